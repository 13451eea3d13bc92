import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from varedit.editing.change_map import Calibration, calibrate, change_map, difference
from varedit.image_processor import prepare, to_pil

data = pytest.importorskip("skimage.data", reason="needs scikit-image's sample photographs")


def decode(image: Image.Image, seed: int | None = None, size: int = 128):
    """A stand-in for an image tokenizer: JPEG at low quality errs as one does, by content, in cells of 8 pixels.

    With a seed the picture is disturbed first, as an editor disturbs what it copies. Returns canvas and decoding as
    the pipeline has them, and what was prepared.
    """
    prepared = prepare(image, size)
    pixels = np.asarray(to_pil(prepared.image_B3HW)[0])
    if seed is not None:
        noise = Image.fromarray(np.random.default_rng(seed).normal(128, 40, pixels.shape).clip(0, 255).astype(np.uint8))
        pixels = np.clip(pixels + (np.asarray(noise.filter(ImageFilter.BoxBlur(2)), float) - 128), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=20, subsampling=0)
    decoded = np.array(Image.open(buffer), np.float32) / 127.5 - 1
    decoded_B3HW = torch.from_numpy(decoded).permute(2, 0, 1)[None]
    canvas_BChw = torch.nn.functional.pixel_unshuffle(decoded_B3HW, 8) / 8
    return canvas_BChw, decoded_B3HW, prepared


def compare(source: Image.Image, target: Image.Image, seed: int = 0):
    source_canvas, source_decoded, prepared = decode(source)
    result_canvas, result_decoded, _ = decode(target, seed)
    return (source_canvas, result_canvas, source_decoded, result_decoded), prepared


def measure(source, target, seed=0, **options):
    parts, prepared = compare(source, target, seed)
    return change_map(*parts, content_box=prepared.content_box, calibration=calibration(), **options)


_CALIBRATION = []


def calibration() -> Calibration:
    if not _CALIBRATION:
        fields = [difference(*compare(photo, photo, seed)[0]) for photo in photos() for seed in range(6)]
        _CALIBRATION.append(calibrate(fields))
    return _CALIBRATION[0]


def photos() -> list[Image.Image]:
    return [Image.fromarray(picture()) for picture in (data.astronaut, data.coffee, data.chelsea)]


def ellipse(image: Image.Image) -> np.ndarray:
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    return ((x / image.width - 0.4) / 0.15) ** 2 + ((y / image.height - 0.5) / 0.18) ** 2 < 1


def with_object(image: Image.Image) -> Image.Image:
    pixels = np.array(image)
    pixels[ellipse(image)] = (30, 90, 220)
    return Image.fromarray(pixels)


