"""Packing any source of pairs into tar shards by aspect bucket: resumable, with checksums and provenance."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from varedit import __version__
from varedit.data.faults import MAX_SKIPPED, Skipped, Tally, image_hw, skip_faults
from varedit.data.record import READ_ERRORS, Encoded, Picture, Record, open_picture, upright_pixels
from varedit.data.shards import FEATURES, INDEX, LAYOUT, is_packed, packed_index
from varedit.image_reader import load_image
from varedit.scales import SIZES, nearest_schedule

if TYPE_CHECKING:
    from varedit.data.features import FeatureEncoder

logger = logging.getLogger(__name__)

JOURNAL = "shards.jsonl"
RECORDS_PER_SHARD = 1000
_STORED_AS_THEY_ARE = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class Shard:
    """One complete shard.

    Attributes:
        file: Name in the folder. bucket: Height over width of its aspect template.
        count: Pairs in it. num_bytes, sha256: Of the file.
        num_taken: Pairs of the source it answers for: those in it and those that could not be stored. content: Digest
            of their places, origins and instructions, by which a resumed run knows its source again.
        origins: Pairs by the first word of their origin. licences: Pairs by licence.
    """

    file: str
    bucket: float
    count: int
    num_bytes: int
    sha256: str
    num_taken: int
    content: str
    origins: dict[str, int]
    licences: dict[str, int]


@dataclass
class PackReport:
    """What `pack` did. `reused` shards were complete before; `tally` counts what was read."""

    shards: list[Shard] = field(default_factory=list)
    reused: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def num_pairs(self) -> int:
        return sum(shard.count for shard in self.shards)


def pack(
    items: Iterable[Record | Skipped],
    output: Path,
    *,
    source: str = "",
    size: int = 512,
    records_per_shard: int = RECORDS_PER_SHARD,
    max_skipped: float = MAX_SKIPPED,
    features: FeatureEncoder | None = None,
) -> PackReport:
    """Write pairs into shards by aspect bucket, pixels unchanged.

    Picture files are stored byte for byte (png, jpeg, webp), arrays as png. A pair's key is its place in the source,
    so that sorted keys give its order back. A shard gets its name when it is complete, and only complete shards count:
    an interrupted run is continued by the same call and ends in the same bytes.

    Args:
        items: What `read` yields, in an order that does not change between runs.
        output: Folder, made if absent.
        source: Where the pairs come from, for the index.
        size: Size class whose templates are the buckets.
        records_per_shard: Pairs in a full shard.
        max_skipped: As in `skip_faults`.
        features: Stores what it makes of each pair beside the pictures.

    Raises:
        ValueError: Bad arguments, a folder packed from something else, or too many faults.
    """
    if size not in SIZES:
        raise ValueError(f"size {size} is not a size class; use one of {', '.join(map(str, SIZES))}")
    if records_per_shard < 1:
        raise ValueError(f"records_per_shard is {records_per_shard}: use at least 1")
    settings = {
        "layout": LAYOUT,
        "version": 1,
        "source": source,
        "size": size,
        "records_per_shard": records_per_shard,
        **({"features": features.facts} if features else {}),
    }
    output.mkdir(parents=True, exist_ok=True)
    done = _continue_journal(output, settings)
    report = PackReport(shards=list(done), reused=len(done))
    packer = _Packer(output, records_per_shard, report, features)
    try:
        for record in skip_faults(items, max_skipped, report.tally):
            place = report.tally.num_records + report.tally.num_skipped - 1  # whatever was skipped keeps its number
            packer.add(_bucket(record, size), record, place)
        packer.finish()
    finally:
        packer.drop_partials()
    _write_index(output, settings, report)
    return report


def verify(folder: Path) -> list[str]:
    """What is wrong with the shards of a complete folder, one line each; empty if every checksum holds.

    Raises:
        ValueError: Not a folder that `pack` completed.
    """
    if not is_packed(folder):
        raise ValueError(f"{folder} holds no complete {INDEX}: pack into it first")
    wrong = []
    for shard in packed_index(folder)["shards"]:
        path = folder / shard["file"]
        if not path.exists():
            wrong.append(f"{path} is missing")
            continue
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.get("sha256"):
                wrong.append(f"{path} does not have the checksum in {INDEX}")
    return wrong


def _bucket(record: Record, size: int) -> float:
    return nearest_schedule(size, *image_hw(record.source)).height_over_width


def _identity(record: Record, place: int) -> bytes:
    return json.dumps([place, record.origin, record.instructions], ensure_ascii=False).encode("utf-8", "surrogatepass")


class _Packer:
    """Open shards of all buckets; pairs of shards that an earlier run completed pass by unpacked."""

    def __init__(
        self, output: Path, records_per_shard: int, report: PackReport, features: FeatureEncoder | None
    ) -> None:
        self._output, self._limit, self._report, self._features = output, records_per_shard, report, features
        self._done: dict[float, list[Shard]] = {}
        for shard in report.shards:
            self._done.setdefault(shard.bucket, []).append(shard)
        self._numbers = Counter({bucket: len(shards) for bucket, shards in self._done.items()})
        self._passing: dict[float, tuple[int, Any]] = {}
        self._open: dict[float, _OpenShard] = {}

    def add(self, bucket: float, record: Record, place: int) -> None:
        identity = _identity(record, place)
        if self._done.get(bucket):
            self._pass(bucket, identity)
            return
        if bucket not in self._open:
            name = f"{bucket:.3f}-{self._numbers[bucket]:06d}.tar"
            self._numbers[bucket] += 1
            self._open[bucket] = _OpenShard(self._output / name, bucket)
        shard = self._open[bucket]
        shard.take(identity)
        members = self._members(record)
        if members:
            shard.write(f"{place:09d}", members, record)
        if shard.count == self._limit:
            self._close(bucket)

    def _members(self, record: Record) -> list[tuple[str, bytes]] | None:
        """The members of a sample; None, and counted, where a picture that had to be decoded cannot be."""
        try:
            members = sample_members(record)
            images = self._features.read(record) if self._features else []
        except READ_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the picture
            logger.warning("skipped %s: unreadable image: %s", record.origin, error)
            self._report.tally.faults["unreadable image"] += 1
            self._report.tally.num_records -= 1
            return None
        if self._features:
            members.append((FEATURES, self._features.encode(images, record.instructions)))
        return members

    def finish(self) -> None:
        left = [shard.file for shards in self._done.values() for shard in shards]
        if left:
            raise ValueError(f"the source ends before {left[0]}, packed earlier: choose an empty folder")
        for bucket in sorted(self._open):
            if self._open[bucket].count:
                self._close(bucket)

    def drop_partials(self) -> None:
        for shard in self._open.values():
            shard.drop()

    def _pass(self, bucket: float, identity: bytes) -> None:
        shard = self._done[bucket][0]
        count, digest = self._passing.get(bucket) or (0, hashlib.sha256())
        digest.update(identity)
        self._passing[bucket] = (count + 1, digest)
        if count + 1 == shard.num_taken:
            if digest.hexdigest() != shard.content:
                raise ValueError(f"the source is not the one {shard.file} was packed from: choose an empty folder")
            # What could not be decoded then is in no shard; it counts as it did when the shard was written.
            num_lost = shard.num_taken - shard.count
            if num_lost:
                self._report.tally.faults["unreadable image"] += num_lost
                self._report.tally.num_records -= num_lost
            self._done[bucket].pop(0)
            del self._passing[bucket]

    def _close(self, bucket: float) -> None:
        shard = self._open.pop(bucket).close()
        with (self._output / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(shard), ensure_ascii=False) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._report.shards.append(shard)


class _OpenShard:
    """A shard being written under a temporary name."""

    def __init__(self, path: Path, bucket: float) -> None:
        self._path, self._bucket = path, bucket
        self._partial = path.with_name(path.name + ".partial")
        self._stream = self._partial.open("wb")
        # The ustar format and fixed times: the same pairs give the same bytes.
        self._tar = tarfile.open(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)
        self._content = hashlib.sha256()
        self._origins: Counter[str] = Counter()
        self._licences: Counter[str] = Counter()
        self.count = self._num_taken = 0

    def take(self, identity: bytes) -> None:
        self._content.update(identity)
        self._num_taken += 1

    def write(self, key: str, members: list[tuple[str, bytes]], record: Record) -> None:
        for extension, data in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self._origins[record.origin.split(" ")[0]] += 1
        self._licences[record.licence or "unknown"] += 1
        self.count += 1

    def close(self) -> Shard:
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        with self._partial.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        num_bytes = self._partial.stat().st_size
        os.replace(self._partial, self._path)
        return Shard(
            self._path.name,
            self._bucket,
            self.count,
            num_bytes,
            sha256,
            self._num_taken,
            self._content.hexdigest(),
            dict(self._origins),
            dict(self._licences),
        )

    def drop(self) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)


def sample_members(record: Record) -> list[tuple[str, bytes]]:
    """Extension and bytes of each member of a sample.

    Raises:
        ValueError: A picture that must be decoded to be stored cannot be.
    """
    members = []
    pictures = (("src", record.source, "RGB"), ("tgt", record.target, "RGB"), ("mask", record.mask, "L"))
    for side, picture, mode in pictures:
        if picture is not None:
            kind, data = _picture_bytes(picture, mode)
            members.append((f"{side}.{kind}", data))
    row = {name: getattr(record, name) for name in ("instructions", "edit_type", "origin", "licence", "extra")}
    members.append(("txt", record.instruction.encode("utf-8")))
    members.append(("json", json.dumps(row, ensure_ascii=False).encode("utf-8")))
    return members


def _picture_bytes(picture: Picture, mode: str) -> tuple[str, bytes]:
    if not isinstance(picture, np.ndarray):
        file = picture if isinstance(picture, Encoded) else Encoded(picture.read_bytes(), str(picture))
        with open_picture(file) as image:
            if image.format in _STORED_AS_THEY_ARE:
                return _STORED_AS_THEY_ARE[image.format], file.data
        # What is left out of the PNG, such as a colour profile, must show in its pixels: as the trainer would read it.
        picture = np.asarray(load_image(file.data).rgb) if mode == "RGB" else upright_pixels(file, mode)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return "png", stream.getvalue()


def _continue_journal(output: Path, settings: dict[str, Any]) -> list[Shard]:
    """Shards that are complete; starts the journal in an empty folder."""
    path = output / JOURNAL
    # Without a shard and an index nothing was packed yet: the journal of an attempt that failed binds to nothing.
    if not any(output.glob("*.tar")) and not (output / INDEX).exists():
        if path.exists():
            if not _is_journal(path):
                raise ValueError(f"{path} is no journal of varedit data pack: choose an empty folder")
            _drop_partials(output)
        _write_whole(path, json.dumps(settings, ensure_ascii=False) + "\n")
        return []
    if not path.exists():
        raise ValueError(f"{output} holds tar files of another origin: choose an empty folder")
    try:
        header, *lines, torn = path.read_text("utf-8").split("\n")  # origins may hold what else splits lines
        before = json.loads(header)
        shards = [Shard(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose an empty folder") from error
    if before != settings:
        raise ValueError(f"{output} was packed with {header.strip()}: use the same, or choose an empty folder")
    for shard in shards:
        file = output / shard.file
        if not file.exists() or file.stat().st_size != shard.num_bytes:
            raise ValueError(f"{file} is missing or cut off since it was packed: choose an empty folder")
    _drop_partials(output)
    if torn:  # by a crash: its shard is packed again
        _write_whole(path, "".join(f"{line}\n" for line in (header, *lines)))
    return shards


def _is_journal(path: Path) -> bool:
    try:
        return json.loads(path.read_text("utf-8").split("\n")[0])["layout"] == LAYOUT
    except (ValueError, LookupError, TypeError):
        return False


def _drop_partials(output: Path) -> None:
    """Shards that a crash left unfinished. Only for a folder that is known to be ours."""
    for partial in output.glob("*.tar.partial"):
        partial.unlink()


def _write_index(output: Path, settings: dict[str, Any], report: PackReport) -> None:
    shards = sorted(report.shards, key=lambda shard: shard.file)
    origins, licences = Counter[str](), Counter[str]()
    for shard in shards:
        origins.update(shard.origins)
        licences.update(shard.licences)
    index = {
        **settings,
        "packed_with": f"varedit {__version__}",
        "num_pairs": report.num_pairs,
        "num_skipped": dict(sorted(report.tally.faults.items())),
        "origins": dict(sorted(origins.items())),
        "licences": dict(sorted(licences.items())),
        "shards": [asdict(shard) for shard in shards],
    }
    _write_whole(output / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
