"""Any image a person has -> model input, and the exact way back to its width and height.

The way of an edit: `load_image` reads anything into upright sRGB with alpha kept aside, `prepare` fits it to a scale
schedule, the model edits, `to_pil` rounds to 8 bits, `Prepared.restore` undoes the fit, `image_writer.save_image`
writes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from varedit.image_reader import ImageError, ImageInput, LoadedImage, load_image
from varedit.scales import ScaleSchedule, nearest_schedule, scale_schedule

__all__ = ["Fit", "ImageError", "ImageInput", "LoadedImage", "Prepared", "load_image", "prepare", "to_pil"]

Fit = Literal["native", "square"]

_BAND_PIXELS = 16_000_000  # held at once by the square fit
_MAX_SQUARE_SIDE = 65_535  # of which side x 1024 pixels are held


@dataclass(frozen=True, eq=False)
class Prepared:
    """Model input and the way back.

    Attributes:
        image_B3HW: float32, (1, 3, H, W) with (H, W) = schedule.image_hw, range [-1, 1] (u8 / 127.5 - 1).
        schedule: the scale schedule that the image was fitted to.
        source: the image that was fitted.
        fit: "native" or "square".
        content_box: (left, top, right, bottom) of the source inside the model's image, in model pixels. Whole numbers
            for "native"; "square" may end between pixels.
    """

    image_B3HW: torch.Tensor
    schedule: ScaleSchedule
    source: LoadedImage
    fit: Fit
    content_box: tuple[float, float, float, float]

    def restore(self, image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
        """Undoes the fit: an image of the schedule's size -> RGB of exactly the source's width and height.

        Args:
            image: anything `load_image` takes; its size must be schedule.image_hw.

        Raises:
            ValueError: the image has another size.
        """
        rgb = load_image(image).rgb
        height, width = self.schedule.image_hw
        if rgb.size != (width, height):
            raise ValueError(f"cannot restore an image of {rgb.width} x {rgb.height} pixels; pass {width} x {height}")
        size = (self.source.width, self.source.height)
        if self.fit == "square":
            return _restore_square(rgb, size)
        left, top, right, bottom = (int(edge) for edge in self.content_box)
        # Cropping first keeps the invented padding out of the resampling filter. Equal sizes are copied, not resampled.
        return rgb.crop((left, top, right, bottom)).resize(size, Image.Resampling.LANCZOS)


def prepare(image: "ImageInput | Prepared", size: int, fit: Fit = "native") -> Prepared:
    """Fits any image to a scale schedule of one size class.

    "native" takes the nearest of the 15 aspect templates. The image is scaled by one factor (Lanczos) to fit inside,
    centred, and the rest is filled with its mirror image; the way back crops the filling off. So nothing is distorted
    (stretching would bend circles, in the input and in whatever the edit draws), nothing is lost (cropping would have
    to give back pixels that the model never saw), and the filling looks like more of the same photo, not like a
    border to be edited. It is at most 11 % of one side up to a ratio of 3:1, and more beyond.
    An image that already has the template's exact size is passed on, and given back, without any resampling.

    "square" is the released fit of the square checkpoints: top left on a white square of side max(width, height),
    scaled (Lanczos) to the square of the size class; back to the side and cropped.

    Args:
        image: anything `load_image` takes; or what came of this very call before, which is returned as it is.
        size: size class, one of `scales.SIZES`.
        fit: "native" or "square".

    Raises:
        ImageError: see `load_image`; also a side beyond 65535 pixels with the square fit.
        ValueError: unknown size class or fit.
    """
    if fit not in ("native", "square"):
        raise ValueError(f"fit {fit!r} is unknown; use 'native' or 'square'")
    square_schedule = scale_schedule(size)  # an unknown size is refused before the image is decoded
    if isinstance(image, Prepared):
        if (image.schedule.size, image.fit) != (size, fit):
            raise ValueError(f"the image was prepared for {image.schedule.size}, {image.fit!r}, not {size}, {fit!r}")
        return image
    source = load_image(image)
    if fit == "square":
        schedule = square_schedule
        fitted, box = _fit_square(source.rgb, schedule.image_hw[0])
    else:
        schedule = nearest_schedule(size, source.height, source.width)
        fitted, box = _fit_native(source.rgb, schedule.image_hw)
    pixels_HW3 = np.asarray(fitted, dtype=np.float32) / 127.5 - 1.0
    image_B3HW = torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None].contiguous()
    return Prepared(image_B3HW, schedule, source, fit, box)


def _fit_native(rgb: Image.Image, image_hw: tuple[int, int]) -> tuple[Image.Image, tuple[int, int, int, int]]:
    height, width = image_hw
    scale = min(width / rgb.width, height / rgb.height)
    inner_width = min(width, max(1, round(rgb.width * scale)))
    inner_height = min(height, max(1, round(rgb.height * scale)))
    inner = rgb.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    right, bottom = left + inner_width, top + inner_height
    # "symmetric" repeats the edge pixel, so it also works for sides of one pixel and paddings longer than the side.
    pixels = np.pad(np.asarray(inner), ((top, height - bottom), (left, width - right), (0, 0)), mode="symmetric")
    return Image.fromarray(pixels), (left, top, right, bottom)


def _fit_square(rgb: Image.Image, size: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """White square, top left, scaled to `size`. Never holds side x side pixels (1 x 60000: 3.6 gigapixels).

    Pillow resamples along rows first and then along columns, so doing the rows band by band gives the same bits.
    """
    side = max(rgb.size)
    if side > _MAX_SQUARE_SIDE:
        raise ImageError(
            f"a side of {side} pixels is too long for the square fit; use the native fit or crop the image"
        )
    rows_done = Image.new("RGB", (size, side), "white")
    step = max(1, _BAND_PIXELS // side)
    for top in range(0, rgb.height, step):
        bottom = min(top + step, rgb.height)
        band = Image.new("RGB", (side, bottom - top), "white")
        band.paste(rgb.crop((0, top, rgb.width, bottom)))
        rows_done.paste(band.resize((size, bottom - top), Image.Resampling.LANCZOS), (0, top))
    square = rows_done.resize((size, size), Image.Resampling.LANCZOS)
    return square, (0.0, 0.0, rgb.width * size / side, rgb.height * size / side)


def _restore_square(rgb: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The square back to its side, cropped to `size` (width, height); band by band of columns, see `_fit_square`."""
    (width, height), side = size, max(size)
    rows_done = rgb.resize((side, rgb.height), Image.Resampling.LANCZOS)
    restored = Image.new("RGB", size)
    step = max(1, _BAND_PIXELS // side)
    for left in range(0, width, step):
        right = min(left + step, width)
        band = rows_done.crop((left, 0, right, rgb.height)).resize((right - left, side), Image.Resampling.LANCZOS)
        restored.paste(band.crop((0, 0, right - left, height)), (left, 0))
    return restored


# ---------------------------------------------------------------- the model's output


def to_pil(image_B3HW: torch.Tensor) -> list[Image.Image]:
    """Model output -> RGB images, rounded to the nearest of 256 levels (the released code truncates).

    Args:
        image_B3HW: float, (B, 3, H, W), nominal range [-1, 1]; values beyond it are clamped.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(image_B3HW.shape)} cannot be converted; use (B, 3, H, W)")
    values_BHW3 = image_B3HW.detach().float().permute(0, 2, 3, 1)
    if not bool(torch.isfinite(values_BHW3).all()):
        raise ValueError("images contain values that are not finite; decode in float32 or bfloat16, not float16")
    levels_BHW3 = ((values_BHW3.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous().numpy()
    return [Image.fromarray(levels_HW3) for levels_HW3 in levels_BHW3]
