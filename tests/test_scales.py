"""The ladders of token grids: against the recorded table, and their internal properties."""

import json
import math
import random

import pytest

from varedit.scales import (
    ASPECT_RATIOS,
    NUM_SCALES,
    PIXELS_PER_TOKEN,
    SIZES,
    ScaleSchedule,
    nearest_schedule,
    scale_schedule,
)

ALL = [(size, ratio) for size in SIZES for ratio in ASPECT_RATIOS]


def mirrored(schedule: ScaleSchedule) -> ScaleSchedule:
    """The schedule of the same size class whose grids are the transposed ones."""
    wanted = tuple((w, h) for h, w in schedule.grids)
    found = [scale_schedule(schedule.size, ratio) for ratio in ASPECT_RATIOS]
    (match,) = [other for other in found if other.grids == wanted]
    return match


def test_every_recorded_grid(parity_dir):
    recorded = json.loads((parity_dir / "scale_schedules.json").read_text())["height_over_width"]
    assert sorted(float(ratio) for ratio in recorded) == list(ASPECT_RATIOS)
    names = {"0.06M": 256, "0.25M": 512, "0.60M": 768, "1M": 1024}
    for ratio, sizes in recorded.items():
        assert set(sizes) == set(names)
        for name, entry in sizes.items():
            schedule = scale_schedule(names[name], float(ratio))
            assert schedule.grids == tuple(map(tuple, entry["grids"])), (ratio, name)
            assert schedule.image_hw == tuple(entry["image_hw"]), (ratio, name)


@pytest.mark.parametrize(("size", "ratio"), ALL)
def test_properties_of_every_schedule(size, ratio):
    schedule = scale_schedule(size, ratio)
    assert schedule.num_scales == len(schedule.grids) == NUM_SCALES[size]
    assert schedule.grids[0] == (1, 1)
    assert schedule.finest == schedule.grids[-1]
    assert schedule.image_hw == tuple(side * PIXELS_PER_TOKEN for side in schedule.finest)
    assert len(set(schedule.grids)) == schedule.num_scales
    for (h, w), (next_h, next_w) in zip(schedule.grids, schedule.grids[1:]):
        assert next_h >= h and next_w >= w
    # a prefix of the 1024 class, which is where positions are counted
    assert schedule.reference_grids == scale_schedule(1024, ratio).grids
    assert schedule.grids == schedule.reference_grids[: schedule.num_scales]


@pytest.mark.parametrize(("size", "ratio"), ALL)
def test_offsets_are_running_sums_of_token_counts(size, ratio):
    schedule = scale_schedule(size, ratio)
    assert schedule.num_tokens == tuple(h * w for h, w in schedule.grids)
    assert schedule.offsets == tuple(sum(schedule.num_tokens[:k]) for k in range(schedule.num_scales + 1))


@pytest.mark.parametrize(("size", "ratio"), ALL)
def test_landscape_mirrors_portrait(size, ratio):
    schedule = scale_schedule(size, ratio)
    assert mirrored(mirrored(schedule)) == schedule
    assert mirrored(schedule).image_hw == schedule.image_hw[::-1]
    # a template's name is its own shape, up to the rounding of the name and of the grid
    assert mirrored(schedule).height_over_width == pytest.approx(1 / ratio, rel=2e-3)


def test_template_names_are_the_shapes_of_the_finest_grid():
    for ratio in ASPECT_RATIOS:
        h, w = scale_schedule(1024, ratio).finest
        assert math.log(h / w) == pytest.approx(math.log(ratio), abs=0.01)


def test_smallest_class_is_the_first_five_scales():
    for ratio in ASPECT_RATIOS:
        small = scale_schedule(128, ratio)
        assert small.num_scales == 5
        for size in SIZES:
            assert small.grids == scale_schedule(size, ratio).grids[:5]
    assert scale_schedule(128).image_hw == (128, 128)


@pytest.mark.parametrize("size", SIZES)
def test_square_side_is_the_size_class(size):
    assert scale_schedule(size).image_hw == (size, size)


def test_schedules_are_values():
    assert scale_schedule(256, 1.5) == ScaleSchedule(256, 1.5)
    assert hash(scale_schedule(256, 1.5)) == hash(ScaleSchedule(256, 1.5))
    assert scale_schedule(256, 1.5) != scale_schedule(512, 1.5)
    assert scale_schedule(256) == scale_schedule(256, 1.0)


@pytest.mark.parametrize(("size", "ratio"), ALL)
def test_nearest_of_an_exact_template_size_is_that_template(size, ratio):
    schedule = scale_schedule(size, ratio)
    assert nearest_schedule(size, *schedule.image_hw) == schedule


@pytest.mark.parametrize("size", SIZES)
def test_nearest_takes_the_last_template_beyond_the_ends(size):
    assert nearest_schedule(size, 1, 100_000).height_over_width == ASPECT_RATIOS[0]
    assert nearest_schedule(size, 100_000, 1).height_over_width == ASPECT_RATIOS[-1]
    assert nearest_schedule(size, 1, 1).height_over_width == 1.0
    assert nearest_schedule(size, 4000, 4001).height_over_width == 1.0


@pytest.mark.parametrize("size", SIZES)
def test_nearest_is_nearest_in_log_aspect_and_symmetric(size):
    draw = random.Random(size)
    for _ in range(100):
        height, width = draw.randint(64, 3000), draw.randint(64, 3000)
        found = nearest_schedule(size, height, width)
        distances = [
            abs(math.log((h * width) / (w * height)))
            for h, w in (scale_schedule(size, r).finest for r in ASPECT_RATIOS)
        ]
        h, w = found.finest
        assert abs(math.log((h * width) / (w * height))) == pytest.approx(min(distances), abs=1e-12)
        assert nearest_schedule(size, width, height) == mirrored(found)
        assert nearest_schedule(size, 7 * height, 7 * width) == found


def test_nearest_boundary_is_the_geometric_mean():
    # 1024 class: between 64 x 64 and 70 x 56 the boundary is sqrt(1.25), not their arithmetic mean 1.125
    assert nearest_schedule(1024, 11179, 10000).height_over_width == 1.0
    assert nearest_schedule(1024, 11181, 10000).height_over_width == 1.25


def test_errors_name_the_value_and_the_fix():
    with pytest.raises(ValueError, match=r"size 300 .*128, 256, 512, 768, 1024"):
        scale_schedule(300)
    with pytest.raises(ValueError, match=r"height_over_width 1\.1 .*0\.333, .*1\.000, .*3\.000"):
        scale_schedule(256, 1.1)
    with pytest.raises(ValueError, match=r"size 300 "):
        nearest_schedule(300, 10, 10)
    for height, width in ((0, 640), (480, 0), (-1, 10)):
        with pytest.raises(ValueError, match=rf"{width} x {height} .*at least 1"):
            nearest_schedule(256, height, width)
