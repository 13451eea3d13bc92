"""Alignment: did the model move the picture as a whole, and if so, put it back.

Editors tend to shift or zoom the whole picture a little while they edit part of it. Source and result as the decoder
shows them are compared in tiles; what the edit left unchanged tells one motion (`alignment.find_motion`, which
also states from where on a motion is real: 0.7 pixels where the longer side has 256). All unchanged pixels together
then tell it to a fraction of a pixel.
"""

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from varedit.alignment import Motion, find_motion
from varedit.image_processor import Prepared, to_pil

NUM_REFINEMENTS = 8

MAX_REACH = 0.06
"""Farthest that a corner moves by mistake, as a share of the longer side. A picture that moved more was meant to."""


def find_slip(source_decoded: Tensor, result_decoded: Tensor, prepared: Prepared) -> Motion | None:
    """How far the model moved the picture by mistake, on what it left unchanged.

    Args:
        source_decoded, result_decoded: (1, 3, H, W) in [-1, 1], both through the decoder.
        prepared: of the source; what the fit invented around it is left out.

    Returns:
        In model pixels, about the middle of the content; None where nothing moved, nothing clear is left to measure
        by, or the picture moved too far for a mistake.
    """
    source, result = (
        np.asarray(_content(to_pil(decoded)[0], prepared)) for decoded in (source_decoded, result_decoded)
    )
    motion = find_motion(source, result)
    if motion is None:
        return None
    height, width = source.shape[:2]
    motion = _refined(_smooth_gray(source), _smooth_gray(result), motion)
    reach = abs(motion.zoom - 1) * np.hypot(height, width) / 2 + np.hypot(motion.shift_x, motion.shift_y)
    return motion if reach <= MAX_REACH * max(height, width) else None


def put_back(result_decoded: Tensor, source_decoded: Tensor, prepared: Prepared, motion: Motion) -> Tensor:
    """The result without the motion, (1, 3, H, W) on the CPU. What had left the frame is filled from the source."""
    left, top, right, bottom = _edges(prepared)
    inside = (slice(None), slice(None), slice(top, bottom), slice(left, right))
    result, output = result_decoded.float().cpu(), source_decoded.float().cpu().clone()
    shift = np.array([motion.shift_y, motion.shift_x])
    moved, seen = zip(*(_moved(channel_HW, motion.zoom, shift) for channel_HW in result[inside][0].numpy()))
    kept_3HW = output[inside][0].numpy()
    output[inside] = torch.from_numpy(np.where(seen, moved, kept_3HW))[None]
    return output


def in_source_pixels(motion: Motion, prepared: Prepared) -> Motion:
    """A motion in model pixels as one in pixels of the source."""
    left, _, right, _ = _edges(prepared)
    scale = prepared.source.width / (right - left)
    return Motion(motion.shift_x * scale, motion.shift_y * scale, motion.zoom, motion.share)


def _smooth_gray(pixels_HW3: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(pixels_HW3.mean(-1, dtype=np.float64), 1.0)


def _refined(source_HW: np.ndarray, result_HW: np.ndarray, motion: Motion) -> Motion:
    """The motion that brings the result nearest to the source, where they can be brought near (Gauss-Newton)."""
    height, width = source_HW.shape
    y, x = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    zoom, shift = motion.zoom, np.array([motion.shift_y, motion.shift_x])
    for _ in range(NUM_REFINEMENTS):
        moved_HW, seen_HW = _moved(result_HW, zoom, shift)
        error_HW = (source_HW - moved_HW) * seen_HW
        slope_y, slope_x = np.gradient(moved_HW)
        # Twice the usual error counts little: what the edit changed is no witness.
        weights_HW = seen_HW / np.square(1 + np.square(error_HW / (2 * np.median(np.abs(error_HW)) + 1)))
        by = np.stack([slope_y * y + slope_x * x, slope_y, slope_x]).reshape(3, -1)
        weighted = by * weights_HW.ravel()
        step = np.linalg.solve(weighted @ by.T + 1e-6 * np.eye(3), weighted @ error_HW.ravel())
        zoom, shift = zoom * (1 + step[0]), shift + zoom * step[1:]
    return Motion(float(shift[1]), float(shift[0]), float(zoom), motion.share)


def _moved(channel_HW: np.ndarray, zoom: float, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The channel with a motion (shift y, x) undone, and which of its pixels were in the frame."""
    height, width = channel_HW.shape
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = middle - zoom * middle + shift
    rows, columns = (zoom * np.arange(n) + start for n, start in zip((height, width), offset))
    seen_HW = _within(rows, height)[:, None] & _within(columns, width)[None, :]
    return ndimage.affine_transform(channel_HW, (zoom, zoom), offset, order=3, mode="nearest"), seen_HW


def _within(places: np.ndarray, size: int) -> np.ndarray:
    return (places >= -0.5) & (places <= size - 0.5)


def _edges(prepared: Prepared) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(edge) for edge in prepared.content_box)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _content(image: Image.Image, prepared: Prepared) -> Image.Image:
    return image.crop(_edges(prepared))
