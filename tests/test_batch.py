"""Batches: job lists, equality with single edits, records, resuming, death in the middle."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from varedit.cli import batch as command
from varedit.editing.batch import RESULTS, BatchOptions, Worker, prepare_output, read_results, run_batch
from varedit.editing.edit import Settings, apply_edit
from varedit.editing.jobs import Job, group_jobs, read_jobs
from varedit.editing.manifest import make_manifest, read_manifest, save_with_manifest
from varedit.editing.mask import image_mask
from varedit.editing.ray_batch import processors_each
from varedit.image_processor import load_image
from varedit.pipeline import load_pipeline
from varedit.testing import tiny_pipeline

SHAPES = {"wide": (90, 60), "square": (64, 64), "other": (92, 60), "tall": (60, 90)}


@pytest.fixture(scope="module")
def model(model_folder):
    return str(model_folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of three shapes, a mask, and a list that names them, one that is missing and one that is none.

    One of the pictures is transparent in places.
    """
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, (width, height) in SHAPES.items():
        channels = 4 if name == "wide" else 3
        Image.fromarray(random.integers(0, 256, (height, width, channels), np.uint8)).save(folder / f"{name}.png")
    mask = Image.new("L", SHAPES["tall"])
    mask.paste(255, (10, 10, 40, 60))
    mask.save(folder / "mask.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "._wide.png").write_bytes(b"what a Mac notes about wide.png")
    rows = [
        {"image": "wide.png", "instruction": "blur", "seed": 3},
        {"image": "missing.png", "instruction": "blur"},
        {"image": "tall.png", "instruction": "paint it", "mask": "mask.png", "output": "sub/a.jpg"},
        {"image": "square.png", "instruction": "make it 'red', please", "seed": "12"},
        {"image": "broken.jpg", "instruction": "blur"},
        {"image": "other.png", "instruction": "sharpen"},
    ]
    (folder / "jobs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def jobs(pictures):
    return read_jobs(pictures / "jobs.jsonl", seed=8)


@pytest.fixture(scope="module")
def singles(jobs, model, tmp_path_factory):
    """Each good job as a single edit, by the name of its output."""
    pipeline = load_pipeline(model, "cpu")
    folder = tmp_path_factory.mktemp("singles")
    (folder / "sub").mkdir()
    for job in jobs:
        if job.image.stem in SHAPES:
            source = load_image(job.image)
            mask = image_mask(job.mask, source.rgb.size) if job.mask else None
            result = apply_edit(pipeline, source, job.instruction, seed=job.seed, mask=mask)
            name = job.mask.name if job.mask else None
            manifest = make_manifest(result, pipeline, input_name=job.image.name, mask_name=name)
            save_with_manifest(result.pixels, folder / job.output, manifest, source)
    return files_below(folder)


@pytest.fixture
def options(model):
    """With as many threads as the single edits."""
    return BatchOptions(model, "cpu", num_threads=torch.get_num_threads())


@pytest.fixture(scope="module")
def finished(jobs, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    options = BatchOptions(model, "cpu", batch_size=2)
    run_batch(prepare_output(folder, jobs, options), folder, options)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != RESULTS]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# -- job lists


def test_json_lines(jobs, pictures):
    assert [job.image.name for job in jobs] == [
        "wide.png", "missing.png", "tall.png", "square.png", "broken.jpg", "other.png",
    ]  # fmt: skip
    assert [job.seed for job in jobs] == [3, 8, 8, 12, 8, 8]
    assert jobs[2].mask == pictures / "mask.png" and jobs[2].output == "sub/a.jpg"
    assert jobs[0].output == "wide.edited.png" and jobs[4].output == "broken.edited.jpg"
    assert [Job.from_json(json.loads(json.dumps(job.to_json()))) for job in jobs] == jobs


def test_csv_says_the_same_as_json_lines(jobs, pictures):
    lines = ["image,instruction,seed,mask,output"]
    for job in jobs:
        mask, output = ("mask.png", "sub/a.jpg") if job.mask else ("", "")
        lines.append(f'{job.image.name},"{job.instruction}",{job.seed},{mask},{output}')
    (pictures / "jobs.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    read = read_jobs(pictures / "jobs.csv")
    assert [replace(job, line=0) for job in read] == [replace(job, line=0) for job in jobs]


def test_a_folder_is_its_pictures(pictures):
    read = read_jobs(pictures, instruction="blur", seed=4)
    assert [job.image.name for job in read] == [
        "broken.jpg", "mask.png", "other.png", "square.png", "tall.png", "wide.png",
    ]  # fmt: skip
    assert {(job.instruction, job.seed) for job in read} == {("blur", 4)}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", '{"image": "a.png", "instruction": "x"}\n{"image"', "line 2 is no JSON"),
        ("a.jsonl", "[1]", "line 1 is no object"),
        ("a.jsonl", '{"image": "a", "instruction": "x", "mask_convention": "black"}', "line 1: mask_convention"),
        ("a.jsonl", '{"instruction": "x"}', "line 1: image is missing"),
        ("a.jsonl", '{"image": "", "instruction": "x"}', "line 1: image is missing"),
        ("a.jsonl", '{"image": "a.png"}', "line 1: instruction is missing"),
        ("a.jsonl", '{"image": "a.png", "instruction": " "}', "is empty"),
        ("a.jsonl", '{"image": 3, "instruction": "x"}', "image 3"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x", "seed": "many"}', "many"),
        ("a.jsonl", '{"image": "a\\u0000.png", "instruction": "x"}', "null character"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x", "seed": 1.5}', "1.5"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x", "seed": -1}', "-1"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x", "output": "../b.png"}', r"\.\./b.png"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x", "output": "/b.png"}', "/b.png"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x", "output": "b.gif"}', "b.gif"),
        ("a.jsonl", '{"image": "a.png", "instruction": "x"}\n' * 2, r"lines 1 and 2 \(a.png, a.png\) would both"),
        ("a.jsonl", "\n", "nothing to do"),
        ("a.csv", "picture,instruction\na.png,x", "no column 'image'"),
        ("a.csv", "image,instruction\na.png,x,y", "line 2 has more cells"),
        ("a.csv", 'image,instruction\n"a.png,x', "is no CSV"),
        ("a.txt", "a.png", "neither"),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_unusable_lists_are_named(name, content, named, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=named) as caught:
        read_jobs(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_empty_values_are_missing_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "instruction": "", "seed": "", "mask": "", "output": ""}')
    (tmp_path / "a.csv").write_text("image,instruction,seed,mask,output\na.png,,,,\n")
    for name in ("a.jsonl", "a.csv"):
        (job,) = read_jobs(tmp_path / name, instruction="blur", seed=4)
        assert (job.instruction, job.seed, job.mask, job.output) == ("blur", 4, None, "a.edited.png")


def test_columns_not_used_are_named_once(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("image,instruction,author\na.png,x,me\nb.png,x,me\n")
    assert len(read_jobs(tmp_path / "a.csv")) == 2
    assert [record.getMessage() for record in caplog.records] == ["a.csv: columns not used: author"]


def test_lists_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_jobs(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        read_jobs(tmp_path / ("a" * 300 + ".csv"))
    with pytest.raises(ValueError, match="--instruction"):
        read_jobs(tmp_path)
    with pytest.raises(ValueError, match="nothing to do"):
        read_jobs(tmp_path, instruction="blur")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)  # tests may run as the superuser, who may read anything
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ValueError, match=f"{tmp_path.name}' cannot be read .Permission denied"):
        read_jobs(tmp_path, instruction="blur")


def test_jobs_are_the_same_in_any_folder(jobs, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    assert read_jobs(Path("jobs.jsonl"), seed=8) == jobs
    monkeypatch.chdir(pictures.parent)
    assert read_jobs(Path(pictures.name) / "jobs.jsonl", seed=8) == jobs


def test_one_shape_in_a_row(jobs):
    def names(chunks):
        return [[job.image.stem for job in chunk] for chunk in chunks]

    assert names(group_jobs(jobs, 128, 2)) == [["wide", "other"], ["tall"], ["square"], ["missing", "broken"]]
    assert names(group_jobs(jobs, 128, 1))[:2] == [["wide"], ["other"]]


def test_a_turned_photo_is_grouped_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (60, 90)).save(tmp_path / "b.jpg")
    assert len(group_jobs(read_jobs(tmp_path, instruction="blur"), 128, 2)) == 1


def test_pictures_that_no_codec_can_make_out_do_not_end_the_batch(tmp_path):
    header = bytearray(128)
    header[:4], header[84:88] = b"DDS ", b"ZZZZ"  # a pixel format that nobody knows
    header[4], header[12], header[16], header[76], header[80] = 124, 8, 8, 32, 4
    (tmp_path / "odd.dds").write_bytes(header)
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*")  # ends in its header
    Image.new("RGB", (90, 60)).save(tmp_path / "b.jpg")
    (tmp_path / "jobs.csv").write_text("image,instruction\nodd.dds,blur\na.jpg,blur\nb.jpg,blur\n")
    chunks = group_jobs(read_jobs(tmp_path / "jobs.csv"), 128, 2)
    assert [[job.image.name for job in chunk] for chunk in chunks] == [["a.jpg", "b.jpg"], ["odd.dds"]]


# -- running


def test_a_mixed_batch_equals_single_edits(finished, singles):
    assert files_below(finished) == singles


def test_transparency_is_kept_in_a_batch(finished, pictures):
    source, edited = (Image.open(path) for path in (pictures / "wide.png", finished / "wide.edited.png"))
    assert source.mode == edited.mode == "RGBA"
    assert edited.getchannel("A").tobytes() == source.getchannel("A").tobytes()
    assert edited.convert("RGB").tobytes() != source.convert("RGB").tobytes()


def test_the_record_has_a_line_a_job(finished, jobs, singles):
    records = {record["output"]: record for record in read_results(finished)}
    assert set(records) == {job.output for job in jobs}
    failed = {name: record["error"] for name, record in records.items() if record["status"] == "failed"}
    assert set(failed) == {"missing.edited.png", "broken.edited.jpg"}
    assert "missing.png" in failed["missing.edited.png"] and "broken.jpg" in failed["broken.edited.jpg"]
    for name in singles:
        assert records[name]["status"] == "ok" and records[name]["change"]["kind"] in ("none", "local", "global")


def test_resume_does_what_is_missing(finished, jobs, singles, options, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    assert [job.image.stem for job in prepare_output(folder, jobs, options, resume=True)] == ["missing", "broken"]
    (folder / "sub/a.jpg").unlink()  # gone
    (folder / "wide.edited.png").write_bytes((folder / "other.edited.png").read_bytes())  # not what was recorded
    record = (folder / RESULTS).read_bytes()
    square = next(line for line in record.splitlines() if b"square.edited" in line)
    # Written, but not recorded; and the line that was being written when the power went.
    (folder / RESULTS).write_bytes(record.replace(square + b"\n", b"") + square[:40])
    (folder / ".varedit-0123.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"wide\.edited\.png' exists already"):
        prepare_output(folder, jobs, options, resume=True)
    (folder / "wide.edited.png").unlink()
    todo = prepare_output(folder, jobs, options, resume=True)
    assert [job.image.stem for job in todo] == ["wide", "missing", "tall", "square", "broken"]
    run_batch(todo, folder, options)
    assert files_below(folder) == singles
    assert all(json.loads(line) for line in (folder / RESULTS).read_text().splitlines())


def test_what_is_there_is_kept(finished, jobs, options, tmp_path, model):
    with pytest.raises(ValueError, match="--resume"):
        prepare_output(finished, jobs, options)
    with pytest.raises(ValueError, match="other settings"):
        prepare_output(finished, jobs, replace(options, settings=Settings(temperature=0.9)), resume=True)
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        prepare_output(finished, jobs, replace(options, model=str(tmp_path / "other")), resume=True)
    mine = tmp_path / "out" / "wide.edited.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"wide\.edited\.png' exists already"):
            prepare_output(mine.parent, jobs, options, resume=resume)
    assert mine.read_bytes() == b"mine"
    assert len(prepare_output(mine.parent, jobs, replace(options, overwrite=True))) == len(jobs)
    for damaged in ('{"output": 1}', '{"output": [], "status": "ok", "settings": {}, "model": ""}', "\xff"):
        (tmp_path / "out" / RESULTS).write_bytes(damaged.encode("latin-1") + b"\n")
        with pytest.raises(ValueError, match="line 1 is damaged"):
            prepare_output(tmp_path / "out", jobs, options, resume=True)
    with pytest.raises(ValueError, match="File name too long: .*aaa"):
        prepare_output(tmp_path / "new", [replace(jobs[0], output="a" * 300 + ".png")], options)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("model_index.json", {"guidance_scale": 1.5}, "other settings"),
        ("transformer/config.json", {"position_layout": "fixed_offset"}, "another model"),
    ],
)
def test_a_model_changed_meanwhile_is_noticed(file, values, named, finished, jobs, options, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    options = replace(options, model=str(tmp_path / "model"))
    assert len(prepare_output(finished, jobs, options, resume=True)) == 2
    config = tmp_path / "model" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(ValueError, match=named):
        prepare_output(finished, jobs, options, resume=True)
    # An earlier version recorded what was asked, and weights only.
    shutil.copytree(finished, tmp_path / "out")
    asked = {"settings": options.settings.to_json()}
    records = [record | asked for record in read_results(finished)]
    for record in records:
        record.pop("configs", None)
    (tmp_path / "out" / RESULTS).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(prepare_output(tmp_path / "out", jobs, options, resume=True)) == 2


def test_what_was_changed_since_it_was_recorded_is_kept(finished, jobs, options, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    mine = folder / "wide.edited.png"
    changed = mine.read_bytes() + b"a caption"  # pixels and manifest stay
    mine.write_bytes(changed)
    assert read_manifest(mine).instruction == jobs[0].instruction
    with pytest.raises(ValueError, match=r"wide\.edited\.png' exists already.*move it away.*--overwrite"):
        prepare_output(folder, jobs, options, resume=True)
    assert mine.read_bytes() == changed
    assert jobs[0] in prepare_output(folder, jobs, replace(options, overwrite=True), resume=True)
    mine.rename(tmp_path / "kept.png")
    assert jobs[0] in prepare_output(folder, jobs, options, resume=True)


def test_a_batch_that_never_began_costs_no_record(finished, jobs, options, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    before = (folder / RESULTS).read_bytes()
    anew = replace(options, overwrite=True)
    todo = prepare_output(folder, jobs, anew)
    with pytest.raises(ValueError, match="nowhere"):
        run_batch(todo, folder, replace(anew, model=str(tmp_path / "nowhere")), anew=True)
    assert (folder / RESULTS).read_bytes() == before
    run_batch(todo[:1], folder, anew, anew=True)
    assert [record["output"] for record in read_results(folder)] == ["wide.edited.png"]


def test_a_disk_full_at_the_record_is_named(jobs, options, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"results\.jsonl' cannot be written \(No space left on device\).*--resume"):
        run_batch(jobs[:1], tmp_path, options)


def test_a_batch_that_replaces_can_be_resumed(finished, jobs, singles, options, tmp_path):
    """Killed with --overwrite among older files, it goes on with both options."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    options = replace(options, overwrite=True)
    older = [replace(job, instruction="sharpen") for job in jobs]
    run_batch(prepare_output(folder, older, options)[:3], folder, options, anew=True)
    todo = prepare_output(folder, jobs, options, resume=True)
    assert len(todo) == len(jobs)  # the record is of another instruction
    with pytest.raises(ValueError, match="exists already"):
        prepare_output(folder, jobs, replace(options, overwrite=False), resume=True)
    run_batch(todo, folder, options)
    assert files_below(folder) == singles
    assert [job.image.stem for job in prepare_output(folder, jobs, options, resume=True)] == ["missing", "broken"]


def test_inputs_and_side_files_are_never_outputs(jobs, pictures, options, tmp_path):
    for name in ("wide.png", "mask.png"):
        with pytest.raises(ValueError, match=f"{name}' is an input"):
            prepare_output(pictures, [*jobs[1:], replace(jobs[0], output=name)], replace(options, overwrite=True))
    assert not (pictures / RESULTS).exists()
    os.link(pictures / "wide.png", tmp_path / "WIDE.png")  # as where wide.png and WIDE.png are one file
    with pytest.raises(ValueError, match="WIDE.png' is an input"):
        prepare_output(tmp_path, [replace(jobs[0], output="WIDE.png")], replace(options, overwrite=True))
    (tmp_path / "wide.tiff.varedit.json").write_text("mine")
    with pytest.raises(ValueError, match=r"wide\.tiff\.varedit\.json' exists"):
        prepare_output(tmp_path, [replace(jobs[0], output="wide.tiff")], options)
    assert prepare_output(tmp_path, [replace(jobs[0], output="wide.png")], options)  # its manifest is inside


def test_bad_masks_fail_by_themselves(jobs, pictures, options, tmp_path):
    Image.new("L", SHAPES["wide"]).save(tmp_path / "empty.png")
    masks = [pictures / "mask.png", tmp_path / "empty.png", tmp_path / "none.png", pictures / "broken.jpg", None]
    todo = [replace(jobs[0], line=n, mask=mask, output=f"{n}.png") for n, mask in enumerate(masks)]
    (tmp_path / "out").mkdir()
    records = run_batch(todo, tmp_path / "out", options)
    errors = {record["line"]: record["error"] for record in records}
    for line, named in enumerate(["another aspect ratio", "the mask is empty", "none.png", "broken.jpg"]):
        assert named in errors[line] and "\n" not in errors[line]
    assert errors[4] is None and list(files_below(tmp_path / "out")) == ["4.png"]


def test_masks_may_be_transparent_where_the_edit_goes(pictures, options, tmp_path):
    white = np.asarray(Image.open(pictures / "mask.png"))
    Image.fromarray(np.dstack([white, white, white, 255 - white])).save(tmp_path / "hole.png")
    common = {"image": str(pictures / "tall.png"), "instruction": "paint it", "seed": 8}
    rows = [
        common | {"mask": str(pictures / "mask.png"), "output": "white.png"},
        common | {"mask": "hole.png", "mask_convention": "transparent", "output": "clear.png"},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    jobs = read_jobs(tmp_path / "jobs.jsonl")
    assert [job.mask_convention for job in jobs] == ["white", "transparent"]
    every = read_jobs(tmp_path / "jobs.jsonl", mask_convention="transparent")
    assert {job.mask_convention for job in every} == {"transparent"}
    output = tmp_path / "out"
    output.mkdir()
    assert all(record["status"] == "ok" for record in run_batch(jobs, output, options))
    first, second = (load_image(output / name).rgb for name in ("white.png", "clear.png"))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert prepare_output(output, jobs, options, resume=True) == []
    assert prepare_output(output, [every[0]], options, resume=True) == [every[0]]  # nobody has touched the file


def test_what_nobody_foresaw_fails_by_itself(jobs, options, tmp_path):
    records = run_batch([replace(jobs[0], output=None), jobs[3]], tmp_path, options)
    assert [record["status"] for record in sorted(records, key=lambda record: record["line"])] == ["failed", "ok"]
    assert "TypeError: " in next(record["error"] for record in records if record["status"] == "failed")


def test_another_instruction_is_another_job(finished, jobs, options):
    changed = [replace(jobs[0], instruction="sharpen")]
    with pytest.raises(ValueError, match="exists already"):  # the file is the other job's
        prepare_output(finished, changed, options, resume=True)


def test_impossible_options_are_refused():
    for name in ("batch_size", "num_workers", "num_threads"):
        with pytest.raises(ValueError, match=name):
            BatchOptions(**{name: 0})


@pytest.mark.parametrize(("size", "named"), [(256, "size 256"), (None, "text encoder")])
def test_what_no_picture_can_be_edited_with_is_refused_at_once(size, named, pictures, model, varedit, tmp_path):
    folder = tmp_path / "model"
    if size:
        tiny_pipeline(num_levels=5).save_pretrained(folder)  # of 128 pixels only
    else:
        shutil.copytree(model, folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    sized = ["--size", size] if size else []
    for _ in range(2):  # nothing of the first stands in the way of the second
        varedit("batch", pictures / "jobs.jsonl", "-o", tmp_path / "out", "--model", folder, *sized).assert_refused(
            named
        )
        assert read_results(tmp_path / "out") == []


def test_processes_take_the_threads_they_are_told(options, tmp_path):
    before = torch.get_num_threads()
    try:
        Worker(tmp_path, replace(options, num_threads=before + 2))
        assert torch.get_num_threads() == before + 2
        Worker(tmp_path, replace(options, num_threads=None, num_workers=2))
        assert torch.get_num_threads() == (before + 2) // 2
    finally:
        torch.set_num_threads(before)


# -- the command


def test_the_command_tells_how_far_it_is(pictures, model, singles, varedit, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "NEWS_SECONDS", 0)
    arguments = ["batch", pictures / "jobs.jsonl", "-o", tmp_path / "out", "--seed=8", "--model", model, "--device=cpu"]
    ran = varedit(*arguments)
    assert ran.code == command.SOME_FAILED and "4 edited, 2 failed" in ran.out
    lines = ran.err.splitlines()
    assert [line.split(",")[0] for line in lines if "left" in line] == [f"{done} of 6" for done in range(1, 7)]
    assert lines[-1].endswith("0:00:00 left") and sum(line.startswith("failed: line ") for line in lines) == 2
    assert files_below(tmp_path / "out") == singles
    varedit(*arguments).assert_refused("results.jsonl", "--resume")
    assert "0 edited, 2 failed, 4 were done before" in varedit(*arguments, "--resume").out


def test_time_left_is_that_of_the_mean_so_far():
    assert command._time_left(30, 1, 4) == "0:01:30 left"
    assert command._time_left(7200, 1, 25) == "2 days, 0:00:00 left"


def test_the_pictures_own_folder_is_not_written_to(pictures, varedit):
    before = files_below(pictures)
    varedit("batch", pictures, "-o", pictures / ".", "--instruction=x", "--overwrite").assert_refused("name another")
    assert files_below(pictures) == before


# -- death in the middle


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_and_resumed(workers, jobs, pictures, model, singles, options, tmp_path):
    out = tmp_path / "out"
    command = ["batch", pictures / "jobs.jsonl", "-o", out, "--seed=8", "--model", model, "--device=cpu"]
    code = "import sys; from varedit.cli import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", code, *map(str, command), f"--workers={workers}"]
    arguments.append(f"--threads={torch.get_num_threads()}")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / RESULTS).exists() and b'"ok"' in (out / RESULTS).read_bytes()):
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive  # workers do not outlive the batch

    for name, data in files_below(out).items():  # each is whole
        if not name.endswith(".tmp"):
            assert data == singles[name]
    todo = prepare_output(out, jobs, options, resume=True)
    assert len(todo) < len(jobs)
    run_batch(todo, out, options)
    assert files_below(out) == singles


@pytest.mark.slow
def test_workers_give_the_same_files(jobs, singles, options, tmp_path):
    options = replace(options, num_workers=2, batch_size=2)
    run_batch(prepare_output(tmp_path, jobs, options), tmp_path, options)
    assert files_below(tmp_path) == singles


@pytest.mark.slow
def test_a_worker_that_dies_costs_nothing(jobs, singles, options, tmp_path):
    killed = []

    def kill_one(record):
        if record["status"] == "ok" and not killed:
            killed.append(next(p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())))
            killed[0].kill()

    options = replace(options, num_workers=2)
    records = run_batch(prepare_output(tmp_path, jobs, options), tmp_path, options, on_result=kill_one)
    assert killed and sorted(record["output"] for record in records) == sorted(job.output for job in jobs)
    assert files_below(tmp_path) == singles


def test_workers_that_always_die_end_the_batch(jobs, options, tmp_path):
    ended = threading.Event()

    def kill_all():
        while not ended.wait(0.05):
            for process in psutil.Process().children():
                if "spawn_main" in " ".join(process.cmdline()):
                    process.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(ValueError, match="worker processes die"):
            run_batch(jobs[:3], tmp_path, replace(options, num_workers=2))
    finally:
        ended.set()
        killer.join()
    assert (tmp_path / RESULTS).read_bytes() == b"" and files_below(tmp_path) == {}


@pytest.mark.slow
def test_workers_without_a_model_say_why(jobs, options, tmp_path):
    options = replace(options, num_workers=2, model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        run_batch(jobs, tmp_path, options)


# -- Ray


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_one_line_says_so():
    from varedit.editing.ray_batch import require_ray

    with pytest.raises(ValueError, match="pip install"):
        require_ray()


def test_processors_are_shared_out():
    assert [processors_each([2], count) for count in (1, 2, 4, 5)] == [2, 1, 1 / 2, 1 / 3]
    assert [processors_each([16, 4], count) for count in (1, 2, 3)] == [16, 8, 5]
    assert processors_each([4, 4, 4, 4], 2) == 4  # an actor lies on one machine
    assert processors_each([1], 49) == 1 / 49 and processors_each([], 3) == 1


@pytest.mark.slow
def test_on_ray_the_files_are_the_same(jobs, singles, options, tmp_path):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray[data]")
    from varedit.editing.ray_batch import run_on_ray

    options = replace(options, num_workers=2)
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        records = run_batch(prepare_output(tmp_path, jobs, options), tmp_path, options, run=run_on_ray)
    finally:
        ray.shutdown()
    assert files_below(tmp_path) == singles
    assert {record["image"] for record in records} == {str(job.image) for job in jobs}


def test_read_manifest_of_a_batch_replays(finished, jobs, model):
    from varedit.editing.replay import replay

    job = next(job for job in jobs if job.image.stem == "tall")
    source = load_image(job.image)
    manifest = read_manifest(finished / job.output)
    assert (manifest.instruction, manifest.input["name"], manifest.mask["name"]) == ("paint it", "tall.png", "mask.png")
    assert replay(manifest, source, load_pipeline(model, "cpu"), image_mask(job.mask, source.rgb.size)).same
