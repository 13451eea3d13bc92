"""image_reader: anything a person has is read, or refused in one line."""

import io
import logging
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from varedit.image_reader import ImageError, load_image

ORIENTATION = 0x0112


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image with some detail, so that resampling and JPEG behave as on photos."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def one_line_error(call, *words: str) -> str:
    with pytest.raises(ImageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------- what can be read


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image = photo(33, 21)
    path = tmp_path / "photo.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    with open(path, "rb") as file:
        from_file = load_image(file)
    sources = [
        str(path),
        path,
        path.read_bytes(),
        bytearray(path.read_bytes()),
        io.BytesIO(path.read_bytes()),
        image,
        array,
        array.astype(np.uint16) * 257,
        array.astype(np.float32) / 255,
        array.astype(np.float64) / 255,
        tensor,
        tensor[None],
        tensor.float() / 127.5 - 1,
        (tensor.double() / 127.5 - 1)[None],
    ]
    for loaded in [from_file, *(load_image(source) for source in sources)]:
        assert same(loaded.rgb, image)
        assert loaded.alpha is None
        assert (loaded.width, loaded.height) == (33, 21)
        assert loaded.notes == ()
    assert load_image(from_file) is from_file


def test_a_pipe_is_read_as_a_file_object():
    code = "from varedit.image_processor import load_image; import sys; print(load_image(sys.stdin.buffer).width)"
    out = subprocess.run([sys.executable, "-c", code], input=encoded(photo(19, 7), "PNG"), stdout=-1, check=True)
    assert out.stdout.strip() == b"19"


def test_array_and_tensor_ranges_meet_at_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.repeat(levels[:, :, None], 3, axis=2)
    tensor = torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1
    assert np.array_equal(np.asarray(load_image(tensor).rgb), rgb)
    assert np.array_equal(np.asarray(load_image(levels / 255).rgb), rgb)
    assert np.array_equal(np.asarray(load_image(levels[:, :, None]).rgb), rgb)
    # 16 bits: the nearest level, not the high byte
    values = np.array([[0, 128, 129, 255, 256, 65407, 65535]], dtype=np.uint16)
    assert np.asarray(load_image(values).rgb)[0, :, 0].tolist() == [0, 0, 1, 1, 1, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, format):
    upright = photo(40, 24)
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that a viewer would need to undo each one
    stored = upright
    if orientation > 1:
        tagged = upright.copy()
        tagged.getexif()[ORIENTATION] = undo[orientation]
        stored = ImageOps.exif_transpose(tagged)
        stored.info.clear()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010E] = "a balloon"
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    loaded = load_image(encoded(stored, format, exif=exif, **options))
    assert loaded.rgb.size == (40, 24)
    difference = np.abs(np.asarray(loaded.rgb).astype(int) - np.asarray(upright)).max()
    assert difference <= (12 if format == "JPEG" else 0)
    kept = Image.Exif()
    kept.load(loaded.exif)
    assert kept[0x010E] == "a balloon"
    assert ORIENTATION not in kept
    assert not set(kept) & {256, 257, 273, 279}  # a TIFF's layout does not describe the picture


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged EXIF by itself
def test_damaged_exif_is_left_out_and_said_but_still_turns(caplog):
    def block(*entries: bytes) -> bytes:
        return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)

    turned = struct.pack("<HHII", ORIENTATION, 3, 1, 6)
    text_for_a_number = struct.pack("<HHI4s", 0x0128, 2, 4, b"abc\0")
    loaded = load_image(encoded(photo(16, 8), "JPEG", exif=block(turned, text_for_a_number)))
    assert loaded.rgb.size == (8, 16)
    assert loaded.exif is None and "damaged EXIF left out" in caplog.text
    for garbage in (b"Exif\0\0XXXXXXX", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"):
        assert load_image(encoded(photo(16, 8), "JPEG", exif=garbage)).rgb.size == (16, 8)


def test_alpha_is_kept_aside_and_colours_are_not_blended():
    rgba = photo(20, 10).convert("RGBA")
    alpha = Image.linear_gradient("L").resize((20, 10))
    rgba.putalpha(alpha)
    for source in (rgba, encoded(rgba, "PNG"), np.asarray(rgba), np.asarray(rgba).astype(np.uint16) * 257):
        loaded = load_image(source)
        assert same(loaded.rgb, photo(20, 10))
        assert same(loaded.alpha, alpha)
    premultiplied = load_image(rgba.convert("RGBa"))
    assert same(premultiplied.alpha, alpha)


def test_gray_with_alpha():
    gray, alpha = Image.linear_gradient("L"), Image.radial_gradient("L")
    image = Image.merge("LA", (gray, alpha))
    for loaded in (load_image(encoded(image, "PNG")), load_image(image)):
        assert same(loaded.rgb, gray.convert("RGB"))
        assert same(loaded.alpha, alpha)
        assert loaded.mode == "LA"


def test_palette_with_transparency():
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0, 1, 2, 0, 1])
    loaded = load_image(encoded(image, "PNG", transparency=bytes([255, 0, 128])))
    assert np.asarray(loaded.rgb)[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 0]]
    assert np.asarray(loaded.alpha)[0].tolist() == [255, 0, 128, 255]
    gif = load_image(encoded(image, "GIF", transparency=1))
    assert np.asarray(gif.alpha)[0].tolist() == [255, 0, 255, 255]
    assert load_image(encoded(image, "PNG")).alpha is None


