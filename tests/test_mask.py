import io

import numpy as np
import pytest
import torch
from PIL import Image

from varedit import quantizer
from varedit.editing.mask import (
    TokenLock,
    box_mask,
    changed_area,
    grow,
    image_mask,
    lock_bits,
    model_mask,
    parse_box,
    parse_polygon,
    polygon_mask,
    token_coverage,
)
from varedit.image_processor import prepare
from varedit.sampling import sample_bits
from varedit.scales import scale_schedule
from varedit.testing import tiny_pipeline


def half_white(width: int = 40, height: int = 20) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def test_white_edits_and_transparent_edits_mean_the_same_area():
    white = half_white()
    clear = np.dstack([np.full((20, 40, 3), 90, np.uint8), 255 - white])
    by_white = image_mask(white, (40, 20))
    by_alpha = image_mask(clear, (40, 20), "transparent")
    assert np.array_equal(by_white, white)
    assert np.array_equal(by_alpha, white)


def test_a_mask_is_read_from_a_png_a_bool_array_and_rgb():
    buffer = io.BytesIO()
    Image.fromarray(half_white()).save(buffer, "PNG")
    for mask in (buffer.getvalue(), half_white() > 0, np.dstack([half_white()] * 3)):
        assert np.array_equal(image_mask(mask, (40, 20)), half_white())


def test_white_under_full_transparency_is_not_edited():
    mask = np.dstack([half_white(), half_white(), half_white(), np.full((20, 40), 255, np.uint8)])
    mask[:10, :, 3] = 0
    levels = np.asarray(image_mask(mask, (40, 20)))
    assert not levels[:10].any()
    assert np.array_equal(levels[10:], half_white()[10:])


def test_any_size_is_resized_and_soft_edges_are_kept():
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))
    levels = np.asarray(image_mask(ramp, (512, 256)))
    assert levels.shape == (256, 512)
    assert len(np.unique(levels)) > 200
    assert (np.diff(levels.astype(int), axis=1) >= 0).all()
    assert image_mask(np.full((100, 150), 255, np.uint8), (1201, 800)).getextrema() == (255, 255)  # within 1 %


@pytest.mark.parametrize(
    ("mask", "convention", "words"),
    [
        (np.full((20, 30), 255, np.uint8), "white", "30 x 20 .* 40 x 20"),
        (np.zeros((20, 40), np.uint8), "white", "empty .* 0 of 255"),
        (np.ones((20, 40), np.uint8), "white", "1 of 255"),
        (half_white(), "transparent", "no alpha"),
        (np.full((20, 40, 4), 255, np.uint8), "transparent", "empty"),
        (half_white(), "black", "convention"),
    ],
)
def test_unusable_masks_are_refused_in_words(mask, convention, words):
    with pytest.raises(ValueError, match=words):
        image_mask(mask, (40, 20), convention)


def test_boxes_and_polygons():
    mask = np.asarray(box_mask((30, 5, 100, 10), (40, 20)))  # cut at the border
    assert mask[5:15, 30:].min() == 255 and int((mask > 0).sum()) == 100
    triangle = np.asarray(polygon_mask([(0, 0), (39, 0), (0, 19)], (40, 20)))
    assert triangle[1, 1] == 255 and triangle[18, 38] == 0
    assert parse_box("1,2,3,4.5") == (1, 2, 3, 4.5)
    assert parse_polygon("1,2 3,4.5  5,6") == [(1, 2), (3, 4.5), (5, 6)]
    far = polygon_mask([(0, 0), (2e6, 1e6), (0, 1e6)], (40, 20))  # below the line to a far corner
    assert (np.asarray(far) > 0).mean() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="no list of X,Y corners"):
        polygon_mask([(3e9, 0), (0, 9), (0, 0)], (40, 20))
    assert np.asarray(grow(box_mask((10, 10, 1, 1), (40, 20)), 3)).sum() == 49 * 255
    assert np.asarray(grow(box_mask((39, 0, 1, 1), (40, 20)), 10**30)).min() == 255  # no farther than the picture
    for call in (
        lambda: box_mask((50, 5, 10, 10), (40, 20)),
        lambda: box_mask((5, 5, 0, 10), (40, 20)),
        lambda: box_mask((0, float("nan"), 9, 9), (40, 20)),
        lambda: parse_box("inf,0,9,9"),
        lambda: parse_box("0,0,1e999,9"),
        lambda: polygon_mask([(0, 0), (1, 1)], (40, 20)),
        lambda: polygon_mask([(90, 90), (99, 90), (99, 99)], (40, 20)),
        lambda: parse_box("1,2,3"),
        lambda: parse_polygon(""),
        lambda: parse_polygon("1,2 3"),
        lambda: parse_polygon("1,2 3,x 4,5"),
        lambda: parse_polygon("1,2 nan,3 4,5"),
        lambda: grow(Image.new("L", (4, 4)), -1),
        lambda: grow(Image.new("L", (4, 4)), 1.5),
    ):
        with pytest.raises(ValueError, match=r"box|polygon|grow"):
            call()


