"""The run folder: what was asked, where and on what it runs, how it goes.

`config.yaml`, `environment.json` and `data.json` are written at the start; `metrics.jsonl` has a line every `log_every`
steps and one a validation; `log.txt` has what was said, and names pairs that could not be used; `samples/` has
pictures, `checkpoints/` the way back in, `model/` or `lora/` the result, and `tensorboard/` the same numbers and
pictures where the package tensorboard is installed. Weights & Biases gets them only if the config says so.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from varedit import __version__
from varedit.training.config import MAY_CHANGE, RunConfig, changed_fields, load_config, save_config

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow", "safetensors", "torchao")
_MAX_SCALES = 13


class Tracker(Protocol):
    """Shows metrics and pictures by step, elsewhere than in `metrics.jsonl`."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, name: str, step: int, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run. What an interrupted run wrote after step `step` is taken back."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, step: int, picture: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of the project "varedit", the same again when resumed. Needs `wandb login`, or WANDB_MODE=offline.

    Raises:
        ValueError: it cannot be reached, or there is no account.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        self._wandb, identity = wandb, folder / "wandb.txt"
        if not identity.exists():
            _write(identity, uuid.uuid4().hex)
        name = identity.read_text(encoding="utf-8")
        try:
            self._run = wandb.init(
                project="varedit", name=folder.name, id=name, resume="allow", dir=folder, config=asdict(config),
                settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config field wandb is true, but {reason}; set it to false to train without") from error
        # Its own counter cannot go back to the step that a run is resumed from.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, name: str, step: int, picture: Image.Image) -> None:
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        self._run.finish()


class RunLog(logging.Handler):
    """Appends what the package logs, such as the names of pairs that cannot be used, to `log.txt` of the run.

    Lines wait until the run has begun: an attempt that is refused leaves nothing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file, self._config = folder / "log.txt", folder / "config.yaml"
        self._waiting: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(self.format(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, if the run has begun."""
        if not self._waiting or not self._config.exists():
            return
        try:
            with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self._waiting)
        except OSError:  # a full disk: the next line tries again, and the next checkpoint says so
            return
        self._waiting = []


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[RunLog]:
    """The run in `folder` keeps its log inside the block."""
    package, log = logging.getLogger("varedit"), RunLog(folder)
    # Where nobody has set up logging, Python's last resort, warnings on stderr, ends with the first handler.
    handlers = [log] if package.hasHandlers() or logging.lastResort is None else [log, logging.lastResort]
    for handler in handlers:
        package.addHandler(handler)
    try:
        yield log
    finally:
        log.flush()
        for handler in handlers:
            package.removeHandler(handler)


