"""Model folders that are written whole or not at all."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def check_folder(output: Path, overwrite: bool) -> None:
    """Raise ValueError where a model cannot be written: the folder exists, or holds something else than a model."""
    if not (output.exists() or output.is_symlink()):
        return
    if not overwrite:
        raise ValueError(f"{output} exists; choose another folder or pass --overwrite")
    if not (output / "model_index.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is no model folder; choose another --output")


@contextlib.contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """As `in_its_place`, of a folder that the user named.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        with in_its_place(output) as folder:
            yield folder
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"cannot write {output}: {reason}; make room, or choose another --output") from error


@contextlib.contextmanager
def in_its_place(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place at the end, or vanishes on any error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    parent = output.parent / f".{output.name}.{secrets.token_hex(8)}"
    parent.mkdir()  # unlike mkdtemp's, with the usual permissions
    try:
        folder = parent / "new"
        folder.mkdir()
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():  # safetensors writes files that their owner alone can read
                path.chmod(folder.stat().st_mode & 0o666)
        old = output.rename(parent / "old") if output.exists() else None
        try:
            folder.rename(output)
        except BaseException:
            if old:
                old.rename(output)
            raise
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove what a killed `in_its_place` of this folder has left. Only where nobody else may be writing it."""
    for left in output.parent.glob(f".{output.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def forget_origin(folder: Path) -> None:
    """Take the note where its parts were loaded from out of a saved model: that folder is nobody's business."""
    for file in [*folder.glob("*/config.json"), folder / "model_index.json"]:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
