"""A training run from its config to its result: what `varedit train` does."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from varedit.training.checkpoint import CheckpointError
from varedit.training.config import EditorConfig, RunConfig, TokenizerConfig, check_packages, check_processes
from varedit.training.journal import check_folder, logged
from varedit.training.loop import Loop, Training
from varedit.training.precision import report_precision
from varedit.training.processes import Processes, joined
from varedit.training.sources import check_new, forget_scans


def train(config: RunConfig, folder: Path, resume: bool = False, perceptual=None) -> int:
    """Train, in this process and those that torchrun started with it, to the end.

    Args:
        config: an `EditorConfig` or a `TokenizerConfig`.
        folder: of the run; see `journal`.
        resume: go on from the last complete checkpoint (from the start if there is none yet).
        perceptual: tokenizer only: module (reconstruction, image) -> scalar, images (B, 3, H, W) in [-1, 1].

    Returns:
        The number of steps done.

    Raises:
        ValueError: config, folder, model or data are unusable; everything that can be is checked before data is read.
        CheckpointError: the run's files could not be written.
    """
    check_packages(config)
    with joined(config.device) as processes:
        check_processes(config, processes.count)
        check_folder(folder, config, resume)
        if not resume:
            check_new(folder)
        processes.barrier()  # the next lines remove what the others have just looked at
        if not resume and processes.first:
            forget_scans(folder)
        processes.barrier()
        with logged(folder) as log:
            report_precision(config, processes.device)
            loop = _begin(config, processes, folder, resume, perceptual)
            log.flush()
            with _writing(folder):
                loop.run()
            return loop.step


def _begin(config: RunConfig, processes: Processes, folder: Path, resume: bool, perceptual) -> Loop:
    try:
        training = _training(config, processes, folder, perceptual)
    except OSError as error:
        raise ValueError(
            f"run {str(folder)!r} cannot begin: {_one_line(error)}; check the config's paths and the output"
        ) from error
    with _writing(folder):
        return Loop(config, training, processes, folder, resume)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Files that cannot be written are a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"run {str(folder)!r} cannot be written: {_one_line(error)}; make room and --resume"
        ) from error


def _training(config: RunConfig, processes: Processes, folder: Path, perceptual) -> Training:
    """What the config trains: its models and its data. Raises ValueError, OSError."""
    if isinstance(config, EditorConfig):
        from varedit.training.trainer import EditorTraining

        return EditorTraining(config, processes, folder)
    if isinstance(config, TokenizerConfig):
        from varedit.training.tokenizer_trainer import TokenizerTraining

        return TokenizerTraining(config, processes, folder, perceptual)
    raise ValueError(f"config is a {type(config).__name__}; pass an EditorConfig or a TokenizerConfig")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
