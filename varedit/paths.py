"""Names of files that come from elsewhere: lists, indices, archives."""

import os
from pathlib import PureWindowsPath


def leaves_folder(name: str) -> bool:
    """Whether a relative path would lead out of its folder, on any system: `..`, or a root (on Windows a drive)."""
    path = PureWindowsPath(name)  # knows both separators
    return bool(path.anchor if os.name == "nt" else path.root) or ".." in path.parts
