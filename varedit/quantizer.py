"""Multi-scale residual binary spherical quantization: features <-> bits <-> codes (paper section 3.1).

Parameter-free functions. A canvas is the running sum of up-sampled codes at the image tokenizer's finest grid,
`canvas_BChw` float32; each scale adds the code of what is still missing. Sampling and teacher forcing build their
pyramids with the same two functions, `accumulate` and `next_input`.

The image tokenizer's grid is `patch_size` times finer than the token grid: with `patch_size` 2 one token carries the
2 x 2 codes below it (patchify), so a token has `patch_size**2 * num_code_bits` bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from varedit.runtime import computes_everything
from varedit.scales import Grid, ScaleSchedule


def latent_grid(schedule: ScaleSchedule, scale: int, patch_size: int) -> Grid:
    """Grid (h, w) of a scale on the image tokenizer's own grid."""
    h, w = schedule.grids[scale]
    return h * patch_size, w * patch_size


def patchify(features_BChw: Tensor, patch_size: int) -> Tensor:
    """Features (B, d, h, w) as tokens (B, l, C), row-major; C = d * patch_size**2, a code's channel outermost."""
    if patch_size > 1:
        features_BChw = F.pixel_unshuffle(features_BChw, patch_size)
    return features_BChw.flatten(2).transpose(1, 2)


