"""Attention maps: what is drawn is what the model computed."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.inspection import (
    AttentionMap,
    block_attention,
    check_blocks,
    default_blocks,
    draw_attention,
    inspect_attention,
    mean_maps,
    record_inputs,
)
from varedit.scales import scale_schedule
from varedit.testing import tiny_pipeline

SQUARE = scale_schedule(128)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8))


VARIANTS = [
    {"conditioning": "sar", "num_aligned_blocks": 1}, {"conditioning": "sar", "num_aligned_blocks": 2},
    {"conditioning": "finest"}, {"conditioning": "full"},
    {"conditioning": "sar", "position_layout": "released"},
]  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_the_weights_make_the_attention_output_of_the_very_edit(variant, guidance_scale, photo):
    pipeline = tiny_pipeline(**variant)
    transformer, schedule = pipeline.transformer, scale_schedule(128, 1.5)
    outputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for block, kept in outputs.items():
        layer = transformer.blocks[block].self_attention.proj
        layer.register_forward_pre_hook(lambda module, arguments, kept=kept: kept.append(arguments[0]))
    with record_inputs(transformer, (0, 1)) as inputs:
        pipeline(photo, "make it red", seed=3, guidance_scale=guidance_scale)
    for block, kept in outputs.items():
        # The last block's attention over the source is never computed, as nothing reads it.
        of_scales = kept[-schedule.num_scales :]
        parts = list(block_attention(transformer, block, inputs[block], schedule))
        assert len(parts) == schedule.num_scales
        for part, attended in zip(parts, of_scales):
            weights_NlK = torch.stack(list(part.head_weights()))
            mine = (weights_NlK @ part.v_NKE).transpose(0, 1).flatten(1)
            torch.testing.assert_close(mine, attended[0], atol=1e-6, rtol=1e-5)
            mean = part.mean_weights()
            torch.testing.assert_close(mean.sum(1), torch.ones(len(mean)), atol=1e-6, rtol=0)
            assert mean.shape[1] == sum(h * w for h, w in part.grids) + schedule.offsets[part.scale + 1]


def test_inspecting_changes_nothing(photo):
    pipeline = tiny_pipeline()
    plain = pipeline(photo, "make it red", seed=3).images[0]
    inspected = inspect_attention(pipeline, photo, "make it red", seed=3)
    assert np.array_equal(plain, inspected.result) and inspected.seed == 3
    assert not pipeline.transformer.blocks[0].self_attention.to_qkv._forward_pre_hooks
    assert [one.scale for one in inspected.maps[0]] == list(range(5))
    # Aligned blocks see the source at the scale's own grid, the others at the finest.
    grids = inspected.maps[0][0].schedule.grids
    assert [one.grids for one in inspected.maps[0]] == [(grid,) for grid in grids]
    assert all(one.grids == (grids[-1],) for one in inspected.maps[1])


def test_hooks_go_when_an_edit_fails(photo):
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="empty"):
        inspect_attention(pipeline, photo, "")
    assert not pipeline.transformer.blocks[0].self_attention.to_qkv._forward_pre_hooks


def attention_map(weights: torch.Tensor, scale: int, grids=(SQUARE.finest,)) -> AttentionMap:
    return AttentionMap(0, scale, SQUARE, grids, weights / weights.sum(1, keepdim=True))


def test_distance_and_shares_of_known_attention():
    num_source, end = 64, SQUARE.offsets[-1]
    uniform = attention_map(torch.ones(64, num_source + end), 4)
    assert uniform.distance == pytest.approx(1, abs=1e-5)
    assert uniform.shares == pytest.approx((64 / 185, 57 / 185, 64 / 185), abs=1e-5)
    torch.testing.assert_close(uniform.source_map, torch.full((8, 8), 1 / 64))
    same_place = torch.zeros(64, num_source + end)
    same_place[:, :64] = torch.eye(64)
    local = attention_map(same_place, 4)
    assert local.distance == pytest.approx(0, abs=1e-6) and local.shares == pytest.approx((1, 0, 0), abs=1e-6)
    turned = attention_map(torch.cat([torch.eye(64).flip(1), torch.zeros(64, end)], 1), 4)
    assert turned.distance > 1  # farther than by chance: at the opposite place
    corner = torch.zeros(4, num_source + SQUARE.offsets[2])
    corner[:, 0] = 1
    assert attention_map(corner, 1).source_map.argmax() == 0
    assert attention_map(torch.ones(1, 2), 0, ((1, 1),)).distance is None


def test_uniform_attention_over_a_ladder_has_distance_one():
    grids = tuple(reversed(SQUARE.grids))
    weights = torch.cat([torch.full((64, h * w), 1 / (h * w)) for h, w in grids] + [torch.zeros(64, 121)], 1)
    full = attention_map(weights, 4, grids)
    assert full.distance == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(full.source_map, torch.full((8, 8), 1 / 64))


def test_mean_over_edits(photo):
    pipeline = tiny_pipeline()
    edits = [inspect_attention(pipeline, photo, "make it red", seed=seed, temperature=1.0) for seed in (1, 2)]
    first, second = (edit.maps[1][4].weights_lK for edit in edits)
    assert not torch.equal(first, second)
    torch.testing.assert_close(mean_maps(edits)[1][4].weights_lK, (first + second) / 2)


def test_blocks():
    transformer = tiny_pipeline(num_blocks=4).transformer
    assert default_blocks(transformer) == (0, 3)
    assert check_blocks([2, 2, 1], transformer) == (2, 1)
    with pytest.raises(ValueError, match="block 4 does not exist; this model has blocks 0 to 3"):
        check_blocks([4], transformer)


def test_the_figure_has_a_cell_for_every_block_and_scale(photo):
    inspected = inspect_attention(tiny_pipeline(), photo, "make it red", blocks=(0, 1), seed=1)
    two = np.asarray(draw_attention(inspected.maps, "title", inspected))
    three = np.asarray(draw_attention([*inspected.maps, inspected.maps[0]], "title", inspected))
    assert three.shape[0] > two.shape[0] and three.shape[1] == two.shape[1]
    assert np.array_equal(three[: two.shape[0] - 20, -250:], two[:-20, -250:])
    assert (three < 250).mean() > 0.2
    assert draw_attention(inspected.maps, "title").size != two.shape[1::-1]


@pytest.mark.parametrize(("width", "height", "shown"), [(96, 96, 252), (40, 400, 3 * 252)])  # 1:3 is the tallest box
def test_the_figure_shows_the_whole_edit(width, height, shown):
    source = Image.new("RGB", (width, height), (200, 40, 40))
    inspected = inspect_attention(tiny_pipeline(), source, "make it red", blocks=(0,), seed=1)
    edit = Image.new("RGB", source.size, (10, 200, 10))
    sheet = np.asarray(draw_attention(inspected.maps, "title", replace(inspected, result=edit)))
    assert (sheet[:, 20] == (10, 200, 10)).all(-1).sum() == shown


# -- the command


def test_command(varedit, model_folder, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    figure = tmp_path / "figure.png"
    arguments = [
        "inspect", "attention", tmp_path / "photo.png", "make it red", "--output", figure, "--model", model_folder,
    ]  # fmt: skip
    ran = varedit(*arguments, "--seed", 1, "--device", "cpu", "--blocks", "0,1")
    assert ran.code == 0, ran.err
    assert len(re.findall(r"^block [01]: distance in the source by scale", ran.out, re.M)) == 2
    with Image.open(figure) as image:
        assert image.width > 1000
    varedit(*arguments).assert_refused("exists already", "--overwrite")


def test_average_command(varedit, model_folder, tmp_path):
    figure = tmp_path / "figure.png"
    ran = varedit(
        "inspect", "attention", "--average", 2, "--output", figure, "--model", model_folder, "--device", "cpu"
    )
    assert ran.code == 0, ran.err
    assert figure.is_file()


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["photo.png", "make it red"], "--output"),
        (["photo.png", "make it red", "--average", "3", "-o", "a.png"], "leave out IMAGE"),
        (["--average", "0", "-o", "a.png"], "at least 1"),
        (["photo.png", "-o", "a.png"], "instruction"),
        (["photo.png", "make it red", "--photos", "x", "-o", "a.png"], "go with --average"),
        (["photo.png", "make it red", "-o", "a.xyz"], "format"),
        (["missing.png", "make it red", "-o", "a.png"], "missing.png"),
        (["photo.png", "make it red", "-o", "a.png", "--blocks", "first"], "'first'"),
        (["photo.png", "make it red", "-o", "a.png", "--temperature", "-1"], "temperature"),
        (["photo.png", "make it red", "-o", "a.png", "--size", "100"], "size 100"),
        (["photo.png", " ", "-o", "a.png"], "empty"),
        (["photo.png", "make it red", "-o", "a.png", "--model", "nowhere"], "nowhere"),
        (["--average", "2", "--photos", "gone", "-o", "a.png", "--model", "nowhere"], "gone"),
    ],
)
def test_bad_input_is_one_line(varedit, photo, tmp_path, monkeypatch, arguments, mentioned):
    monkeypatch.chdir(tmp_path)
    photo.save(tmp_path / "photo.png")
    varedit("inspect", "attention", *arguments).assert_refused(mentioned)
    assert not (tmp_path / "a.png").exists()


def test_a_block_that_does_not_exist_is_refused(varedit, model_folder, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    varedit(
        "inspect", "attention", tmp_path / "photo.png", "make it red", "-o", tmp_path / "a.png",
        "--model", model_folder, "--blocks", "0,9",
    ).assert_refused("block 9 does not exist; this model has blocks 0 to 1")  # fmt: skip
