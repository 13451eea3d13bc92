"""Damaged archives tell what is lost; a name that two archives have names no picture."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varedit.data.archives import Pictures, find_archives
from varedit.data.faults import FaultError, Skipped
from varedit.data.packing import pack
from varedit.data.readers import read
from varedit.data.record import Encoded, Record
from varedit.training.pair_index import scan


def encoded(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("block", [b"\0" * 512, b"\xa5" * 512], ids=["zeros", "noise"])
def test_a_damaged_header_is_no_end(tmp_path: Path, block: bytes) -> None:
    """tarfile stops there without a word; the pairs behind it are lost and must be counted."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 2, 32, 32, 3), np.uint8)
    records = [Record(source, target, ("go",), origin=f"pair {i}") for i, (source, target) in enumerate(pixels)]
    out = tmp_path / "out"
    pack(records, out, size=128, records_per_shard=6)
    (shard,) = out.glob("*.tar")
    with tarfile.open(shard) as archive:
        offset = archive.getmember("000000002.tgt.png").offset
    data = bytearray(shard.read_bytes())
    data[offset : offset + 512] = block
    shard.write_bytes(data)

    items = list(read(out))
    assert [item.origin for item in items[:-1]] == ["pair 0", "pair 1"]
    assert (items[-1].fault, items[-1].num_pairs) == ("truncated shard", 4)
    assert f"damaged from byte {offset} on" in items[-1].detail
    entries, tally = scan(out, 0.7)
    assert len(entries) == 2 and tally.faults == {"truncated shard": 4}


def test_a_shard_with_fewer_pairs_than_its_index_says_counts_for_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 32, 32, 3), np.uint8)
    records = [Record(*pair, ("go",), origin=f"pair {i}") for i, pair in enumerate(pixels)]
    pack(records, tmp_path / "out", size=128)
    pack(records[:3], tmp_path / "less", size=128)
    (shard,) = (tmp_path / "out").glob("*.tar")
    shard.write_bytes((tmp_path / "less" / shard.name).read_bytes())  # whole, but of an earlier day
    last = list(read(tmp_path / "out"))[-1]
    assert isinstance(last, Skipped) and (last.fault, last.num_pairs) == ("truncated shard", 2)
    entries, tally = scan(tmp_path / "out", 0.5)
    assert len(entries) == 3 and tally.faults == {"truncated shard": 2}


def test_an_archive_with_much_padding_is_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1)})
    with (tmp_path / "a.tar").open("ab") as stream:
        stream.write(bytes(300_000))
    pictures = Pictures(tmp_path)
    assert isinstance(pictures.get("1.png"), Encoded) and not pictures.faults


def test_a_name_in_two_archives_names_no_picture(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x/1.png": encoded(1), "x/2.png": encoded(2)})
    write_tar(tmp_path / "b.tar", {"x/1.png": encoded(3), "y/2.png": encoded(4)})
    pictures = Pictures(tmp_path)
    for name in ("x/1.png", "1.png", "deep/x/1.png"):
        with pytest.raises(FaultError, match=rf"2 files match {name}, such as x/1\.png in") as error:
            pictures.get(name)
        assert error.value.fault == "missing image"
    assert pictures.get("x/2.png").data == encoded(2) and pictures.get("y/2.png").data == encoded(4)


def test_a_name_in_two_folders_names_no_picture(tmp_path: Path) -> None:
    roots = tmp_path / "a", tmp_path / "b"
    for root in roots:
        (root / "x").mkdir(parents=True)
        (root / "x" / "1.png").write_bytes(encoded(1))
    write_tar(tmp_path / "b" / "more.tar", {"2.png": encoded(2), "x/1.png": encoded(1)})
    (tmp_path / "a" / "2.png").write_bytes(encoded(2))
    pictures = Pictures(*roots)
    for name in ("x/1.png", "1.png", "deep/2.png"):
        with pytest.raises(FaultError, match=f"2 files match {name}"):
            pictures.get(name)


def test_what_was_unpacked_or_appended_counts_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x/1.png": encoded(1), "2.png": encoded(2)})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:  # as tar -r does: the later one is valid
        info = tarfile.TarInfo("2.png")
        info.size = len(encoded(3))
        archive.addfile(info, io.BytesIO(encoded(3)))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.png").write_bytes(encoded(1))
    pictures = Pictures(tmp_path)
    assert pictures.get("1.png") == tmp_path / "x" / "1.png"
    assert pictures.get("2.png").data == encoded(3)


def test_parts_beside_the_archive_joined_from_them_are_left_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar.split.000").write_bytes(data[:700])
    (tmp_path / "a.tar.split.001").write_bytes(data[700:])
    assert find_archives(tmp_path) == [[tmp_path / "a.tar"]]
    pictures = Pictures(tmp_path)
    assert pictures.get("1.png").data == encoded(1) and not pictures.faults


def test_a_name_that_no_file_can_have_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match="is nowhere") as error:
        Pictures(tmp_path).get("a" * 300 + ".png")
    assert error.value.fault == "missing image"