class Journal:
    """Writes the run folder. Only the first process has one.

    Args:
        folder: of the run, made if absent.
        config: of the run.
        resume: go on with the run in the folder.

    Raises:
        ValueError: the folder holds a run and `resume` is False, or no run and it is True, or the run there has
            another config in a field that would make it another run.
    """

    def __init__(self, folder: Path, config: RunConfig, resume: bool) -> None:
        self.folder, self.config = folder, config
        self._metrics, self._config = folder / "metrics.jsonl", folder / "config.yaml"
        check_folder(folder, config, resume)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self._config)
        _write(folder / "environment.json", json.dumps(environment(), indent=1))
        self._trackers: list[Tracker] = []
        self._bar: Progress | None = None
        self._started, self._first_step, self._first_done = time.monotonic(), 0, 0.0

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`: a resumed run writes them again."""
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the run was killed while it wrote this line
                continue
        _write(self._metrics, "".join(kept))

    def start(self, step: int, done: float) -> None:
        """Open the trackers and, on a terminal, the progress bar.

        Args:
            step: after which training begins. done: part of the run that lies behind, 0 to 1.

        Raises:
            ValueError: see `WeightsAndBiases`.
        """
        if importlib.util.find_spec("tensorboard") is not None:
            self._trackers.append(TensorBoard(self.folder, step))
        if self.config.wandb:
            self._trackers.append(WeightsAndBiases(self.folder, self.config))
        self._started, self._first_step, self._first_done = time.monotonic(), step, done
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console)
            self._bar.start()
            self._bar.add_task("", total=1.0, completed=done)

    def write(self, step: int, done: float, values: dict[str, Any]) -> None:
        """One line of metrics; numbers, and lists of numbers."""
        passed = max(time.monotonic() - self._started, 1e-9)
        rate = (step - self._first_step) * self.config.batch_size / passed
        samples = step * self.config.batch_size
        row = {"step": step, "samples": samples, "samples_per_second": round(rate, 3), **values}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.write(step, _scalars(values))
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar is not None:
            text = f"step {step} of {self.config.steps}  {rate:.1f}/s  {text}"
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        else:
            left = max(0.0, 1 - done) * passed / max(done - self._first_done, 1e-9)
            logger.info("step %d of %d, %.1f samples/s, %s left: %s", step, self.config.steps, rate, _time(left), text)

    def picture(self, name: str, step: int, picture: Image.Image) -> None:
        """Hand a sample sheet to the trackers; the PNG is written by the caller."""
        for tracker in self._trackers:
            tracker.picture(name, step, picture)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close()


def check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """Raise ValueError if a run cannot begin, or go on, in this folder."""
    saved = folder / "config.yaml"
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(
            f"output {str(folder)!r} cannot be made: {str(place)!r} is no folder that can be written to; give another"
        )
    if not resume:
        if saved.exists():
            raise ValueError(f"output {str(folder)!r} holds a run; pass --resume to go on with it, or another folder")
        return
    if not saved.exists():
        raise ValueError(f"output {str(folder)!r} holds no run to resume; leave out --resume to begin one")
    changed = [name for name in changed_fields(load_config(type(config), saved), config) if name not in MAY_CHANGE]
    if changed:
        raise ValueError(
            f"the run in {str(folder)!r} has another {', '.join(changed)}; use its config.yaml, or a new folder"
        )


def environment() -> dict[str, Any]:
    """What a run depends on beside its config: versions, hardware, the revision of the code."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "varedit": __version__,
        "git": git_revision(),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, "+changes" where files differ; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        revision, changes = git("rev-parse", "HEAD").strip(), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changes.strip() else "")


class Sums:
    """Sums of metrics over micro-batches and steps, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) or (2, scales): sum and count

    def add(self, values: dict[str, Tensor | tuple[Tensor, Tensor]], weight: float = 1.0) -> None:
        """Add means, or (sum, count) pairs. Vectors have one entry a scale; all are padded to 13.

        Args:
            weight: of the means. Pairs have their count for it; only a weight of 0 leaves them out.
        """
        for name, value in values.items():
            is_pair = isinstance(value, tuple)
            total, count = value if is_pair else (value, torch.ones_like(value))
            both = torch.stack([total.detach().double(), count.double()]) * (float(weight > 0) if is_pair else weight)
            if both.ndim == 2:
                both = torch.nn.functional.pad(both, (0, _MAX_SCALES - both.shape[1]))
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def totals(self, reduce=None) -> dict[str, Tensor]:
        """Copies of sum and count of everything added, by metric, over all processes with `reduce`.

        Args:
            reduce: sums a tensor over all processes in place. All must then have the same metrics.
        """
        copies = {name: self._sums[name].clone() for name in sorted(self._sums)}
        return {name: reduce(copy) if reduce else copy for name, copy in copies.items()}

    def restore(self, totals: dict[str, Tensor]) -> None:
        """Go on from these totals."""
        self._sums = dict(totals)

    def means(self, reduce=None) -> dict[str, float | list[float]]:
        """Means over everything added, over all processes with `reduce` as in `totals`; begins anew."""
        means: dict[str, float | list[float]] = {}
        for name, (total, count) in self.totals(reduce).items():
            if total.ndim:
                means[name] = [float(t / c) for t, c in zip(total, count) if c > 0]
            elif count > 0:
                means[name] = float(total / count)
        self._sums = {}
        return means


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Lists taken apart: "accuracy/0" is that of the coarsest scale."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _short(value: Any) -> str:
    return " ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.4g}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
