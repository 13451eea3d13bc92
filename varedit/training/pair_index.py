"""Random access to the pairs of a folder or of packed shards: scanned once, then read by number in any order.

A folder and the shards packed from it give the same pairs in the same order, so that a run sees the same batches.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from varedit.data.faults import Skipped, Tally, image_hw
from varedit.data.features import read_features
from varedit.data.readers import read
from varedit.data.record import INDEX, Encoded, Picture, Record
from varedit.data.shards import (
    FEATURES,
    is_packed,
    missing_shard,
    packed_index,
    picture_member,
    read_members,
    read_sample,
    samples,
    short_shard,
)
from varedit.data.shards import INDEX as SHARD_INDEX

_SIDES = {"source": "src", "target": "tgt", "mask": "mask"}


def scan(folder: Path, max_bad_fraction: float) -> tuple[list[dict[str, Any]], Tally]:
    """Find every usable pair of a folder: `pairs.jsonl` with pictures, or packed shards.

    What cannot be used (a missing or unreadable picture, sizes that differ, a caption that is not UTF-8, a truncated
    shard) is named in the log and counted.

    Returns:
        Entries for `read_entry`, plain JSON values with the upright height and width under "hw"; and the counts.

    Raises:
        ValueError: no such folder, no pairs, or more than `max_bad_fraction` of them unusable.
    """
    check_pairs(folder)
    items = _scan_folder(folder) if (folder / INDEX).is_file() else _scan_shards(folder)
    entries, tally = [], Tally()
    for item in items:
        if isinstance(item, Skipped):
            tally.skip(item)
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
    # Keys of samples are places in what was packed: across its shards, this is the order of the source again.
    return sorted(entries, key=lambda entry: entry.get("key", "")), tally


def check_pairs(folder: Path) -> None:
    """Raise ValueError for a folder that `scan` cannot read."""
    if not (folder / INDEX).is_file() and not is_packed(folder):
        raise ValueError(f"data folder {str(folder)!r} holds neither {INDEX} nor packed shards; see varedit data")


def read_entry(folder: Path, entry: dict[str, Any]) -> Record:
    """The pair of one entry of `scan`; its pictures are decoded only when asked for.

    Raises:
        OSError, ValueError: the files have changed since they were scanned.
    """
    pictures: dict[str, Picture | None]
    if "shard" in entry:
        with (folder / entry["shard"]).open("rb") as stream:
            parts = read_members(stream, entry["members"])
        pictures = {side: Encoded(data, f"{entry['origin']} {side}") for side, data in parts.items()}
    else:
        pictures = {side: folder / entry[side] for side in _SIDES if side in entry}
    return Record(
        pictures["source"], pictures["target"], tuple(entry["instructions"]), pictures.get("mask"),
        origin=entry["origin"],
    )  # fmt: skip


def read_entry_features(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The features stored beside a pair in its shard, see `data.features`. Raises OSError, ValueError."""
    if "features" not in entry:
        raise ValueError(f"{entry['origin']} has no {FEATURES}; pack the shards again")
    offset, size = entry["features"]
    with (folder / entry["shard"]).open("rb") as stream:
        stream.seek(offset)
        return read_features(stream.read(size))


def pairs_origin(folder: Path) -> dict[str, str]:
    """Which pairs a scan of this folder is of: the folder, and the SHA-256 of the file that lists its pairs."""
    listing = INDEX if (folder / INDEX).is_file() else SHARD_INDEX
    with (folder / listing).open("rb") as stream:
        return {"folder": str(folder), listing: hashlib.file_digest(stream, "sha256").hexdigest()}


def save_entries(entries: list[dict[str, Any]], origin: dict[str, str], path: Path) -> None:
    """Write entries and, in a line before them, the `pairs_origin` that they are of; whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(f"{json.dumps(origin)}\n{json.dumps(entries, ensure_ascii=False)}", encoding="utf-8")
    os.replace(partial, path)


def load_entries(path: Path) -> tuple[list[dict[str, Any]], str]:
    """What `save_entries` wrote, and its SHA-256, the fingerprint of the data."""
    text = path.read_text(encoding="utf-8").rpartition("\n")[2]
    return json.loads(text), hashlib.sha256(text.encode()).hexdigest()


def load_origin(path: Path) -> dict[str, str] | None:
    """The origin that `save_entries` wrote; None in the run folders of earlier versions, which have none."""
    with path.open(encoding="utf-8") as stream:
        first = stream.read(1)  # a scan without origin is one long line
        return None if first == "[" else json.loads(first + stream.readline())


def _scan_folder(folder: Path) -> Iterator[dict[str, Any] | Skipped]:
    for item in read(folder, "jsonl"):
        if isinstance(item, Skipped):
            yield item
            continue
        places = {}
        for side in _SIDES:
            picture = getattr(item, side)
            if isinstance(picture, Encoded):
                raise ValueError(f"{picture} of {item.origin} lies in an archive: pack {folder} with varedit data pack")
            if picture is not None:
                places[side] = picture.relative_to(folder).as_posix()
        yield _entry(item, places)


def _scan_shards(folder: Path) -> Iterator[dict[str, Any] | Skipped]:
    for shard in packed_index(folder)["shards"]:
        path, num_left = folder / shard["file"], int(shard["count"])
        if not path.exists():
            yield missing_shard(path, num_left)
            continue
        faults: list[Skipped] = []
        with path.open("rb") as stream:
            for key, members in samples(path, stream, faults):
                num_left -= 1
                item = read_sample(path, key, read_members(stream, members))
                if isinstance(item, Skipped):
                    yield item
                    continue
                found = {side: picture_member(short, members) for side, short in _SIDES.items()}
                places = {side: members[name] for side, name in found.items() if name is not None}
                stored = {"features": members[FEATURES]} if FEATURES in members else {}
                entry = _entry(item, {"shard": path.name, "key": key, "members": places, **stored})
                yield entry | {"origin": f"{path.name} {key}"}
        for fault in faults:
            yield replace(fault, num_pairs=max(1, num_left))
        if num_left > 0 and not faults:
            yield short_shard(path, num_left)


def _entry(record: Record, place: dict[str, Any]) -> dict[str, Any]:
    hw = list(image_hw(record.source))
    return {**place, "instructions": list(record.instructions), "hw": hw, "origin": record.origin}
