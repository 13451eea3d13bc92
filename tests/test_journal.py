"""The run folder: who may write into it, and what TensorBoard and Weights & Biases are told, if anything."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from varedit.cli import main
from varedit.training.config import EditorConfig, check_packages
from varedit.training.journal import Journal, Sums, check_folder


def config(**fields) -> EditorConfig:
    return EditorConfig(start="model", **fields)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_folders_that_hold_a_run_or_none(tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        check_folder(tmp_path, config(), resume=True)
    Journal(tmp_path, config(), resume=False)
    with pytest.raises(ValueError, match="holds a run; pass --resume"):
        check_folder(tmp_path, config(), resume=False)
    with pytest.raises(ValueError, match=r"another batch_size, seed"):
        check_folder(tmp_path, config(batch_size=32, seed=1), resume=True)
    check_folder(tmp_path, config(steps=5, sharding="fsdp", max_minutes=3.0), resume=True)


@pytest.mark.parametrize("output", ["taken", "taken/run"])
def test_an_output_in_the_way_is_refused(tmp_path, output):
    (tmp_path / "taken").write_text("here")
    with pytest.raises(ValueError, match="taken.* is no folder that can be written to"):
        check_folder(tmp_path / output, config(), resume=False)
    assert (tmp_path / "taken").read_text() == "here"


def test_lines_of_a_resumed_run(tmp_path):
    first = Journal(tmp_path, config(batch_size=8, micro_batch_size=8), resume=False)
    first.start(0, 0.0)
    for step in (1, 2, 3):
        first.write(step, step / 10, {"loss": 1.0 / step, "accuracy": [0.5, 0.25]})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed
    again = Journal(tmp_path, config(batch_size=8, micro_batch_size=8), resume=True)
    again.rewind(2)
    again.start(2, 0.2)
    again.write(3, 0.3, {"loss": 0.1})
    again.close()
    assert [(row["step"], row["samples"], row["loss"]) for row in lines(tmp_path)] == [
        (1, 8, 1.0), (2, 16, 0.5), (3, 24, 0.1),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


def test_means_are_weighted_and_scales_of_different_number_are_kept_apart():
    sums = Sums()
    sums.add({"loss": torch.tensor(1.0), "accuracy": torch.tensor([0.0, 1.0])}, weight=1.0)
    sums.add({"loss": torch.tensor(4.0), "accuracy": torch.tensor([0.5, 0.5, 0.25])}, weight=2.0)
    sums.add({"share": (torch.tensor(3.0), torch.tensor(4.0)), "nothing": (torch.tensor(0.0), torch.tensor(0.0))})
    assert sums.means() == {
        "accuracy": [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.25], "loss": 3.0, "share": 0.75,
    }  # fmt: skip
    assert sums.means() == {}


def test_counted_pairs_have_the_weight_of_their_count():
    """A token of a small batch counts as one of a large one; a batch that counts for nothing has none."""
    sums = Sums()
    for total, weight in ((4.0, 8.0), (0.0, 2.0), (4.0, 0.0)):
        sums.add({"share": (torch.tensor(total), torch.tensor(4.0))}, weight)
    assert sums.means() == {"share": 0.5}


def test_tensorboard_has_numbers_and_pictures_and_forgets_what_a_resumed_run_does_anew(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume in (((1, 2, 3), False), ((3, 4), True)):
        journal = Journal(tmp_path, config(), resume)
        journal.start(steps[0] - 1, 0.0)
        for step in steps:
            journal.write(step, 0.1, {"loss": float(step + 10 * resume), "accuracy": [0.5, 0.25]})
        journal.picture("edits", steps[-1], Image.new("RGB", (16, 8), "red"))
        journal.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1), (2, 2), (3, 13), (4, 14)]
    assert board.Scalars("accuracy/1")[0].value == 0.25
    (picture,) = board.Images("edits")
    assert (picture.step, picture.width, picture.height) == (4, 16, 8)


def test_weights_and_biases_is_told_what_the_run_is_told(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps, resume in (((1, 2), False), ((3,), True)):
        journal = Journal(tmp_path, config(wandb=True, seed=12345), resume)
        journal.start(steps[0] - 1, 0.0)
        for step in steps:
            journal.write(step, 0.1, {"loss": 0.5, "accuracy": [0.5, 0.25]})
        journal.picture("edits", steps[-1], Image.new("RGB", (16, 8), "red"))
        journal.close()
    wandb.teardown()  # as at the end of a process: waits until all is on the disk
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.rpartition("-")[2] for run in runs}) == 1, "one run, resumed"
    for run in runs:
        (record,) = run.glob("*.wandb")
        content = record.read_bytes()
        for word in (b"accuracy/1", b"loss", b"12345"):
            assert word in content
        assert list(run.glob("files/media/images/edits_*.png"))


def test_nobody_is_told_by_default(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda *address: calls.append(address))
    journal = Journal(tmp_path, config(), resume=False)
    journal.start(0, 0.0)
    journal.write(1, 0.1, {"loss": 0.5})
    journal.close()
    assert not calls and not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    "fields, package",
    [({"wandb": True}, "wandb"), ({"lora": {}}, "peft"), ({"lora": {}, "frozen_dtype": "nf4"}, "torchao")],
)
def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys, fields, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"start": "model", **fields}))
    with pytest.raises(SystemExit) as caught:
        main(["train", "editor", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and f"pip install {package}" in error
    assert not (tmp_path / "run").exists()
    check_packages(config())
