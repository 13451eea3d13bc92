"""image_processor: anything a person has goes in, and comes back at its own width and height."""

import io
import logging
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

from varedit.image_processor import (
    ImageError,
    check_output,
    encode_image,
    load_image,
    prepare,
    save_image,
    to_pil,
)
from varedit.scales import ASPECT_RATIOS, SIZES, scale_schedule

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
        assert loaded.notes == () or "reduced to 8" in loaded.notes[0]
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


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(format, caplog):
    values = np.linspace(0, 65535, 64 * 8, dtype=np.uint16).reshape(8, 64)
    with caplog.at_level(logging.WARNING):
        loaded = load_image(encoded(Image.fromarray(values), format))
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(loaded.rgb)[:, :, 1], expected)
    assert loaded.bit_depth == 16
    assert "16 bits a channel reduced to 8" in caplog.text


def test_16_bit_colour_png_is_read_and_said():
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 25700, 65535) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    loaded = load_image(data)
    assert np.asarray(loaded.rgb)[0].tolist() == [[255, 128, 0], [1, 100, 255]]
    assert loaded.bit_depth == 16 and "16 bits" in loaded.notes[0]


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


# ---------------------------------------------------------------- fit and way back


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.parametrize("height_over_width", ASPECT_RATIOS)
def test_a_template_sized_image_passes_both_ways_bit_for_bit(size, height_over_width):
    height, width = scale_schedule(size, height_over_width).image_hw
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    prepared = prepare(image, size)
    assert prepared.schedule == scale_schedule(size, height_over_width)
    assert prepared.content_box == (0, 0, width, height)
    assert prepared.image_B3HW.shape == (1, 3, height, width) and prepared.image_B3HW.dtype == torch.float32
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert torch.equal(prepared.image_B3HW, pixels / 127.5 - 1)
    assert same(prepared.restore(to_pil(prepared.image_B3HW)[0]), image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height_over_width", ASPECT_RATIOS)
def test_every_template_of_every_class_finds_itself(size, height_over_width):
    height, width = scale_schedule(size, height_over_width).image_hw
    assert prepare(Image.new("RGB", (width, height)), size).content_box == (0, 0, width, height)


@pytest.mark.parametrize("fit", ["native", "square"])
@pytest.mark.parametrize(
    "width, height", [(1, 1), (1, 1000), (1000, 1), (1200, 800), (333, 777), (255, 257), (3001, 40), (2, 6000)]
)
def test_the_way_back_gives_the_width_and_height_of_the_input(width, height, fit):
    image = photo(width, height)
    prepared = prepare(image, 128, fit)
    height_k, width_k = prepared.schedule.image_hw
    assert prepared.image_B3HW.shape == (1, 3, height_k, width_k)
    assert prepared.image_B3HW.abs().max() <= 1
    for model_image in (to_pil(prepared.image_B3HW)[0], prepared.image_B3HW):
        restored = prepared.restore(model_image)
        assert restored.size == (width, height) and restored.mode == "RGB"


@pytest.mark.parametrize("fit", ["native", "square"])
@pytest.mark.parametrize("width, height", [(1200, 800), (333, 777), (640, 250)])
def test_the_way_back_puts_everything_where_it_was(width, height, fit):
    """A smooth image survives the fit; a shift of one model pixel would show."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    image = Image.fromarray((np.stack([x, y, 1 - x], axis=2) * 255).astype(np.uint8))
    prepared = prepare(image, 256, fit)
    restored = prepared.restore(prepared.image_B3HW)
    difference = np.abs(np.asarray(restored).astype(int) - np.asarray(image))
    inner = difference[
        height // 20 : -height // 20, width // 20 : -width // 20
    ]  # the square's white bleeds at the edge
    assert inner.max() <= 2
    if fit == "native":
        assert difference.max() <= 4


def test_native_fit_scales_by_one_factor_and_mirrors_the_rest():
    image = photo(500, 400)
    prepared = prepare(image, 256)
    left, top, right, bottom = prepared.content_box
    height, width = prepared.schedule.image_hw
    assert (height, width) == (256, 320) and (left, top, right, bottom) == (0, 0, 320, 256)
    prepared = prepare(photo(560, 400), 256)  # 1.4 : 1 lies between the templates 320 x 240 and 336 x 224
    left, top, right, bottom = prepared.content_box
    height, width = prepared.schedule.image_hw
    assert abs((right - left) / (bottom - top) - 1.4) < 0.01
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    pixels = np.asarray(to_pil(prepared.image_B3HW)[0])
    padding = [(top, np.flipud(pixels[top : 2 * top]), pixels[:top])]
    padding.append((left, np.fliplr(pixels[:, left : 2 * left]), pixels[:, :left]))
    assert any(num > 0 for num, _, _ in padding)
    for _, mirrored, border in padding:
        assert np.array_equal(mirrored, border)
    inner = photo(560, 400).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels[top:bottom, left:right], np.asarray(inner))


def test_square_fit_is_the_released_arithmetic():
    for width, height in ((300, 200), (120, 333), (256, 256), (256, 100), (90, 256)):
        image = photo(width, height)
        prepared = prepare(image, 256, "square")
        side = max(width, height)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image)
        expected = square.resize((256, 256), Image.Resampling.LANCZOS)
        result = to_pil(prepared.image_B3HW)[0]
        assert same(result, expected)
        assert prepared.schedule == scale_schedule(256)
        back = result.resize((side, side), Image.Resampling.LANCZOS).crop((0, 0, width, height))
        restored = prepared.restore(result)
        assert same(restored, back)
        if side == 256:
            assert same(restored, image)


def test_square_fit_in_bands_equals_the_whole(monkeypatch):
    image = photo(1001, 700)
    square = Image.new("RGB", (1001, 1001), "white")
    square.paste(image)
    monkeypatch.setattr("varedit.image_processor._BAND_PIXELS", 1001 * 37)
    expected = square.resize((128, 128), Image.Resampling.LANCZOS)
    prepared = prepare(image, 128, "square")
    assert same(to_pil(prepared.image_B3HW)[0], expected)
    back = expected.resize((1001, 1001), Image.Resampling.LANCZOS).crop((0, 0, 1001, 700))
    assert same(prepared.restore(expected), back)


def test_prepare_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="300"):
        prepare(photo(8, 8), 300)
    with pytest.raises(ValueError, match="'stretch'"):
        prepare(photo(8, 8), 128, "stretch")
    one_line_error(lambda: prepare(Image.new("RGB", (70_000, 2)), 128, "square"), "70000", "native")
    assert prepare(Image.new("RGB", (70_000, 2)), 128).content_box[2] > 200
    prepared = prepare(photo(30, 20), 128)
    with pytest.raises(ValueError, match="cannot restore an image of 30 x 20"):
        prepared.restore(photo(30, 20))


def test_to_pil_rounds_to_the_nearest_level():
    levels = torch.arange(256, dtype=torch.float32)
    exact = (levels / 127.5 - 1).expand(2, 3, 4, 256)
    for image in to_pil(exact):
        assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(256))
    near = ((levels + 0.4) / 127.5 - 1).expand(1, 3, 1, 256)
    assert np.array_equal(np.asarray(to_pil(near)[0])[0, :, 0], np.arange(256))
    above = ((levels + 0.6) / 127.5 - 1).expand(1, 3, 1, 256)
    assert np.array_equal(np.asarray(to_pil(above)[0])[0, :, 0], np.minimum(np.arange(256) + 1, 255))
    assert to_pil(torch.full((1, 3, 2, 2), -3.0))[0].getpixel((0, 0)) == (0, 0, 0)
    assert to_pil(torch.full((1, 3, 2, 2), 1.0, dtype=torch.bfloat16))[0].getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="not finite"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
        to_pil(torch.zeros(3, 2, 2))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp", ".PNG"])
def test_lossless_formats_return_every_pixel(tmp_path, suffix):
    image = photo(31, 17)
    path = save_image(image, tmp_path / f"out{suffix}")
    assert same(load_image(path).rgb, image)
    assert os.listdir(tmp_path) == [f"out{suffix}"]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".avif"])
def test_lossy_formats_stay_close(tmp_path, suffix):
    if suffix in (".webp", ".avif") and not features.check(suffix[1:]):
        pytest.skip(f"this Pillow does not write {suffix}")
    image = photo(64, 48)
    loaded = load_image(save_image(image, tmp_path / f"out{suffix}"))
    assert loaded.rgb.size == image.size
    assert np.abs(np.asarray(loaded.rgb).astype(int) - np.asarray(image)).mean() < 3


def test_jpeg_keeps_full_colour_resolution(tmp_path):
    path = save_image(photo(64, 48), tmp_path / "out.jpg")
    with Image.open(path) as image:
        assert [sampling[1:3] for sampling in image.layer] == [(1, 1)] * 3


def test_the_format_argument_beats_the_suffix(tmp_path):
    path = save_image(photo(8, 8), tmp_path / "result.data", format="png")
    assert load_image(path).format == "PNG"


def test_unsupported_formats_are_refused_naming_the_supported(tmp_path):
    for name in ("out.gif", "out.txt", "out"):
        one_line_error(lambda name=name: save_image(photo(8, 8), tmp_path / name), "not supported", ".png", ".jpg")
    one_line_error(lambda: encode_image(photo(8, 8), "gif"), "'gif'", ".webp")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".avif"])
def test_alpha_is_attached_again(tmp_path, suffix):
    if suffix in (".webp", ".avif") and not features.check(suffix[1:]):
        pytest.skip(f"this Pillow does not write {suffix}")
    rgba = photo(32, 32).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((32, 32)))
    source = load_image(rgba)
    loaded = load_image(save_image(source.rgb, tmp_path / f"out{suffix}", source))
    assert np.abs(np.asarray(loaded.alpha).astype(int) - np.asarray(source.alpha)).max() <= 4
    if suffix in (".png", ".tiff"):
        assert same(loaded.rgb, source.rgb) and same(loaded.alpha, source.alpha)
    own = load_image(save_image(rgba, tmp_path / f"own{suffix}"))
    assert own.alpha is not None


def test_alpha_is_flattened_on_white_and_said_for_jpeg(tmp_path, caplog):
    rgba = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    source = load_image(rgba)
    with caplog.at_level(logging.WARNING):
        loaded = load_image(save_image(source.rgb, tmp_path / "out.jpg", source))
    assert "JPEG cannot hold transparency" in caplog.text
    assert loaded.rgb.getpixel((3, 3)) == (255, 255, 255)
    caplog.clear()
    opaque = load_image(Image.new("RGBA", (16, 16), (0, 0, 0, 255)))
    save_image(opaque.rgb, tmp_path / "opaque.jpg", opaque)
    assert caplog.text == ""


def test_alpha_of_another_size_is_refused(tmp_path):
    source = load_image(Image.new("RGBA", (16, 16)))
    one_line_error(lambda: save_image(photo(8, 8), tmp_path / "out.png", source), "16 x 16", "8 x 8")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".avif"])
@pytest.mark.parametrize("source_format", ["JPEG", "PNG", "TIFF"])
def test_exif_travels_without_orientation(tmp_path, suffix, source_format):
    if suffix in (".webp", ".avif") and not features.check(suffix[1:]):
        pytest.skip(f"this Pillow does not write {suffix}")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x0110] = "camera"
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    source = load_image(encoded(photo(40, 24), source_format, exif=exif.tobytes()))
    assert source.rgb.size == (24, 40)
    path = save_image(source.rgb, tmp_path / f"out{suffix}", source)
    with Image.open(path) as image:
        kept = image.getexif()
        assert image.size == (24, 40)
        assert kept[0x0110] == "camera"
        assert kept.get(ORIENTATION, 1) == 1
        assert kept.get_ifd(0x8825)[1] == "N"
    assert load_image(path).rgb.size == (24, 40)


def test_exif_too_long_for_a_jpeg_is_left_out_and_said(caplog):
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    source = load_image(encoded(photo(8, 8), "PNG", exif=exif))
    data = encode_image(source.rgb, "jpg", source)
    assert "left out" in caplog.text
    assert load_image(data).exif is None


def test_existing_files_need_permission(tmp_path):
    path = save_image(photo(8, 8), tmp_path / "out.png")
    before = path.read_bytes()
    one_line_error(lambda: save_image(photo(9, 9), path), "out.png", "exists already")
    assert path.read_bytes() == before
    save_image(photo(9, 9), path, overwrite=True)
    assert load_image(path).rgb.size == (9, 9)
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_symbolic_link_stays_one(tmp_path):
    path = save_image(photo(8, 8), tmp_path / "real.png")
    link = tmp_path / "link.png"
    link.symlink_to(path)
    save_image(photo(9, 9), link, overwrite=True)
    assert link.is_symlink() and load_image(path).rgb.size == (9, 9)


def test_unwritable_outputs_are_refused_before_and_at_saving(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cases = {
        tmp_path: "not supported",
        tmp_path / "missing" / "out.png": "does not exist",
        tmp_path / "file" / "out.png": "does not exist",
        tmp_path / ("long" * 100 + ".png"): "another path",
        tmp_path / "null\0.png": "another path",
    }
    (tmp_path / "folder.png").mkdir()
    cases[tmp_path / "folder.png"] = "is a folder"
    for path, words in cases.items():
        one_line_error(lambda path=path: check_output(path, overwrite=True), words)
        one_line_error(lambda path=path: save_image(photo(8, 8), path, overwrite=True), words)
    check_output(tmp_path / "fine.png")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        one_line_error(lambda: save_image(photo(8, 8), tmp_path / "out.png"), "not writable")
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits need POSIX")
    path = save_image(photo(8, 8), tmp_path / "out.png")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ImageError) as caught:
            save_image(noise, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_format_that_cannot_hold_the_image_is_refused(tmp_path):
    one_line_error(lambda: save_image(Image.new("RGB", (70_000, 1)), tmp_path / "out.jpg"), "70000 x 1", "JPEG", "PNG")
    assert os.listdir(tmp_path) == []


def test_new_files_have_the_permissions_of_the_umask(tmp_path):
    if os.name != "posix":
        pytest.skip("permissions are POSIX")
    reference = tmp_path / "reference"
    reference.touch()
    path = save_image(photo(8, 8), tmp_path / "out.png")
    assert path.stat().st_mode == reference.stat().st_mode


def test_a_photo_goes_through_the_whole_way(tmp_path):
    """Turned JPEG in, JPEG out: size, metadata and pixels, with the model replaced by the identity."""
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    exif[0x010E] = "harbour"
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo(800, 1200), "JPEG", quality=95, exif=exif))
    prepared = prepare(path, 512)
    result = prepared.restore(to_pil(prepared.image_B3HW)[0])
    out = load_image(save_image(result, tmp_path / "photo.edited.jpg", prepared.source))
    assert (out.width, out.height) == (1200, 800)
    assert out.format == "JPEG" and b"harbour" in out.exif
    assert np.abs(np.asarray(out.rgb).astype(int) - np.asarray(prepared.source.rgb)).mean() < 3
