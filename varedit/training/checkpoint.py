"""Checkpoints of a run: complete or absent, whatever happens while one is written.

The state is written by PyTorch's distributed checkpointing into a hidden folder, brought to the disk, and then renamed.
It can be loaded by another number of processes than wrote it. A checkpoint is meant for the run that wrote it: like any
PyTorch checkpoint it is not safe to load from strangers. What is passed on is the run's `model` folder.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from varedit.training.processes import Processes
from varedit.training.updates import STATE, Average

_STATE_FILE = "state.json"
_PARTIAL = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the last good one is untouched."""


def training_state(
    parameters: Mapping[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], average: Average | None
) -> dict[str, Tensor]:
    """Every tensor that a run needs to go on, by name: the very tensors, not copies."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key in STATE[type(optimizer).__name__]:
                state[f"{key}.{names[id(parameter)]}"] = values[key]
    if average is not None:
        state |= {f"average.{name}": value for name, value in average.values.items()}
    return state


class Checkpoints:
    """The checkpoints of one run, in `folder/step_NNNNNNNN`.

    Args:
        keep: how many to keep.
        in_background: write while training goes on; the state is copied to main memory first.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int, in_background: bool = False) -> None:
        self.folder, self.processes, self.keep, self.in_background = folder, processes, keep, in_background
        self._pending: tuple[Future, Path] | None = None
        # PyTorch warns, also from its own thread, that there is one process: which is what was asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.glob("step_*") if (path / _STATE_FILE).is_file())
        return sorted(int(path.name.removeprefix("step_")) for path in found)

    def save(self, step: int, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Write a checkpoint: after `step` steps.

        Args:
            state: of `training_state`. extra: plain JSON values.

        Raises:
            CheckpointError: it could not be written, on any process. In the background the error comes with the next
                call of this class.
        """
        self.finish()
        if step in self.steps():
            return
        partial = self.folder / f".step_{step:08d}{_PARTIAL}"
        with self._errors(partial):
            if self.processes.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(f".*{_PARTIAL}"):
                    shutil.rmtree(leftover)
                partial.mkdir()
                (partial / _STATE_FILE).write_text(json.dumps({"step": step, **extra}), encoding="utf-8")
        self.processes.barrier()
        with self._errors(partial):
            alone = self.processes.count == 1
            if self.in_background:
                pending = dcp.async_save(state, checkpoint_id=partial, no_dist=alone)
                self._pending = pending, partial  # type: ignore[assignment]
            else:
                dcp.save(state, checkpoint_id=partial, no_dist=alone)
                self._complete(partial)
        self.processes.barrier()

    def poll(self) -> None:
        """Complete a checkpoint that was written in the background, if it is. Raises CheckpointError."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, if any, and complete it. Raises CheckpointError."""
        if self._pending is None:
            return
        (pending, partial), self._pending = self._pending, None
        with self._errors(partial):
            pending.result()
            self._complete(partial)

    def load(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """Load the newest checkpoint into the tensors of `state`; returns its step and the extra values.

        Raises:
            ValueError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"{str(self.folder)!r} holds no complete checkpoint; start the run again without --resume")
        path = self.folder / f"step_{steps[-1]:08d}"
        dcp.load(state, checkpoint_id=path, no_dist=self.processes.count == 1)
        return json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))

    def _complete(self, partial: Path) -> None:
        """From partial to complete: on the disk first, then under its name."""
        if not self.processes.first:
            return
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        os.rename(partial, self.folder / partial.name.removesuffix(_PARTIAL).removeprefix("."))
        _to_disk(self.folder)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step_{step:08d}")

    @contextlib.contextmanager
    def _errors(self, partial: Path) -> Iterator[None]:
        """Turn what goes wrong while writing into CheckpointError, and remove the half-written folder."""
        try:
            yield
        except (OSError, CheckpointException, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            steps = self.steps()
            last = f"the last good one is of step {steps[-1]}" if steps else "there is no earlier one"
            name = partial.name.removesuffix(_PARTIAL).removeprefix(".")
            raise CheckpointError(
                f"checkpoint {name} could not be written: {_reason(error)}; {last}; make room and --resume"
            ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))[0]
        return " ".join(str(first).split())
    return " ".join(str(error).split())


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
