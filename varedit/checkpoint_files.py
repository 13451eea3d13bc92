"""Reading released checkpoint files: `.pth` with restricted loading (nothing in a file is executed), sharded folders,
safetensors. Tensors are memory-mapped: opening a file reads its names and shapes only.
"""

import argparse
import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Shape = tuple[int, ...]

_PICKLES = (".pth", ".pt", ".bin")


class ConvertError(ValueError):
    """A checkpoint cannot be converted: the message names the file, the key and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors in one or more files. Files are mapped when their tensors are asked for, not before.

    Attributes:
        path: what the user named.
        file_of, shapes, dtypes: of every key.
    """

    path: Path
    file_of: dict[str, Path]
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(file.stat().st_size for file in set(self.file_of.values()))

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Memory-mapped tensors; pages are read when touched and given back with the last of the tensors."""
        keys = list(keys)
        mapped = {file: _load(file) for file in dict.fromkeys(self.file_of[key] for key in keys)}
        return {key: mapped[self.file_of[key]][key] for key in keys}

    def size_of(self, key: str, dim: int, num_dims: int) -> int:
        """One size of a tensor that must be there with so many dimensions. Raises ConvertError naming it."""
        if key not in self.shapes:
            raise ConvertError(f"{self.path}: {key} is missing; is this the right file, and complete?")
        shape = self.shapes[key]
        if len(shape) != num_dims or 0 in shape:
            raise ConvertError(f"{self.path}: {key} has shape {shape}, expected {num_dims} dimensions; fetch it again")
        return shape[dim]


def open_checkpoint(path: Path) -> Checkpoint:
    """List the tensors of a file, or of a folder of pieces. Raises ConvertError."""
    checkpoint = Checkpoint(path, {}, {}, {})
    files, listed = _files(path)
    for file in files:
        for key, tensor in _load(file).items():
            if key in checkpoint.file_of:
                raise ConvertError(f"{path}: {key} is in both {checkpoint.file_of[key].name} and {file.name}")
            checkpoint.file_of[key] = file
            checkpoint.shapes[key] = tuple(tensor.shape)
            checkpoint.dtypes[key] = tensor.dtype
    for key, file in listed.items():
        if checkpoint.file_of.get(key) != file:
            raise ConvertError(f"{path}: {key} is missing from {file.name}, where the index puts it; fetch it again")
    return checkpoint


def _files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """Files of a checkpoint, and what its index says about them."""
    if not path.exists():
        raise ConvertError(f"{path}: no such file or folder")
    if path.is_file():
        return [path], {}
    indices = sorted(path.glob("*.index.json"), key=lambda file: (".safetensors." not in file.name, file.name))
    if indices:
        try:
            weight_map = json.loads(indices[0].read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{indices[0]}: not an index of pieces; fetch it again") from error
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ConvertError(
                    f"{path}: the piece {name!r} that {indices[0].name} lists is missing; fetch it again"
                )
        return [path / name for name in names], {key: path / name for key, name in weight_map.items()}
    files = sorted(file for file in path.iterdir() if file.suffix in (*_PICKLES, ".safetensors"))
    if len(files) != 1:
        raise ConvertError(f"{path}: {len(files)} checkpoints and no *.index.json; name the one file")
    return files, {}


def _load(file: Path) -> dict[str, Tensor]:
    """Tensors of one file by key, memory-mapped. Raises ConvertError; nothing in the file is ever executed."""
    if file.suffix not in (*_PICKLES, ".safetensors"):
        raise ConvertError(f"{file}: unknown kind of file; expected {', '.join(_PICKLES)} or .safetensors")
    try:
        if file.suffix == ".safetensors":
            loaded = load_file(file)
        else:  # files older than torch 1.6 are no zip archives and cannot be mapped
            # Training checkpoints keep their command line beside the weights; a Namespace is a plain container.
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        blamed = re.search(r"GLOBAL (\S+)", str(error))
        if blamed:
            raise ConvertError(
                f"{file}: refused, it holds code or objects ({blamed[1]}), not only tensors; nothing was executed"
            ) from error
        raise ConvertError(
            f"{file}: damaged or not a checkpoint ({type(error).__name__}: {first_line(error)}); fetch it again"
        ) from error
    return _state_dict(loaded, file)


def _state_dict(loaded: object, file: Path) -> dict[str, Tensor]:
    """Unwrap the released containers and check that what is left are plain tensors."""
    if isinstance(loaded, dict):
        trainer = loaded.get("trainer")
        inner = trainer.get("gpt_fsdp") if isinstance(trainer, dict) else loaded.get("vae")
        loaded = inner if isinstance(inner, dict) else loaded
    if not isinstance(loaded, dict) or not loaded:
        raise ConvertError(f"{file}: holds a {type(loaded).__name__}, not a state dict; name the file with the weights")
    for key, tensor in loaded.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ConvertError(
                f"{file}: {key!r} is a {type(tensor).__name__}, not a tensor; name the file with the weights"
            )
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ConvertError(f"{file}: {key} is not a plain tensor with its own values; fetch it again")
    return loaded


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
