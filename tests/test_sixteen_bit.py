"""16 bits a channel: files come in and go out with every bit."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageCms

from varedit import sixteen_bit
from varedit.image_reader import ImageError, load_image
from varedit.image_writer import encode_image

ORIENTATION = 0x0112


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)


def test_every_level_of_8_bits_comes_back_and_every_level_of_16_goes_to_the_nearest():
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(sixteen_bit.to_8_bit(sixteen_bit.to_16_bit(levels)), levels)
    values = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(sixteen_bit.to_8_bit(values), np.rint(values / 257))


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_written_and_read_again_every_bit_is_there(format, channels):
    pixels = noise(13, 21, channels)
    source = load_image(pixels)
    data = encode_image(source.rgb16_HW3, format, source)
    loaded = load_image(data)
    assert loaded.bit_depth == 16 and loaded.notes == ()
    assert np.array_equal(loaded.rgb16_HW3, pixels[:, :, :3])
    assert np.array_equal(np.asarray(loaded.rgb), sixteen_bit.to_8_bit(pixels[:, :, :3]))
    if channels == 4:
        assert np.array_equal(loaded.alpha16_HW, pixels[:, :, 3])
        assert np.array_equal(np.asarray(loaded.alpha), sixteen_bit.to_8_bit(pixels[:, :, 3]))
    with Image.open(io.BytesIO(data)) as image:  # another reader, which drops the low byte
        assert np.array_equal(np.asarray(image), pixels >> 8)


def test_an_8_bit_alpha_is_attached_to_16_bit_colours():
    key = encoded_gray_with_key(noise(6, 5), 514)
    source = load_image(key)
    assert source.alpha is not None and source.alpha16_HW is None
    loaded = load_image(encode_image(source.rgb16_HW3, "png", source))
    assert np.array_equal(loaded.rgb16_HW3, source.rgb16_HW3)
    assert set(np.unique(loaded.alpha16_HW)) == {0, 65535}


def encoded_gray_with_key(values: np.ndarray, key: int) -> bytes:
    """A 16-bit gray PNG with one transparent level, which its first pixel has."""
    values[0, 0] = key
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=key)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_orientation_turns_all_16_bits(format, orientation):
    pixels = noise(7, 11, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if format == "PNG":
        data = sixteen_bit.encode(pixels, "PNG", exif.tobytes())
    else:
        tifffile = pytest.importorskip("tifffile")
        buffer = io.BytesIO()
        order = "<>"[orientation % 2]
        tags = [(ORIENTATION, "H", 1, orientation, True)]
        tifffile.imwrite(buffer, pixels, photometric="rgb", byteorder=order, extratags=tags)
        data = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(buffer, "PNG", exif=exif)
    upright = load_image(buffer.getvalue()).rgb
    loaded = load_image(data)
    assert np.array_equal(loaded.rgb16_HW3 >> 8, np.asarray(upright))
    assert loaded.rgb.size == upright.size


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}, {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "zlib"},
    ],
    ids=str,
)  # fmt: skip
def test_tiffs_of_other_programs(options):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(40, 36, 3)
    buffer = io.BytesIO()
    stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
    tifffile.imwrite(buffer, stored, photometric="rgb", **options)
    assert np.array_equal(load_image(buffer.getvalue()).rgb16_HW3, pixels)
    written = sixteen_bit.encode(pixels, "TIFF")
    assert np.array_equal(tifffile.imread(io.BytesIO(written)), pixels)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_gray_tiffs_mean_what_their_tags_say(photometric):
    tifffile = pytest.importorskip("tifffile")
    levels = np.array([[0, 1000, 30000, 65535]], np.uint16)
    expected = levels if photometric == "minisblack" else 65535 - levels
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, levels, photometric=photometric)
    assert np.array_equal(load_image(buffer.getvalue()).rgb16_HW3[:, :, 1], expected)
    if photometric == "miniswhite":  # of 12 bits Pillow reads the usual kind only
        return
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, levels >> 4, photometric=photometric, bitspersample=12)
    loaded = load_image(buffer.getvalue())
    assert np.abs(loaded.rgb16_HW3[:, :, 1].astype(int) - expected).max() <= 16
    assert np.abs(np.asarray(loaded.rgb)[:, :, 1].astype(int) * 257 - expected).max() <= 150


@pytest.mark.parametrize(
    ("photometric", "extrasamples"), [("separated", None), ("rgb", "assocalpha"), ("rgb", "unspecified")]
)
def test_what_is_not_rgb_with_plain_alpha_is_left_to_pillow(photometric, extrasamples, caplog):
    """CMYK and colours with alpha multiplied in come at 8 bits, with a note; a band without meaning is dropped."""
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(6, 7, 4) | 3 << 14
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric=photometric, extrasamples=extrasamples and [extrasamples])
    with caplog.at_level(logging.WARNING):
        loaded = load_image(buffer.getvalue())
    assert loaded.bit_depth == 16
    if extrasamples == "unspecified":
        assert np.array_equal(loaded.rgb16_HW3, pixels[:, :, :3]) and loaded.alpha is None
    else:
        assert loaded.rgb16_HW3 is None and "16 bits a channel reduced to 8" in caplog.text


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_exif_travels(format):
    exif = Image.Exif()
    exif[0x0110] = "camera"
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    source = load_image(sixteen_bit.encode(noise(4, 6, 3), "PNG", exif.tobytes()))
    data = encode_image(source.rgb16_HW3, format, source)
    with Image.open(io.BytesIO(data)) as image:
        kept = image.getexif()
        assert kept[0x0110] == "camera" and kept.get_ifd(0x8825)[1] == "N"
    assert np.array_equal(load_image(data).rgb16_HW3, source.rgb16_HW3)


def test_a_colour_profile_is_converted_at_16_bits():
    """Gamma 1.8 in linear steps: 8 bits would leave gaps that 16 do not have."""
    pixels = np.dstack([np.linspace(0, 65535, 4096, dtype=np.uint16).reshape(64, 64)] * 3)
    lab = ImageCms.createProfile("LAB")
    broken = sixteen_bit.encode(pixels, "PNG")
    loaded = load_image(_with_profile(broken, ImageCms.ImageCmsProfile(lab).tobytes()))
    assert np.array_equal(loaded.rgb16_HW3, pixels) and "unusable colour profile" in loaded.notes[0]
    profile = _gamma_profile(1.0)
    loaded = load_image(_with_profile(broken, profile))
    assert "converted to sRGB" in loaded.notes[0]
    linear = pixels / 65535
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(loaded.rgb16_HW3 / 65535 - expected).max() < 0.004
    assert len(np.unique(loaded.rgb16_HW3)) > 3000


def test_a_gray_profile_is_converted_at_16_bits():
    levels = np.array([[0, 16384, 32768, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    loaded = load_image(_with_profile(buffer.getvalue(), _gray_profile()))
    assert "converted to sRGB" in loaded.notes[0]
    assert np.abs(loaded.rgb16_HW3[0, :, 1].astype(int) - [0, 35200, 48200, 65535]).max() < 200


def _gray_profile() -> bytes:
    """Linear gray, D50: header, three tags (white point, curve, description)."""
    white = b"XYZ " + bytes(4) + bytes.fromhex("0000f6d6000100000000d32d")
    curve = b"curv" + bytes(4) + bytes(4)
    text = b"desc" + bytes(4) + (5).to_bytes(4) + b"gray\0" + bytes(4 + 4 + 2 + 1 + 67 + 4)
    tags, at, body = b"", 128 + 4 + 3 * 12, b""
    for name, data in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        tags += name + (at + len(body)).to_bytes(4) + len(data).to_bytes(4)
        body += data + bytes(-len(data) % 4)
    head = bytes(4) + bytes(4) + bytes.fromhex("02400000") + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    head += bytes.fromhex("0000f6d6000100000000d32d")
    head = (128 + 4 + len(tags) + len(body)).to_bytes(4) + head[4:] + bytes(128 - len(head))
    return head + (3).to_bytes(4) + tags + body


def _gamma_profile(gamma: float) -> bytes:
    """sRGB's primaries with another curve."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132])
    table = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        at = int.from_bytes(data[table[name] + 4 : table[name] + 8])
        data[at : at + 16] = b"para" + bytes(4) + bytes(4) + round(gamma * 65536).to_bytes(4)
    at = int.from_bytes(data[table[b"desc"] + 4 : table[b"desc"] + 8])
    length = int.from_bytes(data[table[b"desc"] + 8 : table[b"desc"] + 12])
    data[at : at + length] = data[at : at + length].replace("sRGB".encode("utf-16-be"), "Flat".encode("utf-16-be"))
    return bytes(data)