def test_colour_key_transparency():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    loaded = load_image(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert np.asarray(loaded.alpha).tolist() == [[0, 255]]
    sixteen = Image.fromarray(np.array([[0, 514]], dtype=np.uint16))
    loaded = load_image(encoded(sixteen, "PNG", transparency=0))
    assert np.asarray(loaded.alpha).tolist() == [[0, 255]]
    for bits in (1, 2, 4):
        levels, key = 2**bits, 2**bits - 1
        row = sum(level << (8 - bits * (1 + level % (8 // bits))) for level in (0, key))
        body = bytes([0, row]) if bits < 4 else bytes([0, 0 << 4 | key])
        data = b"\x89PNG\r\n\x1a\n"
        width = key + 1 if bits < 4 else 2
        header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
        for kind, part in (
            (b"IHDR", header), (b"tRNS", struct.pack(">H", key)), (b"IDAT", zlib.compress(body)), (b"IEND", b""),
        ):  # fmt: skip
            data += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        alpha = np.asarray(load_image(data).alpha)[0]
        assert alpha[-1] == 0 and (alpha[:-1] == 255).all(), (bits, levels, alpha)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_kept_and_scaled_not_clipped(format):
    values = np.linspace(0, 65535, 64 * 8, dtype=np.uint16).reshape(8, 64)
    loaded = load_image(encoded(Image.fromarray(values), format))
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(loaded.rgb)[:, :, 1], expected)
    assert loaded.bit_depth == 16 and loaded.notes == ()
    assert np.array_equal(loaded.rgb16_HW3, np.dstack([values] * 3))


def test_16_bit_colour_png_is_kept():
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 25700, 65535) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    loaded = load_image(data)
    assert np.asarray(loaded.rgb)[0].tolist() == [[255, 128, 0], [1, 100, 255]]
    assert loaded.rgb16_HW3[1].tolist() == [[65535, 32896, 0], [257, 25700, 65535]]
    assert loaded.bit_depth == 16 and loaded.notes == () and loaded.alpha16_HW is None


def test_a_bitmap_of_16_bits_a_pixel_is_not_16_bits_a_channel():
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    data = b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + struct.pack("<HH", 0xF800, 0x001F)
    loaded = load_image(data)
    assert np.asarray(loaded.rgb)[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert loaded.bit_depth == 8 and loaded.notes == ()


def test_turned_16_bit_gray():
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    loaded = load_image(encoded(Image.fromarray(values), "PNG", exif=exif))
    assert np.array_equal(np.asarray(loaded.rgb)[:, :, 0], np.rot90(values // 257, -1))
    assert np.array_equal(loaded.rgb16_HW3[:, :, 0], np.rot90(values, -1))


def test_one_bit_float_and_other_modes():
    bits = Image.linear_gradient("L").convert("1")
    loaded = load_image(encoded(bits, "PNG"))
    assert same(loaded.rgb, bits.convert("RGB")) and loaded.bit_depth == 1
    assert {0, 255} == set(np.unique(np.asarray(loaded.rgb)))
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    floats = load_image(encoded(Image.fromarray(ramp), "TIFF"))
    assert np.array_equal(np.asarray(floats.rgb)[:, :, 0], np.arange(256).reshape(16, 16))
    one_line_error(lambda: load_image(Image.fromarray(ramp * 255)), "255", "[0, 1]")
    for mode in ("YCbCr", "HSV", "LAB"):
        back = load_image(photo(16, 16).convert(mode))
        assert np.abs(np.asarray(back.rgb).astype(int) - np.asarray(photo(16, 16))).mean() < 3, mode
        assert back.notes == ()


def test_cmyk():
    image = photo(32, 32)
    jpeg = load_image(encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert jpeg.mode == "CMYK" and jpeg.rgb.mode == "RGB"
    assert np.abs(np.asarray(jpeg.rgb).astype(int) - np.asarray(image)).mean() < 2
    tiff = load_image(encoded(image.convert("CMYK"), "TIFF"))
    assert same(tiff.rgb, image.convert("CMYK").convert("RGB"))


def test_colour_profiles():
    image = photo(16, 16)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    loaded = load_image(encoded(image, "PNG", icc_profile=srgb))
    assert same(loaded.rgb, image) and loaded.notes == ()
    gray = load_image(encoded(image.convert("L"), "PNG", icc_profile=srgb))
    assert same(gray.rgb, image.convert("L").convert("RGB"))
    broken = load_image(encoded(image, "PNG", icc_profile=b"not a profile"))
    assert same(broken.rgb, image) and "unusable colour profile" in broken.notes[0]


def test_a_linear_profile_called_srgb_is_converted():
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for at in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12):
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            curve = struct.unpack(">I", data[at + 4 : at + 8])[0]
            data[curve + 8 : curve + 16] = struct.pack(">HHi", 0, 0, 1 << 16)  # a power: 1.0
    loaded = load_image(encoded(Image.new("RGB", (8, 8), (128, 0, 255)), "PNG", icc_profile=bytes(data)))
    assert "'sRGB built-in' converted to sRGB" in loaded.notes[0]
    assert np.abs(np.asarray(loaded.rgb).astype(int) - (188, 0, 255)).max() <= 1


def wide_gamut_profile() -> bytes:
    """A minimal matrix profile with linear light and the sRGB primaries' red and blue swapped: easy to recognise."""
    source = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = bytearray(source)
    table = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12)}
    red, blue = table[b"rXYZ"], table[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    at = struct.unpack(">I", data[table[b"desc"] + 4 : table[b"desc"] + 8])[0]
    length = struct.unpack(">I", data[table[b"desc"] + 8 : table[b"desc"] + 12])[0]
    data[at : at + length] = data[at : at + length].replace("sRGB".encode("utf-16-be"), "BGR ".encode("utf-16-be"))
    return bytes(data)


def test_another_profile_is_converted():
    image = photo(16, 16)
    loaded = load_image(encoded(image, "PNG", icc_profile=wide_gamut_profile()))
    swapped = np.asarray(image)[:, :, ::-1].astype(int)
    assert np.abs(np.asarray(loaded.rgb) - swapped).max() <= 3
    assert "converted to sRGB" in loaded.notes[0]
    exif = Image.Exif()
    exif[0x0110] = "camera"
    exif[0x8769] = {0xA001: 65535, 0x9003: "2026:01:01 00:00:00", 0xA005: {1: "R03"}}
    for profile, space, interop in ((wide_gamut_profile(), 1, {}), (None, 65535, {1: "R03"})):
        kept = Image.Exif()
        kept.load(load_image(encoded(image, "PNG", icc_profile=profile, exif=exif)).exif)
        details = kept.get_ifd(0x8769)
        assert kept[0x0110] == "camera" and details[0x9003].startswith("2026") and details[0xA001] == space
        assert (kept.get_ifd(0xA005) or {}) == interop
    transparent = image.convert("RGBA")
    transparent.putalpha(7)
    loaded = load_image(encoded(transparent, "PNG", icc_profile=wide_gamut_profile()))
    assert np.abs(np.asarray(loaded.rgb) - swapped).max() <= 3
    assert loaded.alpha.getextrema() == (7, 7)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame_and_says_so(format, caplog):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        loaded = load_image(data)
    assert loaded.rgb.getpixel((0, 0))[0] > 250 and loaded.rgb.size == (8, 6)
    assert "first of 3 frames" in caplog.text


def test_pil_images_are_not_modified():
    image = photo(12, 8)
    image.getexif()[ORIENTATION] = 6
    before = image.tobytes()
    assert load_image(image).rgb.size == (8, 12)
    assert image.size == (12, 8) and image.tobytes() == before and image.getexif()[ORIENTATION] == 6


# ---------------------------------------------------------------- what is refused


def test_unusable_files_are_refused_in_one_line(tmp_path):
    one_line_error(lambda: load_image(tmp_path / "missing.png"), "missing.png", "does not exist", "check")
    one_line_error(lambda: load_image(tmp_path), str(tmp_path), "folder")
    one_line_error(lambda: load_image("new\nline.png"), "does not exist")
    one_line_error(lambda: load_image("null\0.png"), "cannot be opened")
    (tmp_path / "empty.png").touch()
    one_line_error(lambda: load_image(tmp_path / "empty.png"), "empty.png", "is empty")
    (tmp_path / "notes.png").write_text("not an image at all\n" * 50)
    one_line_error(lambda: load_image(tmp_path / "notes.png"), "notes.png", "is not an image")
    one_line_error(lambda: load_image(b""), "0 bytes", "is empty")
    one_line_error(lambda: load_image(io.StringIO("text")), "binary mode")
    one_line_error(lambda: load_image(3), "int", "path")
    one_line_error(lambda: load_image(None), "NoneType")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_files_are_refused(format):
    data = encoded(photo(200, 100), format)
    for length in (len(data) // 2, len(data) // 8, 40, 10):
        one_line_error(lambda length=length: load_image(data[:length]), "bytes")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged EXIF by itself
def test_damaged_files_never_raise_anything_else():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "GIF"):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        data = encoded(photo(64, 48), format, **({} if format == "GIF" else {"exif": exif}))
        for _ in range(40):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            try:
                load_image(damaged.tobytes(), max_pixels=10_000_000)
            except ImageError as error:
                assert "\n" not in str(error)


def test_300_megapixels_are_refused_from_the_header():
    message = one_line_error(lambda: load_image(png_header(20000, 15000)), "300000000", "too large", "scale it down")
    assert "178956970" in message
    one_line_error(lambda: load_image(png_header(20000, 15000), max_pixels=10**9), "too large")  # Pillow's own limit
    one_line_error(lambda: load_image(png_header(200, 100), max_pixels=10_000), "200 x 100", "0.0 megapixels")
    one_line_error(lambda: load_image(np.broadcast_to(np.uint8(0), (20000, 15000))), "300.0 megapixels")
    one_line_error(lambda: load_image(torch.zeros(1).expand(3, 20000, 15000)), "300.0 megapixels")


def test_zero_sizes_are_refused():
    one_line_error(lambda: load_image(png_header(0, 10)), "bytes")
    one_line_error(lambda: load_image(Image.new("RGB", (0, 10))), "0 x 10")
    one_line_error(lambda: load_image(np.zeros((10, 0, 3), np.uint8)), "0 x 10")
    one_line_error(lambda: load_image(torch.zeros(3, 0, 10)), "10 x 0")


def test_arrays_and_tensors_out_of_range_or_shape_are_refused():
    one_line_error(lambda: load_image(np.full((4, 4), 1.5)), "1.5", "[0, 1]")
    one_line_error(lambda: load_image(np.full((4, 4), -0.5)), "-0.5")
    one_line_error(lambda: load_image(np.full((4, 4), np.nan)), "nan")
    one_line_error(lambda: load_image(torch.full((3, 4, 4), 1.5)), "1.5", "[-1, 1]")
    one_line_error(lambda: load_image(torch.full((3, 4, 4), float("nan"))), "nan")
    one_line_error(lambda: load_image(np.zeros((4, 4), np.int64)), "int64")
    one_line_error(lambda: load_image(torch.zeros(3, 4, 4, dtype=torch.int64)), "int64")
    for shape in ((3, 4, 5), (4,), (1, 4, 4, 3), (4, 4, 2)):
        one_line_error(lambda shape=shape: load_image(np.zeros(shape, np.uint8)), str(shape), "(H, W")
    for shape in ((4, 4, 3), (2, 3, 4, 4), (1, 4, 4), (4, 4)):
        one_line_error(lambda shape=shape: load_image(torch.zeros(shape)), str(shape), "(3, H, W)")
