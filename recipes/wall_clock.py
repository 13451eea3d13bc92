"""A training that lasts a number of minutes: learning rates by the clock, checkpoints, a log."""

import json
import logging
import os
import time
from pathlib import Path

import torch
import typer

from varedit.training.updates import Average

logger = logging.getLogger("recipe")


class Progress:
    """Wall-clock schedule, checkpoints and log of one training; `average` follows the weights if there is one."""

    def __init__(
        self, run: Path, name: str, minutes: float, model: torch.nn.Module, optimizers: list,
        average: Average | None = None,
    ) -> None:  # fmt: skip
        run.mkdir(parents=True, exist_ok=True)
        self.path, self.log = run / f"{name}.pt", run / f"{name}.jsonl"
        self.model, self.optimizers, self.average, self.budget = model, optimizers, average, minutes * 60
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.step, self.elapsed, self.samples = 0, 0.0, 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            if outline(state) != outline(self.state()):
                raise typer.BadParameter(f"{self.path} is of another model or recipe; take another folder as --run")
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            if average:
                for parameter, saved in state["average"].items():
                    average.values[parameter].copy_(saved)
            self.step, self.elapsed, self.samples = state["step"], state["elapsed"], state["samples"]
        self.started = time.monotonic() - self.elapsed
        self.saved = self.elapsed

    @property
    def done(self) -> bool:
        return self.elapsed >= self.budget

    def rates(self, warm_up: int, decay: float = 0.4) -> None:
        """Constant, then linear to 2 % over the last `decay` of the time; linear warm-up."""
        left = 1 - min(self.elapsed / self.budget, 1.0)
        factor = min(1.0, (self.step + 1) / warm_up) * min(1.0, 0.02 + 0.98 * left / decay)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor

    def advance(self, num_samples: int, metrics: dict) -> None:
        self.step, self.samples = self.step + 1, self.samples + num_samples
        self.elapsed = time.monotonic() - self.started
        if self.average:
            self.average.update(self.step)
        if self.step % 20 == 0:
            row = {"step": self.step, "minutes": round(self.elapsed / 60, 2), "samples": self.samples, **metrics}
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            logger.info("%s", row)
        if self.elapsed - self.saved > 120 or self.done:
            self.save()

    def state(self) -> dict:
        state = {
            "model": self.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "elapsed": self.elapsed, "samples": self.samples,
        }  # fmt: skip
        return state | {"average": self.average.values} if self.average else state

    def save(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise typer.BadParameter(f"step {self.step} is not finite; {self.path} is still good: lower the rate")
        torch.save(self.state(), self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        self.saved = self.elapsed


def outline(state: dict) -> tuple:
    """What two checkpoints have in common if one training can load both."""
    shapes = {name: weight.shape for name, weight in state["model"].items()}
    groups = [[group.get("param_names") for group in one["param_groups"]] for one in state["optimizers"]]
    return shapes, groups, state.keys()
