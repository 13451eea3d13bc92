"""Image files written: whole or not at all, with the source's transparency, EXIF and bits a channel."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from varedit import sixteen_bit
from varedit.durable import write_durably
from varedit.image_reader import CODEC_ERRORS, ImageError, LoadedImage, reason

logger = logging.getLogger(__name__)

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg .jpeg", "WEBP": ".webp", "AVIF": ".avif", "TIFF": ".tif .tiff", "BMP": ".bmp"}
_ALPHA_FORMATS = {"PNG", "WEBP", "AVIF", "TIFF"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "exact": True},  # exact: colours under full transparency are kept
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
_MAX_JPEG_EXIF = 65_533  # a JPEG segment holds no more


def encode_image(image: Image.Image | np.ndarray, format: str, like: LoadedImage | None = None) -> bytes:
    """The bytes of an image file.

    JPEG is written at quality 95 without chroma subsampling, WebP and AVIF at quality 95; the others are lossless.

    Args:
        image: RGB, or RGBA to bring its own alpha; or uint16 (H, W, 3), which PNG and TIFF hold in full. The other
            formats hold 8 bits a channel, with a logged note.
        format: a suffix or Pillow's name of it: "png", ".jpg", "JPEG", "webp", "avif", "tiff", "bmp".
        like: the source: its alpha is attached again where the format can hold it (else the image is laid on white,
            with a logged note), and its EXIF is kept, in a TIFF as far as it describes the picture.

    Raises:
        ImageError: unsupported format, alpha of another size, or an image the format cannot hold.
    """
    name = _format_name(format)
    if isinstance(image, np.ndarray) and not (image.dtype == np.uint16 and image.ndim == 3 and image.shape[2] == 3):
        raise ImageError(f"an array {image.shape} {image.dtype} is no picture to write; pass uint16 (H, W, 3)")
    alpha = image.getchannel("A") if isinstance(image, Image.Image) and image.mode == "RGBA" else None
    alpha = like.alpha if alpha is None and like else alpha
    size = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    if alpha is not None and alpha.size != size:
        raise ImageError(
            f"alpha of {alpha.width} x {alpha.height} pixels does not fit an image of {size[0]} x {size[1]}; restore "
            "the image to its source's size first"
        )
    exif = like.exif if like and name != "BMP" else None
    if exif and name == "JPEG" and len(exif) > _MAX_JPEG_EXIF:
        logger.warning("EXIF of %d bytes is more than a JPEG can hold: left out", len(exif))
        exif = None
    try:
        if isinstance(image, np.ndarray) and name in sixteen_bit.FORMATS:
            return sixteen_bit.encode(_with_alpha(image, alpha, like), name, exif)
        return _encode_8_bit(image, name, alpha, exif)
    except CODEC_ERRORS as error:
        raise ImageError(
            f"{size[0]} x {size[1]} pixels cannot be saved as {name} ({reason(error)}); save as PNG"
        ) from error


def _with_alpha(rgb_HW3: np.ndarray, alpha: Image.Image | None, like: LoadedImage | None) -> np.ndarray:
    """uint16 RGB with the 16-bit alpha of the source, or the 8-bit one where that is all there is."""
    if alpha is None:
        return rgb_HW3
    full = like.alpha16_HW if like else None
    levels_HW = sixteen_bit.to_16_bit(np.asarray(alpha)) if full is None else full
    return np.dstack([rgb_HW3, levels_HW])


def _encode_8_bit(image: Image.Image | np.ndarray, name: str, alpha: Image.Image | None, exif: bytes | None) -> bytes:
    if isinstance(image, np.ndarray):
        logger.warning("%s holds 8 bits a channel: reduced from 16; save as PNG or TIFF to keep them", name)
        image = Image.fromarray(sixteen_bit.to_8_bit(image))
    image = image.convert("RGB")
    # A copy of the source brings its file's compression and colour profile, which are not those of these pixels.
    image.info = {}
    if alpha is not None and name in _ALPHA_FORMATS:
        image.putalpha(alpha)
    elif alpha is not None and alpha.getextrema() != (255, 255):
        logger.warning("%s cannot hold transparency: laid on white; save as PNG to keep it", name)
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    options = dict(_SAVE_OPTIONS.get(name, {}))
    if exif:
        options["exif"] = _describing(exif) if name == "TIFF" else exif
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def _describing(exif: bytes) -> Image.Exif:
    """The tags that a TIFF may have from another file: the rest would overwrite its own width, height and layout."""
    tags = Image.Exif()
    tags.load(exif)
    for tag in set(tags) - sixteen_bit.TIFF_TAGS_KEPT:
        del tags[tag]
    return tags


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
    try:
        exists, is_file, has_folder = path.exists(), path.is_file(), path.resolve().parent.is_dir()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{label} cannot be written ({reason(error)}); choose another path") from error
    if exists and not is_file:
        raise ImageError(f"{label} is a folder or device; name a file")
    if format is None and not path.suffix:
        raise ImageError(f"{label} has no suffix to tell its format; name it as in {path.name}.png")
    _format_name(path.suffix if format is None else format)
    if exists and not overwrite:
        raise ImageError(f"{label} exists already; allow overwriting (--overwrite), or name another")
    if not has_folder:
        raise ImageError(f"{label} is in a folder that does not exist; create it first")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise ImageError(f"{label} is in a folder that is not writable; choose another")


def save_image(
    image: Image.Image | np.ndarray,
    path: str | os.PathLike,
    like: LoadedImage | None = None,
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an image file all at once: whatever fails, `path` holds its old content or the whole new image.

    Args:
        image: see `encode_image`.
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
    with writing(path):
        write_durably(path, data)
    return path


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError, such as that of a full disk, into an ImageError that names the output."""
    try:
        yield
    except OSError as error:
        raise ImageError(
            f"output {os.fspath(path)!r} cannot be written ({reason(error)}); free some space or choose another folder"
        ) from error
