"""Which weights: a hash that names a model, whatever its folder is called."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from varedit.editing.durable import write_durably
from varedit.pipeline import DEFAULT_MODEL, VAREditPipeline

logger = logging.getLogger(__name__)

_known: dict[str, str] = {}  # of this process, see `_file_sha256`


@dataclass(frozen=True)
class ModelIdentity:
    """A model by its weights.

    Attributes:
        name: of the folder or of the hub repository; says nothing certain.
        kind: "files" for the safetensors files of a folder, "memory" for the weights of a pipeline that has none.
        sha256: over the weights.
    """

    name: str
    kind: str
    sha256: str


def identify(pipeline: VAREditPipeline) -> ModelIdentity:
    """The identity of a pipeline: of the folder it was loaded from, else of the weights it holds.

    A pipeline with adapters is identified by the weights it holds. Weights changed in place after loading are not
    noticed: save such a pipeline and load it again.
    """
    name = pipeline.config.get("_name_or_path")
    adapted = any(
        getattr(module, "_hf_peft_config_loaded", False) or any("lora_" in key for key, _ in module.named_parameters())
        for module in pipeline.components.values()
        if isinstance(module, torch.nn.Module)
    )
    if name and not adapted and (folder := model_folder(name)):
        return ModelIdentity(_short(name), "files", folder_sha256(folder))
    return ModelIdentity(_short(name or "memory"), "memory", state_sha256(pipeline))


def identify_folder(model: str | os.PathLike | None) -> ModelIdentity | None:
    """The identity of a model that is not loaded; None is the packaged model. None where it is not on this disk."""
    name = str(DEFAULT_MODEL if model is None else model)
    folder = model_folder(name)
    return ModelIdentity(_short(name), "files", folder_sha256(folder)) if folder else None


def model_folder(name: str) -> Path | None:
    """The folder of a model named by folder or hub repository, if it is on this disk with weights in it."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            return None
    return folder if any(folder.rglob("*.safetensors")) else None


def _short(name: str) -> str:
    """Folders are named by their last part: where they lie is nobody's business."""
    path = Path(name)
    if path.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/revision
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name if path.is_dir() or path.is_absolute() else name


def folder_sha256(folder: Path) -> str:
    """Hash over the names and contents of the safetensors files of a model folder.

    Each file is hashed once and remembered by path, modification time and size, also for later processes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()} {_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def state_sha256(pipeline: VAREditPipeline) -> str:
    """Hash over the names, types, shapes and values of all weights of a pipeline."""
    digest = hashlib.sha256()
    for name, module in sorted(pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            for key, value in sorted(module.state_dict().items()):
                digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    status = path.stat()
    key = f"{path.resolve()} {status.st_mtime_ns} {status.st_size}"
    if key not in _known:
        _known.update(_load_cache())
    if key not in _known:
        with open(path, "rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        _save_cache()
    return _known[key]


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varedit" / "weights.json"


def _load_cache() -> dict[str, str]:
    try:
        cached = json.loads(_cache_file().read_text())
    except (OSError, ValueError):  # no cache yet, or an unreadable one: the files are hashed again
        return {}
    return {str(key): str(value) for key, value in cached.items()} if isinstance(cached, dict) else {}


def _save_cache() -> None:
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_durably(_cache_file(), json.dumps(_load_cache() | _known, indent=1).encode())
    except OSError as error:  # a home that cannot be written to costs time, nothing else
        logger.debug("the hashes of weights are not kept: %s", error)
