"""In what a training run computes."""

import logging

import torch

from varedit.runtime import computes_bfloat16
from varedit.training.config import EditorConfig, RunConfig

logger = logging.getLogger(__name__)


def in_bfloat16(config: RunConfig, device: torch.device) -> bool:
    """Whether a run computes in bfloat16 autocast, with what `config.precision` is on this device."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    four_bits = isinstance(config, EditorConfig) and config.frozen_dtype == "nf4"  # they become bfloat16 when used
    return four_bits or computes_bfloat16(device)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The context in which a run's models compute."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(config, device))


def report_precision(config: RunConfig, device: torch.device) -> None:
    """Say in the log what a run computes in; warn where that will be slow."""
    bfloat16 = in_bfloat16(config, device)
    logger.info("computes in %s", "bfloat16" if bfloat16 else "float32")
    if bfloat16 and not computes_bfloat16(device):
        logger.warning("this device computes bfloat16 very slowly; set precision (with lora frozen_dtype) to float32")
