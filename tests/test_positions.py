"""Positions and rotation."""

import pytest
import torch

from varedit.positions import ladder_positions, rotary_table, rotate, token_positions
from varedit.scales import ASPECT_RATIOS, scale_schedule
from varedit.transformer import CONDITIONINGS

SQUARE = scale_schedule(128)
PORTRAIT = scale_schedule(128, 1.5)
SCHEDULES = [pytest.param(SQUARE, id="square"), pytest.param(PORTRAIT, id="portrait")]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_layouts_agree_at_1024_and_only_there(ratio, conditioning):
    schedule = scale_schedule(1024, ratio)
    for ours, released in zip(*(token_positions(schedule, conditioning, layout) for layout in ("offset", "released"))):
        assert torch.equal(ours, released)
    smaller = scale_schedule(512, ratio)
    for ours, released in zip(*(token_positions(smaller, conditioning, layout) for layout in ("offset", "released"))):
        assert ours.shape == released.shape and not torch.equal(ours, released)


@pytest.mark.parametrize("schedule", [*SCHEDULES, scale_schedule(512, 2.0)])
def test_offset_layout_token_by_token(schedule):
    """Target token (i, j) sits at its place on the 1024 class's finest grid; the source is shifted by that grid."""
    height, width = scale_schedule(1024, schedule.height_over_width).finest
    expected = [
        (round(i * height / h), round(j * width / w)) for h, w in schedule.grids for i in range(h) for j in range(w)
    ]
    source, target = token_positions(schedule, "finest", "offset")
    assert target.tolist() == [list(place) for place in expected]
    finest = expected[schedule.offsets[-2] :]
    assert source.tolist() == [[height + row, width + column] for row, column in finest]
    full, same = token_positions(schedule, "full", "offset")
    assert torch.equal(same, target)
    ends = list(zip(schedule.offsets, schedule.offsets[1:]))
    reordered = torch.cat([target[start:end] for start, end in reversed(ends)])
    assert torch.equal(full, reordered + torch.tensor([height, width]))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_fixed_offset_is_the_same_at_every_template_and_keeps_source_and_target_apart(ratio, conditioning):
    schedule = scale_schedule(1024, ratio)
    source, target = token_positions(schedule, conditioning, "fixed_offset")
    finest = target[schedule.offsets[-2] :]
    assert torch.equal(source[: len(finest)], finest + 64)
    assert not set(map(tuple, source.tolist())) & set(map(tuple, target.tolist()))
    if ratio == 1.0:
        offset = token_positions(schedule, conditioning, "offset")
        assert torch.equal(source, offset[0]) and torch.equal(target, offset[1])


def test_released_layout_is_a_raster_walk_through_the_source_part():
    schedule = scale_schedule(256, 1.5)
    height, width = scale_schedule(1024, 1.5).finest
    walk = [[height + n // width, width + n % width] for n in range(height * width)]
    source, target = token_positions(schedule, "sar", "released")
    num_source = schedule.num_tokens[-1]
    assert source.tolist() == walk[:num_source]
    assert target.tolist() == walk[num_source : num_source + schedule.offsets[-1]]


def test_ladder_positions_start_at_0_and_stay_inside():
    for ratio in ASPECT_RATIOS:
        schedule = scale_schedule(1024, ratio)
        positions = ladder_positions(schedule.grids, schedule.finest)
        assert positions.min() == 0
        assert (positions < torch.tensor(schedule.finest)).all()
        finest = positions[schedule.offsets[-2] :]
        assert torch.equal(finest, torch.cartesian_prod(*map(torch.arange, schedule.finest)))


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32)
    product = {}
    for place in ((0, 0), (5, 3), (40, 17)):
        for distance in ((0, 0), (4, -1), (-2, 7)):
            there = torch.tensor([place]) + torch.tensor([distance])
            turned_q = rotate(q, rotary_table(torch.tensor([place]), 32, q.device))
            turned_k = rotate(k, rotary_table(there, 32, q.device))
            product.setdefault(distance, []).append((turned_q * turned_k).sum())
    for values in product.values():
        torch.testing.assert_close(torch.stack(values), values[0].expand(3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product[0, 0][0], (q * k).sum())
    first = [values[0].item() for values in product.values()]
    assert max(first) - min(first) > 0.1
    # rows turn the first half of the channels alone, columns the second half
    row = rotate(q, rotary_table(torch.tensor([[9, 0]]), 32, q.device))
    assert torch.equal(row[..., 16:], q[..., 16:]) and not torch.equal(row[..., :16], q[..., :16])