def unpatchify(tokens_BlC: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """The inverse of `patchify`: tokens (B, l, C) of a token grid -> features (B, d, h, w) on the tokenizer's grid."""
    features_BChw = tokens_BlC.transpose(1, 2).unflatten(2, grid)
    return F.pixel_shuffle(features_BChw, patch_size) if patch_size > 1 else features_BChw


def features_to_bits(features_BChw: Tensor) -> Tensor:
    """Nearest code of each feature vector as bits (bool, same shape).

    Binary spherical quantization normalises the vector to the unit sphere first; that does not change a sign, so the
    bits are the signs. Zero is bit 0.
    """
    return features_BChw > 0


def bits_to_codes(bits_BChw: Tensor) -> Tensor:
    """Bits (B, d, h, w) -> codes on the unit sphere: -1/sqrt(d) or +1/sqrt(d), float32."""
    return (bits_BChw.float() * 2 - 1) * bits_BChw.shape[1] ** -0.5


def resize_area(features_BChw: Tensor, grid: Grid) -> Tensor:
    """Area pooling to a coarser grid; the identity at the same grid. Returns float32."""
    features_BChw = features_BChw.float()
    if features_BChw.shape[-2:] == grid:
        return features_BChw
    device = features_BChw.device
    if not computes_everything(device):  # 8 -> 6 does not divide evenly
        return F.adaptive_avg_pool2d(features_BChw.cpu(), grid).to(device)
    return F.adaptive_avg_pool2d(features_BChw, grid)


def _resize_bilinear(features_BChw: Tensor, grid: Grid) -> Tensor:
    if features_BChw.shape[-2:] == grid:
        return features_BChw
    return F.interpolate(features_BChw, size=grid, mode="bilinear", align_corners=False)


def empty_canvas(batch_size: int, num_code_bits: int, schedule: ScaleSchedule, patch_size: int, device=None) -> Tensor:
    """The canvas before the first scale: zeros, float32 (B, d, h, w) on the tokenizer's finest grid."""
    h, w = latent_grid(schedule, -1, patch_size)
    return torch.zeros(batch_size, num_code_bits, h, w, device=device)


def accumulate(canvas_BChw: Tensor, bits_BChw: Tensor) -> Tensor:
    """Add one scale's codes, brought up bilinearly to the finest grid, to the canvas. Returns a new canvas."""
    h, w = canvas_BChw.shape[-2:]
    return canvas_BChw + _resize_bilinear(bits_to_codes(bits_BChw), (h, w))


def next_input(canvas_BChw: Tensor, schedule: ScaleSchedule, scale: int, patch_size: int) -> Tensor:
    """The transformer's input tokens (B, l, C) for `scale` >= 1: the canvas so far, bilinear at that scale's grid."""
    return patchify(_resize_bilinear(canvas_BChw, latent_grid(schedule, scale, patch_size)), patch_size)


def residual_bits(features_BChw: Tensor, canvas_BChw: Tensor, schedule: ScaleSchedule, scale: int, patch_size: int):
    """Bits (bool, B, d, h, w) of one scale: what the canvas still lacks of the features, area-pooled to its grid."""
    assert canvas_BChw.shape[-2:] == latent_grid(schedule, -1, patch_size), "the features are not of this schedule"
    residual_BChw = features_BChw.float() - canvas_BChw
    return features_to_bits(resize_area(residual_BChw, latent_grid(schedule, scale, patch_size)))


def encode_bits(features_BChw: Tensor, schedule: ScaleSchedule, patch_size: int) -> tuple[list[Tensor], Tensor]:
    """Quantize features to the bits of all scales.

    Args:
        features_BChw: (B, d, h, w) on the tokenizer's finest grid.

    Returns:
        Bits of each scale, bool (B, d, h_k, w_k), and the full canvas, float32 (B, d, h, w).
    """
    canvas_BChw = torch.zeros_like(features_BChw, dtype=torch.float32)
    bits = []
    for scale in range(schedule.num_scales):
        bits.append(residual_bits(features_BChw, canvas_BChw, schedule, scale, patch_size))
        canvas_BChw = accumulate(canvas_BChw, bits[-1])
    return bits, canvas_BChw


def decode_bits(bits: Sequence[Tensor], schedule: ScaleSchedule, patch_size: int) -> Tensor:
    """The canvas of a list of bits, coarse to fine; the list may stop early (a preview). Inverse of `encode_bits`."""
    batch_size, num_code_bits = bits[0].shape[:2]
    canvas_BChw = empty_canvas(batch_size, num_code_bits, schedule, patch_size, bits[0].device)
    for bits_BChw in bits:
        canvas_BChw = accumulate(canvas_BChw, bits_BChw)
    return canvas_BChw


@dataclass(frozen=True)
class TeacherForcing:
    """What the transformer is trained on. L target tokens of all scales, C bits a token.

    Attributes:
        inputs_BLC: float32 (B, L - n_0, C), inputs of scales 1..; the first scale's input is the start token.
        bits_BLC: bool (B, L, C), the labels.
    """

    inputs_BLC: Tensor
    bits_BLC: Tensor

    @classmethod
    def join(cls, parts: Sequence["TeacherForcing"]) -> "TeacherForcing":
        """One batch of several, all of one schedule."""
        return cls(torch.cat([part.inputs_BLC for part in parts]), torch.cat([part.bits_BLC for part in parts]))


def teacher_forcing(
    features_BChw: Tensor,
    schedule: ScaleSchedule,
    patch_size: int,
    max_flip: float = 0.0,
    generator: torch.Generator | None = None,
    own_bits: Sequence[Tensor] | None = None,
) -> TeacherForcing:
    """Inputs and labels of all scales at once, with bitwise self-correction (Infinity, section 3.4).

    At each scale a strength is drawn uniformly from [0, max_flip] and that share of the bits put on the canvas is
    flipped. Labels are the clean bits of the residual left by the flipped canvas, so the model learns to mend
    mistakes made at coarser scales. Without flips the inputs equal those of sampling the same bits.

    Args:
        own_bits: of each scale, as `next_scales` gives them; these are put on the canvas in place of the target's.
            The labels are still what the target lacks, so the model learns to mend the mistakes that it makes itself.
    """
    canvas_BChw = torch.zeros_like(features_BChw, dtype=torch.float32)
    inputs, labels = [], []
    for scale in range(schedule.num_scales):
        if scale:
            inputs.append(next_input(canvas_BChw, schedule, scale, patch_size))
        bits_BChw = residual_bits(features_BChw, canvas_BChw, schedule, scale, patch_size)
        labels.append(patchify(bits_BChw.float(), patch_size) > 0.5)
        if own_bits is not None:
            bits_BChw = own_bits[scale]
        if max_flip > 0:
            bits_BChw = bitwise_self_correction(bits_BChw, max_flip, generator)
        canvas_BChw = accumulate(canvas_BChw, bits_BChw)
    return TeacherForcing(torch.cat(inputs, dim=1), torch.cat(labels, dim=1))


def bitwise_self_correction(bits_BChw: Tensor, max_flip: float, generator: torch.Generator | None = None) -> Tensor:
    """Flip a share of the bits, the share drawn uniformly from [0, max_flip] once for the scale and the batch.

    Random numbers are drawn on the generator's device (the CPU by default), then moved.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    strength = torch.rand((), generator=generator, device=device) * max_flip
    flips = torch.rand(bits_BChw.shape, generator=generator, device=device) < strength
    return bits_BChw ^ flips.to(bits_BChw.device)
