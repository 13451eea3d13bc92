"""What can be wrong with one pair as it is read: named, counted, and fatal only above a set fraction."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from PIL import ExifTags

from varedit.data.record import READ_ERRORS, Picture, Record, open_picture, reason, upright_pixels

logger = logging.getLogger(__name__)

Fault = Literal[
    "missing image",
    "unreadable image",
    "sizes differ",
    "truncated shard",
    "missing shard",
    "not UTF-8",
    "bad row",
]
FAULTS: tuple[str, ...] = get_args(Fault)

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width

MIN_ITEMS = 200  # before that, one fault is too large a fraction to stop for
LOGGED = 20  # faults named in the log one by one; all of them are counted
MAX_SKIPPED = 0.1


@dataclass(frozen=True)
class Skipped:
    """A pair, or a whole file of pairs, that could not be read.

    Attributes:
        origin: File and line, member or row.
        fault: One of `FAULTS`.
        detail: What exactly, in words.
        num_pairs: How many pairs are lost with it, as far as the index of the shards tells.
    """

    origin: str
    fault: Fault
    detail: str
    num_pairs: int = 1

    def __str__(self) -> str:
        return f"{self.origin}: {self.fault}: {self.detail}"


class FaultError(Exception):
    """Raised inside readers; `checked_record` and the readers turn it into `Skipped`."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault: Fault = fault


def text_of(value: Any, what: str = "instruction") -> str:
    """A text from a row: str, or bytes that must be UTF-8.

    Raises:
        FaultError: "not UTF-8" or "bad row".
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FaultError("not UTF-8", f"{what}: {error}") from error
    if not isinstance(value, str):
        raise FaultError("bad row", f"{what} is {value!r}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can smuggle in halves of characters
        raise FaultError("not UTF-8", f"{what} {value!r} holds half a character")
    return value


def texts_of(value: Any, what: str = "instruction") -> tuple[str, ...]:
    """One or several texts from a row, at least one. Raises FaultError as `text_of`."""
    if not isinstance(value, (list, tuple)):
        return (text_of(value, what),)
    if not value:
        raise FaultError("bad row", f"{what} is an empty list")
    return tuple(text_of(one, what) for one in value)


def image_hw(picture: Picture) -> tuple[int, int]:
    """Height and width of a picture in pixels as it is seen (EXIF orientation obeyed), from its header alone.

    Raises:
        FaultError: "missing image" or "unreadable image".
    """
    if isinstance(picture, np.ndarray):
        return int(picture.shape[0]), int(picture.shape[1])
    try:
        with open_picture(picture) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except READ_ERRORS as error:
        raise _named(picture, error) from error


def pixels_of(picture: Picture) -> np.ndarray:
    """A picture as it is seen, uint8 (height, width, 3).

    Raises:
        FaultError: "missing image" or "unreadable image".
    """
    try:
        return upright_pixels(picture)
    except READ_ERRORS as error:
        raise _named(picture, error) from error


def _named(picture: Picture, error: Exception) -> FaultError:
    if isinstance(error, FileNotFoundError):
        return FaultError("missing image", f"{picture} does not exist")
    return FaultError("unreadable image", f"{picture}: {reason(error)}")


def checked_record(
    source: Picture, target: Picture, instructions: tuple[str, ...], origin: str, **fields: Any
) -> Record | Skipped:
    """A record whose pictures exist, have readable headers and equal sizes; otherwise the fault's name.

    Pixels are not decoded here: a picture cut off in the middle shows when `Record.arrays` is called.
    """
    try:
        height, width = image_hw(source)
        target_hw = image_hw(target)
        if target_hw != (height, width):
            sizes = f"source {width} x {height}, target {target_hw[1]} x {target_hw[0]}"
            return Skipped(origin, "sizes differ", sizes)
        mask = fields.get("mask")
        if mask is not None and image_hw(mask) != (height, width):
            mask_height, mask_width = image_hw(mask)
            sizes = f"source {width} x {height}, mask {mask_width} x {mask_height}"
            return Skipped(origin, "sizes differ", sizes)
    except FaultError as error:
        return Skipped(origin, error.fault, str(error))
    return Record(source, target, instructions, origin=origin, **fields)


@dataclass
class Tally:
    """How many pairs were read, how many were skipped by the name of the fault, and in how many items."""

    num_records: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    num_faulty: int = 0

    @property
    def num_skipped(self) -> int:
        return self.faults.total()

    def skip(self, item: Skipped) -> None:
        """Count a fault, and name it in the log if it is one of the first."""
        self.faults[item.fault] += item.num_pairs
        self.num_faulty += 1
        if self.num_faulty <= LOGGED:
            logger.warning("skipped %s", item)

    def summary(self) -> str:
        """One line, such as "98 pairs, 2 skipped (missing image 1, not UTF-8 1)"."""
        text = f"{self.num_records} pairs, {self.num_skipped} skipped"
        if self.faults:
            text += f" ({', '.join(f'{name} {count}' for name, count in sorted(self.faults.items()))})"
        return text


def skip_faults(
    items: Iterable[Record | Skipped], max_skipped: float = MAX_SKIPPED, tally: Tally | None = None
) -> Iterator[Record]:
    """The records among `items`; faults are counted and logged.

    Args:
        items: What `read` yields.
        max_skipped: Largest fraction of faults that is borne.
        tally: Filled while reading, for the caller's own report.

    Raises:
        ValueError: More than `max_skipped` of the items were faults (looked at from 200 items on, and at the end), or
            there was no pair at all.
    """
    tally = tally if tally is not None else Tally()
    for item in items:
        if isinstance(item, Skipped):
            tally.skip(item)
            # A shard that is missing early on is a large fraction of what was seen, but not of the source.
            if tally.num_records + tally.num_faulty >= MIN_ITEMS:
                _refuse_above(max_skipped, tally, tally.num_faulty)
        else:
            tally.num_records += 1
            yield item
    if tally.num_records + tally.num_skipped == 0:
        raise ValueError("the source holds no pairs: check its path, or name its format")
    _refuse_above(max_skipped, tally, tally.num_skipped)
    if tally.faults:
        logger.warning("%s", tally.summary())


def _refuse_above(max_skipped: float, tally: Tally, num_skipped: int) -> None:
    fraction = num_skipped / (tally.num_records + num_skipped)
    if fraction > max_skipped:
        raise ValueError(
            f"{tally.summary()}: {fraction:.0%} is more than max_skipped {max_skipped:.0%}; "
            "repair the source, or allow a larger fraction"
        )
