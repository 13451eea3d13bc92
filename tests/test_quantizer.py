"""Features <-> bits <-> codes: against loops written out, and training inputs equal to inference inputs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from varedit.quantizer import (
    accumulate,
    bits_to_codes,
    bitwise_self_correction,
    decode_bits,
    empty_canvas,
    encode_bits,
    features_to_bits,
    latent_grid,
    next_input,
    patchify,
    residual_bits,
    resize_area,
    teacher_forcing,
    unpatchify,
)
from varedit.scales import scale_schedule

# (schedule, patch_size): square; portrait whose grids do not divide one another; landscape with 2 x 2 codes a token
CASES = [
    pytest.param(scale_schedule(128), 1, id="square"),
    pytest.param(scale_schedule(128, 1.5), 1, id="portrait"),
    pytest.param(scale_schedule(256, 0.571), 2, id="landscape-patchify"),
]


def random_features(schedule, patch_size, num_code_bits=6, batch_size=2, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch_size, num_code_bits, *latent_grid(schedule, -1, patch_size))


# -- references with explicit loops ---------------------------------------------------------------------------------


def area_by_loops(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean over every input pixel that an output cell touches."""
    channels, height, width = image.shape
    out = np.zeros((channels, *grid))
    for i in range(grid[0]):
        for j in range(grid[1]):
            top, bottom = i * height // grid[0], math.ceil((i + 1) * height / grid[0])
            left, right = j * width // grid[1], math.ceil((j + 1) * width / grid[1])
            for channel in range(channels):
                total = sum(image[channel, y, x] for y in range(top, bottom) for x in range(left, right))
                out[channel, i, j] = total / ((bottom - top) * (right - left))
    return out


def bilinear_by_loops(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pixel centres at half integers, edges repeated, no smoothing on the way down."""
    channels, height, width = image.shape
    out = np.zeros((channels, *grid))
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = max((i + 0.5) * height / grid[0] - 0.5, 0.0)
            x = max((j + 0.5) * width / grid[1] - 0.5, 0.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            a, b = y - y0, x - x0
            for c in range(channels):
                upper = (1 - b) * image[c, y0, x0] + b * image[c, y0, x1]
                lower = (1 - b) * image[c, y1, x0] + b * image[c, y1, x1]
                out[c, i, j] = (1 - a) * upper + a * lower
    return out


def encode_by_loops(features: np.ndarray, grids: list[tuple[int, int]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Multi-scale residual binary spherical quantization of one image, from its definition (paper section 3.1)."""
    canvas = np.zeros_like(features)
    num_code_bits = features.shape[0]
    bits = []
    for grid in grids:
        pooled = area_by_loops(features - canvas, grid)
        unit = pooled / np.linalg.norm(pooled, axis=0, keepdims=True)
        bits.append(unit > 0)
        codes = np.where(bits[-1], 1.0, -1.0) / math.sqrt(num_code_bits)
        canvas = canvas + bilinear_by_loops(codes, features.shape[1:])
    return bits, canvas


def test_equals_the_definition_written_with_loops():
    schedule = scale_schedule(128, 1.5)  # 1x1 2x2 3x2 6x4 9x6
    features = random_features(schedule, 1, num_code_bits=4, batch_size=1).double()
    expected_bits, expected_canvas = encode_by_loops(features[0].numpy(), list(schedule.grids))
    bits, canvas = encode_bits(features, schedule, 1)
    for ours, expected in zip(bits, expected_bits, strict=True):
        assert ours.shape[0] == 1 and np.array_equal(ours[0].numpy(), expected)
    np.testing.assert_allclose(canvas[0].numpy(), expected_canvas, atol=1e-6)
    for scale in range(1, schedule.num_scales):
        expected = bilinear_by_loops(expected_canvas, schedule.grids[scale]).reshape(4, -1).T
        np.testing.assert_allclose(next_input(canvas, schedule, scale, 1)[0].numpy(), expected, atol=1e-6)


# -- pieces ---------------------------------------------------------------------------------------------------------


def test_codes_lie_on_the_unit_sphere():
    bits = torch.rand(2, 14, 3, 5) > 0.5
    codes = bits_to_codes(bits)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 3, 5))
    torch.testing.assert_close(codes.abs(), torch.full_like(codes, 14**-0.5))
    assert torch.equal(codes > 0, bits)
    assert torch.equal(features_to_bits(codes), bits)


