"""What the device at hand computes well."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@contextmanager
def exact_convolutions(device: torch.device | str) -> Iterator[None]:
    """Convolutions of float32 keep all its digits: on newer CUDA cards PyTorch rounds to 10 bits (TF32) by default."""
    if torch.device(device).type != "cuda":
        yield
        return
    new = getattr(torch.backends.cudnn, "conv", None)  # PyTorch since 2.9; the two switches may not be mixed
    switch, name, exact = (new, "fp32_precision", "ieee") if new else (torch.backends.cudnn, "allow_tf32", False)
    before = getattr(switch, name)
    setattr(switch, name, exact)
    try:
        yield
    finally:
        setattr(switch, name, before)


def computes_everything(device: torch.device | str) -> bool:
    """Whether a device has every operation that is used here, with right results, as CPUs and CUDA do.

    MPS has no float64 and pools to grids that divide evenly only; in versions of PyTorch up to 2.12 it silently gives
    wrong results for shifts of integers and for attention under broadcast masks. There such operations are computed on
    the CPU where they are small, and of simpler ones where they are not.
    """
    return torch.device(device).type in ("cpu", "cuda", "meta")


@lru_cache(maxsize=8)
def computes_bfloat16(device: torch.device | str) -> bool:
    """Whether a device computes bfloat16 about as fast as float32, or faster.

    Elsewhere PyTorch computes it all the same, but slowly: a product of matrices took a hundred times as long as in
    float32 on a CPU without AVX-512 (AVX2 is what most desktops and laptops have). Graphics cards before Ampere
    emulate it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True
