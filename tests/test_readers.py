"""Every layout is written here as its set is distributed, and read back to the pixel."""

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varedit.data.archives import JoinedFile
from varedit.data.faults import Skipped, Tally, pixels_of, skip_faults
from varedit.data.readers import detect, read
from varedit.data.record import Record, write_folder


def picture(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def cut_out() -> np.ndarray:
    """A mask as MagicBrush has them: a white picture of twice the size with a hole in its left half."""
    pixels = np.full((48, 64, 4), 255, np.uint8)
    pixels[:, :32, 3] = 0
    return pixels


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels))


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def split(path: Path, names: list[str]) -> None:
    """Cut a file into parts as `split` does, and delete it."""
    data = path.read_bytes()
    step = -(-len(data) // len(names))
    for number, name in enumerate(names):
        (path.parent / name).write_bytes(data[number * step : (number + 1) * step])
    path.unlink()


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(source: Path | str, format: str | None = None) -> list[Record]:
    items = list(read(source, format))
    assert all(isinstance(item, Record) for item in items), items
    return items


def faults(items: list) -> list[str]:
    return [item.fault for item in items if isinstance(item, Skipped)]


def same(record: Record, source: np.ndarray, target: np.ndarray, *instructions: str) -> bool:
    pixels = record.arrays()
    return (
        np.array_equal(pixels[0], source) and np.array_equal(pixels[1], target) and record.instructions == instructions
    )


# ---- SEED-Data-Edit --------------------------------------------------------------------------------------------------
def test_seed_part_1_split_gzip(tmp_path: Path) -> None:
    pytest.importorskip("indexed_gzip")
    root = tmp_path / "auto_editing" / "openimages"
    rows = [
        {"source_image": f"source_images/{i}.jpg", "target_image": f"target_images/{i}.jpg", "instruction": f"do {i}"}
        for i in range(3)
    ]
    lines(root / "annotations" / "split_0001.jsonl", rows)
    for side in ("source", "target"):
        offset = 0 if side == "source" else 100
        files = {f"{side}_images/{i}.jpg": encoded(picture(offset + i)) for i in range(3)}
        tar = root / "images" / f"{side}_images.tar.gz"
        write_tar(tar, files, "w:gz")
        split(tar, [f"{tar.name}.part-aa", f"{tar.name}.part-ab", f"{tar.name}.part-ac"])
    assert detect(tmp_path) == "seed-data-edit"
    for source in (tmp_path, root / "annotations" / "split_0001.jsonl"):
        found = records(source)
        assert [same(r, picture(i), picture(100 + i), f"do {i}") for i, r in enumerate(found)] == [True] * 3
    assert found[0].licence == "CC-BY-NC-4.0"


def test_seed_part_2_unpacked_images(tmp_path: Path) -> None:
    row = {"source_image": "a/1.jpg", "target_image": "a/2.jpg", "instruction": "brighten"}
    lines(tmp_path / "real_editing" / "annotations" / "split_0001.jsonl", [row])
    save(tmp_path / "real_editing" / "images" / "a" / "1.jpg", picture(1))
    save(tmp_path / "real_editing" / "images" / "a" / "2.jpg", picture(2))
    assert same(records(tmp_path)[0], picture(1), picture(2), "brighten")


def test_seed_part_3_sessions_become_pairs(tmp_path: Path) -> None:
    row = {"source_image": "Data/1/0.jpg"}
    for turn in (1, 2, 3):
        row |= {f"instruction_{turn}": f"turn {turn}", f"edit_image_{turn}": f"Data/1/{turn}.jpg"}
    lines(tmp_path / "multi_turn_editing" / "annotations" / "split_0001.jsonl", [row])
    tar = tmp_path / "multi_turn_editing" / "images" / "multi_turn.tar"
    write_tar(tar, {f"20240330_315P_1323turns/Data/1/{i}.jpg": encoded(picture(i)) for i in range(4)})
    found = records(tmp_path)
    assert [same(r, picture(i), picture(i + 1), f"turn {i + 1}") for i, r in enumerate(found)] == [True] * 3
    assert [r.extra["turn"] for r in found] == [1, 2, 3]


def test_seed_faults_are_named(tmp_path: Path) -> None:
    root = tmp_path / "real_editing"
    for name, pixels in (("1", picture(1)), ("2", picture(2)), ("big", picture(3, 48))):
        save(root / "images" / f"{name}.jpg", pixels)
    (root / "images" / "broken.jpg").write_bytes(b"no picture")
    good = {"source_image": "1.jpg", "target_image": "2.jpg", "instruction": "x"}
    bad = ["missing.jpg", "big.jpg", "broken.jpg", "../../secret.jpg"]
    path = root / "annotations" / "split_0001.jsonl"
    lines(
        path,
        [good, *(good | {"target_image": name} for name in bad), {"source_image": "1.jpg", "target_image": "2.jpg"}],
    )
    path.write_bytes(path.read_bytes() + b'{"source_image": "1.jpg", "instruction": "\xff"}\n{"broken\n')
    items = list(read(tmp_path))
    assert faults(items) == [
        "missing image",
        "sizes differ",
        "unreadable image",
        "bad row",
        "bad row",
        "not UTF-8",
        "bad row",
    ]
    assert "source 32 x 24, target 32 x 48" in items[2].detail
    assert "line 2" in items[1].origin and "missing.jpg" in items[1].detail


# ---- ImgEdit ---------------------------------------------------------------------------------------------------------
def write_parquet(path: Path, columns: dict[str, list]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def test_imgedit_single_turn_split_tar(tmp_path: Path) -> None:
    names = [f"results_remove_laion_part5/{i}" for i in range(2)]
    write_parquet(
        tmp_path / "Parquet" / "remove_part5.parquet",
        {
            "input_images": [[f"{name}/original.png"] for name in names],
            "output_images": [[f"{name}/result.png"] for name in names],
            "prompt": ["Remove the dog.", "Remove the café."],
        },
    )
    files = {}
    for i, name in enumerate(names):
        files |= {f"{name}/original.png": encoded(picture(i)), f"{name}/result.png": encoded(picture(10 + i))}
    tar = tmp_path / "Singleturn" / "remove_part5.tar"
    write_tar(tar, files)
    split(tar, [f"{tar.name}.split.{i:03d}" for i in range(3)])
    assert detect(tmp_path) == "imgedit"
    found = records(tmp_path)
    assert same(found[0], picture(0), picture(10), "Remove the dog.")
    assert same(found[1], picture(1), picture(11), "Remove the café.")
    assert found[0].edit_type == "remove"


def test_imgedit_multi_turn(tmp_path: Path) -> None:
    name = "results_version_backtracking_part0/7"
    turns = [
        {
            "input_images": [f"{name}/origin_{i}.png"],
            "output_images": [f"{name}/result_{i}.png"],
            "prompt": f"round {i}",
        }
        for i in range(2)
    ]
    composed = {"input_images": [f"{name}/origin_0.png"] * 2, "output_images": [f"{name}/result_0.png"], "prompt": "x"}
    write_parquet(tmp_path / "Parquet" / "version_backtracking_part0.parquet", {"data": [[*turns, composed]]})
    for i in range(2):
        save(tmp_path / "Multiturn" / name / f"origin_{i}.png", picture(i))
        save(tmp_path / "Multiturn" / name / f"result_{i}.png", picture(10 + i))
    items = list(read(tmp_path))
    assert same(items[0], picture(0), picture(10), "round 0")
    assert same(items[1], picture(1), picture(11), "round 1")
    assert faults(items) == ["bad row"]


# ---- sets in parquet files -------------------------------------------------------------------------------------------
def cell(seed: int) -> dict:
    """A picture as the `datasets` library stores it."""
    return {"bytes": encoded(picture(seed)), "path": None}


PARQUET_SETS = {
    "ultraedit": {
        "clip_sim_source": [0.2, 0.3],
        "source_caption": ["a cat", "a dog"],
        "target_caption": ["a red cat", "a red dog"],
        "idx": ["7", "8"],
        "edit_prompt": ["do 0", "do 1"],
        "source_image": [cell(0), cell(1)],
        "edited_image": [cell(10), cell(11)],
    },
    "magicbrush": {
        "img_id": ["242679", "242679"],
        "turn_index": [1, 2],
        "source_img": [cell(0), cell(1)],
        "mask_img": [{"bytes": encoded(cut_out()), "path": None}] * 2,
        "instruction": ["do 0", "do 1"],
        "target_img": [cell(10), cell(11)],
    },
    "omniedit": {
        "omni_edit_id": ["task_obj_add_1", "task_obj_add_2"],
        "task": ["addition", "addition"],
        "src_img": [cell(0), cell(1)],
        "edited_img": [cell(10), cell(11)],
        "edited_prompt_list": [["do 0", "please do 0"], ["do 1"]],
        "o_score": [9.5, 9.8],
    },
    "instructpix2pix": {
        "original_prompt": ["a cat", "a dog"],
        "original_image": [cell(0), cell(1)],
        "edit_prompt": ["do 0", "do 1"],
        "edited_prompt": ["a red cat", "a red dog"],
        "edited_image": [cell(10), cell(11)],
    },
}


@pytest.mark.parametrize("name", PARQUET_SETS)
def test_parquet_sets(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", PARQUET_SETS[name])
    assert detect(tmp_path) == name
    found = records(tmp_path)
    first = ("do 0", "please do 0") if name == "omniedit" else ("do 0",)
    assert same(found[0], picture(0), picture(10), *first)
    assert same(found[1], picture(1), picture(11), "do 1")
    assert name == "magicbrush" or found[0].mask is None
    if name == "magicbrush":  # the hole of a picture of twice the size
        mask = found[0].arrays()[2]
        assert mask[:, :16].all() and not mask[:, 16:].any()
    assert name != "omniedit" or (found[0].edit_type, found[0].extra["o_score"]) == ("addition", 9.5)
    assert name not in ("ultraedit", "instructpix2pix") or "a cat" in found[0].extra.values()
    assert len({record.origin for record in found}) == 2


def test_parquet_over_an_address(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    write_parquet(tmp_path / "0.parquet", PARQUET_SETS["magicbrush"])
    memory = fsspec.filesystem("memory")
    memory.pipe("/readers_test/data/train-0.parquet", (tmp_path / "0.parquet").read_bytes())
    try:
        assert detect("memory://readers_test") == "magicbrush"
        assert same(records("memory://readers_test")[1], picture(1), picture(11), "do 1")
    finally:
        memory.rm("/readers_test", recursive=True)


def test_bad_cells_cost_only_their_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    columns = {key: value * 2 for key, value in PARQUET_SETS["instructpix2pix"].items()}
    # Parquet promises UTF-8 and does not check: the raw bytes of one caption are not.
    texts = pyarrow.array([b"do 0", b"\xff\xfe", b"do 0", b"do 1"], pyarrow.binary()).view(pyarrow.string())
    columns["edit_prompt"] = texts
    columns["edited_image"] = [cell(10), cell(11), {"bytes": None, "path": None}, cell(11)]
    write_parquet(tmp_path / "a.parquet", columns)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    items = list(read(tmp_path))
    assert faults(items) == ["not UTF-8", "missing image", "truncated shard"]
    assert sum(isinstance(item, Record) for item in items) == 2


def test_instructpix2pix_as_generated(tmp_path: Path) -> None:
    prompt = {"input": "a cat", "edit": "make it red", "output": "a red cat"}
    (tmp_path / "0000001").mkdir()
    (tmp_path / "0000001" / "prompt.json").write_text(json.dumps(prompt))
    for seed in ("55", "77"):
        save(tmp_path / "0000001" / f"{seed}_0.jpg", picture(int(seed)))
        save(tmp_path / "0000001" / f"{seed}_1.jpg", picture(int(seed) + 1))
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "prompt.json").write_text("[1]")
    seeds = [["0000001", ["55", "77"]], ["0000002", ["1"]], ["../0000001", ["55"]], ["listed", ["1"]], ["0000001"], 3]
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    items = list(read(tmp_path))
    assert same(items[0], picture(55), picture(56), "make it red")
    assert same(items[1], picture(77), picture(78), "make it red")
    assert faults(items) == ["bad row"] * 5
    (tmp_path / "seeds.json").write_text("3")
    with pytest.raises(ValueError, match="is no list of names and seeds"):
        list(read(tmp_path))


# ---- own tables and folders ------------------------------------------------------------------------------------------
def test_folder_of_the_synthetic_world_form(tmp_path: Path) -> None:
    mask = np.zeros((24, 32), bool)
    mask[3:9, 4:8] = True
    written = Record(picture(0), picture(1), ("a", "b"), mask, "recolour", "here 1", "CC0", {"scene": {"n": [1, 2]}})
    write_folder([written], tmp_path / "set")
    (found,) = records(tmp_path / "set")
    assert same(found, picture(0), picture(1), "a", "b")
    assert np.array_equal(found.arrays()[2], mask)
    assert (found.edit_type, found.origin, found.licence, found.extra) == ("recolour", "here 1", "CC0", written.extra)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "img" / "1.png", picture(1))
    save(tmp_path / "img" / "2.png", picture(2))
    table = tmp_path / f"pairs{suffix}"
    with table.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(["source_image", "target_image", "instruction", "note"])
        writer.writerow(["img/1.png", "img/2.png", 'paint, the "café"\nred', "n"])
        writer.writerow(["img/1.png", "img/3.png", "x", ""])
        writer.writerow(["img/1.png", "img/2.png", "", ""])
        writer.writerow(["img/1.png"])
    table.write_bytes(
        table.read_bytes() + b"img/1.png,img/2.png,\xff,\r\n".replace(b",", b"\t" if suffix == ".tsv" else b",")
    )
    items = list(read(table))
    assert same(items[0], picture(1), picture(2), 'paint, the "café"\nred')
    assert items[0].extra == {"note": "n"}
    assert same(items[2], picture(1), picture(2), "")  # an empty instruction is for lint to judge
    assert faults(items) == ["missing image", "bad row", "not UTF-8"]


def test_quotes_in_a_table(tmp_path: Path) -> None:
    """Doubled ones, and those inside of cells that are not quoted; one that is not closed takes no rows with it.

    Text after a closed quote spoils its own row only.
    """
    save(tmp_path / "1.png", picture(1))
    save(tmp_path / "2.png", picture(2))
    table = tmp_path / "pairs.csv"
    good = 'source,target,text\n1.png,2.png,"say ""hi"""\n1.png,2.png,a 5" pipe\n1.png,2.png,""\n'
    table.write_text(good)
    assert [record.instruction for record in records(table)] == ['say "hi"', 'a 5" pipe', ""]
    table.write_text(good + '1.png,2.png,"Sale" sign in red\n1.png,2.png,x\n')
    found = list(read(table))
    assert isinstance(found[3], Skipped) and (found[3].origin, found[3].fault) == ("pairs.csv line 5", "bad row")
    assert len(found) == 5 and found[4].instruction == "x"
    table.write_text('source,target,text\n1.png,2.png,"three\nlines\nof it"\n1.png,gone.png,x\n')
    assert [item.origin for item in read(table)] == ["pairs.csv line 2", "pairs.csv line 5"]
    for rest in ("1.png,2.png,x\n", ""):
        table.write_text(good + '1.png,2.png,"make it red\n' + rest)
        found = []
        with pytest.raises(ValueError, match=r"pairs\.csv line 5 cannot be read .*: close the quote") as error:
            found.extend(read(table))
        assert "\n" not in str(error.value)


def test_json_lines_table(tmp_path: Path) -> None:
    save(tmp_path / "1.png", picture(1))
    save(tmp_path / "2.png", picture(2))
    row = {"src": "1.png", "tgt": "2.png", "prompt": "go", "task": "add", "id": 7, "more": [1]}
    lines(
        tmp_path / "own.jsonl",
        [row, {"src": "1.png", "prompt": "x"}, {"src": "/etc/passwd", "tgt": "2.png", "prompt": "x"}],
    )
    with (tmp_path / "own.jsonl").open("a") as stream:
        stream.write("[" * 100_000)  # too deep for the parser
    items = list(read(tmp_path / "own.jsonl"))
    assert same(items[0], picture(1), picture(2), "go")
    assert (items[0].edit_type, items[0].origin, items[0].extra) == ("add", "7", {"more": [1]})
    assert faults(items) == ["bad row", "bad row", "bad row"]
    lines(tmp_path / "own.jsonl", [{**row, "mask": "", "task": ""}])
    (empty,) = read(tmp_path / "own.jsonl")
    assert empty.mask is None and empty.edit_type == ""


@pytest.mark.parametrize("beside", [False, True, "with dots"])
def test_own_folders(tmp_path: Path, beside: bool | str) -> None:
    names = (
        ("{0}.src.png", "{0}.tgt.png", "{0}.txt") if beside else ("source/{0}.png", "target/{0}.png", "text/{0}.txt")
    )
    if beside == "with dots":
        names = tuple(f"img.v1.{name}" for name in names)
    for i in range(2):
        save(tmp_path / names[0].format(i), picture(i))
        save(tmp_path / names[1].format(i), picture(10 + i))
        text = tmp_path / names[2].format(i)
        text.parent.mkdir(exist_ok=True)
        text.write_bytes(f"do {i}\nplease do {i}\n".encode())
    save(tmp_path / names[0].format(2), picture(2))
    assert detect(tmp_path) == "folder"
    items = list(read(tmp_path))
    assert same(items[0], picture(0), picture(10), "do 0", "please do 0")
    assert same(items[1], picture(1), picture(11), "do 1", "please do 1")
    assert faults(items) == ["missing image"]


def test_the_text_folder_comes_before_texts_beside_the_pictures(tmp_path: Path) -> None:
    for side, text in (("source", "a caption"), ("target", "another caption")):
        save(tmp_path / side / "a.png", picture(len(side)))
        save(tmp_path / side / "b.png", picture(len(text)))
        (tmp_path / side / "a.txt").write_text(text)
        (tmp_path / side / "b.txt").write_text(text)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("make it red")
    assert [record.instruction for record in records(tmp_path)] == ["make it red", "a caption"]


def test_orientation_counts_for_sizes(tmp_path: Path) -> None:
    """A photograph stored turned and its edit stored upright are of one size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = Image.fromarray(picture(1, 24, 32))
    tall.save(tmp_path / "1.png", exif=exif)
    save(tmp_path / "2.png", picture(2, 32, 24))
    lines(tmp_path / "own.jsonl", [{"source": "1.png", "target": "2.png", "instruction": "x"}])
    (record,) = records(tmp_path / "own.jsonl")
    assert pixels_of(record.source).shape == pixels_of(record.target).shape == (32, 24, 3)


# ---- the tools below -------------------------------------------------------------------------------------------------
def test_joined_file_reads_as_one(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(1000)
    paths = []
    for number, (start, stop) in enumerate(((0, 1), (1, 400), (400, 400), (400, 1000))):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data[start:stop])
    with io.BufferedReader(JoinedFile(paths), buffer_size=64) as joined:
        for start, count in ((0, 1000), (399, 2), (990, 20), (0, 1), (400, 600)):
            joined.seek(start)
            assert joined.read(count) == data[start : start + count]


def test_faults_are_borne_up_to_a_fraction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = Record(picture(0), picture(1), ("x",))
    bad = Skipped("there", "missing image", "gone")
    tally = Tally()
    kept = list(skip_faults([good] * 19 + [bad], max_skipped=0.05, tally=tally))
    assert len(kept) == 19 and tally.faults == Counter({"missing image": 1})
    assert "there: missing image: gone" in caplog.text and "19 pairs, 1 skipped (missing image 1)" in caplog.text
    shard = Skipped("x.tar", "missing shard", "300 pairs", 300)
    assert len(list(skip_faults([shard] + [good] * 2700, max_skipped=0.1))) == 2700, "it is a tenth, though it is first"
    with pytest.raises(ValueError, match="10% is more than max_skipped 9%"):
        list(skip_faults([shard] + [good] * 2700, max_skipped=0.09))
    with pytest.raises(ValueError, match="10% is more than max_skipped 5%"):
        list(skip_faults([good] * 9 + [bad], max_skipped=0.05))
    endless = (bad for _ in iter(int, 1))
    with pytest.raises(ValueError, match="0 pairs, 200 skipped"):
        list(skip_faults(endless))
    with pytest.raises(ValueError, match="holds no pairs"):
        list(skip_faults([]))


def test_bad_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    (tmp_path / "quote.csv").write_text('source,target,text\na,b,"two\nlines"\na,b,"c\n' + "a,b,c\n" * 30_000)
    for source, format, message in (
        (tmp_path / "nowhere", None, "does not exist"),
        (tmp_path / "empty", None, "name its format, one of seed-data-edit"),
        (tmp_path / "empty", "webdataset", "format 'webdataset' is unknown: use one of"),
        (tmp_path / "no.csv", None, "has no column 'source': its header is a, b"),
        (tmp_path / "quote.csv", None, r"quote\.csv line 4 cannot be read .*: close the quote"),
        ("memory://nothing_here", None, "holds no parquet files"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            list(read(source, format))
        assert "\n" not in str(error.value)
