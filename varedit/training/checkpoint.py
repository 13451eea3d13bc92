"""Checkpoints of a run: complete or absent, whatever happens while one is written.

The state is written by PyTorch's distributed checkpointing into a hidden folder, brought to the disk, and then renamed.
It can be loaded by another number of processes than wrote it. The tensors are safetensors, the rest is JSON: unlike
PyTorch's own format, nothing in a checkpoint is executed when it is read.
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
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from varedit.durable import flush_file, flush_folder
from varedit.training.processes import Processes
from varedit.training.updates import STATE, Average

_STATE_FILE = "state.json"
_PARTIAL = ".partial"
_TENSORS = "*.safetensors"
_BYTES_A_FILE = 1 << 30  # a file is put together in main memory before it is written


class CheckpointError(RuntimeError):
    """Files of a run could not be written; its last good checkpoint is untouched."""


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
        self._pending: tuple[Future, Path, dict[str, Any]] | None = None
        # In the background processes agree too: on a line of their own, or they would mix with those of training.
        self._group = dist.new_group(backend="gloo") if processes.count > 1 else None
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
        self.processes.barrier()
        facts = {"step": step, **extra}
        # As its name does not say, this is PyTorch's writer of sharded safetensors, on the local disk.
        writer = HuggingFaceStorageWriter(str(partial), _files(state), save_distributed=True)
        state = {name: value.contiguous() for name, value in state.items()}  # safetensors knows no memory formats
        with self._errors(partial):
            where = {"storage_writer": writer, "process_group": self._group, "no_dist": self._group is None}
            if self.in_background:
                self._pending = dcp.async_save(state, **where), partial, facts  # type: ignore[assignment]
            else:
                dcp.save(state, **where)
                self._complete(partial, facts)
        self.processes.barrier()

    def poll(self) -> None:
        """Complete a checkpoint that was written in the background, if it is. Raises CheckpointError."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, if any, and complete it. Raises CheckpointError."""
        if self._pending is None:
            return
        (pending, partial, facts), self._pending = self._pending, None
        with self._errors(partial):
            pending.result()
            self._complete(partial, facts)

    def load(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """Load the newest checkpoint into the tensors of `state`; returns its step and the extra values.

        Raises:
            ValueError: there is none, or it is damaged or of other tensors.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"{str(self.folder)!r} holds no complete checkpoint; start the run again without --resume")
        path = self.folder / f"step_{steps[-1]:08d}"
        try:
            facts = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
            _check_files(path, facts.pop("files", {}))
            reader = HuggingFaceStorageReader(str(path))
            dcp.load(state, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except (OSError, ValueError, SafetensorError, CheckpointException) as error:
            before = steps[-2] if len(steps) > 1 else 0
            raise ValueError(
                f"checkpoint {str(path)!r} cannot be loaded: {_reason(error)}; remove it to go on from step {before}"
            ) from error
        return facts

    def _complete(self, partial: Path, facts: dict[str, Any]) -> None:
        """From partial to complete: on the disk first, then under its name."""
        if not self.processes.first:
            return
        # The shards of a tensor lie in several files, none of which knows of the others.
        files = {path.name: path.stat().st_size for path in sorted(partial.glob(_TENSORS))}
        (partial / _STATE_FILE).write_text(json.dumps({**facts, "files": files}), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            (flush_folder if path.is_dir() else flush_file)(path)
        os.rename(partial, self.folder / partial.name.removesuffix(_PARTIAL).removeprefix("."))
        flush_folder(self.folder)
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


def _files(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of the file that each tensor goes to, from 1: some large ones rather than a huge one."""
    files, number, size = {}, 1, 0
    for name, value in state.items():
        num_bytes = value.numel() * value.element_size()
        if size and size + num_bytes > _BYTES_A_FILE:
            number, size = number + 1, 0
        files[name], size = number, size + num_bytes
    return files


def _check_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """Every file must be there, whole, and safetensors."""
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{name} is not there, or not whole")
        with safe_open(path, "pt"):  # reads and checks the header
            pass
    unknown = {path.name for path in folder.glob(_TENSORS)} - sizes.keys()
    if unknown:
        raise ValueError(f"{min(unknown)} does not belong to it")


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))[0]
        return " ".join(str(first).split())
    return " ".join(str(error).split())
