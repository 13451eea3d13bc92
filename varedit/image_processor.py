"""Any image a person has -> model input, and the exact way back to a file of the same width and height.

The way of an edit: `load_image` reads anything into upright 8-bit sRGB with alpha kept aside, `prepare` fits it to a
scale schedule, the model edits, `to_pil` rounds to 8 bits, `Prepared.restore` undoes the fit, `save_image` writes.
"""

import contextlib
import io
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Union

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from varedit.scales import ScaleSchedule, nearest_schedule, scale_schedule

logger = logging.getLogger(__name__)

ImageInput = Union["LoadedImage", str, os.PathLike, bytes, BinaryIO, Image.Image, np.ndarray, torch.Tensor]
Fit = Literal["native", "square"]

MAX_PIXELS = 178_956_970
"""Largest image read: twice Pillow's warning level, which is where Pillow itself refuses."""

# What Pillow's readers and writers raise on damaged input; the set is wide because every format has its own parser.
_CODEC_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(OverflowError, NotImplementedError, struct.error, zlib.error, ImageCms.PyCMSError),
)

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg .jpeg", "WEBP": ".webp", "AVIF": ".avif", "TIFF": ".tif .tiff", "BMP": ".bmp"}
_ALPHA_FORMATS = {"PNG", "WEBP", "AVIF", "TIFF"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "exact": True},  # exact: colours under full transparency are kept
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
_BAND_PIXELS = 16_000_000  # held at once by the square fit
_MAX_SQUARE_SIDE = 65_535  # of which side x 1024 pixels are held
_MAX_JPEG_EXIF = 65_533  # a JPEG segment holds no more

# A TIFF's "EXIF" is its whole directory, strip offsets included. Only these tags describe the picture and may travel:
# description, make, model, resolution (3), software, date, artist, copyright, the EXIF and GPS directories.
_TIFF_TAGS_KEPT = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}

_TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be read, used or written. The message is one line: the value and the fix."""


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image as the model and the way back need it.

    Attributes:
        rgb: upright, mode RGB, sRGB. Colours under transparent pixels are as stored, not blended.
        alpha: mode L of the same size, or None where the input has no transparency.
        format: Pillow's format name ("JPEG", "PNG", ...), None for arrays, tensors and images made in memory.
        mode: the input's own Pillow mode, or the array's dtype.
        bit_depth: bits a channel of the input: 1, 8, 16 or 32.
        exif: EXIF block with the orientation removed, ready for `save_image`; None where there is none.
        notes: what was changed on the way in, one sentence each ("16 bits a channel reduced to 8").
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    format: str | None = None
    mode: str = "RGB"
    bit_depth: int = 8
    exif: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.rgb.width

    @property
    def height(self) -> int:
        return self.rgb.height


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


# ---------------------------------------------------------------- reading


def load_image(image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Reads any image into upright 8-bit sRGB.

    Args:
        image: one of
            a path (str or Path), the bytes of an image file, or a binary file object (read from where it stands);
            a PIL image in any mode (never modified);
            a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16, or float in [0, 1];
            a torch tensor (3, H, W) or (1, 3, H, W): uint8, or float in [-1, 1], the model's own range. A tensor in
            [0, 1] cannot be told from a pale one in [-1, 1]: multiply it by 2 and subtract 1 first;
            a `LoadedImage`, returned as it is.
        max_pixels: larger images are refused from their header, before decoding. Pillow's own limit
            (`PIL.Image.MAX_IMAGE_PIXELS`, doubled) applies as well.

    Returns:
        The image. Of animations the current frame (of files the first) is taken, with a logged warning.

    Raises:
        ImageError: missing, unreadable, damaged, not an image, empty, too large, or of an unknown kind.
    """
    if isinstance(image, LoadedImage):
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image, max_pixels)
    if isinstance(image, Image.Image):
        label = f"image ({image.mode}, {image.width} x {image.height})"
        return _decode(lambda: _from_pil(image, label, max_pixels), label)
    if isinstance(image, (str, os.PathLike)):
        return _from_path(image, max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(image), "image bytes", max_pixels)
    if hasattr(image, "read"):
        label = f"image file object {getattr(image, 'name', type(image).__name__)!r}"
        data = image.read()
        if not isinstance(data, bytes):
            raise ImageError(f"{label} gives {type(data).__name__}, not bytes; open it in binary mode ('rb')")
        return _from_bytes(data, label, max_pixels)
    raise ImageError(
        f"image of type {type(image).__name__} is not supported; pass a path, bytes, a binary file, a PIL image, "
        "a numpy array or a torch tensor"
    )