def test_the_mask_goes_through_the_same_fit_as_the_image():
    image = Image.fromarray(half_white(300, 200)).convert("RGB")
    mask = Image.fromarray(half_white(300, 200))
    for fit in ("native", "square"):
        prepared = prepare(image, 128, fit)
        mask_HW = model_mask(mask, prepared)
        assert tuple(mask_HW.shape) == prepared.schedule.image_hw
        left, top, right, bottom = (int(edge) for edge in prepared.content_box)
        white_HW = (prepared.image_B3HW[0, 0] + 1) / 2
        inside = (slice(top, bottom), slice(left, right))
        assert torch.allclose(mask_HW[inside], white_HW[inside].clamp(0, 1), atol=0.2)  # other filters at the edge
        if fit == "square":
            assert mask_HW[bottom + 1 :].sum() == 0
    with pytest.raises(ValueError, match="10 x 10"):
        model_mask(Image.new("L", (10, 10)), prepared)


def test_coverage_is_the_mean_of_the_mask_at_every_scale():
    schedule = scale_schedule(128, 1.5)
    mask_HW = torch.zeros(schedule.image_hw)
    mask_HW[:40, :24] = 1
    for scale in range(schedule.num_scales):
        coverage_hw = token_coverage(mask_HW, schedule, scale, 2)
        assert tuple(coverage_hw.shape) == quantizer.latent_grid(schedule, scale, 2)
        assert 0 <= coverage_hw.min() and coverage_hw.max() <= 1
    assert torch.allclose(coverage_hw.mean(), mask_HW.mean())
    with pytest.raises(ValueError, match="schedule"):
        token_coverage(mask_HW[:5], schedule, 0, 2)


def edit_with_lock(pipe, mask_HW, seed=3):
    """Next-scale prediction with the lock: bits of all scales, canvas, source features, schedule."""
    prepared = prepare(np.random.default_rng(5).integers(0, 256, (128, 128, 3), np.uint8), 128)
    schedule, patch_size = prepared.schedule, pipe.image_tokenizer.config.patch_size
    features_BChw = pipe.image_tokenizer.encode(prepared.image_B3HW)
    generator = torch.Generator().manual_seed(seed)
    canvas, free_bits, bits = torch.zeros_like(features_BChw), [], []
    for scale in range(schedule.num_scales):
        num_tokens, num_bits = schedule.num_tokens[scale], pipe.image_tokenizer.num_token_bits
        logits = torch.randn(1, num_tokens, num_bits, 2, generator=generator)
        sampled = sample_bits(logits, torch.rand(1, num_tokens, num_bits, generator=generator), 1.0, 1.0)
        free = quantizer.unpatchify(sampled.float(), schedule.grids[scale], patch_size) > 0.5
        coverage = token_coverage(mask_HW, schedule, scale, patch_size)[None]
        bits.append(lock_bits(free, features_BChw, canvas, coverage, schedule, scale, patch_size))
        free_bits.append(free)
        canvas = quantizer.accumulate(canvas, bits[-1])
    return free_bits, bits, canvas, features_BChw, schedule, patch_size


