"""Readers of the public benchmarks, on files written here in their published layouts."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from PIL import Image

from varedit.evaluation.benchmarks import decode_mask, load
from varedit.evaluation.cases import file_key, read_mask, read_picture
from varedit.evaluation.hub import SOURCES


def colour(value, size=(24, 16)):
    return Image.new("RGB", size, (value, 100, 50))


def cell(image):
    """A picture as the hub's tables hold it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path, rows, row_group_size=2):
    pa = pytest.importorskip("pyarrow", reason="this benchmark comes as parquet")
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)


def emu_row(index, task="add", before="a dog", after="a dog and a cat", **more):
    return {
        "instruction": f"edit {index}", "image": cell(colour(index)), "task": task, "split": "test", "idx": index,
        "hash": f"h{index}", "input_caption": before, "output_caption": after,
    } | more  # fmt: skip


@pytest.fixture
def emu(tmp_path):
    placeholder = "a train station in city"
    rows = [
        emu_row(0),
        emu_row(1, "texture"),
        emu_row(2, "style", "a dog", "a dog"),
        emu_row(3, "remove", placeholder, placeholder),
        emu_row(4, "remove", placeholder, "an empty square"),
        emu_row(5, "juggling"),
        emu_row(6, instruction="  "),
    ]
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [emu_row(9)])
    return tmp_path


def test_emu_edit_reads_the_reported_split(emu):
    found = load("emu-edit", emu)
    assert [case.instruction for case in found.cases] == [f"edit {i}" for i in range(6)]
    assert found.cases[1].edit_type == "color"
    assert found.cases[0].source_caption == "a dog" and found.cases[0].target_caption == "a dog and a cat"
    assert (read_picture(found.cases[5].source) == np.asarray(colour(5))).all()
    assert found.problems == (("row 6", "no instruction"),)
    assert found.notes["unknown type juggling"] == 1
    assert (found.notes["identical_captions"], found.notes["placeholder_captions"]) == (2, 2)
    assert found.notes["dropped"] == 0 and found.notes["rows"] == 7 and found.notes["rows_expected"] == 3589


def test_emu_edit_drops_bad_captions_when_told(emu):
    found = load("emu-edit", emu, options={"bad_captions": "drop"})
    assert [case.extra["idx"] for case in found.cases] == [0, 1, 5]
    assert found.notes["dropped"] == 3
    assert found.settings != load("emu-edit", emu).settings
    # A key names the same row either way.
    assert [case.key for case in found.cases] == ["00000", "00001", "00005"]


def test_a_broken_picture_is_named_in_the_same_words_every_time(tmp_path):
    """Pillow's own words hold an address in memory; score files have to repeat to the byte."""
    write_parquet(tmp_path / "test-0.parquet", [emu_row(0), emu_row(1, image={"bytes": b"junk", "path": None})])
    with pytest.raises(ValueError, match=r"^image of row \(0, 1\) is no picture \(UnidentifiedImageError\)$"):
        read_picture(load("emu-edit", tmp_path).cases[1].source)


def test_emu_edit_generations_have_their_splits_swapped(tmp_path):
    more = {"edited_image": cell(colour(7)), "model": "emu"}
    write_parquet(tmp_path / "data/test-0.parquet", [emu_row(1, **more)])
    write_parquet(tmp_path / "data/validation-0.parquet", [emu_row(2, **more), emu_row(3, **more)])
    found = load("emu-edit", tmp_path)
    assert found.settings["split"] == "validation" and len(found.cases) == 2
    assert len(load("emu-edit", tmp_path, options={"split": "test"}).cases) == 1


def write_pie(folder, entries):
    for name in ("a.jpg", "b.jpg"):
        path = folder / "annotation_images/1_change/" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour(90, (512, 512)).save(path)
    (folder / "mapping_file.json").write_text(json.dumps(entries))


def pie_row(mask, kind="1", image="1_change/a.jpg"):
    return {
        "image_path": image, "original_prompt": "a [red] car", "editing_prompt": "a [blue] car",
        "editing_instruction": "make the car blue", "editing_type_id": kind, "blended_word": "red blue", "mask": mask,
    }  # fmt: skip


