"""The training objective: one cross-entropy a bit, scales weighted (paper section 3.1, as in the released code).

And the tokenizer's loss of detail.
"""

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


def edit_weights(mask_BHW: Tensor, schedule: ScaleSchedule, factor: float) -> Tensor:
    """Weights that count tokens inside the change mask `factor` times, float32 (B, L), sum 1 for every pair.

    Not in the paper. Where most of a picture stays as it is, copying fills the loss long before the edit is learned; a
    small model on a small budget then spends it where it is needed. A token that the mask touches counts as inside.

    Args:
        mask_BHW: bool, True where the edit may change pixels.
    """
    parts = [
        F.adaptive_max_pool2d(mask_BHW.float()[:, None], grid).flatten(1) * (factor - 1) + 1 for grid in schedule.grids
    ]
    weights_BL = torch.cat(parts, dim=1) * token_weights(schedule, mask_BHW.device)
    return weights_BL / weights_BL.sum(1, keepdim=True)


def objective(
    logits_BLC2: Tensor, bits_BLC: Tensor, schedule: ScaleSchedule, weights_BL: Tensor | None = None
) -> Tensor:
    """The scalar loss: mean over bits and batch, weighted over tokens (by `token_weights` if none are given)."""
    losses_BL = bit_losses(logits_BLC2, bits_BLC).mean(-1)
    weights = token_weights(schedule, losses_BL.device) if weights_BL is None else weights_BL
    return (losses_BL * weights).sum(1).mean()


def bit_accuracy(logits_BLC2: Tensor, bits_BLC: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Share of bits predicted right at each scale, float32 (num_scales,)."""
    right_BLC = (logits_BLC2[..., 1] > logits_BLC2[..., 0]) == bits_BLC
    return torch.stack([part.float().mean() for part in right_BLC.split(list(schedule.num_tokens), dim=1)])


def laplacian_loss(predicted: Tensor, target: Tensor, num_levels: int = 4) -> Tensor:
    """L1 on a Laplacian pyramid, every level with the same weight: fine detail counts as much as layout."""
    difference, loss = predicted - target, predicted.new_zeros(())
    for _ in range(num_levels):
        coarse = F.avg_pool2d(difference, 2, ceil_mode=True, count_include_pad=False)
        loss = loss + (difference - F.interpolate(coarse, size=difference.shape[-2:], mode="bilinear")).abs().mean()
        difference = coarse
    return loss + difference.abs().mean()
