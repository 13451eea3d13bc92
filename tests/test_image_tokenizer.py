"""The convolutional encoder and decoder: shapes, range, storage, and its levels against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.scales import scale_schedule
from varedit.testing import tiny_image_tokenizer

VARIANTS = [
    pytest.param({"stem_patch": 1, "multipliers": (1, 1, 2, 2, 2), "patch_size": 1}, 16, id="stride16"),
    pytest.param({"stem_patch": 2, "multipliers": (1, 1, 2, 2), "patch_size": 1}, 16, id="stride16-stem2"),
    pytest.param({"stem_patch": 4, "multipliers": (1, 2, 2), "patch_size": 1}, 16, id="stride16-stem4"),
    pytest.param({"stem_patch": 1, "multipliers": (1, 1, 2, 2), "patch_size": 2}, 8, id="stride8-patchify"),
    pytest.param({"stem_patch": 4, "multipliers": (1, 1), "patch_size": 2}, 8, id="stride8-stem4-patchify"),
    pytest.param({"stem_patch": 4, "multipliers": (1,), "patch_size": 4}, 4, id="one-level"),
]


def build(seed=0, **config):
    torch.manual_seed(seed)
    defaults = {"num_code_bits": 6, "base_width": 32, "num_blocks": 1}
    return VAREditImageTokenizer(**(defaults | config)).eval()


def random_image(height, width, batch_size=1, seed=0):
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("config", "stride"), VARIANTS)
@torch.no_grad()
def test_shapes_and_strides(config, stride):
    model = build(**config)
    assert model.stride == stride
    assert model.num_token_bits == 6 * config["patch_size"] ** 2
    for height, width in ((32, 32), (48, 64)):
        features = model.encode(random_image(height, width, batch_size=2))
        assert features.shape == (2, 6, height // stride, width // stride)
        assert features.dtype == torch.float32
        image = model.decode(features)
        assert image.shape == (2, 3, height, width)
        assert image.dtype == torch.float32


@torch.no_grad()
def test_features_lie_on_the_finest_token_grid():
    for ratio in (1.0, 1.5, 0.571):
        schedule = scale_schedule(128, ratio)
        model = tiny_image_tokenizer()
        features = model.encode(random_image(*schedule.image_hw))
        patch_size = model.config.patch_size
        assert features.shape[-2:] == tuple(patch_size * side for side in schedule.finest)


@torch.no_grad()
def test_decoded_images_are_clamped():
    model = tiny_image_tokenizer()
    model.decoder.conv_out.weight.mul_(100)
    image = model.decode(torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert image.min() == -1 and image.max() == 1
    assert (image.abs() < 1).any()


@torch.no_grad()
def test_forward_is_decode_of_encode():
    model, image = tiny_image_tokenizer(), random_image(32, 48)
    assert torch.equal(model(image), model.decode(model.encode(image)))


@torch.no_grad()
def test_batch_of_two_is_two_singles():
    model, images = tiny_image_tokenizer(), random_image(32, 48, batch_size=2)
    features = model.encode(images)
    decoded = model.decode(features)
    for row in range(2):
        alone = model.encode(images[row : row + 1])
        torch.testing.assert_close(alone, features[row : row + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decode(alone), decoded[row : row + 1], atol=1e-5, rtol=1e-5)


# -- the network written out ------------------------------------------------------------------------------------------


def group_norm(x, norm, num_groups):
    groups = x.view(len(x), num_groups, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-6).sqrt()).view_as(x)
    return normed * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def swish(x):
    return x * torch.sigmoid(x)


def conv(x, state, name, stride=1, padding=1):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=padding)


def residual(x, block, num_groups):
    state = block.state_dict()
    hidden = conv(swish(group_norm(x, block.norm1, num_groups)), state, "conv1")
    hidden = conv(swish(group_norm(hidden, block.norm2, num_groups)), state, "conv2")
    return hidden + (conv(x, state, "shortcut", padding=0) if "shortcut.weight" in state else x)


@torch.no_grad()
def test_equals_the_network_written_out():
    """Two levels of different width: down-sampling pads right and bottom; up-sampling repeats each pixel."""
    model = build(multipliers=(1, 2), stem_patch=4, patch_size=2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    image = random_image(32, 48)

    encoder, state = model.encoder, model.encoder.state_dict()
    x = image.view(1, 3, 8, 4, 12, 4).permute(0, 1, 3, 5, 2, 4).reshape(1, 48, 8, 12)  # 4 x 4 pixels into channels
    x = residual(conv(x, state, "conv_in"), encoder.levels[0].blocks[0], 32)
    x = torch.cat([torch.cat([x, torch.zeros(1, 32, 8, 1)], 3), torch.zeros(1, 32, 1, 13)], 2)
    x = residual(conv(x, state, "levels.0.conv", stride=2, padding=0), encoder.levels[1].blocks[0], 32)
    for block in encoder.middle:
        x = residual(x, block, 32)
    features = conv(swish(group_norm(x, encoder.norm_out, 32)), state, "conv_out")
    torch.testing.assert_close(model.encode(image), features, atol=1e-5, rtol=1e-4)

    decoder, state = model.decoder, model.decoder.state_dict()
    x = conv(features, state, "conv_in")
    for block in (*decoder.middle, *decoder.levels[1].blocks):
        x = residual(x, block, 32)
    x = conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), state, "levels.1.conv")
    for block in decoder.levels[0].blocks:
        x = residual(x, block, 32)
    x = conv(swish(group_norm(x, decoder.norm_out, 32)), state, "conv_out")
    expected = x.view(1, 3, 4, 4, 8, 12).permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 32, 48).clamp(-1, 1)
    torch.testing.assert_close(model.decode(features), expected, atol=1e-5, rtol=1e-4)
    assert len(decoder.levels[0].blocks) == len(encoder.levels[0].blocks) + 1


def test_initialization_makes_residual_blocks_the_identity():
    model = build(multipliers=(1, 1), stem_patch=4, patch_size=2)
    model.initialize()
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    for level in (*model.encoder.levels, *model.decoder.levels):
        for block in level.blocks:
            assert torch.equal(block(x), x)
    loss = (model(random_image(16, 16)) - random_image(16, 16, seed=1)).square().mean()
    loss.backward()
    blocks = [*model.encoder.middle, *model.decoder.middle]
    assert all(block.conv2.weight.grad.any() for block in blocks)  # zero, but not stuck there


# -- storage and number formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "stride"), VARIANTS[1:5:3])
def test_save_and_load(tmp_path, config, stride):
    model = build(**config)
    model.save_pretrained(tmp_path)
    loaded = VAREditImageTokenizer.from_pretrained(tmp_path).eval()
    assert loaded.stride == stride
    assert tuple(loaded.config.multipliers) == config["multipliers"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    image = random_image(32, 48)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


@torch.no_grad()
def test_bfloat16_in_float32_out(tmp_path):
    model = tiny_image_tokenizer()
    model.save_pretrained(tmp_path)
    half = VAREditImageTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    image = random_image(32, 48)
    features, expected = half.encode(image), model.encode(image)
    assert features.dtype == torch.float32
    assert (features - expected).square().mean().sqrt() < 0.05 * expected.std()
    decoded = half.decode(expected)
    assert decoded.dtype == torch.float32
    assert (decoded - model.decode(expected)).abs().max() < 0.1


# -- bad configurations -----------------------------------------------------------------------------------------------


def test_widths_must_be_multiples_of_the_groups():
    with pytest.raises(ValueError, match=r"\[24, 48, 48\].*32"):
        build(base_width=24, multipliers=(1, 2, 2), stem_patch=4)


def test_a_token_must_cover_16_pixels():
    with pytest.raises(ValueError, match="stride 8 times patch_size 1 must be 16"):
        build(multipliers=(1, 1, 1, 1), patch_size=1)
    with pytest.raises(ValueError, match="stride 16 times patch_size 2 must be 16"):
        build(multipliers=(1, 1, 1, 1, 1), patch_size=2)


def test_fewer_groups_for_narrow_models():
    model = build(base_width=24, multipliers=(1, 2), stem_patch=4, patch_size=2, num_groups=8)
    assert model.encode(random_image(32, 32)).shape == (1, 6, 4, 4)
    with pytest.raises(ValueError, match=r"\[24, 48\].*num_groups 16"):
        build(base_width=24, multipliers=(1, 2), stem_patch=4, patch_size=2, num_groups=16)