def test_pie_bench(tmp_path):
    entries = {
        "000000000001": pie_row([512 * 10 + 20, 5]),
        "000000000002": pie_row([512 * 10], image="1_change/b.jpg"),
        "000000000003": pie_row([0, 1], kind="12"),
        "000000000004": pie_row([0, 1], image="1_change/missing.jpg"),
        "000000000005": pie_row([0, 1], image="../../secret.jpg"),
    }
    write_pie(tmp_path, entries)
    found = load("pie-bench", tmp_path)
    (case,) = found.cases
    assert case.key == "000000000001" and case.edit_type == "change object"
    assert (case.source_caption, case.target_caption) == ("a red car", "a blue car")
    mask = read_mask(case.mask, (512, 512))
    assert mask.sum() == 4 * 511 + 5 and mask[10, 20:25].all()
    reasons = dict(found.problems)
    assert "no list of starts" in reasons["000000000002"] and "editing_type_id '12'" in reasons["000000000003"]
    assert "missing.jpg" in reasons["000000000004"] and "leaves the folder" in reasons["000000000005"]


def test_pie_mask_worked_by_hand():
    """Runs over the flattened frame, the last one cut at the end, then the border set."""
    mask = decode_mask([6, 2, 13, 3, 23, 9], (5, 5))
    expected = np.ones((5, 5), bool)  # of the runs, 6, 7 and 13 lie inside the border
    expected[1:4, 1:4] = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    assert (mask == expected).all()


@pytest.mark.parametrize("runs", [[1, 2, 3], [1, -2], [1.5, 2], "1 2", [25, 1], [True, 2]])
def test_pie_mask_refuses_what_is_no_mask(runs):
    with pytest.raises(ValueError, match="mask"):
        decode_mask(runs, (5, 5))


def cut_out(left):
    """A mask as MagicBrush has them: the picture with a hole in its left or right half, here of twice the size."""
    image = Image.new("RGBA", (48, 32), "white")
    image.paste((255, 255, 255, 0), (0, 0, 24, 32) if left else (24, 0, 48, 32))
    return image


def write_magicbrush(folder):
    for name, values in {"139": (10, 20, 30), "30": (40, 50)}.items():
        path = folder / "images" / name
        path.mkdir(parents=True)
        colour(values[0]).save(path / f"{name}-input.png")
        for turn, value in enumerate(values[1:], 1):
            colour(value).save(path / f"{name}-output{turn}.png")
            cut_out(turn == 1).save(path / f"{name}-mask{turn}.png")
    turn = {"input": "139-input.png", "mask": "139-mask1.png", "output": "139-output1.png", "instruction": "first"}
    second = {"input": "139-output1.png", "mask": "139-mask2.png", "output": "139-output2.png", "instruction": "second"}
    single = {"input": "30-input.png", "mask": "30-mask1.png", "output": "30-output1.png", "instruction": "only"}
    (folder / "edit_sessions.json").write_text(json.dumps({"139": [turn, second], "30": [single]}))
    captions = {"139": {"139-output1.png": "one", "139-output2.png": "two"}, "30": {"30-output1.png": "three"}}
    (folder / "local_captions.json").write_text(json.dumps(captions))


def test_magicbrush_single_turn(tmp_path):
    write_magicbrush(tmp_path)
    found = load("magicbrush", tmp_path)
    assert [case.key for case in found.cases] == ["139_1", "139_inde_2", "30_1"]
    assert all(case.scored and case.previous is None for case in found.cases)
    second = found.cases[1]
    assert read_picture(second.source)[0, 0, 0] == 20 and read_picture(second.target)[0, 0, 0] == 30
    assert second.target_caption == "two" and second.extra["file"] == "139/139_inde_2.png"
    masks = [read_mask(case.mask, (16, 24)) for case in found.cases[:2]]
    assert masks[0][:, :12].all() and not masks[0][:, 12:].any() and (masks[1] == ~masks[0]).all()
    assert "clip_out" in found.metrics and "drift" not in found.metrics


def test_magicbrush_multi_turn_scores_the_last(tmp_path):
    write_magicbrush(tmp_path)
    found = load("magicbrush-multi", tmp_path)
    assert [(case.key, case.previous, case.scored) for case in found.cases] == [
        ("139_1", None, False), ("139_iter_2", "139_1", True), ("30_1", None, True),
    ]  # fmt: skip


def test_pie_bench_in_the_folder_above(tmp_path):
    """Its repository has both under data/."""
    (tmp_path / "data").mkdir()
    write_pie(tmp_path / "data", {"000000000001": pie_row([0, 1])})
    assert read_picture(load("pie-bench", tmp_path).cases[0].source).shape == (512, 512, 3)


