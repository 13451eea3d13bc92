"""Scores from pixels: distances, background preservation as PIE-Bench has it, alignment, drift.

All pictures are uint8 (height, width, 3) of one size; `fit_result` gets a result there.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from varedit.evaluation.cases import Fit

MAX_PSNR = 100.0
"""PSNR of equal pictures, in dB: infinity has no mean."""


def fit_result(result: np.ndarray, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """A result at `size` (height, width), the way the benchmark's reference does it.

    Args:
        fit: "resize" (Lanczos), "bicubic", or "corner": the bottom right corner of that size where the result is larger
            and not square (PIE-Bench: editors that return a collage), else as "resize".
    """
    height, width = size
    if result.shape[:2] == size:
        return result
    if (
        fit == "corner"
        and result.shape[0] != result.shape[1]
        and result.shape[0] >= height
        and result.shape[1] >= width
    ):
        return result[result.shape[0] - height :, result.shape[1] - width :]
    resampling = Image.Resampling.BICUBIC if fit == "bicubic" else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(result).resize((width, height), resampling))


def l1(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference on [0, 1]."""
    return float(np.abs(_unit(first) - _unit(second)).mean())


def l2(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared difference on [0, 1] (MagicBrush's L2)."""
    return float(np.square(_unit(first) - _unit(second)).mean())


# ---- the background, as PIE-Bench's reference measures it


def background(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64 (H, W, 3) on [0, 1] with the edited area black.

    Averages then run over the whole frame: PIE-Bench's reference does that, so a large edit makes every number better.
    """
    return _unit(picture) * ~mask[..., None]


def background_mse(source: np.ndarray, result: np.ndarray, mask: np.ndarray) -> float | None:
    """Mean squared difference of the backgrounds over the whole frame; None where there is no background."""
    if mask.all():
        return None
    return float(np.square(background(source, mask) - background(result, mask)).mean())


def background_psnr(source: np.ndarray, result: np.ndarray, mask: np.ndarray) -> float | None:
    """PSNR in dB of `background_mse` at data range 1, at most `MAX_PSNR`."""
    error = background_mse(source, result, mask)
    if error is None:
        return None
    return MAX_PSNR if error == 0 else float(min(MAX_PSNR, -10 * np.log10(error)))


def background_ssim(source: np.ndarray, result: np.ndarray, mask: np.ndarray) -> float | None:
    """SSIM of the backgrounds at data range 1 (torchmetrics, 11 x 11 Gaussian).

    Raises:
        ValueError: torchmetrics is not installed.
    """
    if mask.all():
        return None
    import torch

    ssim = torchmetrics_image().structural_similarity_index_measure
    first, second = (
        torch.from_numpy(background(picture, mask)).float().permute(2, 0, 1)[None] for picture in (source, result)
    )
    return float(ssim(second, first, data_range=1.0))


def torchmetrics_image():
    """torchmetrics.functional.image.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import torchmetrics.functional.image as image
    except ImportError as error:
        raise ValueError("ssim and lpips need torchmetrics: pip install torchmetrics, or leave them out") from error
    return image


# ---- alignment and drift

ZOOMS = np.linspace(0.92, 1.08, 17)


def alignment(source: np.ndarray, result: np.ndarray) -> tuple[float, float, float]:
    """How far a result is shifted and zoomed as a whole: (x, y) in shares of the short side, and the zoom factor.

    Many editors return a slightly moved or enlarged frame; pixel scores then punish what no one sees. The zoom (in
    steps of 1 %) is the one whose phase correlation has the highest peak; the peak's place is the shift.
    """
    scale = 192 / min(source.shape[:2])
    size = tuple(max(32, round(side * scale)) for side in source.shape[1::-1])
    first = _edges(Image.fromarray(source).convert("L").resize(size, Image.Resampling.BICUBIC))
    second = Image.fromarray(result).convert("L").resize(size, Image.Resampling.BICUBIC)
    best: tuple[float, tuple[float, float, float]] = (-1.0, (0.0, 0.0, 1.0))
    for zoom in sorted(ZOOMS, key=lambda value: abs(value - 1)):  # of equals, the one nearest to no zoom
        half = size[0] * zoom / 2, size[1] * zoom / 2
        box = (size[0] / 2 - half[0], size[1] / 2 - half[1], size[0] / 2 + half[0], size[1] / 2 + half[1])
        corners = (box[0], box[1], box[0], box[3], box[2], box[3], box[2], box[1])
        moved = second.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
        peak, x, y = _phase_peak(first, _edges(moved))
        if peak > best[0] + 1e-9:
            best = (peak, (x * zoom / min(size), y * zoom / min(size), float(zoom)))
    return best[1]


def misalignment(source: np.ndarray, result: np.ndarray) -> float:
    """One number of `alignment`: the farthest that a corner of a square frame moves, in shares of its side."""
    x, y, zoom = alignment(source, result)
    return float(np.hypot(abs(x) + abs(zoom - 1) / 2, abs(y) + abs(zoom - 1) / 2))


def _edges(image: Image.Image) -> np.ndarray:
    """Gradient size under a window: what stays when an edit changes colours."""
    pixels = np.asarray(image, np.float32)
    down, across = np.gradient(pixels)
    window = np.hanning(pixels.shape[0])[:, None] * np.hanning(pixels.shape[1])[None]
    return np.hypot(down, across) * window


def _phase_peak(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Height of the phase correlation's peak and how far `second` lies right of and below `first`, in pixels."""
    cross = np.fft.rfft2(second) * np.conj(np.fft.rfft2(first))
    surface = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-6), first.shape)
    row, column = np.unravel_index(int(surface.argmax()), surface.shape)
    height, width = surface.shape
    y, x = row - height * (row > height // 2), column - width * (column > width // 2)
    return float(surface[row, column]), float(x), float(y)


def drift(first: np.ndarray, result: np.ndarray, masks: list[np.ndarray]) -> float | None:
    """Wear of a chain of edits: root mean square difference in levels to the picture the chain began with.

    Args:
        first: the source of the chain's first turn. result: of the turn that is scored.
        masks: of all turns so far, bool (H, W); what any of them covers does not count. Empty counts the whole frame.

    Returns:
        Levels of 255; None where the masks leave nothing.
    """
    untouched = ~np.any([np.zeros(first.shape[:2], bool), *masks], axis=0)
    if not untouched.any():
        return None
    return float(255 * np.sqrt(np.square(_unit(first)[untouched] - _unit(result)[untouched]).mean()))


def _unit(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64) / 255
