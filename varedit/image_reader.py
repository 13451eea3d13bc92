"""Any image a person has -> upright sRGB, with transparency, EXIF and 16 bits a channel kept aside."""

import io
import logging
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, Union

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from varedit import sixteen_bit

logger = logging.getLogger(__name__)

ImageInput = Union["LoadedImage", str, os.PathLike, bytes, BinaryIO, Image.Image, np.ndarray, torch.Tensor]
_Color = TypeVar("_Color", Image.Image, np.ndarray)

MAX_PIXELS = 178_956_970
"""Largest image read: twice Pillow's warning level, which is where Pillow itself refuses."""

CODEC_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, RuntimeError),
    *(OverflowError, NotImplementedError, struct.error, zlib.error, ImageCms.PyCMSError),
)
"""What readers and writers of images raise on damaged input; the set is wide, for every format has its own parser."""

_SRGB_TOLERANCE = 2  # levels of 255: profiles of sRGB round its curve and its primaries differently

_CONVERTED = "colour profile"
"""How the note on a conversion begins."""

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
        exif: EXIF block with the orientation removed, ready for `image_writer`; None where there is none.
        notes: what was changed on the way in, one sentence each ("16 bits a channel reduced to 8").
        rgb16_HW3: the same as `rgb` at 16 bits a channel, uint16; None where the input has fewer (or more), or is of a
            format that is read at 8 bits only, which `notes` says.
        alpha16_HW: the same as `alpha`, uint16; may be None where `alpha` is not.
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    format: str | None = None
    mode: str = "RGB"
    bit_depth: int = 8
    exif: bytes | None = None
    notes: tuple[str, ...] = ()
    rgb16_HW3: np.ndarray | None = None
    alpha16_HW: np.ndarray | None = None

    @property
    def width(self) -> int:
        return self.rgb.width

    @property
    def height(self) -> int:
        return self.rgb.height


