"""A training run from its config to its result: what `varedit train` does."""

from pathlib import Path

from safetensors import SafetensorError

from varedit.training.checkpoint import CheckpointError
from varedit.training.config import EditorConfig, RunConfig, TokenizerConfig, check_packages, check_processes
from varedit.training.journal import check_folder
from varedit.training.loop import Loop
from varedit.training.processes import joined
from varedit.training.sources import forget_scans


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
        if not resume and processes.first:
            forget_scans(folder)
        processes.barrier()
        if isinstance(config, EditorConfig):
            from varedit.training.trainer import EditorTraining

            training = EditorTraining(config, processes, folder)
        elif isinstance(config, TokenizerConfig):
            from varedit.training.tokenizer_trainer import TokenizerTraining

            training = TokenizerTraining(config, processes, folder, perceptual)
        else:
            raise ValueError(f"config is a {type(config).__name__}; pass an EditorConfig or a TokenizerConfig")
        try:
            loop = Loop(config, training, processes, folder, resume)
            loop.run()
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"run {str(folder)!r} cannot be written: {reason}; make room and --resume") from error
        return loop.step
