"""Two decodings and canvases compared: how surely each pixel was changed, against the noise of a do-nothing edit.

Source and result are compared in decoded pixels, both through the same decoder, so that most of the image tokenizer's
own error cancels; and in token space, canvas against canvas: where the bits are nearly the same, what differs in pixels
is the decoder's spill, not an edit. Either sees changes that the other can hardly tell from noise; their product tells
far more than each. Everything is in the model's pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from varedit.editing.fields import add_to_diagonal, blur, outer, pixels, planes, solve, window_mean

SMOOTHING = 0.1
"""Standard deviation of the filter over the signed difference, in cells: single-pixel noise cancels, edges stay."""

TOKEN_POWER = 0.55
"""Weight of a cell's difference against a pixel's. Fitted to edits with known masks; so are the next four."""

CONTRAST_POWER = 0.5
"""Where the source has contrast noise is stronger, but so are edits: the noise counts with this power."""

FAINT = 0.3
"""What is added to each ratio of difference and noise: below it all differences are alike."""

GUIDE_RADIUS = 0.4
"""Cells: evidence is averaged over this much around a pixel, on its own side of an edge."""

GUIDE_CONTRAST = 10.0
"""Levels: an edge of the source or the result of more contrast than this stops the averaging."""

EVIDENCE_RANGE = (-1.25, 3.2)
"""Evidence beyond these, from `log(low)`, counts as this much: one strong pixel does not carry its neighbours."""

HIGH_SHARE = 1.5
"""`Calibration.high` as a multiple of `low`."""


@dataclass(frozen=True)
class Calibration:
    """What a do-nothing edit looks like, and how far a change must stand out from it. Made by `calibrate`.

    Attributes:
        floor: noise in flat areas, levels of 255 (root mean square over the channels).
        slope: growth of the noise's variance with local contrast, levels: bit errors show at edges and in texture.
        token: difference of two canvases in half of the cells of a do-nothing edit (Euclidean); 0 ignores the canvases.
        high: score that starts a change (a seed). Scores count in such noises, see `Difference.evidence`.
        low: score down to which a change grows from its seed.
    """

    floor: float = 3.0
    slope: float = 4.0
    token: float = 0.75
    high: float = 12.0
    low: float = 8.0

    def __post_init__(self) -> None:
        if not (self.floor > 0 <= min(self.slope, self.token) and 0 < self.low <= self.high):
            raise ValueError(f"{self} is impossible; floor must be positive and low between 0 and high")

    def noise(self, contrast_HW: np.ndarray) -> np.ndarray:
        """Standard deviation of a do-nothing edit in levels, float32 (H, W)."""
        return np.sqrt(np.float32(self.floor**2) + np.float32(self.slope) * contrast_HW)


@dataclass(frozen=True, eq=False)
class Difference:
    """Two decodings and canvases compared, before any threshold. Model pixels of the content only.

    Attributes:
        source_HW3, result_HW3: float32, levels of 255.
        pixel_HW: float32, smoothed difference in levels (root mean square over the channels).
        contrast_HW: float32, local standard deviation of the source in levels.
        token_HW: float32, Euclidean difference of the canvases, between cells bilinear.
        cell: pixels a side of a cell of the canvas.
    """

    source_HW3: np.ndarray
    result_HW3: np.ndarray
    pixel_HW: np.ndarray
    contrast_HW: np.ndarray
    token_HW: np.ndarray
    cell: float = 8.0

    def evidence(self, calibration: Calibration) -> np.ndarray:
        """float32 (H, W): logarithm of the score, how many times the expected noise a pixel and its cell differ by.

        Averaged over neighbours within the same edges of source and result.
        """
        noise_HW = calibration.noise(self.contrast_HW)
        score_HW = (self.pixel_HW / noise_HW + FAINT) * (noise_HW / calibration.floor) ** (1 - CONTRAST_POWER)
        if calibration.token:
            score_HW = score_HW * (self.token_HW / calibration.token + FAINT) ** TOKEN_POWER
        base = np.log(calibration.low)
        evidence_HW = np.clip(np.log(score_HW), base + EVIDENCE_RANGE[0], base + EVIDENCE_RANGE[1])
        radius = max(1, round(GUIDE_RADIUS * self.cell))
        guided = [guided_mean(evidence_HW, guide, radius) for guide in (self.source_HW3, self.result_HW3)]
        evidence_HW = (guided[0] + guided[1]) / 2
        if calibration.token:  # equal bits near and far have equal decodings
            reach = 2 * round(self.cell) + 1
            evidence_HW[ndimage.maximum_filter(self.token_HW, reach) == 0] = base + EVIDENCE_RANGE[0]
        return evidence_HW.astype(np.float32)


def guided_mean(values_HW: np.ndarray, guide_HW3: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a window that does not cross the edges of a colour picture (guided filter): float32 (H, W)."""
    size, guide = 2 * radius + 1, planes(guide_HW3)
    guide_mean, values_mean = window_mean(guide, size), window_mean(values_HW, size)
    covariance = window_mean(outer(guide), size) - outer(guide_mean)
    common = window_mean(guide * values_HW, size) - guide_mean * values_mean
    slope = solve(add_to_diagonal(covariance, np.float32(GUIDE_CONTRAST**2)), common)
    offset = values_mean - (slope * guide_mean).sum(0)
    return (window_mean(slope, size) * guide).sum(0) + window_mean(offset, size)


