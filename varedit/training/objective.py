"""The training objective: one cross-entropy a bit, scales weighted (paper section 3.1, as in the released code)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from varedit.scales import ScaleSchedule


def token_weights(schedule: ScaleSchedule, device: torch.device | None = None) -> Tensor:
    """Weight of every target token, float32 (L,), sum 1: proportional to sqrt(finest area / own scale's area)."""
    finest = schedule.num_tokens[-1]
    weights = torch.cat([torch.full((count,), (finest / count) ** 0.5) for count in schedule.num_tokens])
    return (weights / weights.sum()).to(device)


def bit_losses(logits_BLC2: Tensor, bits_BLC: Tensor) -> Tensor:
    """Cross-entropy of every bit, float32 (B, L, C). Two logits: it is the softplus of their signed difference."""
    margin = (logits_BLC2[..., 1] - logits_BLC2[..., 0]).float()
    return F.softplus(torch.where(bits_BLC, -margin, margin))


def objective(logits_BLC2: Tensor, bits_BLC: Tensor, schedule: ScaleSchedule) -> Tensor:
    """The scalar loss: mean over bits and batch, weighted over tokens."""
    losses_BL = bit_losses(logits_BLC2, bits_BLC).mean(-1)
    return (losses_BL * token_weights(schedule, losses_BL.device)).sum(1).mean()


def bit_accuracy(logits_BLC2: Tensor, bits_BLC: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Share of bits predicted right at each scale, float32 (num_scales,)."""
    right_BLC = (logits_BLC2[..., 1] > logits_BLC2[..., 0]) == bits_BLC
    return torch.stack([part.float().mean() for part in right_BLC.split(list(schedule.num_tokens), dim=1)])
