"""The data of a run: a function of seed and step, gone through evenly, and what is unusable named."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import CPU, SHAPES

from varedit.data.faults import skip_faults
from varedit.data.packing import pack
from varedit.data.readers import read
from varedit.scales import nearest_schedule
from varedit.training.data import HeldOut, MicroBatches, Plan
from varedit.training.run import train
from varedit.training.sources import open_pairs

pytest_plugins = ["training_runs"]


def test_a_batch_is_a_function_of_seed_and_step(editor_config, tmp_path):
    pairs, _ = open_pairs(editor_config("data.source=world"), CPU, tmp_path)
    long, short = (Plan(pairs, steps, 4, seed=3) for steps in (50, 20))
    assert [long.schedule(step) for step in range(20)] == [short.schedule(step) for step in range(20)]
    assert len({long.schedule(step) for step in range(50)}) > 3
    whole, halves = MicroBatches(long, 4)[5], [MicroBatches(short, 2)[number] for number in (10, 11)]
    assert torch.equal(whole.target_B3HW, torch.cat([half.target_B3HW for half in halves]))
    assert whole.positions == halves[0].positions + halves[1].positions and whole.step == halves[1].step == 5


def test_a_folder_is_gone_through_evenly_in_buckets_of_its_own_shapes(editor_config, tmp_path):
    found, held_out = open_pairs(editor_config("data.sizes={128: 3, 256: 1}", "steps=400"), CPU, tmp_path)
    assert held_out is None
    plan = Plan(found, 400, 2, seed=0)
    seen = {size: np.zeros(len(SHAPES), int) for size in (128, 256)}
    for step in range(400):
        schedule = plan.schedule(step)
        numbers = plan.numbers(step, range(2))
        assert {nearest_schedule(schedule.size, *SHAPES[number]) for number in numbers} == {schedule}
        np.add.at(seen[schedule.size], numbers, 1)
    assert 2 < seen[128].sum() / seen[256].sum() < 4.5
    assert seen[128].min() > 0.6 * seen[128].mean()


def test_a_run_is_not_validated_on_what_it_trains_on(editor_config, tmp_path, pairs_folder):
    with pytest.raises(ValueError, match="data.validation is data.source"):
        open_pairs(editor_config(f"data.validation={pairs_folder}", "data.validation_count=2"), CPU, tmp_path)


def test_the_worlds_held_out_pairs_are_as_many_as_asked_for_whatever_the_micro_batch(editor_config, tmp_path):
    _, held_out = open_pairs(editor_config("data.source=world", "data.validation_count=10"), CPU, tmp_path)
    found = []
    for size in (4, 16):
        held = HeldOut(held_out, 10, size, seed=0)
        found.append([text for index in range(len(held)) for text in held.batch(index).instructions])
    assert len(found[0]) == 10 and found[0] == found[1]


@pytest.mark.parametrize("name", ["data.json", "model", "metrics.jsonl"])
def test_what_a_run_would_write_over_is_left_alone(editor_config, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("[1, 2]")
    (folder / "slurm-1.out").write_text("other things are no matter")
    with pytest.raises(ValueError, match=f"already holds .*'{name}'; give another folder"):
        train(editor_config(), folder)
    assert (folder / name).read_text() == "[1, 2]" and len(list(folder.iterdir())) == 2


def test_held_out_pairs_are_not_trained_on(editor_config, tmp_path):
    found, held_out = open_pairs(editor_config("data.validation_count=2"), CPU, tmp_path)
    origins = [[entry["origin"] for entry in part.entries] for part in (found, held_out)]
    assert [len(part) for part in origins] == [4, 2] and not set(origins[0]) & set(origins[1])


def test_bad_pairs_are_skipped_counted_and_named(editor_config, tmp_path, pairs_folder, caplog):
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = (pairs_folder / "pairs.jsonl").read_bytes().splitlines()
    (folder / "images").symlink_to(pairs_folder / "images")
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    bad = json.loads(lines[0]) | {"target": "small.png"}
    gone = json.loads(lines[0]) | {"source": "gone.png"}
    outside = json.loads(lines[0]) | {"source": "../config.yaml"}
    extra = [json.dumps(row).encode() for row in (bad, gone, outside)] + [b'{"instructions": "\xff"}']
    (folder / "pairs.jsonl").write_bytes(b"\n".join([*lines, *extra]))
    with pytest.raises(ValueError, match=r"6 pairs, 4 skipped.*max_bad_fraction above 0\.4"):
        open_pairs(editor_config(f"data.source={folder}"), CPU, tmp_path / "refused")
    found, _ = open_pairs(editor_config(f"data.source={folder}", "data.max_bad_fraction=0.5"), CPU, tmp_path)
    assert len(found.entries) == len(SHAPES)
    for words in ("line 7: sizes differ", "line 8: missing image", "line 9: bad row", "line 10: not UTF-8"):
        assert words in caplog.text


def copy_of(pairs: Path, folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "pairs.jsonl").write_bytes((pairs / "pairs.jsonl").read_bytes())
    for path in (pairs / "images").iterdir():
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_picture_that_goes_bad_later_is_replaced(editor_config, tmp_path, pairs_folder):
    folder = copy_of(pairs_folder, tmp_path / "pairs")
    found, _ = open_pairs(editor_config(f"data.source={folder}"), CPU, tmp_path)
    broken = folder / "images/0000001_target.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    plan = Plan(found, 40, 3, seed=0)
    step = next(step for step in range(40) if 1 in plan.numbers(step, range(3)))
    batch = MicroBatches(plan, 3)[step]
    assert len(batch.skipped) == 1 and "line 2" in batch.skipped[0]
    assert len(batch.target_B3HW) == 3 and not batch.error


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_lost_shard_counts_for_its_pairs(editor_config, tmp_path, pairs_folder, damage):
    """A run that may lose one pair in ten must not go on with half of its shards."""
    pack(read(pairs_folder), tmp_path / "shards", size=128, records_per_shard=3)
    first = max((tmp_path / "shards").glob("1.000-*.tar"), key=lambda path: path.stat().st_size)
    if damage == "missing":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes()[:2000])
    words = rf"3 pairs, 3 skipped \({damage} shard 3\).*max_bad_fraction above 0\.5"
    with pytest.raises(ValueError, match=words):
        open_pairs(editor_config(f"data.source={tmp_path / 'shards'}", "data.max_bad_fraction=0.4"), CPU, tmp_path)
    with pytest.raises(ValueError, match="50% is more than max_skipped 40%"):
        list(skip_faults(read(tmp_path / "shards"), max_skipped=0.4))
    assert len(list(skip_faults(read(tmp_path / "shards"), max_skipped=0.5))) == 3


def test_the_runs_log_names_what_it_skipped(editor_config, tmp_path, pairs_folder):
    """At the start of the run and, after a picture has gone bad, of the resumed one; a refused run leaves none."""
    folder, run = copy_of(pairs_folder, tmp_path / "pairs"), tmp_path / "run"
    (folder / "images/0000003_source.png").unlink()
    changes = [f"data.source={folder}", "steps=3"]
    with pytest.raises(ValueError, match="5 pairs, 1 skipped"):
        train(editor_config(*changes), run)
    assert not run.exists()
    changes.append("data.max_bad_fraction=0.5")
    train(editor_config(*changes), run)
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "WARNING skipped" in line]
    assert "line 4: missing image: images/0000003_source.png" in line
    for path in folder.glob("images/*_target.png"):
        if "0000000" not in path.name:
            path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be used"):
        train(editor_config(*changes, "steps=20"), run, resume=True)
    assert re.search(r"WARNING skipped .*line \d: .*_target\.png' is damaged", (run / "log.txt").read_text())


def test_a_folder_that_was_rewritten_is_not_resumed(editor_config, tmp_path, pairs_folder):
    folder, run = copy_of(pairs_folder, tmp_path / "pairs"), tmp_path / "run"
    settings = editor_config(f"data.source={folder}")
    open_pairs(settings, CPU, run)
    lines = (folder / "pairs.jsonl").read_bytes()
    (folder / "pairs.jsonl").write_bytes(lines.replace(b"invert it", b"turn it over"))
    with pytest.raises(ValueError, match="has changed since this run began"):
        open_pairs(settings, CPU, run)
    (folder / "pairs.jsonl").write_bytes(lines)
    found, _ = open_pairs(settings, CPU, run)
    assert found.entries[0]["instructions"][0] == "invert it"


def test_shards_that_were_packed_anew_are_not_resumed(editor_config, tmp_path, pairs_folder):
    settings, shards = editor_config(f"data.source={tmp_path / 'shards'}"), tmp_path / "shards"
    pack(read(pairs_folder), shards, size=128)
    open_pairs(settings, CPU, tmp_path / "run")
    shutil.rmtree(shards)
    pack(list(read(pairs_folder))[:5], shards, size=128)
    with pytest.raises(ValueError, match="has changed since this run began"):
        open_pairs(settings, CPU, tmp_path / "run")


def test_the_scan_of_an_earlier_version_is_resumed(editor_config, tmp_path):
    """It does not say what it is of, and `data.json` not how many pairs are held out."""
    settings, index, facts = (
        editor_config("data.validation_count=2"),
        tmp_path / "pairs.index.json",
        tmp_path / "data.json",
    )
    found, _ = open_pairs(settings, CPU, tmp_path)
    index.write_text(index.read_text().splitlines()[1])
    known = json.loads(facts.read_text())
    del known["held_out"]
    facts.write_text(json.dumps(known))
    again, _ = open_pairs(settings, CPU, tmp_path)
    assert again.entries == found.entries and index.read_text().startswith("[")


def test_another_validation_folder_is_scanned_anew(editor_config, tmp_path, pairs_folder):
    """Two folders may list their pairs in the same words, though their pictures have other shapes."""
    folders = [copy_of(pairs_folder, tmp_path / name) for name in ("first", "second")]
    for path in (folders[1] / "images").iterdir():
        Image.new("RGB", (64, 48)).save(path)
    for folder, hw in zip(folders, ([128, 128], [48, 64])):
        _, held_out = open_pairs(editor_config(f"data.validation={folder}", "data.validation_count=1"), CPU, tmp_path)
        assert held_out.folder == folder and held_out.entries[0]["hw"] == hw


@pytest.mark.parametrize("change", ["data.validation_count=1", "data.validation_count=0", "data.validation=PAIRS"])
def test_a_run_is_not_resumed_with_other_pairs_held_out(editor_config, tmp_path, pairs_folder, change):
    changes = ["data.validation_count=2", "steps=3"]
    train(editor_config(*changes), tmp_path / "run")
    change = change.replace("PAIRS", str(copy_of(pairs_folder, tmp_path / "other")))
    with pytest.raises(
        ValueError, match=r"the run holds out 2 pairs .*, this config \d; give data.validation"
    ) as caught:
        train(editor_config(*changes, change), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)
    assert train(editor_config(*changes, "steps=4"), tmp_path / "run", resume=True) == 4


def test_a_held_out_pair_that_goes_bad_is_named_once(editor_config, tmp_path, pairs_folder):
    folder, run = copy_of(pairs_folder, tmp_path / "held"), tmp_path / "run"
    changes = [f"data.validation={folder}", "data.validation_count=6", "validate_every=1"]
    train(editor_config(*changes, "steps=3"), run)
    broken = folder / "images/0000001_target.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    train(editor_config(*changes, "steps=6"), run, resume=True)
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "held-out" in line]
    assert "WARNING skipped held-out" in line and "line 2" in line


@pytest.mark.parametrize("name", ["data.objects", "data.photos", "data.validation"])
def test_folders_that_hold_nothing_are_refused_before_anything_is_written(editor_config, tmp_path, name):
    (tmp_path / "empty").mkdir()
    changes = [f"{name}={tmp_path / 'empty'}"]
    changes += ["data.validation_count=2"] if "validation" in name else ["data.source=world"]
    with pytest.raises(ValueError, match="empty"):
        train(editor_config(*changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_changed_is_not_resumed(editor_config, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "index.jsonl").write_text('{"file": "one.jpg"}')
    settings = editor_config("data.source=world", f"data.photos={photos}")
    open_pairs(settings, CPU, tmp_path)
    for name in (".DS_Store", "Thumbs.db"):  # file managers put them there when somebody looks
        (photos / name).write_bytes(b"a look")
    open_pairs(settings, CPU, tmp_path)
    (photos / "more.jpg").write_bytes(b"more")
    with pytest.raises(ValueError, match="has changed"):
        open_pairs(settings, CPU, tmp_path)
