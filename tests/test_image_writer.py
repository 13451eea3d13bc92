"""image_writer: files hold what they can of the picture, and are written whole or not at all."""

import io
import logging
import os

import numpy as np
import pytest
from PIL import Image, features

from varedit.image_processor import ImageError, load_image, prepare, to_pil
from varedit.image_writer import check_output, encode_image, save_image

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


def one_line_error(call, *words: str) -> str:
    with pytest.raises(ImageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


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
    one_line_error(lambda: save_image(photo(8, 8), tmp_path / "out"), "has no suffix", "out.png")
    for name in ("out.gif", "out.txt"):
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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_another_files_layout_in_the_exif_does_not_describe_a_tiff(format):
    exif = Image.Exif()
    exif[256], exif[257], exif[262], exif[0x0110] = 7, 5, 6, "camera"  # width, height, YCbCr
    source = load_image(encoded(photo(40, 24), format, exif=exif.tobytes()))
    with Image.open(io.BytesIO(encode_image(source.rgb, "tiff", source))) as image:
        assert image.getexif()[0x0110] == "camera" and same(image, source.rgb)


@pytest.mark.parametrize(("mode", "compression"), [("1", "group4"), ("RGB", "jpeg")])
def test_a_copy_of_the_source_is_not_written_as_its_file_was(mode, compression):
    data = encoded(photo(40, 24).convert(mode), "TIFF", compression=compression, icc_profile=b"unusable")
    source = load_image(data)
    with Image.open(io.BytesIO(encode_image(source.rgb.copy(), "tiff", source))) as image:
        assert same(image, source.rgb) and "icc_profile" not in image.info


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
        tmp_path: "is a folder",
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
