"""Names of files that come from elsewhere: lists, indices, archives, folders."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath


def leaves_folder(name: str) -> bool:
    """Whether a relative path would lead out of its folder, on any system: `..`, or a root (on Windows a drive)."""
    path = PureWindowsPath(name)  # knows both separators
    return (
        bool(path.anchor if os.name == "nt" else path.root) or PurePosixPath(name).is_absolute() or ".." in path.parts
    )


def is_hidden(path: PurePath) -> bool:
    """Whether a system or its file manager has put a file there, by its name or a folder's.

    Looking at a folder leaves such files; Macs put `._photo.jpg` beside a photo on other systems' drives.
    """
    return path.name.lower() in ("thumbs.db", "desktop.ini") or any(part.startswith(".") for part in path.parts)


def visible(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Those of a folder that are not hidden in it, sorted."""
    return sorted(path for path in paths if not is_hidden(path.relative_to(folder)))
