"""Checkpoints: complete or absent, read back to the bit, and nothing in them is ever executed."""

import json
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import CPU

from varedit.training import checkpoint
from varedit.training.checkpoint import CheckpointError, Checkpoints


@contextmanager
def no_room_for_more_than(num_bytes: int) -> Iterator[None]:
    """The system refuses to write more than this to any file, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, in_background):
    checkpoints = Checkpoints(tmp_path, CPU, keep=2, in_background=in_background)
    state = {"weight": torch.arange(200_000, dtype=torch.float32)}

    def save(step: int) -> None:
        checkpoints.save(step, state, {"note": "good"})
        checkpoints.finish()

    save(1)
    words = r"step_00000002 could not be written: .*last good one is of step 1"
    with no_room_for_more_than(100_000), pytest.raises(CheckpointError, match=words):
        save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    loaded = {"weight": torch.zeros(200_000)}
    assert checkpoints.load(loaded) == {"step": 1, "note": "good"}
    assert torch.equal(loaded["weight"], state["weight"])
    save(2)
    assert checkpoints.steps() == [1, 2], "with room again it goes on"


@pytest.mark.parametrize("in_background", [False, True])
def test_checkpoints_are_complete_or_absent_and_few(tmp_path, in_background):
    checkpoints = Checkpoints(tmp_path, CPU, keep=2, in_background=in_background)
    (tmp_path / ".step_00000009.partial").mkdir()
    (tmp_path / "step_00000008").mkdir()  # no state.json
    for step in (1, 2, 3):
        state = {"weight": torch.full((3,), float(step))}
        checkpoints.save(step, state, {})
        state["weight"].zero_()  # a copy is being written
    checkpoints.finish()
    assert checkpoints.steps() == [2, 3]
    loaded = {"weight": torch.zeros(3)}
    assert checkpoints.load(loaded)["step"] == 3 and loaded["weight"].eq(3).all()
    assert not (tmp_path / ".step_00000009.partial").exists()


def mixed_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "step": torch.tensor(7.0),
        "convolution": torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last),
        "half": torch.randn(8, generator=generator).bfloat16(),
        "none": torch.zeros(0, 4),
        "matrix": torch.randn(16, 16, generator=generator),
    }


def test_every_kind_of_tensor_comes_back_to_the_bit_from_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BYTES_A_FILE", 1200)
    state = mixed_state()
    checkpoints = Checkpoints(tmp_path, CPU, keep=1)
    checkpoints.save(1, state, {})
    assert len(list((tmp_path / "step_00000001").glob("*.safetensors"))) == 3
    loaded = {name: torch.full_like(value, 9) for name, value in state.items()}
    checkpoints.load(loaded)
    for name, value in state.items():
        assert torch.equal(loaded[name], value) and loaded[name].stride() == value.stride()


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    checkpoints, proof = Checkpoints(tmp_path / "run", CPU, keep=1), tmp_path / "proof"
    payload = pickle.dumps(Malice(proof))
    pickle.loads(payload)
    assert proof.is_dir(), "the planted pickle does nothing"
    proof.rmdir()

    state = {"weight": torch.ones(3)}
    checkpoints.save(1, state, {})
    folder = tmp_path / "run/step_00000001"
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):  # where PyTorch's own format has pickles
        (folder / name).write_bytes(payload)
    loaded = {"weight": torch.zeros(3)}
    assert checkpoints.load(loaded) == {"step": 1} and loaded["weight"].eq(1).all()

    (shard,) = folder.glob("*.safetensors")
    for content in (payload, torch_file(tmp_path, Malice(proof))):
        shard.write_bytes(content)
        facts = json.loads((folder / "state.json").read_text()) | {"files": {shard.name: len(content)}}
        (folder / "state.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match="cannot be loaded: .*remove it to go on from step 0") as caught:
            checkpoints.load(loaded)
        assert "\n" not in str(caught.value)
    assert not proof.exists()


def torch_file(folder: Path, value: object) -> bytes:
    torch.save(value, folder / "value.pt")
    return (folder / "value.pt").read_bytes()


@pytest.mark.parametrize(
    "damage, words",
    [("cut", "not whole"), ("gone", "is not there"), ("added", "does not belong"), ("other", "Missing key.*bias"),
     ("shape", "Size mismatch.*weight"), ("json", "cannot be loaded")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage, words):
    checkpoints = Checkpoints(tmp_path, CPU, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"weight": torch.ones(3)}, {})
    (shard,) = (tmp_path / "step_00000002").glob("*.safetensors")
    loaded = {"weight": torch.zeros(3)}
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "gone":
        shard.unlink()
    elif damage == "added":
        shard.with_name("more.safetensors").write_bytes(shard.read_bytes())
    elif damage == "other":
        loaded["bias"] = torch.zeros(1)
    elif damage == "shape":
        loaded["weight"] = torch.zeros(4)
    else:
        (tmp_path / "step_00000002/state.json").write_text('{"step": 2')
    with pytest.raises(ValueError, match=rf"step_00000002.*{words}.*remove it to go on from step 1") as caught:
        checkpoints.load(loaded)
    assert "\n" not in str(caught.value)
