"""One example of editing data, and the folder format that every reader and the trainer understand."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from varedit.paths import leaves_folder

INDEX = "pairs.jsonl"
IMAGES = "images"
_KNOWN = ("source", "target", "mask", "instructions", "edit_type", "origin", "licence")

# What Pillow's decoders raise on damaged files.
READ_ERRORS = (ValueError, OSError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Encoded:
    """A picture file out of an archive or a table: its bytes, and a name for messages.

    It keeps pairs as small as they are on disk until their pixels are asked for, and lets packing store the very bytes.
    """

    data: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name


Picture = Path | Encoded | np.ndarray
"""A file, the bytes of one, or pixels."""


@dataclass(frozen=True)
class Record:
    """A source picture, what is asked for, and the picture that answers it.

    Attributes:
        source: Picture file, or uint8 (height, width, 3).
        target: The same for the edited picture.
        instructions: One or more phrasings of the same edit, the first being the main one.
        mask: Black and white picture file, or bool (height, width), or None: True where pixels may change.
        edit_type: Such as "recolour"; empty if unknown.
        origin: Where the pair comes from (data set and item, or generator and seed).
        licence: Licence of the pictures, in words.
        extra: Whatever else the origin knows (captions, scene graphs, held-out parts): plain JSON values.
    """

    source: Picture
    target: Picture
    instructions: tuple[str, ...]
    mask: Picture | None = None
    edit_type: str = ""
    origin: str = ""
    licence: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def instruction(self) -> str:
        """The main phrasing."""
        return self.instructions[0]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Source and target as uint8 (height, width, 3), mask as bool (height, width) or None; all upright.

        Raises:
            ValueError: A picture cannot be read (the message names the file).
        """
        return _pixels(self.source), _pixels(self.target), self.mask_array()

    def mask_array(self) -> np.ndarray | None:
        """The mask alone, as `arrays` gives it."""
        if self.mask is None:
            return None
        mask = _pixels(self.mask, "L")
        return mask if mask.dtype == bool else mask > 127


def open_picture(picture: Path | Encoded) -> Image.Image:
    """Pillow's image of a picture file, not decoded yet. Raises one of `READ_ERRORS`."""
    return Image.open(io.BytesIO(picture.data) if isinstance(picture, Encoded) else picture)


def upright_pixels(picture: Picture, mode: str = "RGB") -> np.ndarray:
    """A picture as it is seen, EXIF orientation obeyed: uint8 (height, width, 3), or (height, width) for mode "L".

    Arrays are returned as they are. Raises one of `READ_ERRORS`.
    """
    if isinstance(picture, np.ndarray):
        return picture
    with open_picture(picture) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert(mode))


def cut_out_mask(picture: Path | Encoded, size: tuple[int, int]) -> np.ndarray:
    """A mask given as the picture with a hole in it, bool at `size` (height, width), True in the hole.

    MagicBrush has its masks so, at times of another size than the picture (its authors, issue 10 of
    OSU-NLP-Group/MagicBrush). Without any transparency the mask is where the file is white.

    Raises:
        ValueError: The file cannot be read (the message names it).
    """
    try:
        with open_picture(picture) as image:
            upright = ImageOps.exif_transpose(image)
            opaque = upright.convert("RGBA").getchannel("A")
            is_cut = bool((np.asarray(opaque) < 128).any())
            hole = ImageOps.invert(opaque) if is_cut else upright.convert("L")
            return np.asarray(hole.resize(size[::-1], Image.Resampling.NEAREST)) > 127
    except READ_ERRORS as error:
        raise ValueError(f"mask {picture} cannot be read: {reason(error)}") from error


def _pixels(picture: Picture, mode: str = "RGB") -> np.ndarray:
    try:
        return upright_pixels(picture, mode)
    except READ_ERRORS as error:
        raise ValueError(f"picture {picture} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What one of `READ_ERRORS` says; Pillow names a stream by its address in memory, which says nothing to anyone."""
    return "no picture format" if isinstance(error, UnidentifiedImageError) else str(error)


def write_folder(records: Iterable[Record], folder: Path) -> int:
    """Write records as `pairs.jsonl` and PNG pictures under `images/`.

    The index is written last and moved into place at once: a folder with an index is complete, one without it can be
    written again.

    Args:
        records: Any number, also from a generator; only one is held at a time.
        folder: Made if absent.

    Returns:
        How many records were written.

    Raises:
        ValueError: The folder holds an index already, or there are no records.
    """
    index = folder / INDEX
    if index.exists():
        raise ValueError(f"{index} exists: choose another folder or delete it first")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    partial = folder / f"{INDEX}.partial"
    count = 0
    with partial.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(_write_one(record, folder, count), ensure_ascii=False) + "\n")
            count += 1
        lines.flush()
        os.fsync(lines.fileno())
    if count == 0:
        partial.unlink()
        raise ValueError(f"no records to write to {folder}")
    os.replace(partial, index)
    return count


def _write_one(record: Record, folder: Path, number: int) -> dict[str, Any]:
    source, target, mask = record.arrays()
    row: dict[str, Any] = {}
    for role, pixels in (("source", source), ("target", target), ("mask", mask)):
        if pixels is None:
            continue
        row[role] = f"{IMAGES}/{number:07d}_{role}.png"
        # A light compression: pictures of the world are written once and read often.
        Image.fromarray(pixels).save(folder / row[role], compress_level=3)
    row |= {"instructions": list(record.instructions), "edit_type": record.edit_type}
    row |= {"origin": record.origin, "licence": record.licence}
    return row | record.extra


def read_folder(folder: Path) -> Iterator[Record]:
    """Read a folder that `write_folder` wrote, one record at a time; pictures stay paths.

    Raises:
        ValueError: No index, or a line that is no record (the message names file and line).
    """
    index = folder / INDEX
    try:
        lines = index.open(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"folder {folder} has no readable {INDEX}: {error}") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _read_one(json.loads(line), folder)
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise ValueError(f"{index} line {number} is no record: {error}") from error


def _read_one(row: dict[str, Any], folder: Path) -> Record:
    instructions = row["instructions"]
    if (
        not isinstance(instructions, list)
        or not instructions
        or not all(isinstance(text, str) for text in instructions)
    ):
        raise ValueError(f"instructions is {instructions!r}: use a list of texts")
    return Record(
        source=_inside(folder, row["source"]),
        target=_inside(folder, row["target"]),
        instructions=tuple(instructions),
        mask=_inside(folder, row["mask"]) if row.get("mask") else None,
        edit_type=row.get("edit_type", ""),
        origin=row.get("origin", ""),
        licence=row.get("licence", ""),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
    )


def _inside(folder: Path, name: str) -> Path:
    """The path of a picture; an index from elsewhere must not reach files outside its folder."""
    if leaves_folder(name):
        raise ValueError(f"path {name!r} leaves the folder: use a path relative to it")
    return folder / PurePosixPath(name)