def recoloured(image: Image.Image) -> Image.Image:
    pixels, where = np.array(image), ellipse(image)
    pixels[where] = np.clip(pixels[where].mean(-1, keepdims=True) * (1.6, 0.4, 0.9), 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("photo", photos(), ids=["astronaut", "coffee", "chelsea"])
def test_a_do_nothing_edit_has_an_empty_map(photo):
    change = measure(photo, photo, seed=77)
    assert change.kind == "none" and not change.hard_HW.any() and change.area == 0


@pytest.mark.parametrize("photo", photos(), ids=["astronaut", "coffee", "chelsea"])
# A recoloured piece of a larger thing has no edge to stop at, only noise.
@pytest.mark.parametrize(("edit", "least_overlap"), [(with_object, 0.85), (recoloured, 0.4)])
def test_a_local_edit_is_found_where_it_is(photo, edit, least_overlap):
    parts, prepared = compare(photo, edit(photo))
    change = change_map(*parts, content_box=prepared.content_box, calibration=calibration())
    height, width = change.hard_HW.shape
    visible = np.abs(np.asarray(edit(photo), int) - np.asarray(photo)).max(-1) >= 24  # black stays black, recoloured
    truth = np.asarray(Image.fromarray(visible).resize((width, height)))
    assert change.kind == "local"
    overlap = (change.hard_HW & truth).sum() / (change.hard_HW | truth).sum()
    recall = (change.hard_HW & truth).sum() / truth.sum()
    assert overlap > least_overlap and recall > 0.95, (overlap, recall)


@pytest.mark.parametrize(
    ("edit", "orientation"),
    [
        (lambda image: image.convert("L").convert("RGB"), "same"),
        (lambda image: ImageOps.invert(image), "same"),
        (lambda image: image.point([min(255, round(v * 1.4 + 14)) for v in range(256)] * 3), "same"),
        (lambda image: image.filter(ImageFilter.GaussianBlur(image.width * 0.022)), "same"),
        (ImageOps.mirror, "mirrored"),
        (ImageOps.flip, "upside_down"),
        (lambda image: image.rotate(180), "rotated"),
    ],
)
def test_an_edit_of_the_whole_picture_is_recognised(edit, orientation):
    photo = photos()[1]
    change = measure(photo, edit(photo))
    assert (change.kind, change.orientation) == ("global", orientation)


def test_a_new_background_is_local_and_spares_the_objects():
    photo = photos()[0]
    pixels = np.array(Image.effect_noise(photo.size, 60).convert("RGB"))
    pixels[..., 0] //= 3
    keep = ellipse(photo) | np.roll(ellipse(photo), 150, 1)
    pixels[keep] = np.asarray(photo)[keep]
    change = measure(photo, Image.fromarray(pixels))
    height, width = change.hard_HW.shape
    kept = np.asarray(Image.fromarray(keep).resize((width, height)))
    assert change.kind == "local" and change.area > 0.6
    assert change.hard_HW[kept].mean() < 0.45  # the rest is the border


def test_equal_canvases_and_equal_decodings_are_no_change():
    (canvas, _, decoded, _), prepared = compare(photos()[1], photos()[1])
    assert change_map(canvas, canvas, decoded, decoded).kind == "none"
    # The same bits decoded with spill from elsewhere: gated by the canvases.
    assert change_map(canvas, canvas, decoded, (decoded + 0.2).clamp(-1, 1), calibration=Calibration()).kind == "none"


def test_stray_change_is_what_lies_outside_the_mask():
    photo = photos()[0]
    asked = measure(photo, with_object(photo), mask_HW=np.ones((128, 128)))
    assert asked.stray == 0
    elsewhere = np.zeros((128, 128))
    elsewhere[:10, :10] = 1
    missed = measure(photo, with_object(photo), mask_HW=elsewhere)
    assert missed.stray == pytest.approx(missed.area, rel=0.02)


def test_the_map_is_machine_readable_and_drawable():
    photo = photos()[0]
    change = measure(photo, with_object(photo))
    facts = json.loads(json.dumps(change.to_json()))
    assert facts["kind"] == "local" and facts["stray"] is None
    left, top, right, bottom = facts["box"]
    assert left < 0.4 < right and top < 0.5 < bottom and right - left < 0.5
    drawn = change.draw(photo)
    assert drawn.size == photo.size and drawn.mode == "RGB"
    assert change.to_image().size == change.hard_HW.shape[::-1]
    assert np.array_equal(np.asarray(drawn), np.asarray(change.draw(photo)))


def test_padding_of_the_fit_is_left_out():
    photo = photos()[1].crop((0, 0, 600, 370))
    parts, prepared = compare(photo, with_object(photo))
    left, top, right, bottom = prepared.content_box
    assert (right - left, bottom - top) != prepared.schedule.image_hw[::-1]
    change = change_map(*parts, content_box=prepared.content_box, calibration=calibration())
    assert change.hard_HW.shape == (bottom - top, right - left)


def test_calibration_grows_with_the_noise_and_refuses_nothing():
    photo = photos()[2]
    parts, _ = compare(photo, photo, 1)
    quiet = calibrate([difference(*parts)])
    source_canvas, result_canvas, source_decoded, result_decoded = parts
    louder = source_decoded + 3 * (result_decoded - source_decoded)
    loud = calibrate([difference(source_canvas, result_canvas, source_decoded, louder)])
    assert loud.noise(np.float32(5)) > 2 * quiet.noise(np.float32(5))
    shape = difference(*parts).pixel_HW.shape
    assert calibrate([difference(*parts)] * 2, [np.ones(shape, bool), None]) == quiet  # ignored: the mask's inside
    still = calibrate([difference(source_canvas, source_canvas, source_decoded, source_decoded)])
    assert still.floor > 0 and still.token == 0
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate([])
    with pytest.raises(ValueError, match="impossible"):
        Calibration(high=1.0, low=2.0)


def test_shapes_that_do_not_belong_together_are_refused():
    (canvas, _, decoded, _), _ = compare(photos()[1], photos()[1])
    with pytest.raises(ValueError, match="differ in shape"):
        difference(canvas, canvas[:, :, 1:], decoded, decoded)
    with pytest.raises(ValueError, match="not one image"):
        difference(torch.cat([canvas, canvas]), canvas, decoded, decoded)