def test_pie_mask_of_another_size_than_its_picture(tmp_path):
    write_pie(tmp_path, {"000000000001": pie_row([0, 1]), "000000000002": pie_row([0, 1], image="1_change/b.jpg")})
    colour(90, (1024, 1024)).save(tmp_path / "annotation_images/1_change/b.jpg")
    found = load("pie-bench", tmp_path)
    assert len(found.cases) == 1 and "b.jpg is 1024 x 1024" in dict(found.problems)["000000000002"]


def test_rows_without_an_instruction_are_named(tmp_path):
    nothing = pie_row([0, 1]) | {"editing_instruction": None}
    write_pie(tmp_path, {"000000000001": nothing, "000000000002": pie_row([0, 1])})
    assert load("pie-bench", tmp_path).problems == (("000000000001", "ValueError: no instruction"),)
    write_magicbrush(tmp_path)
    sessions = json.loads((tmp_path / "edit_sessions.json").read_text())
    sessions["139"][1]["instruction"] = " "
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    found = load("magicbrush", tmp_path)
    assert [case.key for case in found.cases] == ["30_1"] and found.problems == (("139", "turn 2 has no instruction"),)


def test_a_missing_caption_does_not_take_the_score_from_all(tmp_path):
    write_magicbrush(tmp_path)
    (tmp_path / "local_captions.json").write_text(json.dumps({"139": {"139-output1.png": "one"}}))
    assert "clip_out" in load("magicbrush", tmp_path).metrics


@pytest.mark.parametrize(("name", "column"), [("emu-edit", "image"), ("magicbrush", "source_img"), ("gedit", "key")])
def test_tables_of_another_data_set_are_refused(tmp_path, name, column):
    for split in ("test", "dev"):
        write_parquet(tmp_path / f"data/{split}-0.parquet", [{"input_image": cell(colour(1)), "text": "x"}])
    with pytest.raises(ValueError, match=f"has no column '{column}' but input_image, text"):
        load(name, tmp_path)


