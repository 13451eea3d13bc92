"""Crop, edit, stitch: a small edit in a large picture is made on a part of it, which the model sees larger.

The part is the area to edit with some context around it, in the shape of an aspect template. It is edited as a picture
of its own and put back; everything outside it is the input, bit for bit.
"""

import math
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from varedit.editing.change_map import ChangeMap
from varedit.image_processor import Fit, LoadedImage
from varedit.scales import nearest_schedule, scale_schedule

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the picture."""

CONTEXT = 0.25
"""Shown around the area to edit on every side, as a share of the area's longer side."""

MIN_GAIN = 2.0
"""How many times larger the model must see the area for a crop to be worth the lost view of the whole."""

MAX_MAP_SIDE = 1536
"""Longest side in pixels of the change map of a cropped edit."""


def crop_box(area: Image.Image, size: int, fit: Fit = "native") -> Box | None:
    """The part of a picture to edit alone, or None where the whole is the better view.

    Args:
        area: mode L, of the picture's size; where the edit may go (above 0).
        size: size class of the model.
        fit: "square" takes the square template.
    """
    found = area.getbbox()
    if found is None:
        return None
    width, height = area.size
    context = CONTEXT * max(found[2] - found[0], found[3] - found[1])
    wanted = found[2] - found[0] + 2 * context, found[3] - found[1] + 2 * context
    schedule = (
        scale_schedule(size) if fit == "square" else nearest_schedule(size, *(math.ceil(x) for x in wanted[::-1]))
    )
    template = schedule.image_hw[::-1]
    # In the template's shape, and not below its size: smaller would only be enlarged.
    scale = max(1.0, *(side / model_side for side, model_side in zip(wanted, template)))
    edges = [
        _place((found[axis] + found[axis + 2]) / 2, math.ceil(template[axis] * scale), area.size[axis])
        for axis in (0, 1)
    ]
    (left, right), (top, bottom) = edges
    gain = max(width, height) / max(right - left, bottom - top)
    return (left, top, right, bottom) if gain >= MIN_GAIN else None


def _place(middle: float, length: int, limit: int) -> tuple[int, int]:
    """Start and end of a stretch around a middle, moved and cut to lie within the limit."""
    length = min(length, limit)
    start = min(max(round(middle - length / 2), 0), limit - length)
    return start, start + length


def cut(source: LoadedImage, box: Box | None) -> LoadedImage:
    """A part of a picture as a picture of its own, without transparency and EXIF. No box: the picture itself."""
    if box is None:
        return source
    left, top, right, bottom = box
    rgb16_HW3 = None if source.rgb16_HW3 is None else source.rgb16_HW3[top:bottom, left:right]
    return replace(source, rgb=source.rgb.crop(box), rgb16_HW3=rgb16_HW3, alpha=None, alpha16_HW=None, exif=None)


def stitch(source: LoadedImage, part: Image.Image | np.ndarray, box: Box) -> Image.Image | np.ndarray:
    """The picture with an edited part put back; of the part's type and bits a channel."""
    if isinstance(part, Image.Image):
        image = source.rgb.copy()
        image.paste(part, box)
        return image
    assert source.rgb16_HW3 is not None
    left, top, right, bottom = box
    pixels = source.rgb16_HW3.copy()
    pixels[top:bottom, left:right] = part
    return pixels


def place_map(change: ChangeMap, box: Box, size: tuple[int, int], mask: Image.Image | None) -> ChangeMap:
    """The change map of a cropped edit as one of the whole picture, of at most `MAX_MAP_SIDE` pixels a side.

    `difference` stays that of the crop.

    Args:
        size: (width, height) of the whole picture.
        mask: mode L, of the whole picture; what `stray` is counted outside of.
    """
    height, width = change.hard_HW.shape
    scale = min(width / (box[2] - box[0]), MAX_MAP_SIDE / max(size))
    map_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    where, on_grid = [], True
    for axis in (1, 0):
        edges = [box[edge] * map_size[axis] / size[axis] for edge in (axis, axis + 2)]
        on_grid &= edges[1] - edges[0] == change.hard_HW.shape[1 - axis] and edges[0].is_integer()
        start = min(round(edges[0]), map_size[axis] - 1)
        where.append(slice(start, max(round(edges[1]), start + 1)))

    def placed(levels_HW: np.ndarray) -> np.ndarray:
        whole_HW = np.zeros(map_size[::-1], np.float32)
        target = whole_HW[where[0], where[1]]
        part = Image.fromarray(levels_HW.astype(np.float32))
        target[:] = np.asarray(part.resize(target.shape[::-1], Image.Resampling.BILINEAR))
        return whole_HW

    hard_HW = placed(change.hard_HW) > 0  # any part of a pixel: nothing that changed gets lost
    if not on_grid:  # nor by rounding the box to pixels of the map
        hard_HW = ndimage.binary_dilation(hard_HW, np.ones((3, 3)))
    share = (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])
    stray = None
    if mask is not None and change.stray is not None:
        outside = [np.mean(np.asarray(part) == 0) for part in (mask.crop(box), mask)]
        stray = float(change.stray * share * outside[0] / outside[1]) if outside[1] else 0.0
    return replace(
        change,
        soft_HW=np.clip(placed(change.soft_HW), 0, 1),
        hard_HW=hard_HW,
        kind="none" if change.kind == "none" else "local",
        orientation="same",
        area=change.area * share,
        stray=stray,
        remainder_HW=hard_HW,
    )
