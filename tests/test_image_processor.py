"""image_processor: fitted to the model and back, a picture keeps its width, its height and its place."""

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.image_processor import ImageError, prepare, to_pil
from varedit.scales import ASPECT_RATIOS, SIZES, scale_schedule


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image with some detail, so that resampling and JPEG behave as on photos."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


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
    """Waves of 32 model pixels survive the fit; a shift of one model pixel, in either direction, would show."""
    left, _, right, _ = prepare(Image.new("RGB", (width, height)), 256, fit).content_box

    def waves(shift: int) -> np.ndarray:
        """Shifted by so many model pixels."""
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        x, y = ((side * (right - left) / width - shift) * 2 * np.pi / 32 for side in (x, y))
        return np.rint(127.5 + 120 * np.stack([np.sin(x), np.sin(y), np.sin(x + y)], axis=2)).astype(int)

    def shown(difference: np.ndarray) -> np.ndarray:
        """The most in each channel, without the edge, where the square's white bleeds in."""
        return difference[height // 20 : -height // 20, width // 20 : -width // 20].max((0, 1))

    prepared = prepare(Image.fromarray(waves(0).astype(np.uint8)), 256, fit)
    difference = np.abs(np.asarray(prepared.restore(prepared.image_B3HW)).astype(int) - waves(0))
    shifted = np.abs(waves(1) - waves(0))
    assert shown(difference).max() <= 2 and shown(shifted).min() > 20
    if fit == "native":
        assert difference.max() <= 12 < 20 < shifted.max((0, 1)).min()


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
