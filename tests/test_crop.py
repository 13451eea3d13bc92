"""Crop, edit, stitch: which part is taken, and that everything else stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.editing.change_map import change_map
from varedit.editing.crop import CONTEXT, MIN_GAIN, crop_box, cut, place_map, stitch
from varedit.editing.mask import box_mask, polygon_mask
from varedit.editing.preserve import reach
from varedit.image_processor import load_image
from varedit.scales import nearest_schedule

LARGE = (3000, 2000)


@pytest.mark.parametrize("box", [(1400, 900, 200, 150), (0, 0, 100, 300), (2900, 1990, 100, 10), (1000, 20, 500, 90)])
@pytest.mark.parametrize("size", [128, 256, 512])
def test_the_box_holds_the_area_with_context_in_a_templates_shape(box, size):
    found = crop_box(box_mask(box, LARGE), size)
    left, top, right, bottom = found
    assert 0 <= left <= box[0] and right >= box[0] + box[2] and right <= LARGE[0]
    assert 0 <= top <= box[1] and bottom >= box[1] + box[3] and bottom <= LARGE[1]
    height, width = nearest_schedule(size, bottom - top, right - left).image_hw
    assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=0.01)  # nothing to fill up
    assert right - left >= width - 1 and bottom - top >= height - 1  # nothing to enlarge
    context = CONTEXT * max(box[2], box[3])
    assert right - left >= box[2] + context and bottom - top >= box[3] + context  # at the border one side has it all
    assert max(LARGE) / max(right - left, bottom - top) >= MIN_GAIN


def test_the_whole_is_kept_where_a_crop_shows_no_more():
    assert crop_box(box_mask((0, 0, 1200, 1000), LARGE), 128) is None  # covers much
    assert crop_box(box_mask((10, 10, 20, 20), (250, 180)), 128) is None  # hardly larger than the model
    assert crop_box(box_mask((10, 10, 20, 20), (250, 180)), 512) is None
    assert crop_box(Image.new("L", LARGE), 128) is None
    far_apart = Image.new("L", LARGE)
    far_apart.putpixel((5, 5), 255)
    far_apart.putpixel((2990, 1990), 255)
    assert crop_box(far_apart, 128) is None


def test_the_square_fit_takes_a_square():
    left, top, right, bottom = crop_box(box_mask((1000, 1000, 400, 100), LARGE), 128, "square")
    assert right - left == bottom - top


def test_a_part_put_back_changes_that_part_alone():
    rng = np.random.default_rng(0)
    source = load_image(rng.integers(0, 65536, (30, 40, 4), np.uint16))
    box = (5, 7, 25, 19)
    part = cut(source, box)
    assert part.rgb.size == (20, 12) and part.alpha is None and part.rgb16_HW3.shape == (12, 20, 3)
    assert cut(source, None) is source
    assert np.array_equal(stitch(source, part.rgb16_HW3, box), source.rgb16_HW3)
    assert stitch(source, part.rgb, box).tobytes() == source.rgb.tobytes()
    other = stitch(source, np.zeros((12, 20, 3), np.uint16), box)
    assert not other[7:19, 5:25].any()
    other[7:19, 5:25] = source.rgb16_HW3[7:19, 5:25]
    assert np.array_equal(other, source.rgb16_HW3)


@pytest.mark.parametrize("box", [(130, 8, 430, 233), (0, 208, 240, 400), (301, 77, 599, 399), (0, 0, 144, 96)])
def test_the_map_in_the_whole_covers_all_that_the_edit_of_the_part_may_touch(box):
    canvas, decoded = torch.zeros(1, 4, 12, 18), torch.zeros(1, 3, 96, 144)
    nothing, rng = change_map(canvas, canvas, decoded, decoded), np.random.default_rng(box[0])
    for _ in range(5):
        hard_HW = np.zeros((96, 144), bool)
        for top, left in rng.integers(0, 90, (3, 2)):
            hard_HW[top : top + rng.integers(1, 20), left : left + rng.integers(1, 50)] = True
        change = replace(nothing, hard_HW=hard_HW, remainder_HW=hard_HW, kind="local", area=float(hard_HW.mean()))
        touched = np.zeros((400, 600), bool)
        touched[box[1] : box[3], box[0] : box[2]] = reach(change, (box[2] - box[0], box[3] - box[1]))
        covered = reach(place_map(change, box, (600, 400), None), (600, 400))
        assert not (touched & ~covered).any() and covered.mean() < touched.mean() + 0.04


def test_the_map_of_a_part_is_placed_in_the_whole():
    hard_HW = np.zeros((96, 144), bool)
    hard_HW[40:60, 100:120] = True
    area = float(hard_HW.mean())
    canvas, decoded = torch.zeros(1, 4, 12, 18), torch.zeros(1, 3, 96, 144)
    change = replace(
        change_map(canvas, canvas, decoded, decoded),
        soft_HW=hard_HW.astype(np.float32), hard_HW=hard_HW, kind="global", area=area, magnitude=9.0, stray=0.5,
    )  # fmt: skip
    box = (600, 300, 744, 396)  # one pixel of the picture is one of the model
    mask = polygon_mask([(620, 320), (720, 320), (720, 380)], (1200, 800))
    placed = place_map(change, box, (1200, 800), mask)
    rows, columns = np.nonzero(placed.hard_HW)
    assert placed.hard_HW.shape == (800, 1200)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (340, 359, 700, 719)
    assert placed.kind == "local" and placed.magnitude == 9.0
    assert placed.area == pytest.approx(placed.hard_HW.mean()) == pytest.approx(area * 144 * 96 / (1200 * 800))
    outside = np.asarray(mask) == 0
    in_part = outside[300:396, 600:744].sum()
    assert placed.stray == pytest.approx(0.5 * in_part / outside.sum())
    assert placed.to_json()["box"] == pytest.approx([700 / 1200, 340 / 800, 720 / 1200, 360 / 800], abs=1e-4)
    huge = place_map(change, (600, 300, 744, 396), (30_000, 20_000), None)
    assert max(huge.hard_HW.shape) == 1536 and huge.hard_HW.any() and huge.stray is None
    assert place_map(change, (59_000, 98, 59_144, 100), (60_000, 100), None).hard_HW.any()
