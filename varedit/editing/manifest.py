"""The manifest: how a picture was made, carried by the picture, so that anyone with the model makes it again.

It travels as an XMP packet inside PNG, JPEG and WebP, and as FILE.varedit.json beside the other formats. The packet
also says, in the vocabulary of the press (IPTC digital source type), that the picture was edited with generative AI.
Writing the same edit twice gives the same bytes: a manifest holds neither a time nor a path.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image

from varedit import __version__
from varedit.durable import write_together
from varedit.editing.edit import EditResult, Settings
from varedit.editing.edit_kind import Orientation
from varedit.editing.model_identity import ModelIdentity, identify
from varedit.image_processor import ImageError, LoadedImage, load_image
from varedit.image_writer import check_output, encode_image, save_image, writing
from varedit.pipeline import VAREditPipeline, check_prompt, check_seed

logger = logging.getLogger(__name__)

FORMAT = "varedit/1"
STATEMENT = "This picture was edited by AI with varedit."
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's term for "edited using generative AI"."""

SIDE_SUFFIX = ".varedit.json"
EMBEDDING_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Files that carry their manifest inside; only one too long for a JPEG goes beside it."""

_NAMESPACE = "urn:varedit:1.0/"
_XMP_IN_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_MAX_JPEG_XMP = 65_533 - len(_XMP_IN_JPEG)
_MAX_BYTES = 4 * 2**20  # of a manifest that is read
_SOFTWARE = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow")


@dataclass(frozen=True)
class Manifest:
    """How a picture was made.

    Attributes:
        instruction, seed, settings: of the edit.
        input: name (without folders), sha256 of the pixels (`pixels_sha256`; of 16 bits a channel also sha256_16),
            width, height.
        output: sha256 (and sha256_16) of the pixels before they were encoded, sha256 of the model's bits; the box of a
            crop (left, top, right, bottom), and the motion that was found.
        model: which one, see `model_identity.identify`. Earlier versions recorded no `configs`.
        software: versions. The bits do not depend on most of them; a replay that differs names those that differ.
        device: kind and model of the processor, dtype of the weights; of a CPU also the number of threads.
        mask: sha256, box where it is a plain rectangle (left, top, width, height), name of its file, polygon (corners)
            if it was given as one; None without one.
        change: `ChangeMap.to_json`, or None.
    """

    instruction: str
    seed: int
    settings: Settings
    input: dict[str, Any]
    output: dict[str, Any]
    model: dict[str, Any]
    software: dict[str, str]
    device: dict[str, Any]
    mask: dict[str, Any] | None = None
    change: dict[str, Any] | None = None

    @property
    def turn(self) -> Orientation:
        """How the whole picture was turned, transparency included; see `EditResult.like`."""
        change = self.change or {}
        # A second pass is locked to where the first one changed something; after a global one there is none.
        somewhere = self.mask is not None or (self.settings.lock == "two-pass" and change.get("kind") == "local")
        return "same" if somewhere else change.get("orientation", "same")

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the way back."""
        return {"format": FORMAT, "statement": STATEMENT} | asdict(self)

    @classmethod
    def from_json(cls, values: Any, label: str = "the manifest") -> "Manifest":
        """Raises ValueError, naming `label` and the field, where the values are not those of `to_json`."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{label} has the format {found!r}, not {FORMAT!r}; update varedit or check the file")
        parts: dict[str, Any] = {item.name: values.get(item.name) for item in fields(cls)}
        try:
            parts["settings"] = Settings.from_json(parts["settings"])
            check_prompt(parts["instruction"])
            if not isinstance(parts["seed"], int):
                raise ValueError(f"the seed {parts['seed']!r} is no whole number")
            check_seed(parts["seed"])
            _check_texts("input", parts["input"], ["sha256"], ["name", "sha256_16"])
            _check_texts("output", parts["output"], ["sha256"], ["sha256_16", "bits_sha256"])
            _check_texts("model", parts["model"], ["kind", "sha256"], ["name"])
            _check_texts("model configs", parts["model"].get("configs") or {}, [])
            _check_texts("software", parts["software"], ["varedit"])
            _check_texts("device", parts["device"], [], ["dtype"])
            if parts["mask"] is not None:
                _check_texts("mask", parts["mask"], ["sha256"], ["name"])
        except ValueError as error:
            raise ValueError(f"{label} is damaged: {error}") from None
        return cls(**parts)


def _check_texts(name: str, table: Any, keys: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(table, dict) or not all(isinstance(table.get(key), str) for key in keys):
        raise ValueError(f"{name} {table!r} lacks {' or '.join(keys) or 'its table'}")
    for key in optional:
        if not isinstance(table.get(key), (str, type(None))):
            raise ValueError(f"{name} has the unusable {key} {table[key]!r}")


def make_manifest(
    result: EditResult,
    pipeline: VAREditPipeline,
    *,
    input_name: str | None = None,
    mask_name: str | None = None,
    mask_polygon: Sequence[tuple[float, float]] | None = None,
    model: ModelIdentity | None = None,
) -> Manifest:
    """The manifest of an edit.

    Args:
        input_name, mask_name: file names; folders are dropped.
        mask_polygon: corners of the mask, if it is that of `polygon_mask`.
        model: where it is known already; else the pipeline's weights are hashed (once a file, see `weights`).
    """
    source = result.source
    pixels = picture_sha256(source.rgb, source.rgb16_HW3) | {"width": source.width, "height": source.height}
    output: dict[str, Any] = picture_sha256(result.image, result.rgb16_HW3) | {"bits_sha256": bits_sha256(result.bits)}
    if result.box is not None:
        output["crop"] = list(result.box)
    if result.motion is not None:
        output["motion"] = asdict(result.motion) | {"undone": result.aligned}
    mask = None
    if result.mask is not None:
        corners = None if mask_polygon is None else [list(corner) for corner in mask_polygon]
        mask = {"name": _base(mask_name), "polygon": corners} | describe_mask(result.mask)
    return Manifest(
        instruction=result.prompt,
        seed=result.seed,
        settings=result.settings,
        input={"name": _base(input_name)} | pixels,
        output=output,
        model=asdict(model or identify(pipeline)),
        software=software(),
        device=device_of(pipeline),
        mask=mask,
        change=result.change_map.to_json() if result.change_map else None,
    )


def _base(name: str | None) -> str | None:
    return None if name is None else Path(name).name


# ---------------------------------------------------------------- what is hashed


def pixels_sha256(image: Image.Image | np.ndarray) -> str:
    """Hash of mode, size and pixels: the same for the same picture, whatever file it came from.

    Args:
        image: any image, or uint16 (H, W, 3).
    """
    if isinstance(image, np.ndarray):
        mode, height, width = "RGB;16", *image.shape[:2]
    else:
        mode, height, width = image.mode, image.height, image.width
    digest = hashlib.sha256(f"{mode} {width}x{height}\n".encode())
    step = max(1, 4_000_000 // width)  # in bands: the bytes of a whole image would be a second copy of it
    for top in range(0, height, step):
        bottom = min(top + step, height)
        if isinstance(image, np.ndarray):
            digest.update(image[top:bottom].astype("<u2").tobytes())
        else:
            digest.update(image.crop((0, top, width, bottom)).tobytes())
    return digest.hexdigest()


def picture_sha256(image: Image.Image, rgb16_HW3: np.ndarray | None) -> dict[str, str]:
    """The hashes of a picture by name: sha256 of its 8 bits a channel, sha256_16 of its 16 where it has them."""
    full = {} if rgb16_HW3 is None else {"sha256_16": pixels_sha256(rgb16_HW3)}
    return {"sha256": pixels_sha256(image)} | full


def bits_sha256(bits: list[torch.Tensor]) -> str:
    """Hash of the bits of all scales."""
    digest = hashlib.sha256()
    for part in bits:
        digest.update(f"{tuple(part.shape)}\n".encode())
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_mask(mask: Image.Image) -> dict[str, Any]:
    """Hash of a mask, and its box (left, top, width, height) if it is all 255 inside one and 0 outside."""
    box = None
    if found := mask.getbbox():
        inside = mask.crop(found)
        if inside.getextrema() == (255, 255):
            box = [found[0], found[1], inside.width, inside.height]
    return {"sha256": pixels_sha256(mask), "box": box}


def software() -> dict[str, str]:
    """Versions of what an edit is computed with."""
    versions = {name: importlib.metadata.version(name) for name in _SOFTWARE}
    return {"varedit": __version__, "python": platform.python_version()} | versions


def device_of(pipeline: VAREditPipeline) -> dict[str, Any]:
    """Kind and model of the processor that a pipeline runs on, and the dtype of its weights; of a CPU the threads."""
    device = pipeline._execution_device
    threads = {}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = torch.backends.cpu.get_cpu_capability()
        threads = {"threads": torch.get_num_threads()}
    else:
        name = platform.machine()
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return {"type": device.type, "name": name, "dtype": dtype} | threads


# ---------------------------------------------------------------- writing


def save_with_manifest(
    image: Image.Image | np.ndarray,
    path: str | Path,
    manifest: Manifest,
    like: LoadedImage | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write an image file with its manifest inside, or beside it where the format has no room.

    Whatever happens, `path` holds its old content or the whole new image; where it cannot be written, a manifest beside
    it keeps its old content too.

    Args:
        image, path, like, overwrite: of `image_writer.save_image`.

    Raises:
        ImageError: see `save_image`; also an existing side file without `overwrite`.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    data = encode_image(image, path.suffix, like)
    embedded = embed(data, manifest)
    files: dict[Path, bytes] = {}
    if embedded is None:
        check_side_file(path, overwrite=overwrite)
        # First, so that the image is never there without its manifest.
        files[side_file(path)] = json.dumps(manifest.to_json(), indent=1).encode()
    with writing(path):
        write_together(files | {path: embedded or data})
    return path


def save_without_manifest(
    image: Image.Image | np.ndarray, path: str | Path, like: LoadedImage | None = None, *, overwrite: bool = False
) -> Path:
    """`save_image`; the side file of an earlier picture of that name is removed, since it does not describe this one.

    Raises:
        ImageError: see `save_image`; also an existing side file without `overwrite`.
    """
    path = Path(path)
    check_side_file(path, overwrite=overwrite)
    save_image(image, path, like, overwrite=overwrite)
    if os.path.exists(side_file(path)):  # unlike unlink(missing_ok) it bears names that are too long
        with writing(path):
            side_file(path).unlink()
    return path


def side_file(path: Path) -> Path:
    """photo.tiff -> photo.tiff.varedit.json."""
    return path.with_name(path.name + SIDE_SUFFIX)


def check_side_file(path: Path, *, overwrite: bool = False) -> None:
    """Raise ImageError where the side file of an output cannot be written, or exists and must not be replaced."""
    side = side_file(path)
    if os.path.isdir(side):
        raise ImageError(f"output {str(side)!r} is a folder; choose another name for the picture")
    if os.path.exists(side) and not overwrite:  # unlike Path.exists it bears names that are too long
        raise ImageError(f"output {str(side)!r} exists already; allow overwriting (--overwrite), or name another")


def embed(data: bytes, manifest: Manifest) -> bytes | None:
    """The bytes of an image file with the manifest in it; the pixels' bytes stay as they are.

    Returns:
        None for a format without room for it: AVIF, TIFF, BMP, or a manifest too long for a JPEG.
    """
    packet = xmp_packet(manifest)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _embed_in_png(data, packet)
    if data.startswith(b"\xff\xd8\xff") and len(packet) <= _MAX_JPEG_XMP:
        return _embed_in_jpeg(data, packet)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _embed_in_webp(data, packet)
    return None


def xmp_packet(manifest: Manifest) -> bytes:
    """The manifest and the statement as XMP (ISO 16684-1)."""
    text = json.dumps(manifest.to_json(), ensure_ascii=True, separators=(",", ":"))
    packet = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:varedit="{_NAMESPACE}" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<xmp:CreatorTool>varedit {__version__}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>
<varedit:manifest>{escape(text)}</varedit:manifest>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""
    return packet.encode()


def _embed_in_png(data: bytes, packet: bytes) -> bytes:
    """An iTXt chunk, uncompressed, right after the header chunk."""
    body = b"iTXt" + b"XML:com.adobe.xmp\0" + b"\0\0" + b"\0" + b"\0" + packet
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end = 8 + 4 + 4 + 13 + 4
    return data[:end] + chunk + data[end:]


def _embed_in_jpeg(data: bytes, packet: bytes) -> bytes:
    """An APP1 segment behind the ones that readers want first (JFIF and EXIF)."""
    at = 2
    while data[at : at + 2] in (b"\xff\xe0", b"\xff\xe1"):
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    body = _XMP_IN_JPEG + packet
    return data[:at] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[at:]


def _embed_in_webp(data: bytes, packet: bytes) -> bytes | None:
    """An "XMP " chunk at the end, announced in the extended header, which is added where there is none."""
    chunks = data[12:]
    if chunks[:4] == b"VP8 ":  # the simple form: lossy without alpha
        with Image.open(io.BytesIO(data)) as image:
            size = b"".join((side - 1).to_bytes(3, "little") for side in image.size)
        chunks = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + chunks
    if chunks[:4] != b"VP8X":
        return None
    flags = bytes([chunks[8] | 0x04])
    padded = b"XMP " + struct.pack("<I", len(packet)) + packet + b"\0" * (len(packet) % 2)
    chunks = chunks[:8] + flags + chunks[9:] + padded
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


# ---------------------------------------------------------------- reading


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest in an image file or beside it; None where there is none. A side file itself may be named as well.

    Raises:
        ImageError: the file is missing or no image.
        ValueError: a manifest that is damaged or from a later version.
    """
    path = Path(path)
    if path.name.endswith(SIDE_SUFFIX):
        return _read_side(path)
    packet = _read_xmp(path)
    text = _manifest_text(packet) if packet else None
    if text is None:
        # Unlike Path.is_file os.path.isfile bears names that are too long.
        return _read_side(side_file(path)) if os.path.isfile(side_file(path)) else None
    return _parse(text, f"the manifest in {str(path)!r}")


def _read_xmp(path: Path) -> bytes | None:
    try:
        with Image.open(path) as image:
            packet = image.info.get("xmp")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        load_image(path)  # says what is wrong with it
        raise
    packet = packet.encode() if isinstance(packet, str) else packet
    return packet if packet and len(packet) <= _MAX_BYTES else None


def _manifest_text(packet: bytes) -> str | None:
    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:  # XMP has neither; they are how XML is made to explode
        return None
    try:
        root = ElementTree.fromstring(packet.strip(b"\0"))
    except (ElementTree.ParseError, ValueError):  # someone else's damaged packet
        return None
    name = f"{{{_NAMESPACE}}}manifest"
    for element in root.iter():  # other programs may have rewritten the element as an attribute
        if element.tag == name:
            return element.text
        if name in element.attrib:
            return element.attrib[name]
    return None


def _read_side(path: Path) -> Manifest:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{str(path)!r} is too large to be a manifest")
        return _parse(path.read_text(), repr(str(path)))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is damaged: it is no text") from None


def _parse(text: str, label: str) -> Manifest:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{label} is damaged: it is no JSON") from None
    return Manifest.from_json(values, label)