def test_bits_are_the_nearest_code_and_zero_is_bit_0():
    torch.manual_seed(0)
    features = torch.randn(1, 3, 4, 4)
    everything = torch.tensor([[(n >> bit) & 1 for bit in range(3)] for n in range(8)]).bool()
    distances = [(features - bits_to_codes(bits.view(1, 3, 1, 1))).norm(dim=1) for bits in everything]
    nearest = everything[torch.stack(distances).argmin(0)].movedim(-1, 1)
    assert torch.equal(features_to_bits(features), nearest)
    assert not features_to_bits(torch.tensor([0.0, -0.0]).view(1, 2, 1, 1)).any()


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_bits_of_a_zero_residual_are_0(schedule, patch_size):
    features = random_features(schedule, patch_size)
    for scale in range(schedule.num_scales):
        bits = residual_bits(features, features, schedule, scale, patch_size)
        assert bits.dtype == torch.bool and not bits.any()
        assert bits.shape[-2:] == latent_grid(schedule, scale, patch_size)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patchify_and_unpatchify_are_inverse(patch_size):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 5 * patch_size, 7 * patch_size)
    tokens = patchify(features, patch_size)
    assert tokens.shape == (2, 35, 3 * patch_size**2)
    assert torch.equal(unpatchify(tokens, (5, 7), patch_size), features)
    assert torch.equal(patchify(unpatchify(tokens, (5, 7), patch_size), patch_size), tokens)


def test_patchify_is_row_major_with_the_code_channel_outermost():
    features = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    tokens = patchify(features, 2)
    for i in range(2):
        for j in range(3):
            expected = features[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)
            assert torch.equal(tokens[0, i * 3 + j], expected)


def test_area_pooling_is_the_identity_at_its_own_grid_and_float32():
    features = torch.randn(1, 2, 6, 4, dtype=torch.bfloat16)
    same = resize_area(features, (6, 4))
    assert same.dtype == torch.float32 and torch.equal(same, features.float())
    pooled = resize_area(features, (3, 2))
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, F.avg_pool2d(features.float(), 2))


