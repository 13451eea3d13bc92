"""Files that are whole or not there, also after a power cut: written aside, flushed to disk, then renamed."""

import os
import secrets
from pathlib import Path

TEMPORARY = ".varedit-*.tmp"
"""Pattern of the names under which files are written before they get their own."""


def write_durably(path: Path, data: bytes) -> None:
    """Write a file, replacing what was there. Whatever happens, `path` holds its old content or all of the new.

    Raises:
        OSError: the folder is missing, not writable or full. Nothing is left over.
    """
    write_together({path: data})


def write_together(files: dict[Path, bytes]) -> None:
    """`write_durably` for files that belong together: where the room ends at one of them, all keep their old content.

    All are written aside before the first gets its name; names are given in order.
    """
    aside: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            target = path.resolve()  # the file behind a symbolic link, not the link
            temporary = target.parent / f".varedit-{secrets.token_hex(8)}.tmp"
            aside[temporary] = target
            # Not tempfile: its files are private to their owner, and this one becomes the user's.
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in aside.items():
            os.replace(temporary, target)
    finally:  # after the rename there is nothing left to remove
        for temporary in aside:
            temporary.unlink(missing_ok=True)
    for folder in {target.parent for target in aside.values()}:
        flush_folder(folder)


def flush_file(path: Path) -> None:
    """Bring to the disk what another program, or a library, has written to a file."""
    with open(path, "rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut. Windows cannot open folders and needs no such step."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
