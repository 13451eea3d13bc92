"""Masks: where an edit may change the picture, in pixels and in bits.

A mask is a Pillow image of mode L and of the input's size: 255 = edit here, 0 = leave alone, between = soft edge.
`image_mask`, `box_mask` and `polygon_mask` make one; `model_mask` brings it to the model's pixels, `token_coverage` to
the grid of a scale, and `TokenLock` forces the source's bits outside, scale by scale.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from varedit import quantizer
from varedit.image_processor import ImageInput, Prepared, load_image
from varedit.scales import ScaleSchedule

if TYPE_CHECKING:
    from varedit.pipeline import SampledScale

Convention = Literal["white", "transparent"]

_FARTHEST = 2.0**30
"""Pixels that a corner may lie away: Pillow draws in 32 bits."""

MAX_ASPECT_ERROR = 0.01
"""A mask's aspect ratio may differ from the image's by this share; rounding to whole pixels needs some."""

SELECTED = 128
"""A mask selects something when a pixel reaches this level: below it the input outweighs the edit everywhere."""


# ---------------------------------------------------------------- making


def image_mask(mask: ImageInput, size: tuple[int, int], convention: Convention = "white") -> Image.Image:
    """A mask from an image of any size and the same aspect ratio.

    Args:
        mask: anything `load_image` takes, or a bool array (H, W).
        size: (width, height) of the image to be edited.
        convention: "white": white pixels are edited, and so are none under full transparency. "transparent" (that of
            the OpenAI API): transparent pixels are edited, the colours do not matter.

    Raises:
        ValueError: unreadable, another aspect ratio, nothing selected, no alpha channel, or an unknown convention.
    """
    if convention not in ("white", "transparent"):
        raise ValueError(f"mask convention {convention!r} is unknown; use 'white' or 'transparent'")
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = mask.astype(np.uint8) * 255
    loaded = load_image(mask)
    _check_aspect((loaded.width, loaded.height), size)
    if convention == "transparent":
        if loaded.alpha is None:
            raise ValueError("the mask has no alpha channel; make the area to edit transparent, or pass white edits")
        levels = loaded.alpha.point([255 - level for level in range(256)])
    else:
        levels = loaded.rgb.convert("L")
        if loaded.alpha is not None:
            levels = Image.composite(levels, Image.new("L", levels.size), loaded.alpha)
    _check_selects(levels, convention)
    if levels.size != size:
        levels = levels.resize(size, Image.Resampling.BILINEAR)  # no overshoot; averages when it shrinks
        _check_selects(levels, convention)
    return levels


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """A mask that selects the rectangle (x, y, width, height), cut at the borders of an image of `size`.

    Raises:
        ValueError: a side that is not positive, or a box outside the image.
    """
    x, y, width, height = box
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box {_numbers(box)} is endless; give X,Y,WIDTH,HEIGHT in pixels")
    if not (width > 0 and height > 0):
        raise ValueError(f"box {_numbers(box)} has no area; give X,Y,WIDTH,HEIGHT with positive sides")
    left, top = max(round(x), 0), max(round(y), 0)
    right, bottom = min(round(x + width), size[0]), min(round(y + height), size[1])
    if left >= right or top >= bottom:
        raise ValueError(f"box {_numbers(box)} covers no pixel of the image of {size[0]} x {size[1]}; move it inside")
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


def polygon_mask(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> Image.Image:
    """A mask that selects the inside of a polygon, (x, y) corners in pixels of an image of `size`.

    Corners are pixels and belong to the inside: of four corners at 0 and 9 it is 10 pixels wide, where a box of width 9
    is 9.

    Raises:
        ValueError: no corners, fewer than three, or no pixel of the image inside.
    """
    try:
        corners = [(float(x), float(y)) for x, y in points]
        if not all(abs(number) <= _FARTHEST for corner in corners for number in corner):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"polygon {points!r} is no list of X,Y corners in pixels") from None
    if len(corners) < 3:
        raise ValueError(f"a polygon of {len(corners)} points has no area; give at least 3")
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    if mask.getextrema() == (0, 0):
        raise ValueError(f"the polygon covers no pixel of the image of {size[0]} x {size[1]}; move it inside")
    return mask


def parse_box(text: str) -> tuple[float, float, float, float]:
    """ "X,Y,WIDTH,HEIGHT" -> four numbers. Raises ValueError for anything else."""
    try:
        x, y, width, height = (float(part) for part in text.split(","))
        if not all(map(math.isfinite, (x, y, width, height))):
            raise ValueError
    except ValueError:
        raise ValueError(f"box {text!r} is not X,Y,WIDTH,HEIGHT in pixels, such as 40,60,200,150") from None
    return x, y, width, height


def parse_polygon(text: str) -> list[tuple[float, float]]:
    """ "X,Y X,Y X,Y ..." -> corners. Raises ValueError for anything else."""
    try:
        points = [tuple(float(part) for part in corner.split(",")) for corner in text.split()]
        if not points or not all(len(point) == 2 and all(map(math.isfinite, point)) for point in points):
            raise ValueError
    except ValueError:
        raise ValueError(f"polygon {text!r} is not X,Y X,Y X,Y ... in pixels, such as '40,60 240,60 140,210'") from None
    return [(x, y) for x, y in points]


def grow(mask: Image.Image, pixels: int) -> Image.Image:
    """The mask grown by a margin on every side, so that an object drawn to the edge of the mask is not clipped."""
    check_margin(pixels)
    if not pixels:
        return mask
    pixels = min(pixels, max(mask.size))  # farther than the picture reaches is nowhere
    return Image.fromarray(ndimage.maximum_filter(np.asarray(mask), size=2 * pixels + 1, mode="nearest"))


def changed_area(changed_HW: np.ndarray, size: tuple[int, int], margin: float) -> Image.Image:
    """A mask of what an edit changed, grown by a margin that also fades out, at the size of the image.

    Args:
        changed_HW: bool, model pixels, see `ChangeMap.hard_HW`.
        size: (width, height) of the image that the map is of.
        margin: model pixels, above 0; the mask is full up to half of it.
    """
    away_HW = ndimage.distance_transform_edt(~changed_HW)
    levels_HW = np.clip(2 - 2 * away_HW / margin, 0, 1)
    return Image.fromarray(np.rint(levels_HW * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def check_margin(pixels: int) -> None:
    """Raise ValueError if a mask cannot grow by so many pixels."""
    if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 0:
        raise ValueError(f"a mask cannot grow by {pixels} pixels; give a whole number, 0 or more")


def selects(mask: Image.Image) -> bool:
    """Whether a mask selects anything, see `SELECTED`."""
    return int(np.asarray(mask).max()) >= SELECTED


def _check_aspect(mask_size: tuple[int, int], size: tuple[int, int]) -> None:
    (mask_width, mask_height), (width, height) = mask_size, size
    ratio = (mask_width * height) / (mask_height * width)
    # A whole pixel either way is rounding, whatever its share of a small mask's side.
    slack = max(MAX_ASPECT_ERROR, 1 / mask_width, 1 / mask_height)
    if not 1 / (1 + slack) <= ratio <= 1 + slack:
        raise ValueError(
            f"the mask of {mask_width} x {mask_height} pixels has another aspect ratio than the image of "
            f"{width} x {height}; make the mask from the image itself"
        )


def _check_selects(levels: Image.Image, convention: Convention) -> None:
    if not selects(levels):
        largest = int(np.asarray(levels).max())
        what = "white" if convention == "white" else "transparent"
        raise ValueError(f"the mask is empty (its strongest pixel is {largest} of 255); make the area to edit {what}")


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


# ---------------------------------------------------------------- in the model's pixels and bits


def model_mask(mask: Image.Image, prepared: Prepared) -> Tensor:
    """A mask in the model's pixels, through the same fit as the image.

    Returns:
        float32 (H, W) in [0, 1], (H, W) = schedule.image_hw. What the fit invented around the image follows the mask
        as it follows the image (mirrored); beside a square fit it is 0.

    Raises:
        ValueError: the mask is not of the source's size.
    """
    source, (height, width) = prepared.source, prepared.schedule.image_hw
    if mask.size != (source.width, source.height):
        raise ValueError(
            f"a mask of {mask.width} x {mask.height} pixels for an image of {source.width} x {source.height}; "
            "make it with image_mask, box_mask or polygon_mask"
        )
    left, top, right, bottom = (round(edge) for edge in prepared.content_box)
    # Area average: the level is the covered share of a model pixel.
    inner = mask.resize((max(right - left, 1), max(bottom - top, 1)), Image.Resampling.BOX)
    padding = ((top, height - top - inner.height), (left, width - left - inner.width))
    levels_HW = np.asarray(inner, np.float32) / 255
    if prepared.fit == "native":
        return torch.from_numpy(np.pad(levels_HW, padding, mode="symmetric"))
    return torch.from_numpy(np.pad(levels_HW, padding))


def token_coverage(mask_HW: Tensor, schedule: ScaleSchedule, scale: int, patch_size: int) -> Tensor:
    """Share of each cell of a scale that the mask covers.

    Args:
        mask_HW: float in [0, 1] of schedule.image_hw, see `model_mask`.

    Returns:
        float32 (h, w) on the image tokenizer's grid of that scale.
    """
    if tuple(mask_HW.shape) != schedule.image_hw:
        raise ValueError(f"a mask of shape {tuple(mask_HW.shape)} for a schedule of {schedule.image_hw} pixels")
    return quantizer.resize_area(mask_HW[None, None], quantizer.latent_grid(schedule, scale, patch_size))[0, 0]


def lock_bits(
    bits_BChw: Tensor,
    features_BChw: Tensor,
    canvas_BChw: Tensor,
    coverage_Bhw: Tensor,
    schedule: ScaleSchedule,
    scale: int,
    patch_size: int,
) -> Tensor:
    """Force the source's bits where the mask does not reach: the lock in token space.

    A forced cell takes the bits of what the canvas still lacks of the source, so the canvas heads for the source
    whatever was put on it before; where every coarser scale was forced too, these are exactly the source's own bits.

    A cell is free as soon as the mask touches it, however large the cell: tone and layout are drawn at the coarse
    scales, and the finer ones do not make up for what those were not allowed. What a coarse code changes beyond the
    mask is taken back by the forced cells of the finer scales.

    Args:
        bits_BChw: bool, the bits sampled at this scale, on the tokenizer's grid (B, d, h_k, w_k).
        features_BChw: the source's continuous features, (B, d, h, w) on the tokenizer's finest grid.
        canvas_BChw: the canvas before this scale.
        coverage_Bhw: from `token_coverage`, (B, h_k, w_k) or (1, h_k, w_k).

    Returns:
        bool, the same shape as `bits_BChw`.
    """
    source_bits_BChw = quantizer.residual_bits(features_BChw, canvas_BChw, schedule, scale, patch_size)
    free_B1hw = (coverage_Bhw > 0)[:, None].to(bits_BChw.device)
    return torch.where(free_B1hw, bits_BChw, source_bits_BChw)


class TokenLock:
    """The lock as a constraint of the pipeline's call: `pipeline(..., constrain_bits=TokenLock(masks_HW))`.

    Args:
        masks_HW: one an image of the call, float in [0, 1], see `model_mask`; None leaves that image free.
    """

    def __init__(self, masks_HW: Sequence[Tensor | None]) -> None:
        self.masks_HW = masks_HW

    def __call__(self, sampled: "SampledScale") -> Tensor:
        where = sampled.schedule, sampled.scale, sampled.patch_size
        bits = []
        for row, index in enumerate(sampled.indices):
            mask_HW, one = self.masks_HW[index], slice(row, row + 1)
            locked_BChw = sampled.bits_BChw[one]
            if mask_HW is not None:
                coverage_Bhw = token_coverage(mask_HW, *where)[None]
                features_BChw, canvas_BChw = sampled.features_BChw[one], sampled.canvas_BChw[one]
                locked_BChw = lock_bits(locked_BChw, features_BChw, canvas_BChw, coverage_Bhw, *where)
            bits.append(locked_BChw)
        return torch.cat(bits)
