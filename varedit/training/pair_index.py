"""Random access to the pairs of a folder or of packed shards: scanned once, then read by number in any order."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import ExifTags, Image

from varedit.data.archives import PICTURE_SUFFIXES, tar_members
from varedit.data.faults import READ_ERRORS, Encoded, FaultError, Picture, Skipped, Tally, texts_of
from varedit.data.public_sets import json_lines
from varedit.data.record import INDEX, Record
from varedit.data.shards import is_packed

logger = logging.getLogger(__name__)

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_NAMED = 20


def scan(folder: Path, max_bad_fraction: float) -> tuple[list[dict[str, Any]], Tally]:
    """Find every usable pair of a folder: `pairs.jsonl` with pictures, or packed shards.

    What cannot be used (a missing or unreadable picture, sizes that differ, a caption that is not UTF-8, a truncated
    shard) is named in the log and counted.

    Returns:
        Entries for `read_entry`, plain JSON values with the upright height and width under "hw"; and the counts.

    Raises:
        ValueError: no such folder, no pairs, or more than `max_bad_fraction` of them unusable.
    """
    if (folder / INDEX).is_file():
        items = _scan_folder(folder)
    elif is_packed(folder):
        items = _scan_shards(folder)
    else:
        raise ValueError(f"data folder {str(folder)!r} holds neither {INDEX} nor packed shards; see varedit data")
    entries, tally = [], Tally()
    for item in items:
        if isinstance(item, Skipped):
            tally.faults[item.fault] += 1
            if tally.num_skipped <= _NAMED:
                logger.warning("skipped %s", item)
        else:
            tally.num_records += 1
            entries.append(item)
    total = tally.num_records + tally.num_skipped
    if not entries:
        raise ValueError(f"data folder {str(folder)!r} holds no usable pair: {tally.summary()}")
    if tally.num_skipped > max_bad_fraction * total:
        raise ValueError(
            f"data folder {str(folder)!r}: {tally.summary()}; repair it, or raise data.max_bad_fraction "
            f"above {tally.num_skipped / total:.3g}"
        )
    return entries, tally


def read_entry(folder: Path, entry: dict[str, Any]) -> Record:
    """The pair of one entry of `scan`; its pictures are decoded only when asked for.

    Raises:
        OSError, ValueError: the files have changed since they were scanned.
    """
    if "shard" not in entry:
        pictures = folder / entry["source"], folder / entry["target"]
        return Record(*pictures, tuple(entry["instructions"]), origin=entry["origin"])
    with (folder / entry["shard"]).open("rb") as stream:
        parts = {}
        for name, (offset, size) in entry["members"].items():
            stream.seek(offset)
            parts[name] = stream.read(size)
    sides = [Encoded(parts[side], f"{entry['origin']} {side}") for side in ("src", "tgt")]
    return Record(*sides, tuple(entry["instructions"]), origin=entry["origin"])  # type: ignore[arg-type]


def save_entries(entries: list[dict[str, Any]], path: Path) -> str:
    """Write entries, in place at once; returns their SHA-256, the fingerprint of the data."""
    text = json.dumps(entries, ensure_ascii=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return hashlib.sha256(text.encode()).hexdigest()


def load_entries(path: Path) -> tuple[list[dict[str, Any]], str]:
    """What `save_entries` wrote, and its fingerprint."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text), hashlib.sha256(text.encode()).hexdigest()


def upright_hw(picture: Picture) -> tuple[int, int]:
    """Height and width after the EXIF orientation is applied, from the header alone. Raises FaultError."""
    try:
        with Image.open(picture) as image:  # type: ignore[arg-type]
            height, width = image.height, image.width
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
    except FileNotFoundError as error:
        raise FaultError("missing image", f"{picture} does not exist") from error
    except READ_ERRORS as error:
        raise FaultError("unreadable image", f"{picture} is no picture") from error
    return (width, height) if turned else (height, width)


def _scan_folder(folder: Path) -> Iterator[dict[str, Any] | Skipped]:
    for item in json_lines(folder / INDEX):
        if isinstance(item, Skipped):
            yield item
            continue
        origin, row = item
        try:
            names = [_inside(row.get(side)) for side in ("source", "target")]
            instructions = texts_of(row.get("instructions"), "instructions")
            hw = _common_hw(*(folder / name for name in names))
        except FaultError as error:
            yield Skipped(origin, error.fault, str(error))
            continue
        yield {
            "source": names[0], "target": names[1], "instructions": list(instructions), "hw": list(hw),
            "origin": origin,
        }  # fmt: skip


def _inside(name: Any) -> str:
    """A path in the index; it must not reach files outside the folder."""
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise FaultError("bad row", f"path {name!r} is not one inside the folder")
    return name


def _common_hw(source: Picture, target: Picture) -> tuple[int, int]:
    hw, other = upright_hw(source), upright_hw(target)
    if hw != other:
        sizes = f"source {hw[1]} x {hw[0]}, target {other[1]} x {other[0]}"
        raise FaultError("sizes differ", sizes)
    return hw


def _scan_shards(folder: Path) -> Iterator[dict[str, Any] | Skipped]:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.exists():
            yield Skipped(str(path.name), "missing shard", f"{shard['count']} pairs")
            continue
        faults: list[Skipped] = []
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        with path.open("rb") as stream:
            for member in tar_members(stream, path.name, faults):
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
        for key, members in samples.items():
            yield _scan_sample(path, key, members)
        yield from faults


def _scan_sample(path: Path, key: str, members: dict[str, tuple[int, int]]) -> dict[str, Any] | Skipped:
    origin = f"{path.name} {key}"
    sides = {
        name.partition(".")[0]: place
        for name, place in members.items()
        if name.startswith(("src.", "tgt.")) and name[3:] in PICTURE_SUFFIXES
    }
    try:
        if len(sides) != 2:
            raise FaultError("missing image", "a sample needs a src and a tgt picture")
        with path.open("rb") as stream:

            def member(place: tuple[int, int]) -> bytes:
                stream.seek(place[0])
                return stream.read(place[1])

            hw = _common_hw(*(Encoded(member(sides[side]), f"{origin} {side}") for side in ("src", "tgt")))
            if "json" in members:
                instructions = texts_of(json.loads(member(members["json"]))["instructions"])
            elif "txt" in members:
                instructions = texts_of(member(members["txt"]))
            else:
                raise FaultError("bad row", "no txt")
    except FaultError as error:
        return Skipped(origin, error.fault, str(error))
    except (ValueError, KeyError) as error:
        return Skipped(origin, "bad row", f"json: {error}")
    return {
        "shard": path.name, "members": {side: list(place) for side, place in sides.items()},
        "instructions": list(instructions), "hw": list(hw), "origin": origin,
    }  # fmt: skip
