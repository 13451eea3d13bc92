"""Pictures by name, wherever a data set keeps them: loose files, tar archives, archives split into parts, gzip."""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from varedit.data.faults import FaultError, Skipped
from varedit.data.record import Encoded
from varedit.paths import is_hidden, leaves_folder

logger = logging.getLogger(__name__)

# images.tar, images.tar.gz, images.tgz, images.tar.split.000, images.tar.gz.part-aa
_ARCHIVE = re.compile(r"^(?P<stem>.+?\.(?:tar|tar\.gz|tgz))(?:\.(?:split|part)[.-](?P<part>\w+))?$")
CHUNK = 1 << 16
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class JoinedFile(io.RawIOBase):
    """Several files read as one, as `cat` would join them, without writing them anew."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._starts = [0]
        for path in paths:
            self._starts.append(self._starts[-1] + path.stat().st_size)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for number, file in enumerate(self._files):
            start, stop = self._starts[number], self._starts[number + 1]
            if start <= self._position < stop:
                file.seek(self._position - start)
                count = file.readinto(view[: min(len(view), stop - self._position)])
                self._position += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def open_archive(paths: list[Path]) -> Any:
    """A seekable stream of uncompressed tar data.

    Args:
        paths: The parts of one archive, in order.

    Raises:
        ValueError: gzip without the package that can seek in it.
    """
    joined = JoinedFile(paths)
    matched = _ARCHIVE.match(paths[0].name)
    assert matched is not None
    if matched["stem"].endswith(".tar"):
        return io.BufferedReader(joined)
    try:
        import indexed_gzip
    except ImportError as error:
        raise ValueError(
            f"{paths[0]} is gzip, which needs indexed_gzip to seek in: pip install indexed_gzip, or unpack it"
        ) from error
    return indexed_gzip.IndexedGzipFile(fileobj=io.BufferedReader(joined))


def find_archives(root: Path) -> list[list[Path]]:
    """The archives at or below `root`, each as the ordered list of its parts."""
    if root.is_file():
        return [[root]] if _ARCHIVE.match(root.name) else []
    groups: dict[Path, list[tuple[str, Path]]] = defaultdict(list)
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in names:
            matched = _ARCHIVE.match(name)
            if matched and not is_hidden(Path(name)):
                groups[Path(folder) / matched["stem"]].append((matched["part"] or "", Path(folder) / name))
    archives = []
    for stem in sorted(groups):
        paths = [path for _, path in sorted(groups[stem])]
        # Parts that still lie beside the archive they were joined to are not to be joined to it once more.
        archives.append(paths[:1] if paths[0] == stem else paths)
    return archives


@dataclass(frozen=True)
class _Member:
    archive: int
    offset: int
    size: int


class Pictures:
    """Finds pictures by the names that annotations use.

    Names in annotations and paths on disk or in archives often differ by leading folders: a name matches a file when
    one is a tail of the other and no second file matches as well. A loose file of the very name comes first; one that
    was unpacked beside its archive counts once.

    Args:
        roots: Folders (searched with everything below) and archives.

    Attributes:
        faults: Archives that end too early or are damaged; the members before the break can be read.
    """

    def __init__(self, *roots: Path) -> None:
        self._roots = [root for root in roots if root.exists()]
        self._streams: list[Any] = []
        self._members: dict[str, _Member | Path] | None = None
        self._by_name: dict[str, list[str]] = {}
        self._repeated: Counter[str] = Counter()  # names in a second archive or root, which say nothing
        self.faults: list[Skipped] = []

    def get(self, name: str) -> Path | Encoded:
        """The picture of that name.

        Raises:
            FaultError: "missing image": none or several match; "bad row": the name leaves the folder.
        """
        path = PurePosixPath(name)
        if leaves_folder(name) or not path.name:
            raise FaultError("bad row", f"path {name!r} leaves the folder: use a path relative to it")
        direct = [root / path for root in self._roots if os.path.isfile(root / path)]  # Path's raises for long names
        if len(direct) > 1:
            raise self._unclear(str(path), len(direct), str(path))
        return direct[0] if direct else self._read(self._match(str(path)))

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def _match(self, name: str) -> str:
        members = self._index()
        found = [name]
        if name not in members:
            alike = self._by_name.get(name.rsplit("/", 1)[-1], ())
            found = [other for other in alike if other.endswith("/" + name) or name.endswith("/" + other)]
        count = sum(1 + self._repeated[other] for other in found)
        if count != 1:
            raise self._unclear(name, count, *found[:1])
        return found[0]

    def _unclear(self, name: str, count: int, example: str = "") -> FaultError:
        what = f"{count} files match {name}, such as {example}" if count else f"{name} is nowhere"
        return FaultError("missing image", f"{what} in {', '.join(map(str, self._roots))}")

    def _read(self, name: str) -> Path | Encoded:
        member = self._index()[name]
        if isinstance(member, Path):
            return member
        stream = self._streams[member.archive]
        stream.seek(member.offset)
        return Encoded(stream.read(member.size), name)

    def _index(self) -> dict[str, _Member | Path]:
        if self._members is None:
            self._members = {}
            for root in self._roots:
                if root.is_dir():
                    self._index_folder(root)
                for parts in find_archives(root):
                    self._index_archive(parts, root)
            for name in self._members:
                self._by_name.setdefault(name.rsplit("/", 1)[-1], []).append(name)
        return self._members

    def _index_archive(self, parts: list[Path], root: Path) -> None:
        assert self._members is not None
        logger.info("reading the table of contents of %s (%d parts)", parts[0].name, len(parts))
        stream = open_archive(parts)
        number = len(self._streams)
        self._streams.append(stream)
        for member in tar_members(stream, str(parts[0]), self.faults):
            if member.name.lower().endswith(PICTURE_SUFFIXES):
                name = member.name.removeprefix("./")
                before = self._members.get(name)
                if before == root / name:  # unpacked
                    continue
                if before is not None and not (isinstance(before, _Member) and before.archive == number):
                    self._repeated[name] += 1
                # Of one name twice in one archive, the later is the one that unpacking would leave.
                self._members[name] = _Member(number, member.offset_data, member.size)

    def _index_folder(self, root: Path) -> None:
        assert self._members is not None
        for folder, _, names in os.walk(root):
            for name in names:
                if name.lower().endswith(PICTURE_SUFFIXES):
                    path = Path(folder) / name
                    inner = path.relative_to(root).as_posix()
                    if inner in self._members:
                        self._repeated[inner] += 1
                    self._members[inner] = path


def tar_members(stream: Any, origin: str, faults: list[Skipped]) -> Iterator[tarfile.TarInfo]:
    """The complete files of a tar; where it breaks off or is damaged, one "truncated shard" is added to `faults`."""
    previous: tarfile.TarInfo | None = None  # tarfile sees that a member is cut off only on the way to the next one
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if previous is not None and previous.isfile():
                    yield previous
                previous = member
                archive.members = []  # type: ignore[attr-defined]  # or it keeps all it has seen
            # tarfile takes a damaged header for the end, as it does the zeros of the true one.
            stream.seek(archive.offset)
            rest = stream.read(tarfile.BLOCKSIZE)
            what = "no end mark" if len(rest) < tarfile.BLOCKSIZE else ""
            while rest and not what:
                what = f"damaged from byte {archive.offset} on" if rest.strip(b"\0") else ""
                rest = stream.read(CHUNK)
            if what:
                faults.append(Skipped(origin, "truncated shard", f"{what}; what came before is used"))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        faults.append(Skipped(origin, "truncated shard", f"{error}; what came before is used"))
        return
    if previous is not None and previous.isfile():
        yield previous