def test_a_broken_arrow_file_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="this benchmark comes as tables")
    (tmp_path / "data.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="data.arrow cannot be read"):
        load("gedit", tmp_path)


def test_options_that_would_not_be_used_are_refused(tmp_path, emu):
    (tmp_path / "own.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="is not used for .*own.jsonl.*leave --data out"):
        load(str(tmp_path / "own.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="revision=main is for downloads"):
        load("emu-edit", emu, options={"revision": "main"})


def test_magicbrush_parquet(tmp_path):
    rows = [
        {"img_id": "7", "turn_index": turn, "source_img": cell(colour(turn)), "mask_img": cell(colour(255)),
         "instruction": f"turn {turn}", "target_img": cell(colour(turn + 1))}
        for turn in (2, 1)
    ]  # fmt: skip
    write_parquet(tmp_path / "data/dev-00000-of-00001.parquet", rows, row_group_size=1)
    found = load("magicbrush", tmp_path)
    assert [case.instruction for case in found.cases] == ["turn 1", "turn 2"]
    assert read_picture(found.cases[1].source)[0, 0, 0] == 2 and found.cases[0].mask().all()
    assert "clip_out" not in found.metrics  # no captions there


def test_imgedit(tmp_path):
    (tmp_path / "animal").mkdir()
    colour(5).save(tmp_path / "animal/000342021.jpg")
    rows = {
        "1082": {"id": "animal/000342021.jpg", "prompt": "Add a hat.", "edit_type": "add"},
        "1083": {"id": "animal/000342021.jpg", "prompt": "x", "edit_type": "dance"},
    }
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))
    (tmp_path / "UGE_edit.json").write_text(json.dumps({"0": {"id": "animal/000342021.jpg", "prompt": "y"}}))
    found = load("imgedit", tmp_path)
    assert [(case.key, case.edit_type) for case in found.cases] == [("1082", "add")] and found.metrics == ()
    assert found.problems == (("1083", "ValueError: unknown edit_type 'dance'"),)
    assert load("imgedit", tmp_path, options={"suite": "uge"}).cases[0].edit_type == "uge"


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_gedit(tmp_path, form):
    pa = pytest.importorskip("pyarrow", reason="this benchmark comes as tables")
    rows = [
        {"task_type": kind, "key": key, "instruction": "go", "instruction_language": language,
         "input_image": cell(colour(3)), "input_image_raw": cell(colour(4)), "Intersection_exist": both}
        for kind, key, language, both in (
            ("subject-add", "aa", "en", True), ("subject-add", "bb", "cn", True), ("ps_human", "cc", "en", False),
            ("dance", "dd", "en", True),
        )
    ]  # fmt: skip
    if form == "parquet":
        write_parquet(tmp_path / "data/train-0.parquet", rows)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as sink:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    found = load("gedit", tmp_path)
    assert [case.key for case in found.cases] == ["aa", "cc"] and found.problems[0][0] == "dd"
    assert found.fit == "bicubic" and found.mean_over == "types"
    assert read_picture(found.cases[0].source)[0, 0, 0] == 3
    assert found.cases[0].extra["file"] == "fullset/subject-add/en/aa.png"
    options = {"language": "cn", "subset": "intersection"}
    assert [case.key for case in load("gedit", tmp_path, options=options).cases] == ["bb"]


def test_own_lines(tmp_path):
    colour(1).save(tmp_path / "a.png")
    lines = [
        json.dumps({"source": "a.png", "instruction": "do", "target": "a.png", "type": "add", "key": "x/y"}),
        "{broken",
        json.dumps({"source": "a.png"}),
        json.dumps({"source": "a.png", "instruction": "do", "colour": 3}),
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    found = load(str(tmp_path / "own.jsonl"))
    assert found.cases[0].key == file_key("x/y") and "/" not in found.cases[0].key
    assert found.metrics == ("l1_source", "l1", "l2")
    assert [row for row, _ in found.problems] == ["line 2", "line 3", "line 4"]


def test_own_folder_of_pairs(tmp_path):
    from varedit.data.synthetic import write_world

    write_world(tmp_path / "pairs", 3, size=128)
    found = load(str(tmp_path / "pairs"))
    assert len(found.cases) == 3 and {"l1", "psnr", "stray"} <= set(found.metrics)
    assert read_mask(found.cases[0].mask, (128, 128)).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pie-bench", None, "form"),
        ("imgedit", None, "Benchmark.tar"),
        ("nonsense", None, "'nonsense' is unknown; use procedural, emu-edit, .*gedit, or name a folder"),
        ("procedural", {"a": "b"}, "takes seed"),
        ("procedural", {"seed": "one"}, "seed is 'one'"),
        ("gedit", {"colour": "red"}, "reader option 'colour' is unknown"),  # told before anything is downloaded
        ("gedit", None, "cannot be downloaded .*stepfun-ai/GEdit-Bench.*--data"),
    ],
)
def test_missing_data_says_how_to_get_it(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, options=options)


def test_unknown_reader_option_and_value(emu):
    with pytest.raises(ValueError, match="bad_captions is 'maybe'"):
        load("emu-edit", emu, options={"bad_captions": "maybe"})
    with pytest.raises(ValueError, match="unknown"):
        load("emu-edit", emu, options={"colour": "red"})


class Hub:
    """The part of the hub's interface that a download uses: one data set with some files at one commit."""

    def __init__(self, repository, commit, files):
        self.asked = []
        outer = self
        root = f"/datasets/{repository}/resolve/{commit}/"

        class Handler(BaseHTTPRequestHandler):
            def reply(self, data, head=False, **headers):
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if not head:
                    self.wfile.write(data)

            def do_GET(self, head=False):
                path = unquote(urlparse(self.path).path)
                outer.asked.append(path)
                if path.startswith(f"/api/datasets/{repository}/revision/"):
                    about = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                    self.reply(json.dumps(about).encode(), head, Content_Type="application/json")
                elif path == f"/api/datasets/{repository}/tree/{commit}":
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                    self.reply(json.dumps(entries).encode(), head, Content_Type="application/json")
                elif path.startswith(root) and path.removeprefix(root) in files:
                    data = files[path.removeprefix(root)]
                    etag = hashlib.sha256(data).hexdigest()
                    self.reply(data, head, ETag=f'"{etag}"', X_Repo_Commit=commit)
                else:
                    self.send_error(404)

            def do_HEAD(self):
                self.do_GET(head=True)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_a_benchmark_is_downloaded_at_its_pinned_commit(emu, tmp_path):
    """In a process of its own: the hub's address is read when its library is imported."""
    commit = SOURCES["emu-edit"].revision
    files = {f"data/{path.name}": path.read_bytes() for path in (emu / "data").iterdir()} | {"huge.bin": b"x"}
    hub = Hub("facebook/emu_edit_test_set", commit, files)
    program = "import sys; from varedit.evaluation.benchmarks import load; b = load('emu-edit'); "
    program += "print(len(b.cases), b.settings['revision'])"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    hub.server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", commit]
    fetched = {path.partition("/resolve/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {f"{commit}/{name}" for name in files if name != "huge.bin"}  # only what is needed
