"""Shards: the released layout is read, what is packed equals what was raw, and a broken-off run continues."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varedit.data.faults import Skipped
from varedit.data.packing import pack, verify
from varedit.data.readers import detect, read
from varedit.data.record import Record, write_folder
from varedit.data.synthetic import World, to_record

SIZES = ((32, 32), (24, 48), (48, 24))


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make_records(count: int) -> list[Record]:
    """Pairs of three shapes in turn."""
    found = []
    for i in range(count):
        hw = SIZES[i % 3]
        mask = picture(1000 + i, *hw)[..., 0] > 128 if i % 2 else None
        texts = (f"do {i}", f"bitte {i} é")[: 1 + i % 2]
        extra = {"n": i, "scene": {"objects": [1]}} if i % 2 else {}
        found.append(Record(picture(i, *hw), picture(500 + i, *hw), texts, mask, "add", f"set {i}", "CC0", extra))
    return found


def equal(a: Record, b: Record) -> bool:
    fields = ("instructions", "edit_type", "origin", "licence", "extra")
    pixels = zip(a.arrays(), b.arrays())
    return all(getattr(a, f) == getattr(b, f) for f in fields) and all(
        (x is None) == (y is None) and np.array_equal(x, y) for x, y in pixels
    )


def by_origin(items: list) -> dict[str, Record]:
    return {item.origin: item for item in items}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, without the order in which shards happened to be finished."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "shards.jsonl"}


# ---- the released layout ---------------------------------------------------------------------------------------------
def write_released(path: Path, keys: list[int], kind: str = "JPEG") -> None:
    with tarfile.open(path, "w") as archive:
        for key in keys:
            for extension, data in (
                ("src.jpg", encoded(picture(key), kind)),
                ("tgt.jpg", encoded(picture(500 + key), kind)),
                ("txt", f"do {key}".encode()),
            ):
                info = tarfile.TarInfo(f"{key:09d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def test_released_layout(tmp_path: Path) -> None:
    for number in range(2):
        write_released(tmp_path / f"wds_seed_{number:04d}.tar", [number * 3 + i for i in range(3)])
    write_released(tmp_path / "wds_img_0000.tar", [6])
    (tmp_path / "SEEDEdit.txt").write_text("seed\t6\t2\n")
    (tmp_path / "ImgEdit.txt").write_text("img\t1\t1\n")
    assert detect(tmp_path) == detect(tmp_path / "SEEDEdit.txt") == "released-shards"
    found = list(read(tmp_path))
    assert sorted(record.instruction for record in found) == [f"do {i}" for i in range(7)]
    found = list(read(tmp_path / "SEEDEdit.txt"))
    assert [record.instruction for record in found] == [f"do {i}" for i in range(6)]
    with Image.open(io.BytesIO(encoded(picture(4), "JPEG"))) as image:
        assert np.array_equal(found[4].arrays()[0], np.asarray(image))
    (shard,) = list(read(tmp_path / "wds_img_0000.tar"))
    assert shard.instruction == "do 6"


def test_released_layout_with_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "wds_seed_0000.tar"
    write_released(path, [0, 1, 2], "PNG")
    path.write_bytes(path.read_bytes()[: 2 * 9 * 1024])  # in the second pair
    (tmp_path / "SEEDEdit.txt").write_text("seed\t6\t2\n")
    items = list(read(tmp_path))
    assert [item.instruction for item in items if isinstance(item, Record)] == ["do 0", "do 1"]
    assert [item.fault for item in items if isinstance(item, Skipped)] == ["truncated shard", "missing shard"]
    assert "promises 6 pairs, 2 were read" in caplog.text


@pytest.mark.parametrize("cut", range(0, 12 * 1024, 512))
def test_shard_cut_anywhere_gives_whole_pairs_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "wds_seed_0000.tar"
    write_released(path, [0, 1, 2])
    whole = list(read(path))
    with tarfile.open(path) as archive:
        ends = [member.offset_data + member.size for member in archive if member.name.endswith(".txt")]
    path.write_bytes(path.read_bytes()[:cut])
    items = list(read(path, "shard"))
    pairs = [item for item in items if isinstance(item, Record)]
    assert len(whole) == 3 and len(pairs) == sum(end <= cut for end in ends) == len(items) - 1
    assert all(equal(a, b) for a, b in zip(pairs, whole)) and items[-1].fault == "truncated shard"


def test_shard_members_with_faults(tmp_path: Path) -> None:
    good = encoded(picture(1), "PNG")
    samples = {
        "a": {"src.png": good, "txt": b"x"},
        "b": {"src.png": good, "tgt.png": good},
        "c": {"src.png": good, "tgt.png": good, "txt": b"\xff"},
        "d": {"src.png": good, "tgt.png": encoded(picture(1, 16), "PNG"), "txt": b"x"},
        "e": {"src.png": good, "tgt.png": b"nothing", "txt": b"x"},
        "f": {"src.png": good, "tgt.png": good, "txt": b"x", "json": b"[1"},
        "f1": {"src.png": good, "tgt.png": good, "txt": b"x", "json": b"[1]"},
        "f2": {"src.png": good, "tgt.png": good, "txt": b"x", "json": b"[" * 100_000},
        "f3": {"src.png": good, "tgt.png": good, "json": b"{}"},
        "f4": {"src.png": good, "tgt.png": good, "json": b'{"instructions": [3]}'},
        "f5": {"src.png": good, "tgt.png": good, "txt": b"x", "json": b'{"licence": 3}'},
        "f6": {"src.png": good, "tgt.png": good, "txt": b"x", "json": b'{"extra": 3}'},
        "g": {"src.png": good, "tgt.png": good, "txt": b"fine"},
        "h": {"src.png": good, "tgt.png": good, "json": b'{"instructions": "fine", "licence": null, "extra": null}'},
    }
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"./deep.folder/{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    *faults, first, last = read(tmp_path / "x.tar")
    names = ["missing image", "bad row", "not UTF-8", "sizes differ", "unreadable image", *["bad row"] * 7]
    assert [item.fault for item in faults] == names
    assert first.instructions == last.instructions == ("fine",)


# ---- packing ---------------------------------------------------------------------------------------------------------
def test_packed_equals_raw(tmp_path: Path) -> None:
    world = World(size=128)
    raw = [*make_records(20), *(to_record(world.pair(0, i), f"world {i}") for i in range(4))]
    report = pack(raw, tmp_path / "out", source="here", size=256, records_per_shard=3)
    assert report.num_pairs == 24
    assert detect(tmp_path / "out") == "packed"
    found = list(read(tmp_path / "out"))
    assert len(found) == 24 and all(equal(by_origin(found)[record.origin], record) for record in raw)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["origins"] == {"set": 20, "world": 4} and index["licences"] == {"CC0": 20, "unknown": 4}
    assert {shard["bucket"] for shard in index["shards"]} == {0.5, 1.0, 2.0}
    for shard in index["shards"]:
        shapes = {record.arrays()[0].shape for record in read(tmp_path / "out" / shard["file"])}
        assert {height / width for height, width, _ in shapes} == {shard["bucket"]}


def test_picture_files_are_stored_byte_for_byte(tmp_path: Path) -> None:
    rows = []
    for kind, suffix in (("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "png"), ("BMP", "bmp")):
        for side, seed in (("source", 1), ("target", 2)):
            (tmp_path / f"{side}.{suffix}").write_bytes(encoded(picture(seed), kind))
        rows.append({"source": f"source.{suffix}", "target": f"target.{suffix}", "instruction": kind})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = list(read(tmp_path / "own.jsonl"))
    pack(raw, tmp_path / "out")
    found = list(read(tmp_path / "out"))
    assert all(equal(a, b) for a, b in zip(raw, found)) and len(found) == 4
    for a, b in zip(raw[:3], found[:3]):
        assert b.source.data == a.source.read_bytes()


class Stop(Exception):
    pass


def stop_after(items: list, count: int) -> Iterator:
    yield from items[:count]
    raise Stop


@pytest.mark.parametrize("stops", [(1,), (4, 5), (10, 12, 19)])
def test_interrupted_and_continued_gives_the_same_bytes(tmp_path: Path, stops: tuple[int, ...]) -> None:
    raw = make_records(20)
    settings = {"source": "here", "records_per_shard": 2}
    pack(raw, tmp_path / "whole", **settings)
    for count in stops:
        with pytest.raises(Stop):
            pack(stop_after(raw, count), tmp_path / "parts", **settings)
        assert not list((tmp_path / "parts").glob("*.partial"))
        assert not (tmp_path / "parts" / "index.json").exists()
    finished = len(list((tmp_path / "parts").glob("*.tar")))
    report = pack(raw, tmp_path / "parts", **settings)
    assert report.reused == finished
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert verify(tmp_path / "parts") == []


def test_a_crash_leaves_partial_files_that_do_not_count(tmp_path: Path) -> None:
    raw = make_records(12)
    pack(raw, tmp_path / "whole", records_per_shard=2)
    with pytest.raises(Stop):
        pack(stop_after(raw, 9), tmp_path / "parts", records_per_shard=2)
    parts = tmp_path / "parts"
    (parts / "1.000-000009.tar.partial").write_bytes(b"half")
    journal = parts / "shards.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # the last line torn: its shard is packed again
    report = pack(raw, parts, records_per_shard=2)
    assert report.reused == 2
    assert contents(parts) == contents(tmp_path / "whole")


def test_unreadable_pictures_do_not_upset_a_continued_run(tmp_path: Path) -> None:
    raw = make_records(9)
    broken = tmp_path / "broken.bmp"
    broken.write_bytes(encoded(picture(1), "BMP")[:200])
    raw[3] = Record(broken, picture(1), ("x",), origin="broken")
    with pytest.raises(Stop):
        pack(stop_after(raw, 8), tmp_path / "parts", records_per_shard=2, max_skipped=0.5)
    report = pack(raw, tmp_path / "parts", records_per_shard=2, max_skipped=0.5)
    assert report.num_pairs == 8
    assert "broken" not in by_origin(list(read(tmp_path / "parts")))


def test_packing_again_bears_no_more_faults_than_the_first_time(tmp_path: Path) -> None:
    raw = make_records(9)
    broken = tmp_path / "broken.bmp"
    broken.write_bytes(encoded(picture(1), "BMP")[:200])
    raw[3] = Record(broken, picture(1), ("x",), origin="broken")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"8 pairs, 1 skipped \(unreadable image 1\): 11% is more than max_skipped"
        ):
            pack(raw, tmp_path / "parts", records_per_shard=2)
    pack(raw, tmp_path / "parts", records_per_shard=2, max_skipped=0.5)
    pack(raw, tmp_path / "whole", records_per_shard=2, max_skipped=0.5)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_another_source_or_setting_is_refused(tmp_path: Path) -> None:
    raw = make_records(9)
    out = tmp_path / "out"
    pack(raw, out, source="a", records_per_shard=2)
    with pytest.raises(ValueError, match="use the same, or choose an empty folder"):
        pack(raw, out, source="b", records_per_shard=2)
    with pytest.raises(ValueError, match="is not the one"):
        pack(raw[::-1], out, source="a", records_per_shard=2)
    with pytest.raises(ValueError, match="the source ends before"):
        pack(raw[:4], out, source="a", records_per_shard=2)
    with pytest.raises(ValueError, match="size 300 is not a size class"):
        pack(raw, tmp_path / "new", size=300)
    with pytest.raises(ValueError, match="records_per_shard is 0"):
        pack(raw, tmp_path / "new", records_per_shard=0)


def test_an_attempt_that_packed_nothing_binds_to_nothing(tmp_path: Path) -> None:
    raw, out = make_records(3), tmp_path / "out"
    with pytest.raises(ValueError, match="100% is more than max_skipped"):
        pack([Skipped("a", "bad row", "b")], out, size=512)
    assert pack(raw, out, size=128).num_pairs == 3
    (out / "shards.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"shards\.jsonl is damaged"):
        pack(raw, out, size=128)


@pytest.mark.parametrize(
    "index, words",
    [
        ({}, "lists no shards"),
        ({"shards": 3}, "lists no shards"),
        ({"shards": [{"file": "../x.tar", "count": 1}]}, "'../x.tar', which leaves the folder"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: dict, words: str) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"layout": "varedit-shards"} | index))
    for read_it in (read, verify):
        with pytest.raises(ValueError, match=words):
            list(read_it(tmp_path))


def test_checksums(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="pack into it first"):
        verify(tmp_path)
    pack(make_records(6), out, records_per_shard=2)
    assert verify(out) == []
    first, second, *_ = sorted(out.glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[700] ^= 1
    first.write_bytes(data)
    second.unlink()
    assert [line.rsplit(" ", 1)[0].split(" ", 1)[1] for line in verify(out)] == [
        "does not have the checksum in",
        "is",
    ]


def test_webdataset_reads_what_is_packed(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    raw = [record for record in make_records(9) if record.arrays()[0].shape[0] == 32]
    pack(raw, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == [record.instruction for record in raw]
    with Image.open(io.BytesIO(samples[0]["src.png"])) as image:
        assert np.array_equal(np.asarray(image), raw[0].source)


def test_folder_to_shards_and_back(tmp_path: Path) -> None:
    raw = make_records(5)
    write_folder(raw, tmp_path / "raw")
    pack(read(tmp_path / "raw"), tmp_path / "out")
    found = by_origin(list(read(tmp_path / "out")))
    assert all(equal(found[record.origin], record) for record in raw)