def _with_profile(png: bytes, profile: bytes) -> bytes:
    import struct
    import zlib

    body = b"iCCP" + b"profile\0\0" + zlib.compress(profile)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize("format", ["jpg", "webp", "bmp"])
def test_formats_of_8_bits_say_that_they_reduce(format, caplog):
    pixels = noise(8, 8, 3)
    with caplog.at_level(logging.WARNING):
        loaded = load_image(encode_image(pixels, format))
    assert "8 bits a channel" in caplog.text and "PNG or TIFF" in caplog.text
    if format == "bmp":
        assert np.array_equal(np.asarray(loaded.rgb), sixteen_bit.to_8_bit(pixels))


def test_arrays_that_are_no_picture_are_refused():
    for array in (noise(4, 4, 3).astype(np.uint8), noise(4, 4), noise(4, 4, 4)):
        with pytest.raises(ImageError, match=r"uint16 \(H, W, 3\)"):
            encode_image(array, "png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["png", "tiff"])
def test_damaged_files_never_raise_anything_else(format):
    rng = np.random.default_rng(0)
    data = encode_image(noise(24, 16, 3), format)
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, 200, 3)] = rng.integers(0, 256, 3)
        try:
            load_image(damaged.tobytes(), max_pixels=10_000_000)
        except ImageError as error:
            assert "\n" not in str(error)
