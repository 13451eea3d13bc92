"""Preserve: untouched pixels are the input's own, changed ones carry the input's own detail.

The model works at its size class; the input may have a hundred times the pixels. So the edit is not enlarged but
transferred: from the source and the result as the decoder shows them, a field of colour gains is estimated that says
how much of the source's detail the edit kept (recoloured: all of it, in other colours; removed or painted over: none).
At the input's own resolution

    output = result + gain * (input - source)         source, result and gain brought up to the input's size

which is the input itself where nothing changed, the input recoloured where the edit is a change of colour, and the
edit's own pixels where the edit drew something new. The idea of fitting local affine colour transforms at low
resolution is that of bilateral guided upsampling and the guided filter.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image
from scipy import ndimage, sparse

from varedit.editing.change_map import ORIENTATIONS, ChangeMap
from varedit.editing.detail import transfer
from varedit.image_processor import LoadedImage

Mode = Literal["exact", "blend", "off"]

FEATHER = 2.0
"""Model pixels around the changed area over which an exact edit fades out. Inside it is seen whole: an outline of what
was removed would catch the eye."""

_BAND_PIXELS = 500_000  # input pixels held at once as float32: about 60 MB with all fields

_Picture = LoadedImage | Image.Image | np.ndarray


def preserve(
    original: _Picture,
    edited: Image.Image,
    change: ChangeMap,
    mode: Mode = "exact",
    strength: float = 1.0,
    *,
    mask: Image.Image | None = None,
) -> Image.Image | np.ndarray:
    """Put the input's own pixels and detail back into an edit.

    Args:
        original: the input: a `LoadedImage`, an RGB image, or an array (H, W, 3) of uint8 or uint16.
        edited: the edit as the model made it, of the input's size.
        change: the change map of the edit.
        mode: "exact": outside the changed area and FEATHER model pixels around it the output is the input, bit for
            bit. A global edit has no outside. "blend": fades from edit to input by how surely a pixel changed.
            "off": the edit as it is.
        strength: from 0, the edit as it is, to 1, the mode in full; between, the input shines through the edit's
            untouched parts in that proportion.
        mask: mode L, of the input's size; the output is the input, bit for bit, where it is 0.

    Returns:
        RGB image; an array of the same type for an array. Deterministic; memory does not grow with the input beyond
        the input and the output themselves.

    Raises:
        ValueError: sizes that differ, an unknown mode, a strength outside [0, 1], an array of another kind.
    """
    if mode not in ("exact", "blend", "off"):
        raise ValueError(f"preserve mode {mode!r} is unknown; use 'exact', 'blend' or 'off'")
    if not 0 <= strength <= 1:
        raise ValueError(f"preserve strength {strength} must lie between 0 (the edit as it is) and 1 (locked)")
    pixels = _pixels(original)
    size = (pixels.shape[1], pixels.shape[0])
    for name, image in (("edit", edited), ("mask", mask)):
        if image is not None and image.size != size:
            raise ValueError(
                f"the {name} of {image.width} x {image.height} pixels must have the input's {size[0]} x {size[1]}"
            )
    if mode == "off" or strength == 0:
        scale = np.iinfo(pixels.dtype).max // 255
        output = np.asarray(edited.convert("RGB")).astype(pixels.dtype) * pixels.dtype.type(scale)
    elif change.kind == "none" and strength == 1:
        output = pixels.copy()
    else:
        output = _compose(pixels, change, opacity(change, mode, strength))
    if mask is not None:
        _lock_outside(output, pixels, mask)
    return output if isinstance(original, np.ndarray) else Image.fromarray(output)


def opacity(change: ChangeMap, mode: Mode = "exact", strength: float = 1.0) -> np.ndarray:
    """How much of the edit is seen: float32 (H, W) in [0, 1], model pixels."""
    changed = change.remainder_HW if change.orientation != "same" else change.hard_HW
    if change.kind == "global" and (change.orientation == "same" or changed.mean() > 0.5):
        return np.ones(changed.shape, np.float32)
    if mode == "blend":
        # Of a turned picture the soft map is of what lay there before: the sure extent alone is of the turned one.
        soft = np.maximum(change.soft_HW, changed) if change.orientation == "same" else changed.astype(np.float32)
        shown = ndimage.gaussian_filter(soft, FEATHER / 2)
        shown[shown < 1 / 255] = 0
    elif changed.any():
        shown = np.maximum(1 - ndimage.distance_transform_edt(~changed) / FEATHER, 0)
    else:
        shown = np.zeros(changed.shape)
    return (1 - strength * (1 - shown)).astype(np.float32)


def reach(change: ChangeMap, size: tuple[int, int]) -> np.ndarray:
    """The pixels of an input of `size` (width, height) that an exact edit may change: bool (H, W)."""
    if change.orientation != "same":
        return np.ones(size[::-1], bool)
    shown = opacity(change)
    enlarge = _Enlarge(shown.shape, size[::-1], cubic=False)
    return enlarge(shown[..., None], slice(None), slice(None))[..., 0] > 0


# ---------------------------------------------------------------- at the input's resolution


def _compose(pixels: np.ndarray, change: ChangeMap, shown: np.ndarray) -> np.ndarray:
    """The input with the edit laid over it by `shown`, band by band."""
    output = pixels[ORIENTATIONS[change.orientation]].copy()
    moved = transfer(change)
    fields = np.concatenate([moved.result_HW3, moved.source_HW3], -1)
    gains = moved.gain_HW33.reshape(*shown.shape, 9)
    height, width = pixels.shape[:2]
    smooth = _Enlarge(shown.shape, (height, width), cubic=True)
    linear = _Enlarge(shown.shape, (height, width), cubic=False)
    levels = np.float32(np.iinfo(pixels.dtype).max / 255)
    for rows, columns in _tiles(linear, shown):
        alpha = linear(shown[..., None], rows, columns)
        own = output[rows, columns] / levels
        large = smooth(fields, rows, columns)
        edit, detail = large[..., :3], own - large[..., 3:]
        gain = linear(gains, rows, columns)
        for channel in range(3):
            edit[..., channel] += (gain[..., 3 * channel : 3 * channel + 3] * detail).sum(-1)
        mixed = own + alpha * (np.clip(edit, 0, 255) - own)
        rounded = np.rint(mixed * levels).astype(pixels.dtype)
        output[rows, columns] = np.where(alpha > 0, rounded, output[rows, columns])
    return output


def _tiles(linear: "_Enlarge", shown: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Bands of rows, cut to the columns in which something is shown."""
    height, width = linear.size
    step = max(1, _BAND_PIXELS // width)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        seen = (linear.rows[rows] @ shown).any(0)
        columns = np.flatnonzero(linear.columns @ seen.astype(np.float32))
        if len(columns):
            yield rows, slice(int(columns[0]), int(columns[-1]) + 1)


class _Enlarge:
    """Fields of model pixels (h, w, C) brought to any part of the input's size, bilinearly or bicubically.

    A tile has the same values as that part of the whole.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], cubic: bool) -> None:
        self.size = size
        self.rows, self.columns = (_weights(n, target, cubic) for n, target in zip(grid, size))

    def __call__(self, field_hwC: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """float32 (rows, columns, C)."""
        h, w, channels = field_hwC.shape
        tall = self.rows[rows] @ field_hwC.reshape(h, w * channels)
        turned = tall.reshape(-1, w, channels).swapaxes(0, 1).reshape(w, -1)
        large = self.columns[columns] @ turned
        return large.reshape(large.shape[0], -1, channels).swapaxes(0, 1)


def _weights(num_inputs: int, num_outputs: int, cubic: bool) -> sparse.csr_array:
    """Interpolation along one axis as a sparse matrix (num_outputs, num_inputs), rows summing to 1; edges repeat."""
    centres = (np.arange(num_outputs) + 0.5) * (num_inputs / num_outputs) - 0.5
    first = np.floor(centres).astype(int)
    t = (centres - first).astype(np.float64)
    if cubic:  # Catmull-Rom
        taps = [-1, 0, 1, 2]
        weights = [
            ((-0.5 * t + 1) * t - 0.5) * t, (1.5 * t - 2.5) * t * t + 1, ((-1.5 * t + 2) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        ]  # fmt: skip
    else:
        taps, weights = [0, 1], [1 - t, t]
    inputs = np.concatenate([np.clip(first + tap, 0, num_inputs - 1) for tap in taps])
    outputs = np.tile(np.arange(num_outputs), len(taps))
    values = np.concatenate(weights).astype(np.float32)
    return sparse.csr_array((values, (outputs, inputs)), shape=(num_outputs, num_inputs))


def _pixels(original: _Picture) -> np.ndarray:
    """The input as an array (H, W, 3) of uint8 or uint16; not a copy."""
    if isinstance(original, LoadedImage):
        return np.asarray(original.rgb)
    if isinstance(original, Image.Image):
        return np.asarray(original if original.mode == "RGB" else original.convert("RGB"))
    if original.ndim != 3 or original.shape[2] != 3 or original.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"an array {original.shape} {original.dtype} is no RGB picture; pass (H, W, 3) uint8 or uint16"
        )
    return original


def _lock_outside(output: np.ndarray, pixels: np.ndarray, mask: Image.Image) -> None:
    """Fade the output into the input by the mask, in place: the input itself where the mask is 0."""
    step = max(1, _BAND_PIXELS // pixels.shape[1])
    for top in range(0, pixels.shape[0], step):
        rows = slice(top, top + step)
        box = (0, top, mask.width, min(top + step, mask.height))
        alpha = np.asarray(mask.crop(box), np.float32)[..., None] / 255
        own = pixels[rows].astype(np.float32)
        mixed = np.rint(own + alpha * (output[rows] - own)).astype(pixels.dtype)
        output[rows] = np.where(alpha > 0, mixed, pixels[rows])
