"""The loop: the same losses however it is interrupted, and a clock where one is asked for."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import no_room_for_more_than
from torch import Tensor
from training_runs import CPU, rows, weights

from varedit.cli import main
from varedit.training.checkpoint import CheckpointError
from varedit.training.data import batches
from varedit.training.loop import Loop
from varedit.training.run import train
from varedit.training.trainer import EditorTraining

pytest_plugins = ["training_runs"]


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("optimizer.name=muon", "ema_decay=0.9", "async_checkpoints=true"),
        ("data.num_workers=2",),
        ("lora.rank=4", "lora.dropout=0.1", "frozen_dtype=float32"),
    ],
    ids=["plain", "muon", "workers", "adapters"],
)
def test_an_interrupted_run_has_the_losses_of_a_whole_one(editor_config, tmp_path, extra):
    def result(run: Path) -> dict[str, Tensor]:
        return load_file(next((run / "lora").glob("*.safetensors"))) if "lora.rank=4" in extra else weights(run)

    train(editor_config(*extra), tmp_path / "whole")
    train(editor_config(*extra, "steps=4"), tmp_path / "parts")
    assert train(editor_config(*extra), tmp_path / "parts", resume=True) == 6
    assert len(rows(tmp_path / "whole")) == 6
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    results = [result(tmp_path / name) for name in ("whole", "parts")]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_a_run_whose_disk_was_full_goes_on_as_if_it_had_not_been(editor_config, tmp_path, in_background):
    settings = [editor_config(f"async_checkpoints={in_background}", *more) for more in ((), ("steps=3",))]
    train(settings[0], tmp_path / "whole")
    train(settings[1], tmp_path / "run")
    with no_room_for_more_than(50_000), pytest.raises(CheckpointError, match=r"last good one is of step 3; make room"):
        train(settings[0], tmp_path / "run", resume=True)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step_00000002", "step_00000003"}
    train(settings[0], tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_result_that_finds_no_room_is_written_by_resuming(editor_config, tmp_path):
    settings, model = editor_config("steps=1", "optimizer.warm_up=0"), tmp_path / "run/model"
    train(settings, tmp_path / "run")
    expected = weights(tmp_path / "run")
    shutil.rmtree(model)
    with (
        no_room_for_more_than(50_000),
        pytest.raises(CheckpointError, match="cannot be written: .*; make room and --res"),
    ):
        train(settings, tmp_path / "run", resume=True)
    assert not model.exists()
    train(settings, tmp_path / "run", resume=True)
    assert all(torch.equal(expected[name], value) for name, value in weights(tmp_path / "run").items())


def test_lines_after_the_checkpoint_are_written_anew(editor_config, tmp_path):
    train(editor_config("steps=4"), tmp_path / "run")
    whole = rows(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").open("a").write('{"step": 5, "loss": 0}\n{"step": 6, "lo')
    train(editor_config("steps=5"), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run")[:4] == whole and rows(tmp_path / "run", "step") == [1, 2, 3, 4, 5]


def test_accumulation_equals_one_pass(editor_config, tmp_path):
    for name, micro in (("one", 4), ("two", 2)):
        changes = (f"micro_batch_size={micro}", "steps=3", "gradient_checkpointing=true")
        train(editor_config(*changes), tmp_path / name)
    np.testing.assert_allclose(rows(tmp_path / "one"), rows(tmp_path / "two"), rtol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(editor_config, tmp_path):
    settings = editor_config("optimizer.lr=1e30", "optimizer.warm_up=0")
    training = EditorTraining(settings, CPU, tmp_path / "run")
    loop = Loop(settings, training, CPU, tmp_path / "run", resume=False)
    with pytest.raises(ValueError, match="the loss of step"):
        loop.run()


def three_steps(settings, folder):
    """A loop after three steps, and its data."""
    training = EditorTraining(settings, CPU, folder)
    loop = Loop(settings, training, CPU, folder, resume=False)
    data = batches(training.plan, settings.micro_batch_size, 0, settings.steps, (0, 1), 0)
    for _ in range(3):
        loop.train_step(data)
        loop.after_step()
    return loop, data


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_no_checkpoint_of_a_step_that_was_not_finite(editor_config, tmp_path, spoilt):
    """The log has no line before step 6, the next checkpoint is due at step 4."""
    loop, data = three_steps(editor_config("log_every=6"), tmp_path / "run")
    if spoilt == "loss":
        next(iter(loop.parameters.values())).data.fill_(float("nan"))
    else:  # the loss is that of good weights, the update spoils them
        parameter = next(iter(loop.parameters.values()))
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    loop.train_step(data)
    with pytest.raises(ValueError, match="the (loss|gradient norm) of step 4 .* is nan; begin a new run") as caught:
        loop.after_step()
    assert spoilt in str(caught.value) and loop.checkpoints.steps() == [2]


def test_the_first_line_after_a_resume_is_that_of_an_uninterrupted_run(editor_config, tmp_path):
    """The log has a line every four steps, the run is killed after the checkpoint of step 2."""
    settings, folder = editor_config("log_every=4"), tmp_path / "run"
    train(settings, tmp_path / "whole")
    three_steps(settings, folder)
    train(settings, folder, resume=True)
    for key in ("step", "loss", "accuracy", "gradient_norm"):
        assert rows(folder, key) == rows(tmp_path / "whole", key)


def test_a_run_by_the_clock_decays_with_it_and_ends_with_it(editor_config, tmp_path):
    """The clock is set, not waited for: eight of ten minutes are over, then all of them."""
    settings = editor_config("steps=100000", "max_minutes=10", "optimizer.decay=linear", "optimizer.warm_up=0")
    folder = tmp_path / "run"
    loop = Loop(settings, EditorTraining(settings, CPU, folder), CPU, folder, resume=False)
    assert loop.done < 0.01
    loop.started -= 8 * 60
    loop.done = loop.part_done()
    loop.train_step(batches(loop.training.plan, settings.micro_batch_size, 0, settings.steps, (0, 1), 0))
    # decay_fraction 0.4: half of the decay lies behind, from 1 down to final_factor 0.02
    assert loop.learning_rate == pytest.approx(1e-3 * (0.02 + 0.98 * 0.5), rel=0.2)
    loop.save()

    again = Loop(settings, EditorTraining(settings, CPU, folder), CPU, folder, resume=True)
    assert again.step == 1 and 0.8 <= again.done < 1
    again.started -= 2 * 60
    again.run()
    assert again.step == 2 and rows(folder, "step") == [2] and weights(folder)
    assert train(settings, folder, resume=True) == 2, "its time is over"


@pytest.mark.slow
def test_killed_and_resumed(editor_config, tmp_path):
    """SIGKILL to the command while it trains; the rest of the run has the very losses of an uninterrupted one."""
    settings = editor_config("steps=40", "save_every=3")
    train(settings, tmp_path / "whole")
    path = tmp_path / "config.yaml"
    code = "from varedit.cli import main; import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); main()"
    arguments = ["train", "editor", "--config", str(path), "--set", "steps=40", "--set", "save_every=3"]
    command = [sys.executable, "-c", code, str(torch.get_num_threads()), *arguments, "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 11):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(log.read_text().splitlines())
    assert 11 <= done < 40
    train(settings, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_the_command_resumes(editor_config, tmp_path, capsys):
    editor_config()
    arguments = ["train", "editor", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    for extra in (["--set", "steps=3"], ["--set", "steps=4", "--resume"]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *extra])
        assert caught.value.code == 0
    assert "done, 4 steps" in capsys.readouterr().out and rows(tmp_path / "run", "step") == [1, 2, 3, 4]
