"""16 bits a channel: the colour PNG and TIFF files that Pillow holds at 8 bits only, read and written in full.

Pixels are uint16 arrays (H, W, C) with C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.
"""

import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageCms

FORMATS = ("PNG", "TIFF")
"""Pillow's names of the formats that can be read and written with 16 bits a channel."""

TIFF_TAGS_KEPT = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}
"""A TIFF's "EXIF" is its whole directory, strip offsets included. Only these tags describe the picture and may travel:
description, make, model, resolution (3), software, date, artist, copyright, the EXIF and GPS directories."""


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, the nearest level: round(value / 257)."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_16_bit(values: np.ndarray) -> np.ndarray:
    """uint8 -> uint16, the same level: value * 257. The inverse of `to_8_bit`."""
    return values.astype(np.uint16) * np.uint16(257)


def decode(data: bytes, format: str) -> np.ndarray | None:
    """The pixels of a PNG or of a TIFF's first page as they are stored: uint16 (H, W, C), not turned upright.

    Returns:
        None where the file holds something else than 16-bit gray or RGB, or cannot be read this way.
    """
    import imagecodecs

    try:
        pixels = imagecodecs.png_decode(data) if format == "PNG" else imagecodecs.tiff_decode(data)
    except (RuntimeError, ValueError, NotImplementedError):  # its own errors are RuntimeErrors
        return None
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and pixels.shape[2] > 4 and pixels.shape[0] in (3, 4):  # in planes
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim != 3 or pixels.dtype != np.uint16 or pixels.shape[2] > 4:
        return None
    return pixels


def upright(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels turned by an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    rows = slice(None, None, -1) if orientation in (3, 4, 7, 8) else slice(None)
    columns = slice(None, None, -1) if orientation in (2, 3, 6, 7) else slice(None)
    return np.ascontiguousarray(pixels_HWC[rows, columns])


def to_srgb(pixels_HWC: np.ndarray, icc_profile: bytes) -> np.ndarray:
    """RGB (H, W, 3) or gray (H, W, 1) of a colour profile -> sRGB (H, W, 3), both uint16.

    With the intent and black point of the 8-bit conversion.
    """
    import imagecodecs

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    converted = imagecodecs.cms_transform(
        pixels_HWC,
        icc_profile,
        srgb,
        colorspace="GRAY" if pixels_HWC.shape[2] == 1 else "RGB",
        outcolorspace="RGB",
        outdtype="uint16",
        intent=int(ImageCms.Intent.RELATIVE_COLORIMETRIC),
        flags=int(ImageCms.Flags.BLACKPOINTCOMPENSATION),
    )
    return converted.reshape(*pixels_HWC.shape[:2], 3)


def encode(pixels_HWC: np.ndarray, format: str, exif: bytes | None = None) -> bytes:
    """The bytes of a PNG or TIFF file of RGB or RGBA pixels, lossless.

    Args:
        exif: an EXIF block without orientation, as of `LoadedImage`.
    """
    if format == "TIFF":
        return _encode_tiff(pixels_HWC, exif)
    import imagecodecs

    data = bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels_HWC)))
    if exif is None:
        return data
    body = b"eXIf" + exif.removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end = 8 + 4 + 4 + 13 + 4  # of the signature and the header chunk
    return data[:end] + chunk + data[end:]


def _encode_tiff(pixels_HWC: np.ndarray, exif: bytes | None) -> bytes:
    """One uncompressed strip behind a directory that Pillow writes: an EXIF block is a TIFF without pixels."""
    height, width, channels = pixels_HWC.shape
    described = Image.Exif()
    if exif:
        described.load(exif)
    directory = Image.Exif()  # a new one: the given block may be big-endian
    for tag in TIFF_TAGS_KEPT & set(described):
        is_directory = tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
        directory[tag] = described.get_ifd(tag) if is_directory else described[tag]
    base = ExifTags.Base
    directory[base.ImageWidth], directory[base.ImageLength] = width, height
    directory[base.BitsPerSample] = (16,) * channels
    directory[base.Compression] = 1
    directory[base.PhotometricInterpretation] = 2  # RGB
    directory[base.SamplesPerPixel] = channels
    directory[base.RowsPerStrip] = height
    directory[base.StripByteCounts] = pixels_HWC.nbytes
    directory[base.PlanarConfiguration] = 1
    if channels == 4:
        directory[base.ExtraSamples] = 2  # alpha that is not multiplied into the colours
    directory[base.StripOffsets] = 0  # counted from the directory's end: Pillow adds its length
    data = directory.tobytes().removeprefix(b"Exif\0\0")
    return data + pixels_HWC.astype("<u2" if data.startswith(b"II") else ">u2").tobytes()