@torch.no_grad()
def test_a_full_mask_changes_nothing_and_an_empty_one_gives_the_source():
    pipe = tiny_pipeline()
    free, bits, *_ = edit_with_lock(pipe, torch.ones(128, 128))
    assert all(torch.equal(a, b) for a, b in zip(free, bits))
    _, bits, canvas, features, schedule, patch_size = edit_with_lock(pipe, torch.zeros(128, 128))
    source_bits, source_canvas = quantizer.encode_bits(features, schedule, patch_size)
    assert all(torch.equal(a, b) for a, b in zip(source_bits, bits))
    assert torch.equal(canvas, source_canvas)


@torch.no_grad()
def test_outside_the_mask_the_bits_are_forced_and_the_canvas_is_theirs():
    mask_HW = torch.zeros(128, 128)
    mask_HW[20:70, 60:110] = 1
    free, bits, canvas, features, schedule, patch_size = edit_with_lock(tiny_pipeline(), mask_HW)
    assert torch.equal(canvas, quantizer.decode_bits(bits, schedule, patch_size))
    running = torch.zeros_like(features)
    for scale in range(schedule.num_scales):
        coverage = token_coverage(mask_HW, schedule, scale, patch_size)[None, None].expand_as(bits[scale])
        wanted = quantizer.residual_bits(features, running, schedule, scale, patch_size)
        assert torch.equal(bits[scale][coverage == 0], wanted[coverage == 0])
        assert torch.equal(bits[scale][coverage > 0], free[scale][coverage > 0])
        running = quantizer.accumulate(running, bits[scale])
    _, source_canvas = quantizer.encode_bits(features, schedule, patch_size)
    error = (canvas - source_canvas).square().mean(1)[0]
    inside = quantizer.resize_area(mask_HW[None, None], tuple(error.shape))[0, 0]
    assert error[inside == 0].mean() < 0.3 * error[inside == 1].mean()  # locked cells stay near the source


def test_the_lock_of_the_call_forces_the_sources_bits_outside_and_frees_what_lies_inside():
    """Bits outside are those of the residual, given what was on the canvas; a full mask and None are no lock."""
    pipe = tiny_pipeline()
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, (128, 128, 3), np.uint8) for _ in range(3)]
    mask_HW = torch.zeros(128, 128)
    mask_HW[20:70, 60:110] = 1
    options = {"seed": [1, 2, 3], "temperature": 1.0, "output_type": "bits"}
    free = pipe(pictures, "blur", **options)
    locked = pipe(pictures, "blur", constrain_bits=TokenLock([mask_HW, None, torch.ones(128, 128)]), **options)
    for index in (1, 2):
        assert all(torch.equal(*pair) for pair in zip(locked.bits[index], free.bits[index], strict=True))
    schedule, patch_size = locked.schedule[0], pipe.image_tokenizer.config.patch_size
    with torch.no_grad():
        features = pipe.image_tokenizer.encode(prepare(pictures[0], 128).image_B3HW)
    canvas = torch.zeros_like(features)
    for scale, part in enumerate(locked.bits[0]):
        bits = part.permute(2, 0, 1)[None].bool()
        outside = token_coverage(mask_HW, schedule, scale, patch_size) == 0
        wanted = quantizer.residual_bits(features, canvas, schedule, scale, patch_size)
        assert torch.equal(bits[:, :, outside], wanted[:, :, outside])
        canvas = quantizer.accumulate(canvas, bits)
    assert outside.any() and not torch.equal(bits, wanted)
    alone = pipe(pictures[0], "blur", constrain_bits=TokenLock([mask_HW]), **options | {"seed": 1})
    assert all(torch.equal(*pair) for pair in zip(alone.bits[0], locked.bits[0], strict=True))


def test_a_changed_area_holds_the_change_and_fades_out_around_it():
    changed_HW = np.zeros((40, 60), bool)
    changed_HW[10:20, 20:40] = True
    levels = np.asarray(changed_area(changed_HW, (60, 40), 8))
    assert (levels[6:24, 16:44][1:-1, 1:-1] > 0).all() and levels[10:20, 20:40].min() == 255
    assert levels[15, 44] == 191 and levels[15, 47] == 0 and levels[15, 12] == 0
    large = np.asarray(changed_area(changed_HW, (600, 400), 8))
    assert large.shape == (400, 600) and large[150, 300] == 255 and large[50, 50] == 0