# -- the pyramid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_decoding_the_encoded_bits_gives_the_canvas(schedule, patch_size):
    features = random_features(schedule, patch_size)
    bits, canvas = encode_bits(features, schedule, patch_size)
    assert [tuple(b.shape[-2:]) for b in bits] == [
        latent_grid(schedule, k, patch_size) for k in range(schedule.num_scales)
    ]
    assert canvas.dtype == torch.float32 and canvas.shape == features.shape
    assert torch.equal(decode_bits(bits, schedule, patch_size), canvas)


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_partial_decoding_is_the_canvas_so_far_and_the_error_falls(schedule, patch_size):
    """The features are a sum of random codes of every scale, so each scale finds something to add."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, *latent_grid(schedule, k, patch_size)) for k in range(schedule.num_scales)]
    features = decode_bits([torch.rand(shape, generator=generator) > 0.5 for shape in shapes], schedule, patch_size)
    bits, _ = encode_bits(features, schedule, patch_size)
    canvas = empty_canvas(2, 6, schedule, patch_size)
    assert canvas.shape == features.shape and canvas.dtype == torch.float32 and not canvas.any()
    errors = [features.square().mean()]
    for count, scale_bits in enumerate(bits, start=1):
        canvas = accumulate(canvas, scale_bits)
        preview = decode_bits(bits[:count], schedule, patch_size)
        assert torch.equal(preview, canvas)
        errors.append((features - preview).square().mean())
    assert all(after < before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 0.15 * errors[0]


def test_accumulate_makes_a_new_canvas():
    canvas = torch.zeros(1, 2, 4, 4)
    accumulate(canvas, torch.ones(1, 2, 2, 2).bool())
    assert not canvas.any()


def test_last_scale_is_added_without_resampling():
    schedule = scale_schedule(128)
    bits = torch.rand(1, 3, 8, 8) > 0.5
    assert torch.equal(accumulate(empty_canvas(1, 3, schedule, 1), bits), bits_to_codes(bits))


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_batch_equals_singles(schedule, patch_size):
    features = random_features(schedule, patch_size, batch_size=3)
    bits, canvas = encode_bits(features, schedule, patch_size)
    for row in range(3):
        single_bits, single_canvas = encode_bits(features[row : row + 1], schedule, patch_size)
        assert torch.equal(single_canvas[0], canvas[row])
        assert all(torch.equal(one[0], many[row]) for one, many in zip(single_bits, bits, strict=True))


# -- teacher forcing ------------------------------------------------------------------------------------------------


def split_labels(forcing, schedule, patch_size):
    """Labels (B, L, C) -> bits (B, d, h, w) of every scale."""
    return [
        unpatchify(forcing.bits_BLC[:, start:end], grid, patch_size)
        for start, end, grid in zip(schedule.offsets, schedule.offsets[1:], schedule.grids)
    ]


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_training_inputs_under_perfect_bits_are_inference_inputs(schedule, patch_size):
    features = random_features(schedule, patch_size)
    forcing = teacher_forcing(features, schedule, patch_size)
    assert forcing.inputs_BLC.dtype == torch.float32 and forcing.bits_BLC.dtype == torch.bool
    assert forcing.inputs_BLC.shape == (2, schedule.offsets[-1] - 1, 6 * patch_size**2)
    assert forcing.bits_BLC.shape == (2, schedule.offsets[-1], 6 * patch_size**2)

    bits, _ = encode_bits(features, schedule, patch_size)
    canvas = empty_canvas(2, 6, schedule, patch_size)
    for scale, chosen in enumerate(split_labels(forcing, schedule, patch_size)):
        assert torch.equal(chosen, bits[scale])
        if scale:
            part = forcing.inputs_BLC[:, schedule.offsets[scale] - 1 : schedule.offsets[scale + 1] - 1]
            assert torch.equal(part, next_input(canvas, schedule, scale, patch_size))
        canvas = accumulate(canvas, chosen)


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_labels_are_the_clean_bits_of_what_the_flipped_canvas_lacks(schedule, patch_size):
    features = random_features(schedule, patch_size)
    forcing = teacher_forcing(features, schedule, patch_size, 0.6, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    size = features.shape[-2:]
    canvas = torch.zeros_like(features)
    clean = encode_bits(features, schedule, patch_size)[0]
    num_flips = num_mended = 0
    for scale, label in enumerate(split_labels(forcing, schedule, patch_size)):
        grid = latent_grid(schedule, scale, patch_size)
        if scale:
            part = forcing.inputs_BLC[:, schedule.offsets[scale] - 1 : schedule.offsets[scale + 1] - 1]
            below = canvas if grid == tuple(size) else F.interpolate(canvas, grid, mode="bilinear")
            assert torch.equal(part, patchify(below, patch_size))
        expected = F.adaptive_avg_pool2d(features - canvas, grid) > 0
        assert torch.equal(label, expected)
        num_mended += (label != clean[scale]).sum().item()
        strength = 0.6 * torch.rand((), generator=generator)
        flipped = expected ^ (torch.rand(expected.shape, generator=generator) < strength)
        num_flips += (flipped != expected).sum().item()
        codes = (flipped.float() * 2 - 1) * features.shape[1] ** -0.5
        canvas = canvas + (codes if grid == tuple(size) else F.interpolate(codes, tuple(size), mode="bilinear"))
    assert num_flips > 0 and num_mended > 0


@pytest.mark.parametrize(("schedule", "patch_size"), CASES)
def test_with_bits_of_its_own_the_labels_are_what_its_canvas_lacks_of_the_target(schedule, patch_size):
    features, other = random_features(schedule, patch_size), random_features(schedule, patch_size, seed=1)
    own_bits, _ = encode_bits(other, schedule, patch_size)
    forcing = teacher_forcing(features, schedule, patch_size, own_bits=own_bits)
    canvas = empty_canvas(2, 6, schedule, patch_size)
    for scale, label in enumerate(split_labels(forcing, schedule, patch_size)):
        if scale:
            part = forcing.inputs_BLC[:, schedule.offsets[scale] - 1 : schedule.offsets[scale + 1] - 1]
            assert torch.equal(part, next_input(canvas, schedule, scale, patch_size))
        assert torch.equal(label, residual_bits(features, canvas, schedule, scale, patch_size))
        canvas = accumulate(canvas, own_bits[scale])
    clean = teacher_forcing(features, schedule, patch_size)
    assert not torch.equal(forcing.inputs_BLC, clean.inputs_BLC)
    again = teacher_forcing(features, schedule, patch_size, own_bits=encode_bits(features, schedule, patch_size)[0])
    assert torch.equal(again.inputs_BLC, clean.inputs_BLC) and torch.equal(again.bits_BLC, clean.bits_BLC)


def test_flips_follow_the_generator_alone():
    schedule = scale_schedule(128)
    features = random_features(schedule, 1)

    def run(seed, strength=0.5):
        return teacher_forcing(features, schedule, 1, strength, torch.Generator().manual_seed(seed))

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.inputs_BLC, again.inputs_BLC) and torch.equal(first.bits_BLC, again.bits_BLC)
    assert not torch.equal(first.inputs_BLC, other.inputs_BLC)
    still, clean = run(1, 0.0), teacher_forcing(features, schedule, 1)
    assert torch.equal(still.inputs_BLC, clean.inputs_BLC) and torch.equal(still.bits_BLC, clean.bits_BLC)


def test_share_of_flips_is_uniform_up_to_the_maximum():
    generator = torch.Generator().manual_seed(0)
    bits = torch.zeros(1, 8, 32, 32, dtype=torch.bool)
    shares = torch.tensor([bitwise_self_correction(bits, 0.3, generator).float().mean() for _ in range(400)])
    assert shares.min() < 0.01 and 0.29 < shares.max() < 0.32
    quantiles = shares.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.075, 0.15, 0.225]), atol=0.03, rtol=0)
    # flips go both ways and never change the input
    assert not bits.any()
    assert bitwise_self_correction(~bits, 1.0, torch.Generator().manual_seed(1)).float().mean() < 1
