import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage
from test_change_map import calibration, compare, ellipse, photos, recoloured, with_object

from varedit.editing.change_map import change_map
from varedit.editing.preserve import FEATHER, _Enlarge, opacity, preserve, reach
from varedit.image_processor import load_image, to_pil

SIDE = 900


def large(index: int = 0) -> Image.Image:
    photo = photos()[index]
    return photo.resize((SIDE, round(SIDE * photo.height / photo.width)), Image.Resampling.LANCZOS)


def edit(source: Image.Image, target: Image.Image, seed: int = 5):
    """The change map and the blurry enlargement of an edit from source to target done at 128 pixels."""
    parts, prepared = compare(source, target, seed)
    change = change_map(*parts, content_box=prepared.content_box, calibration=calibration())
    return prepared.restore(to_pil(parts[3])[0]), change


def psnr(image, truth) -> float:
    error = np.square(np.asarray(image, float) - np.asarray(truth, float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("make", [with_object, recoloured])
def test_exact_keeps_every_pixel_outside_and_beats_the_enlargement(index, make):
    source = large(index)
    edited, change = edit(source, make(source))
    output = preserve(source, edited, change)
    same = (np.asarray(output) == np.asarray(source)).all(-1)
    outside = ~reach(change, source.size)
    assert change.kind == "local" and outside.mean() > 0.7
    assert same[outside].all()
    assert psnr(output, make(source)) > psnr(edited, make(source)) + 5
    shown = opacity(change)
    assert (shown[change.hard_HW] == 1).all()
    assert shown[ndimage.distance_transform_edt(~change.hard_HW) >= FEATHER].max() == 0


def test_a_do_nothing_edit_gives_the_input_bit_for_bit():
    source = large(1)
    edited, change = edit(source, source)
    for mode in ("exact", "blend"):
        assert np.array_equal(preserve(source, edited, change, mode), source)


GLOBAL = {
    "grayscale": (lambda image: image.convert("L").convert("RGB"), 6.0),
    "invert": (ImageOps.invert, 6.0),
    "darker": (lambda image: image.point([round(v * 0.5) for v in range(256)] * 3), 1.5),
    "warm": (lambda image: Image.merge("RGB", [image.getchannel(c).point([min(255, round(v * g)) for v in range(256)])
                                              for c, g in (("R", 1.15), ("G", 1.0), ("B", 0.65))]), 4.0),
}  # fmt: skip


@pytest.mark.parametrize("name", GLOBAL)
def test_a_tone_edit_carries_the_inputs_own_detail(name):
    apply, gain = GLOBAL[name]
    source = large(1)
    edited, change = edit(source, apply(source))
    output = preserve(source, edited, change)
    assert change.kind == "global"
    assert psnr(output, apply(source)) > psnr(edited, apply(source)) + gain


@pytest.mark.parametrize("turn", [ImageOps.mirror, ImageOps.flip])
def test_a_mirrored_picture_is_the_input_mirrored(turn):
    source = large(1)
    edited, change = edit(source, turn(source))
    assert np.array_equal(preserve(source, edited, change), turn(source))
    kept = (np.asarray(preserve(source, edited, change, "blend")) == np.asarray(turn(source))).all(-1)
    assert kept.mean() > 0.95


def fine(image) -> np.ndarray:
    """What is finer than a model can show at 128 pixels, gray levels."""
    gray = np.asarray(image.convert("L"), float)
    return gray - ndimage.gaussian_filter(gray, SIDE / 128)


def pixelated(image: Image.Image) -> Image.Image:
    return image.resize((16, 10), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("destroy", [lambda image: image.filter(ImageFilter.GaussianBlur(SIDE * 0.022)), pixelated])
def test_detail_that_the_edit_destroyed_does_not_come_back(destroy):
    source = large(1)
    edited, change = edit(source, destroy(source))
    output = preserve(source, edited, change)
    assert psnr(output, destroy(source)) > psnr(edited, destroy(source)) - 0.3
    ghost = (fine(output) * fine(source)).mean() / np.square(fine(source)).mean()
    assert change.kind == "global" and abs(ghost) < 0.03


def test_black_and_white_keeps_no_tint():
    source = large(1)
    gray = source.convert("L").convert("RGB")
    edited, change = edit(source, gray)
    output = preserve(source, edited, change)
    before, noise, tint = (np.ptp(np.asarray(image, int), axis=-1) for image in (source, edited, output))
    assert before.mean() > 100 and noise.mean() > 3  # there is colour to lose, and some that came with the noise
    assert tint.max() == 0
    assert psnr(output, gray) > psnr(edited, gray) + 12


@pytest.mark.parametrize("name", ["faded", "sepia", "dark blue"])
def test_a_picture_with_little_colour_keeps_it(name):
    source = large(1)
    gray, pixels = (np.asarray(image, float) for image in (source.convert("L").convert("RGB"), source))
    wanted = {
        "faded": 0.75 * gray + 0.25 * pixels,
        "sepia": gray * (1, 0.85, 0.65),
        "dark blue": gray * (0.3, 0.35, 0.5),
    }
    target = Image.fromarray(wanted[name].astype(np.uint8))
    edited, change = edit(source, target)
    output = preserve(source, edited, change)
    assert change.kind == "global"
    tint, expected = (np.ptp(np.asarray(image, float), axis=-1).mean() for image in (output, target))
    assert abs(tint - expected) < 0.3 * expected


def test_what_was_removed_leaves_no_ghost():
    plain = Image.new("RGB", (SIDE, SIDE), (120, 160, 90))
    source = with_object(plain)
    edited, change = edit(source, plain)
    left = np.abs(np.asarray(preserve(source, edited, change), int) - np.asarray(plain)).max(-1)[ellipse(plain)]
    assert change.kind == "local"
    assert left.mean() < 6 and np.mean(left > 30) < 0.01  # the object differs by 130


def test_off_and_strength():
    source = large(0)
    edited, change = edit(source, with_object(source))
    assert np.array_equal(preserve(source, edited, change, "off"), edited)
    assert np.array_equal(preserve(source, edited, change, strength=0), edited)
    locked, half = (np.asarray(preserve(source, edited, change, strength=s), int) for s in (1, 0.5))
    outside = ~reach(change, source.size)
    assert (
        0 < np.abs(half - np.asarray(source))[outside].mean() < np.abs(np.asarray(edited, int) - source)[outside].mean()
    )
    assert np.abs(half - locked)[change_core(change, source.size)].mean() < 3  # inside both show the edit


def change_core(change, size) -> np.ndarray:
    """Where an exact edit is seen in full, away from the feather."""
    return (
        np.asarray(Image.fromarray(opacity(change) == 1).convert("L").resize(size).filter(ImageFilter.MinFilter(15)))
        > 0
    )


def test_blend_fades_and_leaves_far_pixels_alone():
    source = large(0)
    edited, change = edit(source, with_object(source))
    output = np.asarray(preserve(source, edited, change, "blend"))
    same = (output == np.asarray(source)).all(-1)
    assert same[~ellipse(source)].mean() > 0.5
    shown = opacity(change, "blend")
    assert ((shown > 0) & (shown < 1)).sum() > ((opacity(change) > 0) & (opacity(change) < 1)).sum()


def test_a_mask_binds_in_every_mode():
    source = large(1)
    gray = source.convert("L").convert("RGB")
    edited, change = edit(source, gray)
    mask = Image.new("L", source.size)
    mask.paste(255, (100, 100, 500, 400))
    closed = np.asarray(mask) == 0
    for mode in ("exact", "blend", "off"):
        output = np.asarray(preserve(source, edited, change, mode, mask=mask))
        assert np.array_equal(output[closed], np.asarray(source)[closed])
        assert psnr(output[150:350, 150:450], np.asarray(gray)[150:350, 150:450]) > 20
    mirrored, turned = edit(source, ImageOps.mirror(source))
    output = np.asarray(preserve(source, mirrored, turned, mask=mask))
    assert np.array_equal(output[closed], np.asarray(source)[closed])
    assert np.array_equal(output[~closed], np.asarray(ImageOps.mirror(source))[~closed])


def test_sixteen_bits_stay_sixteen_bits():
    source = large(0)
    low_bytes = np.random.default_rng(1).integers(0, 99, (SIDE, SIDE, 3), np.uint16)
    deep = np.minimum(np.asarray(source), 254).astype(np.uint16) * 257 + low_bytes
    edited, change = edit(source, with_object(source))
    output = preserve(deep, edited, change)
    assert output.dtype == np.uint16
    outside = ~reach(change, source.size)
    assert np.array_equal(output[outside], deep[outside])
    shallow = np.asarray(preserve(source, edited, change), float)
    assert np.abs(output / 257 - shallow).max() < 6  # the same edit, up to the low byte and the clip


def test_tiles_equal_the_whole_and_the_output_is_deterministic(monkeypatch):
    source = large(0)
    edited, change = edit(source, source.convert("L").convert("RGB"))
    whole = np.asarray(preserve(load_image(source), edited, change))
    assert np.array_equal(whole, preserve(source, edited, change))
    monkeypatch.setattr("varedit.editing.preserve._BAND_PIXELS", 7 * SIDE)
    assert np.array_equal(whole, preserve(source, edited, change))


def test_enlarging_reproduces_lines_and_copies_at_the_same_size():
    line = np.linspace(0, 255, 16, dtype=np.float32)[None, :, None].repeat(4, 0)
    for cubic in (False, True):
        same = _Enlarge((4, 16), (4, 16), cubic)(line, slice(0, 4), slice(0, 16))
        assert np.allclose(same, line, atol=1e-3)
        big = _Enlarge((4, 16), (12, 160), cubic)(line, slice(2, 5), slice(30, 130))
        assert np.allclose(np.diff(big[0, :, 0]), np.diff(line[0, :2, 0]) / 10, atol=1e-2)


def test_unusable_requests_are_refused_in_words():
    source = large(0)
    edited, change = edit(source, with_object(source))
    for call, words in (
        (lambda: preserve(source, edited, change, "strict"), "strict"),
        (lambda: preserve(source, edited, change, strength=2), "strength 2"),
        (lambda: preserve(source, edited.resize((10, 10)), change), "10 x 10"),
        (lambda: preserve(source, edited, change, mask=Image.new("L", (5, 5))), "mask of 5 x 5"),
        (lambda: preserve(np.zeros((SIDE, SIDE, 3)), edited, change), "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
