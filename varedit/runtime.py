"""What the device at hand computes well."""

from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def computes_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for bfloat16.

    Elsewhere PyTorch computes it all the same, up to a hundred times slower than float32: on CPUs without AVX-512 or
    its like, which are most of those in desktops and laptops, and in another way on graphics cards before Ampere.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True