def difference(
    source_canvas: Tensor,
    result_canvas: Tensor,
    source_decoded: Tensor,
    result_decoded: Tensor,
    content_box: tuple[float, float, float, float] | None = None,
) -> Difference:
    """Compare the source and the result of one edit.

    Args:
        source_canvas, result_canvas: (1, d, h, w) or (d, h, w). The source's is the second value of
            `quantizer.encode_bits` of its features.
        source_decoded, result_decoded: (1, 3, H, W) or (3, H, W) in [-1, 1], both canvases through the decoder.
        content_box: of `Prepared`; what the fit invented around the picture is left out. None: there is nothing.

    Raises:
        ValueError: shapes that do not belong together.
    """
    canvases = [_single(canvas, "canvas") for canvas in (source_canvas, result_canvas)]
    decodings = [_single(decoded, "decoding") for decoded in (source_decoded, result_decoded)]
    for first, second in (canvases, decodings):
        if first.shape != second.shape:
            raise ValueError(f"source {tuple(first.shape)} and result {tuple(second.shape)} differ in shape")
    height, width = decodings[0].shape[-2:]
    left, top, right, bottom = (round(edge) for edge in content_box or (0, 0, width, height))
    inside = (slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1)))
    source, result = ((d.permute(1, 2, 0).numpy()[inside] + 1) * np.float32(127.5) for d in decodings)
    cells_hw = (canvases[1] - canvases[0]).square().sum(0).sqrt()[None, None]
    token = torch.nn.functional.interpolate(cells_hw, size=(height, width), mode="bilinear")[0, 0].numpy()[inside]
    cell = height / canvases[0].shape[-2]
    pixel = smoothed(result - source, SMOOTHING * cell)
    return Difference(source, result, pixel, local_contrast(source), token, cell)


def smoothed(change_HW3: np.ndarray, sigma: float) -> np.ndarray:
    """Size of a signed difference after a Gaussian blur, root mean square over the channels: float32 (H, W)."""
    return rms(pixels(blur(planes(change_HW3), sigma)))


def local_contrast(image_HW3: np.ndarray, size: int = 5) -> np.ndarray:
    """Standard deviation in a square window, root mean square over the channels: float32 (H, W)."""
    image = planes(image_HW3)
    variance = window_mean(np.square(image - window_mean(image, size)), size)
    return np.sqrt(np.maximum(variance.mean(0), 0))  # a running sum may end a little below zero


def rms(values_HWC: np.ndarray) -> np.ndarray:
    """Root mean square over the channels."""
    return np.sqrt(np.square(values_HWC).mean(-1))


def _single(tensor: Tensor, name: str) -> Tensor:
    tensor = tensor.detach().float().cpu()
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 3:
        raise ValueError(f"a {name} of shape {tuple(tensor.shape)} is not one image; pass (1, C, H, W) or (C, H, W)")
    return tensor
