"""Pairs in tar shards: reading the released layout and the one that `packing` writes.

A sample is a run of members with one key: `KEY.src.jpg`, `KEY.tgt.jpg`, `KEY.txt` (the released layout), and in our
shards also `KEY.mask.png`, `KEY.json` and `KEY.features.safetensors`. Any WebDataset loader reads both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeGuard

from varedit.data.archives import PICTURE_SUFFIXES, tar_members
from varedit.data.faults import FaultError, Skipped, checked_record, text_of, texts_of
from varedit.data.record import Encoded, Record
from varedit.paths import visible

logger = logging.getLogger(__name__)

Item = Record | Skipped
Members = dict[str, tuple[int, int]]
"""Extension -> offset and size in the shard."""
INDEX = "index.json"
LAYOUT = "varedit-shards"
FEATURES = "features.safetensors"


def is_packed(folder: Path) -> bool:
    """True for a folder that `pack` completed."""
    try:
        return json.loads((folder / INDEX).read_text("utf-8")).get("layout") == LAYOUT
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def packed_index(folder: Path) -> dict[str, Any]:
    """The index of a folder that `is_packed`.

    Raises:
        ValueError: It does not list shards, or one outside of the folder.
    """
    index = json.loads((folder / INDEX).read_text("utf-8"))
    try:
        files = [str(shard["file"]) for shard in index["shards"] if int(shard["count"]) >= 0]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX} lists no shards: pack the pairs again") from error
    for file in files:
        if PurePath(file).name != file:
            raise ValueError(f"{folder / INDEX} names {file!r}, which leaves the folder: pack the pairs again")
    return index


def released_index(path: Path) -> list[tuple[str, int, int]] | None:
    """Lines `name<TAB>count<TAB>num_shards` of an index file such as SEEDEdit.txt; None if it is something else."""
    try:
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [(name, int(count), int(num_shards)) for name, count, num_shards in rows] or None
    except (OSError, ValueError):
        return None


def read_packed(folder: Path) -> Iterator[Item]:
    """A folder that `pack` completed, in the order of its index."""
    for shard in packed_index(folder)["shards"]:
        path, num_left = folder / shard["file"], int(shard["count"])
        if not path.exists():
            yield missing_shard(path, num_left)
            continue
        for item in read_shard(path):
            yield with_lost_pairs(item, num_left)
            num_left = 0 if is_break(item) else num_left - 1
        if num_left > 0:
            yield short_shard(path, num_left)


def missing_shard(path: Path, num_pairs: int) -> Skipped:
    """What is yielded for a shard that the index names and that is not there."""
    return Skipped(str(path), "missing shard", f"{num_pairs} pairs", max(1, num_pairs))


def short_shard(path: Path, num_pairs: int) -> Skipped:
    """What is yielded for a whole shard with `num_pairs` fewer than the index promises."""
    return Skipped(str(path), "truncated shard", f"{num_pairs} pairs fewer than {INDEX} says", num_pairs)


def is_break(item: Item) -> TypeGuard[Skipped]:
    """True for what is yielded where a shard breaks off."""
    return isinstance(item, Skipped) and item.fault == "truncated shard"


def with_lost_pairs(item: Item, num_left: int) -> Item:
    """An item of a shard; where the shard breaks off, it counts for the `num_left` pairs that the index promises."""
    return replace(item, num_pairs=max(1, num_left)) if is_break(item) else item


def read_released(source: Path) -> Iterator[Item]:
    """The released layout: index files naming shards `wds_<name>_<4 digits>.tar`, or a folder of such shards.

    Shards lie beside the index file or in a folder below it.
    """
    folder = source if source.is_dir() else source.parent
    indexes = visible(folder.glob("*.txt"), folder) if source.is_dir() else [source]
    found = {path.name: path for path in visible(folder.rglob("*.tar"), folder)}
    listed = [row for index in indexes for row in released_index(index) or ()]
    if not listed:
        for name in sorted(found):
            yield from read_shard(found[name])
        return
    for name, count, num_shards in listed:
        num_read = 0
        for number in range(num_shards):
            shard = f"wds_{name}_{number:04d}.tar"
            if shard not in found:
                lost = max(1, count // num_shards)
                yield Skipped(str(folder / shard), "missing shard", f"one of {num_shards} of {name}", lost)
                continue
            for item in read_shard(found[shard]):
                num_read += isinstance(item, Record)
                yield item
        if num_read != count:
            logger.warning("%s: the index promises %d pairs, %d were read", name, count, num_read)


def read_shard(path: Path) -> Iterator[Item]:
    """The pairs of one tar; where it breaks off, the pairs before the break and one "truncated shard"."""
    faults: list[Skipped] = []
    with path.open("rb") as stream:
        for key, members in samples(path, stream, faults):
            yield read_sample(path, key, read_members(stream, members))
    yield from faults


def samples(path: Path, stream: BinaryIO, faults: list[Skipped]) -> Iterator[tuple[str, Members]]:
    """Key and members of each whole sample of a tar; where it breaks off, one "truncated shard" is added to `faults`.

    Args:
        path: Of the tar, for messages. stream: it, opened; it may be read from between two samples.
    """
    key, members = "", Members()
    for member in tar_members(stream, str(path), faults):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        stem = f"{folder}/{stem}" if folder else stem
        if stem != key and members:
            yield key, members
            members = {}
        key = stem
        members[extension.lower()] = (member.offset_data, member.size)
    if members and (not faults or _is_complete(members)):
        yield key, members


def read_members(stream: BinaryIO, members: Members) -> dict[str, bytes]:
    """The bytes of the members of a sample, without those of its features."""
    parts = {}
    for extension, (offset, size) in members.items():
        if extension != FEATURES:
            stream.seek(offset)
            parts[extension] = stream.read(size)
    return parts


def _is_complete(members: Members) -> bool:
    return "txt" in members and all(any(name.startswith(side) for name in members) for side in ("src.", "tgt."))


def read_sample(path: Path, key: str, parts: dict[str, bytes]) -> Item:
    """The pair of one sample; `parts` are its members by extension."""
    place = f"{path.name} {key}"
    try:
        pictures = {side: _side(place, side, parts) for side in ("src", "tgt", "mask")}
        for side in ("src", "tgt"):
            if pictures[side] is None:
                raise FaultError("missing image", f"no {side} picture")
        row = _row(parts)
        instructions = row.get("instructions") or parts.get("txt")
        if instructions is None:
            raise FaultError("bad row", "no txt")
        assert pictures["src"] is not None and pictures["tgt"] is not None
        return checked_record(
            pictures["src"],
            pictures["tgt"],
            texts_of(instructions),
            text_of(row.get("origin") or place, "origin"),
            mask=pictures["mask"],
            edit_type=text_of(row.get("edit_type") or "", "edit_type"),
            licence=text_of(row.get("licence") or "", "licence"),
            extra=row.get("extra") or {},
        )
    except FaultError as error:
        return Skipped(place, error.fault, str(error))


def _row(parts: dict[str, bytes]) -> dict[str, Any]:
    """What a sample's json says; empty without one. Raises FaultError."""
    try:
        row = json.loads(text_of(parts["json"], "json")) if "json" in parts else {}
    except (ValueError, RecursionError) as error:
        raise FaultError("bad row", f"json: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("extra") or {}, dict):
        raise FaultError("bad row", "json is no object, or its extra is none")
    return row


def _side(place: str, side: str, parts: dict[str, bytes]) -> Encoded | None:
    name = picture_member(side, parts)
    return None if name is None else Encoded(parts[name], f"{place}.{name}")


def picture_member(side: str, members: Iterable[str]) -> str | None:
    """The extension under which a sample holds its picture "src", "tgt" or "mask"; None if it has none."""
    for name in members:
        if name.startswith(side + ".") and name[len(side) :] in PICTURE_SUFFIXES:
            return name
    return None