def load_image(image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Reads any image into upright sRGB; 16 bits a channel are kept beside the 8 that the model sees.

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
        raise ImageError(f"{label} cannot be opened ({reason(error)}); check the path and its permissions") from error
    with file:
        return _open(file, label, max_pixels, empty=os.fstat(file.fileno()).st_size == 0)


def _from_bytes(data: bytes, label: str, max_pixels: int) -> LoadedImage:
    return _open(io.BytesIO(data), f"{label} ({len(data)} bytes)", max_pixels, empty=not data)


def _open(file: BinaryIO, label: str, max_pixels: int, *, empty: bool) -> LoadedImage:
    if empty:
        raise ImageError(f"{label} is empty; pass a complete image file")

    def read() -> LoadedImage:
        with Image.open(file) as opened:
            return _from_pil(opened, label, max_pixels, file)

    return _decode(read, label)


def _decode(read: Callable[[], LoadedImage], label: str) -> LoadedImage:
    """Calls `read` and turns whatever Pillow raises into one ImageError that names the image."""
    try:
        return read()
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{label} is too large ({reason(error).split(',')[0]}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{label} is not an image this Pillow can read; convert it to PNG or JPEG") from error
    except CODEC_ERRORS as error:
        raise ImageError(f"{label} is damaged or truncated ({reason(error)}); get a complete copy") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
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


def _from_pil(image: Image.Image, label: str, max_pixels: int, file: BinaryIO | None = None) -> LoadedImage:
    """The file is the one that the image was opened from, for what Pillow does not read of it."""
    _check_size(image.width, image.height, label, max_pixels)
    notes: list[str] = []
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":  # MPO is a phone's JPEG with a depth map or thumbnail behind it
        frame = image.tell()
        notes.append(f"{'first' if frame == 0 else f'frame {frame + 1}'} of {num_frames} frames used")
    codec_args = [tile[3] for tile in getattr(image, "tile", ())]
    raw_modes = [str(args[0] if isinstance(args, tuple) else args) for args in codec_args]
    # Pillow reads 16-bit colour by dropping the low byte. BGR;16 is 16 bits a pixel: 5-6-5.
    reduced = any(";16" in raw and "BGR;16" not in raw for raw in raw_modes) and not image.mode.startswith("I")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    planes = tags.get(ExifTags.Base.PlanarConfiguration) == 2 and 16 in tags.get(ExifTags.Base.BitsPerSample, ())
    bands = image.mode if planes else raw_modes[0].split(";")[0] if reduced else ""
    _scale_transparent_gray(image, raw_modes)
    upright, orientation, exif = _upright(image, notes)
    if image.mode.startswith("I;16"):
        upright = _true_gray(upright, tags)
    color, alpha, bit_depth = _split(upright, label)
    pixels = np.asarray(upright).astype(np.uint16)[:, :, None] if bit_depth == 16 else None  # gray, whole
    if reduced or planes:
        bit_depth = 16
        pixels = _read_16_bit(file, image, bands, orientation)
        if planes and pixels is None:  # Pillow takes each half of its samples for a sample
            raise ImageError(f"{label} has 16 bits a channel in planes that cannot be read; save it without planes")
    # LAB is colorimetric: its profile describes nothing that the conversion to RGB has not used.
    icc_profile = None if image.mode == "LAB" else image.info.get("icc_profile")
    rgb16_HW3 = alpha16_HW = None
    if pixels is not None:
        if pixels.shape[2] in (2, 4):
            alpha16_HW = pixels[:, :, -1]
            alpha = Image.fromarray(sixteen_bit.to_8_bit(alpha16_HW))
        rgb16_HW3 = _to_srgb(pixels[:, :, : 1 if pixels.shape[2] < 3 else 3], icc_profile, notes)
        rgb = Image.fromarray(sixteen_bit.to_8_bit(rgb16_HW3))
    else:
        if bit_depth > 8:
            notes.append(f"{bit_depth} bits a channel reduced to 8")
        rgb = _to_srgb(color, icc_profile, notes)
    if exif and any(note.startswith(_CONVERTED) for note in notes):
        exif = _marked_srgb(exif)
    for note in notes:
        logger.warning("%s: %s", label, note)
    return LoadedImage(rgb, alpha, image.format, image.mode, bit_depth, exif, tuple(notes), rgb16_HW3, alpha16_HW)


def _read_16_bit(file: BinaryIO | None, image: Image.Image, bands: str, orientation: int) -> np.ndarray | None:
    """What Pillow has read at 8 bits, in full and upright: uint16 (H, W, C), or None where that cannot be had.

    Args:
        bands: as Pillow names what is stored; CMYK and colours with alpha multiplied into them are left to Pillow.
    """
    if file is None or image.format not in sixteen_bit.FORMATS or image.tell() != 0:
        return None
    if bands not in ("RGB", "RGBA", "RGBX", "LA"):
        return None
    file.seek(0)
    pixels = sixteen_bit.decode(file.read(), image.format)
    if pixels is None or pixels.size // pixels.shape[2] != image.width * image.height:
        return None
    pixels = pixels[:, :, :3] if bands == "RGBX" else pixels  # a fourth band that means nothing
    return sixteen_bit.upright(pixels, orientation)


def _upright(image: Image.Image, notes: list[str]) -> tuple[Image.Image, int, bytes | None]:
    """A turned copy, the orientation of what is stored, and the EXIF block without it. A damaged block is left out.

    Not ImageOps.exif_transpose: that one fails, unturned, where any other tag is odd.
    """
    orientation = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation, 1)  # of a TIFF
    image.load()  # first, so that damaged pixels are not taken for damaged EXIF; turns a TIFF upright by itself
    turn = None
    try:
        tagged = image.getexif().get(ExifTags.Base.Orientation, 1)
        turn = _TURNS.get(tagged)
        orientation = tagged if turn is not None else orientation
        exif = Image.Exif()
        exif.load(image.getexif().tobytes())
        exif.pop(ExifTags.Base.Orientation, None)
        if image.format == "TIFF":
            for tag in set(exif) - sixteen_bit.TIFF_TAGS_KEPT:
                del exif[tag]
        exif_bytes = exif.tobytes() if len(exif) else None
    except CODEC_ERRORS as error:
        notes.append(f"damaged EXIF left out ({reason(error)})")
        exif_bytes = None
    return image.transpose(turn) if turn is not None else image.copy(), orientation, exif_bytes


def _scale_transparent_gray(image: Image.Image, raw_modes: list[str]) -> None:
    """Grays of 2 and 4 bits are read as 0 to 255, and the one that is transparent has to go with them."""
    factor = {"L;2": 85, "L;4": 17}.get(raw_modes[0] if raw_modes else "")
    if factor and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= factor


def _true_gray(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """16-bit grays of a TIFF as they are meant: of 12 bits in full, and black where white is stored as zero."""
    values = np.asarray(image).astype(np.uint32)
    if 12 in tags.get(ExifTags.Base.BitsPerSample, ()):
        values = (values * 65535 + 2047) // 4095
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        values = 65535 - values
    turned = Image.fromarray(values.astype(np.uint16))
    turned.info = image.info
    return turned


def _marked_srgb(exif: bytes) -> bytes:
    """An EXIF block that says sRGB: it came with another colour space, which the pixels no longer have."""
    tags = Image.Exif()
    tags.load(exif)
    details = tags.get_ifd(ExifTags.IFD.Exif)
    if ExifTags.Base.ColorSpace in details:
        details[ExifTags.Base.ColorSpace] = 1
    details.pop(ExifTags.IFD.Interop, None)  # such as R03: Adobe RGB
    return tags.tobytes()


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
        return Image.fromarray(sixteen_bit.to_8_bit(values)), alpha, 16
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


def _to_srgb(color: _Color, icc_profile: bytes | None, notes: list[str]) -> _Color:
    """Colour -> RGB in sRGB. A profile that is sRGB, by whatever name, changes no value; an unusable one is noted.

    Args:
        color: mode L, RGB or CMYK; or uint16 (H, W, 1) or (H, W, 3).
    """
    if not icc_profile:
        return _as_rgb(color)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        name = ImageCms.getProfileDescription(profile).strip()
        if profile.profile.xcolor_space.strip() == "RGB":
            color = _as_rgb(color)  # a grayscale or palette image may carry an RGB profile
            if _is_srgb(profile):
                return color
        converted = (
            sixteen_bit.to_srgb(color, icc_profile) if isinstance(color, np.ndarray) else _convert(color, profile)
        )
    except CODEC_ERRORS as error:
        notes.append(f"unusable colour profile ignored ({reason(error)})")
        return _as_rgb(color)
    notes.append(f"{_CONVERTED} {name!r} converted to sRGB")
    return converted


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """By what it makes of grays and primaries: "sRGB-elle-V2-g10" is linear, and many an sRGB has another name."""
    ramp = np.arange(0, 256, 5)[:, None]
    colors = np.stack([ramp * one for one in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))]).astype(np.uint8)
    converted = np.asarray(_convert(Image.fromarray(colors), profile))
    return bool(np.abs(converted.astype(int) - colors).max() <= _SRGB_TOLERANCE)


