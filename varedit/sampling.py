"""From logits to bits: guidance, temperature, top-p, and random numbers that do not depend on the batch.

Everything here is a pure function. Each bit is its own two-way choice, so top-p has a closed form.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varedit.runtime import computes_everything

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True)
class Sampling:
    """How bits are chosen: see the pipeline's call."""

    guidance_scale: float
    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale {self.guidance_scale} must be 0 or more; 1 switches guidance off")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0 or more; 0 takes the likelier bit")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1; 1 keeps every choice")


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer torch stores it in."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): wrapping 64-bit products, equal on every device."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def random_uniform(seeds_B: Tensor, scale: int, num_tokens: int, num_bits: int) -> Tensor:
    """Uniform random numbers in (0, 1) that are a function of (seed, scale, position, bit) of one model alone.

    So an image's random numbers are the same alone or in any batch, on any device.

    Args:
        seeds_B: int64 (B,), one seed an image.

    Returns:
        float32 (B, num_tokens, num_bits).
    """
    device = seeds_B.device
    if not computes_everything(device):
        return random_uniform(seeds_B.cpu(), scale, num_tokens, num_bits).to(device)
    stream_B = _mix(_mix(seeds_B.to(torch.int64) * _signed(_GOLDEN)) + _signed((scale + 1) * _GOLDEN))
    counter = torch.arange(1, num_tokens * num_bits + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    hashed = _mix(stream_B[:, None] + counter[None, :])
    return ((_shift_right(hashed, 41).float() + 0.5) / (1 << 23)).view(-1, num_tokens, num_bits)


def guide(logits: Tensor, unguided_logits: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance on logits: g * conditional + (1 - g) * unconditional (paper section 4.1)."""
    return guidance_scale * logits + (1 - guidance_scale) * unguided_logits


def sample_bits(logits: Tensor, random: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Choose each bit from its two logits.

    Args:
        logits: (..., 2), index 0 the logit of bit 0.
        random: uniform numbers of shape (...).
        temperature: divides the logits; 0 takes the larger logit (a tie is bit 0).
        top_p: a value is dropped when the other alone has at least this probability.

    Returns:
        bool (...).
    """
    margin = (logits[..., 1] - logits[..., 0]).float()
    if temperature == 0:
        return margin > 0
    probability = torch.sigmoid(margin / temperature)
    certain = torch.maximum(probability, 1 - probability) >= top_p
    return torch.where(certain, margin > 0, random < probability)