def _from_path(path: str | os.PathLike, max_pixels: int) -> LoadedImage:
    label = f"image {os.fspath(path)!r}"
    try:
        file = open(path, "rb")  # closed below: only opening it belongs in this try
    except FileNotFoundError:
        raise ImageError(f"{label} does not exist; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{label} is a folder; name an image file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{label} cannot be opened ({_reason(error)}); check the path and its permissions") from error
    with file:
        return _open(file, label, max_pixels, empty=os.fstat(file.fileno()).st_size == 0)


def _from_bytes(data: bytes, label: str, max_pixels: int) -> LoadedImage:
    return _open(io.BytesIO(data), f"{label} ({len(data)} bytes)", max_pixels, empty=not data)


def _open(file: BinaryIO, label: str, max_pixels: int, *, empty: bool) -> LoadedImage:
    if empty:
        raise ImageError(f"{label} is empty; pass a complete image file")

    def read() -> LoadedImage:
        with Image.open(file) as opened:
            return _from_pil(opened, label, max_pixels)

    return _decode(read, label)


def _decode(read: Callable[[], LoadedImage], label: str) -> LoadedImage:
    """Calls `read` and turns whatever Pillow raises into one ImageError that names the image."""
    try:
        return read()
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{label} is too large ({_reason(error).split(',')[0]}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{label} is not an image this Pillow can read; convert it to PNG or JPEG") from error
    except _CODEC_ERRORS as error:
        raise ImageError(f"{label} is damaged or truncated ({_reason(error)}); get a complete copy") from error


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _check_size(width: int, height: int, label: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{label} has no pixels ({width} x {height}); both sides must be at least 1")
    if width * height > max_pixels:
        raise ImageError(
            f"{label} is too large ({width} x {height} is {width * height / 1e6:.1f} megapixels, the limit is "
            f"{max_pixels / 1e6:.1f}); scale it down first"
        )


def _from_pil(image: Image.Image, label: str, max_pixels: int) -> LoadedImage:
    _check_size(image.width, image.height, label, max_pixels)
    notes: list[str] = []
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":  # MPO is a phone's JPEG with a depth map or thumbnail behind it
        frame = image.tell()
        notes.append(f"{'first' if frame == 0 else f'frame {frame + 1}'} of {num_frames} frames used")
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    sixteen_bit = any(";16" in raw and "BGR;16" not in raw for raw in raw_modes)  # BGR;16: 16 bits a pixel, 5-6-5
    upright, exif = _upright(image, notes)
    color, alpha, bit_depth = _split(upright, label)
    if sixteen_bit:  # Pillow reads 16-bit colour by dropping the low byte
        bit_depth = 16
    if bit_depth > 8:
        notes.append(f"{bit_depth} bits a channel reduced to 8")
    # LAB is colorimetric: its profile describes nothing that the conversion to RGB has not used.
    rgb = _to_srgb(color, None if image.mode == "LAB" else image.info.get("icc_profile"), notes)
    for note in notes:
        logger.warning("%s: %s", label, note)
    return LoadedImage(rgb, alpha, image.format, image.mode, bit_depth, exif, tuple(notes))


def _upright(image: Image.Image, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """A turned copy of the image, and its EXIF block without the orientation. A damaged block is noted and left out.

    Not ImageOps.exif_transpose: that one fails, unturned, where any other tag is odd.
    """
    image.load()  # first, so that damaged pixels are not taken for damaged EXIF; turns a TIFF upright by itself
    turn = None
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        exif = Image.Exif()
        exif.load(image.getexif().tobytes())
        exif.pop(ExifTags.Base.Orientation, None)
        if image.format == "TIFF":
            for tag in set(exif) - _TIFF_TAGS_KEPT:
                del exif[tag]
        exif_bytes = exif.tobytes() if len(exif) else None
    except _CODEC_ERRORS as error:
        notes.append(f"damaged EXIF left out ({_reason(error)})")
        exif_bytes = None
    return image.transpose(turn) if turn is not None else image.copy(), exif_bytes


def _split(image: Image.Image, label: str) -> tuple[Image.Image, Image.Image | None, int]:
    """Separates colour (mode L, RGB or CMYK) from alpha (mode L or None) and tells the bits a channel."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F":
            return Image.fromarray(_float_to_u8(values, label)), None, 32
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            raise ImageError(f"{label} has 32-bit values outside 0..65535; rescale it to 8 or 16 bits")
        key = image.info.get("transparency")  # the one gray level that is transparent
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return Image.fromarray(_u16_to_u8(values)), alpha, 16
    bit_depth = 1 if image.mode == "1" else 8
    if image.mode in ("LA", "La"):
        gray, alpha = image.convert("LA").split()
        return gray, alpha, bit_depth
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A"), bit_depth
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None, bit_depth
    return image.convert("RGB"), None, bit_depth


def _to_srgb(color: Image.Image, icc_profile: bytes | None, notes: list[str]) -> Image.Image:
    """Colour of mode L, RGB or CMYK -> RGB in sRGB. An sRGB profile changes no value; an unusable one is noted."""
    if not icc_profile:
        return color.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        name = ImageCms.getProfileDescription(profile).strip()
        if profile.profile.xcolor_space.strip() == "RGB":
            color = color.convert("RGB")  # a grayscale or palette image may carry an RGB profile
            if name.startswith("sRGB"):
                return color
        converted = ImageCms.profileToProfile(
            color,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except _CODEC_ERRORS as error:
        notes.append(f"unusable colour profile ignored ({_reason(error)})")
        return color.convert("RGB")
    assert converted is not None  # None only when converting in place
    notes.append(f"colour profile {name!r} converted to sRGB")
    return converted


def _u16_to_u8(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(v / 257): 65535 -> 255


def _float_to_u8(values: np.ndarray, label: str, low: float = 0.0) -> np.ndarray:
    """Floats in [low, 1] -> the nearest of 256 levels."""
    smallest, largest = float(values.min()), float(values.max())
    if not (low <= smallest and largest <= 1.0):  # also catches NaN
        raise ImageError(
            f"{label} has float values from {smallest:g} to {largest:g}; scale and clamp them to [{low:g}, 1]"
        )
    values = values.astype(np.float32)
    return np.rint((values - low) * (255.0 / (1.0 - low))).astype(np.uint8)


def _from_array(array: np.ndarray, max_pixels: int) -> LoadedImage:
    label = f"image array {array.shape} {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{label} has no image shape; use (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    _check_size(array.shape[1], array.shape[0], label, max_pixels)
    if array.dtype == np.uint8:
        levels = array
    elif array.dtype == np.uint16:
        levels = _u16_to_u8(array)
    elif np.issubdtype(array.dtype, np.floating):
        levels = _float_to_u8(array, label)
    else:
        raise ImageError(f"{label} has an unsupported type; use uint8, uint16 or float in [0, 1]")
    bit_depth = 8 * array.dtype.itemsize
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    pil = Image.fromarray(np.ascontiguousarray(levels))
    alpha = pil.getchannel("A") if pil.mode == "RGBA" else None
    return LoadedImage(pil.convert("RGB"), alpha, mode=str(array.dtype), bit_depth=bit_depth)


def _from_tensor(tensor: torch.Tensor, max_pixels: int) -> LoadedImage:
    label = f"image tensor {tuple(tensor.shape)} {tensor.dtype}"
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(f"{label} has no image shape; use (3, H, W) or (1, 3, H, W)")
    _check_size(tensor.shape[2], tensor.shape[1], label, max_pixels)
    values_HW3 = tensor.detach().cpu().permute(1, 2, 0)
    if tensor.dtype == torch.uint8:
        levels = values_HW3.numpy()
    elif tensor.is_floating_point():
        levels = _float_to_u8(values_HW3.float().numpy(), label, low=-1.0)
    else:
        raise ImageError(f"{label} has an unsupported type; use uint8 or float in [-1, 1]")
    rgb = Image.fromarray(np.ascontiguousarray(levels))
    return LoadedImage(rgb, mode=str(tensor.dtype), bit_depth=8 * tensor.element_size())


# ---------------------------------------------------------------- fitting


def prepare(image: ImageInput, size: int, fit: Fit = "native") -> Prepared:
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
        image: anything `load_image` takes.
        size: size class, one of `scales.SIZES`.
        fit: "native" or "square".

    Raises:
        ImageError: see `load_image`; also a side beyond 65535 pixels with the square fit.
        ValueError: unknown size class or fit.
    """
    if fit not in ("native", "square"):
        raise ValueError(f"fit {fit!r} is unknown; use 'native' or 'square'")
    square_schedule = scale_schedule(size)  # an unknown size is refused before the image is decoded
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


# ---------------------------------------------------------------- writing


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


def encode_image(image: Image.Image, format: str, like: LoadedImage | None = None) -> bytes:
    """The bytes of an image file.

    JPEG is written at quality 95 without chroma subsampling, WebP and AVIF at quality 95; the others are lossless.

    Args:
        image: RGB, or RGBA to bring its own alpha.
        format: a suffix or Pillow's name of it: "png", ".jpg", "JPEG", "webp", "avif", "tiff", "bmp".
        like: the source: its alpha is attached again where the format can hold it (else the image is laid on white,
            with a logged note), and its EXIF is kept.

    Raises:
        ImageError: unsupported format, alpha of another size, or an image the format cannot hold.
    """
    name = _format_name(format)
    alpha = image.getchannel("A") if image.mode == "RGBA" else like.alpha if like else None
    image = image.convert("RGB")
    if alpha is not None:
        if alpha.size != image.size:
            raise ImageError(
                f"alpha of {alpha.width} x {alpha.height} pixels does not fit an image of {image.width} x "
                f"{image.height}; restore the image to its source's size first"
            )
        if name in _ALPHA_FORMATS:
            image.putalpha(alpha)
        elif alpha.getextrema() != (255, 255):
            logger.warning("%s cannot hold transparency: laid on white; save as PNG to keep it", name)
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    options = dict(_SAVE_OPTIONS.get(name, {}))
    if like and like.exif and name != "BMP":
        if name == "JPEG" and len(like.exif) > _MAX_JPEG_EXIF:
            logger.warning("EXIF of %d bytes is more than a JPEG can hold: left out", len(like.exif))
        else:
            options["exif"] = like.exif
    buffer = io.BytesIO()
    try:
        image.save(buffer, name, **options)
    except _CODEC_ERRORS as error:
        raise ImageError(
            f"{image.width} x {image.height} pixels cannot be saved as {name} ({_reason(error)}); save as PNG"
        ) from error
    return buffer.getvalue()


def _format_name(format: str) -> str:
    """Pillow's name of a format given as "jpg", ".JPG" or "JPEG"."""
    names = [name for name in _SUFFIXES if name not in ("WEBP", "AVIF") or features.check(name.lower())]
    for name in names:
        if format and "." + format.lower().removeprefix(".") in _SUFFIXES[name].split():
            return name
    known = " ".join(_SUFFIXES[name] for name in names)
    raise ImageError(f"format {format!r} is not supported for saving; use one of {known}")


def check_output(path: str | os.PathLike, *, format: str | None = None, overwrite: bool = False) -> None:
    """Refuses, before any work is done, an output that `save_image` could not write.

    Raises:
        ImageError: unsupported format, existing file without `overwrite`, not a file, missing or unwritable folder.
    """
    path, label = Path(path), f"output {os.fspath(path)!r}"
    _format_name(path.suffix if format is None else format)
    try:
        exists, is_file, has_folder = path.exists(), path.is_file(), path.resolve().parent.is_dir()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{label} cannot be written ({_reason(error)}); choose another path") from error
    if exists and not is_file:
        raise ImageError(f"{label} is a folder or device; name a file")
    if exists and not overwrite:
        raise ImageError(f"{label} exists already; choose another name or allow overwriting")
    if not has_folder:
        raise ImageError(f"{label} is in a folder that does not exist; create it first")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise ImageError(f"{label} is in a folder that is not writable; choose another")


def save_image(
    image: Image.Image,
    path: str | os.PathLike,
    like: LoadedImage | None = None,
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an image file all at once: whatever fails, `path` holds its old content or the whole new image.

    Args:
        image: RGB or RGBA; see `encode_image`.
        path: where to; its suffix decides the format unless `format` does.
        like: the source, for alpha and EXIF.
        format: see `encode_image`.
        overwrite: replace an existing file.

    Raises:
        ImageError: see `check_output` and `encode_image`; also a full disk. No file is left over.
    """
    path = Path(path)
    check_output(path, format=format, overwrite=overwrite)
    data = encode_image(image, path.suffix if format is None else format, like)
    target = path.resolve()  # through a symbolic link to the file itself: os.replace would replace the link
    temporary = target.parent / f".varedit-{secrets.token_hex(8)}.tmp"  # same folder: a rename must not cross disks
    try:
        # Not tempfile: its files are private to their owner, and this one becomes the user's.
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, target)
    except OSError as error:
        raise ImageError(
            f"output {str(path)!r} cannot be written ({_reason(error)}); free some space or choose another folder"
        ) from error
    finally:  # also when interrupted; after the rename there is nothing left to remove
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path
