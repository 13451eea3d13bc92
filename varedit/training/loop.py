"""The loop of every training: data, gradients, new weights, what is logged and saved, and the exact way back in.

Everything random is a function of (seed, step, position in the batch): a run that was killed goes on from its last
checkpoint with the very losses that it would have had. With `max_minutes` the clock has a say as well.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from varedit.training.checkpoint import Checkpoints, training_state
from varedit.training.config import RunConfig, check_processes
from varedit.training.data import HeldOut, MicroBatch, Plan, batches, stream_seed
from varedit.training.journal import Journal, Sums
from varedit.training.processes import Processes, is_sharded, set_gradient_sync
from varedit.training.updates import (
    Average,
    build_optimizers,
    clip_gradients,
    learning_rate_factor,
    set_learning_rates,
    trainable,
)

logger = logging.getLogger(__name__)

_LARGE = 1000  # pairs after which the share of unusable ones is judged
_FINITE = ("loss", "gradient_norm")  # beginnings of metrics' names: where one is not finite, the weights are spoilt


class Training(Protocol):
    """What is trained. Modules are on their device and, if asked for, sharded."""

    modules: dict[str, nn.Module]
    plan: Plan
    held_out: HeldOut | None

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch, and metrics: scalars or vectors with one entry a scale."""

    def validate(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Metrics of a micro-batch of held-out pairs, no gradients, nothing random."""

    def sample(self, step: int, folder: Path, journal: Journal | None) -> None:
        """Write sample pictures. Called on every process; only the first has a journal and writes."""

    def export(self, folder: Path) -> None:
        """Write the result. Called on every process; only the first writes."""


class Loop:
    """Drives a training from its last checkpoint, or from the start, to its last step.

    Args:
        config: of the run.
        training: what is trained.
        processes: who we are.
        folder: of the run.
        resume: go on with the run in the folder.

    Raises:
        ValueError: see `Journal` and `check_processes`.
    """

    def __init__(self, config: RunConfig, training: Training, processes: Processes, folder: Path, resume: bool) -> None:
        check_processes(config, processes.count)
        self.config, self.training, self.processes, self.folder = config, training, processes, folder
        self.journal = Journal(folder, config, resume) if processes.first else None
        self.parameters = trainable(training.modules)
        self.optimizers = build_optimizers(training.modules, config.optimizer)
        self.average = Average(self.parameters, config.ema_decay) if config.ema_decay else None
        self.checkpoints = Checkpoints(
            folder / "checkpoints", processes, config.keep_checkpoints, config.async_checkpoints
        )
        self.state = training_state(self.parameters, self.optimizers, self.average)
        self.step, self.num_skipped, minutes = 0, 0, 0.0
        self.sums = Sums()
        if resume and self.checkpoints.steps():
            saved = self.checkpoints.load(self.state)
            self.step, self.num_skipped, minutes = saved["step"], saved["num_skipped"], saved["minutes"]
            self._restore_sums(saved.get("sums", {}))  # checkpoints of earlier versions have none
        self.started = time.monotonic() - 60 * minutes
        self.done = self.part_done()
        self._skipped_held_out: set[str] = set()
        if self.journal is not None:
            self.journal.rewind(self.step)

    @property
    def minutes(self) -> float:
        """Time of training up to now, of interrupted parts up to their last checkpoint."""
        return (time.monotonic() - self.started) / 60

    def part_done(self) -> float:
        """Part of the run that lies behind, 0 to 1 or a little more: of the steps or of the time, whichever is more."""
        by_step = self.step / self.config.steps
        if not self.config.max_minutes:
            return by_step
        clock = torch.tensor(self.minutes if self.processes.first else 0.0, dtype=torch.float64)
        return max(by_step, self.processes.sum(clock.to(self.processes.device)).item() / self.config.max_minutes)

    def run(self) -> None:
        """Train to the end, and write the result.

        Raises:
            ValueError: the loss or its gradient is no longer finite, or too many pairs cannot be used.
            CheckpointError: a checkpoint could not be written.
        """
        config = self.config
        process = (self.processes.rank, self.processes.count)
        data = batches(
            self.training.plan, config.micro_batch_size, self.step, config.steps, process, config.data.num_workers
        )
        try:
            if self.journal is not None:
                self.journal.start(self.step, self.done)
            while self.done < 1:
                self.train_step(data)
                self.after_step()
            self.save()
            self.checkpoints.finish()
            with self.for_use():
                self.training.export(self.folder)
            self.processes.barrier()
        finally:
            if self.journal is not None:
                self.journal.close()

    def train_step(self, data: Iterator[MicroBatch]) -> None:
        """One step: all micro-batches of this process, the sum of gradients, one update."""
        config, modules = self.config, self.training.modules
        num_micro = config.batch_size // config.micro_batch_size
        own = num_micro // self.processes.count
        factor = learning_rate_factor(self.step, self.done, config.optimizer)
        set_learning_rates(self.optimizers, factor)
        self.learning_rate = factor * config.optimizer.lr
        for index in range(own):
            batch = next(data)
            assert batch.step == self.step, f"the data is at step {batch.step}, the loop at {self.step}"
            self._note_skipped(batch)
            for module in modules.values():
                set_gradient_sync(module, index == own - 1)
            torch.manual_seed(stream_seed("dropout", config.seed, self.step, batch.positions[0]))
            loss, metrics = self.training.loss(batch)
            # FSDP2 averages over processes where replicas are summed.
            share = self.processes.count if any(is_sharded(m) for m in modules.values()) else 1
            (loss * (share / num_micro)).backward()
            self.sums.add({"loss": loss, **metrics})
        for module in modules.values():
            if not is_sharded(module):
                self.processes.sum_gradients(p for p in module.parameters() if p.requires_grad)
        for name, module in modules.items():
            norm = clip_gradients(module, config.optimizer.clip, self.processes)
            self.sums.add({f"gradient_norm_{name}" if len(modules) > 1 else "gradient_norm": norm})
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1
        self.done = self.part_done()

    def after_step(self) -> None:
        """Log, validate, sample and save where it is time."""
        config, step = self.config, self.step
        self.checkpoints.poll()
        if step % config.log_every == 0 or self.done >= 1:
            self.log(self.sums.means(self.processes.sum))
        if _due(step, config.validate_every):
            self.validate()
        if _due(step, config.sample_every):
            with self.for_use():
                self.training.sample(step, self.folder / "samples", self.journal)
            self.processes.barrier()
        if _due(step, config.save_every) and self.done < 1:
            self.save()

    def log(self, means: dict) -> None:
        """Write metrics; a loss or gradient that is not finite ends the run (the last checkpoint is still good)."""
        if self.journal is not None:
            self.journal.write(self.step, self.done, {**means, "learning_rate": self.learning_rate})
        self._check_finite(means)

    @torch.no_grad()
    def validate(self) -> None:
        """Metrics over the held-out pairs, shared out over the processes."""
        plan, processes = self.training.held_out, self.processes
        if plan is None:
            return
        sums = Sums()
        num_micro = len(plan)
        # Sharded models compute together: every process must run equally often, the last ones for nothing.
        rounds = -(-num_micro // processes.count)
        with self.for_use():
            for turn in range(rounds):
                index = turn * processes.count + processes.rank
                batch = plan.batch(min(index, num_micro - 1))
                self._name_held_out(batch.skipped if index < num_micro else [])
                sums.add(self.training.validate(batch), weight=float(index < num_micro) * len(batch.positions))
        means = {f"validation_{name}": value for name, value in sums.means(processes.sum).items()}
        if self.journal is not None:
            self.journal.write(self.step, self.done, means)

    def save(self) -> None:
        """Write a checkpoint of the steps done, and what the next line of the log has of them.

        Raises:
            ValueError: a loss or gradient since the last line was not finite: the weights are spoilt.
            CheckpointError: it could not be written.
        """
        totals = {name: total.tolist() for name, total in self.sums.totals(self.processes.sum).items()}
        self._check_finite({name: total[0] for name, total in totals.items()})
        facts = {"num_skipped": self.num_skipped, "minutes": self.minutes, "sums": totals}
        self.checkpoints.save(self.step, self.state, facts)

    def _restore_sums(self, totals: dict[str, list]) -> None:
        """Go on from the sums of all processes: the first one has them, the others nothing of them."""
        device, share = self.processes.device, float(self.processes.first)
        both = {name: torch.tensor(total, dtype=torch.float64, device=device) for name, total in totals.items()}
        self.sums.restore({name: total * share for name, total in both.items()})

    def _check_finite(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for a loss or gradient norm, mean or sum, that is not finite."""
        for name in sorted(values, reverse=True):  # the loss first
            value = values[name]
            if name.startswith(_FINITE) and not math.isfinite(value):
                raise ValueError(
                    f"the {name.replace('_', ' ')} of step {self.step} or shortly before is {value}; begin a new run "
                    "with a lower optimizer.lr or optimizer.clip (the last checkpoint is still good)"
                )

    @contextlib.contextmanager
    def for_use(self) -> Iterator[None]:
        """The weights that are validated, sampled and exported: the average, if there is one; evaluation mode."""
        modules = self.training.modules.values()
        for module in modules:
            module.eval()
        try:
            with self.average.applied() if self.average is not None else contextlib.nullcontext():
                try:
                    yield
                finally:
                    for module in modules:
                        if is_sharded(module):  # else the next step would see what was gathered here
                            module.reshard()
        finally:
            for module in modules:
                module.train()

    def _name_held_out(self, skipped: list[str]) -> None:
        """Held-out pairs that are replaced, each named once: every validation meets them again."""
        for name in skipped:
            if name not in self._skipped_held_out:
                logger.warning("skipped held-out %s", name)
                self._skipped_held_out.add(name)

    def _note_skipped(self, batch: MicroBatch) -> None:
        for name in batch.skipped:
            logger.warning("skipped %s", name)
        self.num_skipped += len(batch.skipped)
        seen = max((self.step + 1) * self.config.batch_size // self.processes.count, _LARGE)
        limit = self.config.data.max_bad_fraction
        if self.num_skipped > limit * seen:
            raise ValueError(
                f"{self.num_skipped} pairs could not be used, more than data.max_bad_fraction {limit} of the pairs so "
                "far; repair the data, or allow more"
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