def _convert(color: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(
        color,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # None only when converting in place
    return converted


def _as_rgb(color: _Color) -> _Color:
    if isinstance(color, np.ndarray):
        return np.ascontiguousarray(np.broadcast_to(color, (*color.shape[:2], 3)))
    return color.convert("RGB")


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
    rgb16_HW3 = alpha16_HW = None
    if array.dtype == np.uint8:
        levels = array
    elif array.dtype == np.uint16:
        levels, pixels = sixteen_bit.to_8_bit(array), array if array.ndim == 3 else array[:, :, None]
        rgb16_HW3, alpha16_HW = _as_rgb(pixels[:, :, :3]), pixels[:, :, 3] if pixels.shape[2] == 4 else None
    elif np.issubdtype(array.dtype, np.floating):
        levels = _float_to_u8(array, label)
    else:
        raise ImageError(f"{label} has an unsupported type; use uint8, uint16 or float in [0, 1]")
    bit_depth = 8 * array.dtype.itemsize
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    pil = Image.fromarray(np.ascontiguousarray(levels))
    alpha = pil.getchannel("A") if pil.mode == "RGBA" else None
    return LoadedImage(
        pil.convert("RGB"),
        alpha,
        mode=str(array.dtype),
        bit_depth=bit_depth,
        rgb16_HW3=rgb16_HW3,
        alpha16_HW=alpha16_HW,
    )


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
