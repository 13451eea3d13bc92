"""The transformer: its three uses are equal to each other and to the method written out from its definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from varedit.positions import POSITION_LAYOUTS, rotary_table, rotate, token_positions
from varedit.scales import scale_schedule
from varedit.testing import TEXT_FEATURES, tiny_transformer
from varedit.transformer import CONDITIONINGS, VAREditTransformer, attend, modulate, scale_aligned_reference

SQUARE = scale_schedule(128)
PORTRAIT = scale_schedule(128, 1.5)  # 1x1 2x2 3x2 6x4 9x6: not nested
LANDSCAPE = scale_schedule(128, 0.571)
SCHEDULES = [pytest.param(SQUARE, id="square"), pytest.param(PORTRAIT, id="portrait")]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build(**config):
    """A tiny model whose attention scales differ from head to head; one lies beyond the clamp."""
    model = tiny_transformer(**config)
    with torch.no_grad():
        for block in model.blocks:
            block.self_attention.log_scale.copy_(torch.tensor([1.5, 5.0]))
    return model


def example(schedule, batch_size=2, num_text=5, seed=0, num_bits=16):
    """Random inputs: arguments of a call for all scales."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "inputs": draw(batch_size, schedule.offsets[-1] - 1, num_bits),
        "source_BChw": draw(batch_size, num_bits, *schedule.finest),
        "text_BTF": draw(batch_size, num_text, TEXT_FEATURES),
    }


@torch.no_grad()
def all_scales(model, schedule, inputs, **conditions):
    return model(schedule, inputs, **conditions)


@torch.no_grad()
def scale_by_scale(model, schedule, inputs, **conditions):
    """Prefill, then one scale at a time with the cache."""
    cache = model(schedule, **conditions)
    logits = []
    for scale, (start, end) in enumerate(zip(schedule.offsets, schedule.offsets[1:])):
        part = inputs[:, start - 1 : end - 1] if scale else None
        logits.append(model(schedule, part, scale=scale, cache=cache))
    return torch.cat(logits, dim=1)


# -- the method, written out ------------------------------------------------------------------------------------------


def plain_attention(q, keys, values, scale=1.0, mask_BT=None):
    weights = q @ torch.cat(keys, 2).transpose(2, 3) * scale
    if mask_BT is not None:
        weights = weights.masked_fill(~mask_BT[:, None, None], -math.inf)
    return (weights.softmax(-1) @ torch.cat(values, 2)).transpose(1, 2).flatten(2)


def heads(x, num_heads):
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def turn(x, positions):
    """Rotation as a product of complex numbers: the first half of the pairs by the row, the second by the column."""
    quarter = x.shape[-1] // 4
    frequency = torch.tensor([10000.0 ** (-i / quarter) for i in range(quarter)])
    angle = torch.cat([positions[:, :1] * frequency, positions[:, 1:] * frequency], dim=-1)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def qkv(attention, x, positions):
    q, k, v = F.linear(x, attention.to_qkv.weight).chunk(3, dim=-1)
    num_heads = attention.num_heads
    q, k, v = heads(q + attention.q_bias, num_heads), heads(k, num_heads), heads(v + attention.v_bias, num_heads)
    scale = attention.log_scale.clamp(max=math.log(100)).exp()
    q = q / q.norm(dim=-1, keepdim=True) * scale[:, None, None]
    return turn(q, positions), turn(k / k.norm(dim=-1, keepdim=True), positions), v


def pool_tokens(x_BNSE, finest, grid):
    """Area pooling of tokens: the mean over every source cell that a cell of the grid touches."""
    cells = x_BNSE.unflatten(2, finest)
    rows = [(i * finest[0] // grid[0], math.ceil((i + 1) * finest[0] / grid[0])) for i in range(grid[0])]
    columns = [(j * finest[1] // grid[1], math.ceil((j + 1) * finest[1] / grid[1])) for j in range(grid[1])]
    return torch.stack([cells[:, :, a:b, c:d].mean((2, 3)) for a, b in rows for c, d in columns], dim=2)


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def written_out_text(model, text_BTF, mask_BT):
    """Pooled instruction (B, D) and its tokens for cross-attention (B, T, D)."""
    text = text_BTF / (text_BTF.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.text_norm.weight
    pool = model.text_pool
    num_heads, head_size = pool.query.shape
    k, v = F.linear(text, pool.to_kv.weight).chunk(2, dim=-1)
    query = pool.query[None, :, None].expand(len(text), -1, -1, -1)
    pooled = plain_attention(
        query, [heads(k, num_heads)], [heads(v + pool.v_bias, num_heads)], head_size**-0.5, mask_BT
    )
    first, _, second = model.text_proj
    return pool.proj(pooled)[:, 0], second(F.gelu(first(text), approximate="tanh"))


def written_out_block(model, index, block, groups, shared, text, mask_BT, schedule):
    """One block. `groups` are (kind, scale, tokens, positions): the parts that attend as one."""
    gate1, gate2, scale1, scale2, shift1, shift2 = (shared + block.modulation_table).unbind(1)
    projected = [
        (kind, scale, *qkv(block.self_attention, layer_norm(x) * (1 + scale1[:, None]) + shift1[:, None], positions))
        for kind, scale, x, positions in groups
    ]
    sources = [part for part in projected if part[0] == "source"]
    targets = [part for part in projected if part[0] == "target"]
    conditioning = model.config.conditioning
    cross, results = block.cross_attention, []
    for (kind, scale, x, positions), (*_, q, _, _) in zip(groups, projected):
        seen = [part[3:] for part in sources if conditioning != "full" or part[1] <= scale]
        if kind == "target":
            if conditioning == "sar" and index < model.config.num_aligned_blocks:
                seen = [[pool_tokens(part, schedule.finest, schedule.grids[scale]) for part in sources[0][3:]]]
            seen = seen + [part[3:] for part in targets if part[1] <= scale]
        x = x + gate1[:, None] * block.self_attention.proj(
            plain_attention(q, [k for k, _ in seen], [v for _, v in seen])
        )
        normed = layer_norm(x) * block.cross_norm.weight + block.cross_norm.bias
        k, v = F.linear(text, cross.to_kv.weight).chunk(2, dim=-1)
        k, v, q = heads(k, cross.num_heads), heads(v + cross.v_bias, cross.num_heads), heads(cross.to_q(normed), 2)
        x = x + cross.proj(plain_attention(q, [k], [v], q.shape[-1] ** -0.5, mask_BT))
        hidden = F.gelu(block.mlp.fc1(layer_norm(x) * (1 + scale2[:, None]) + shift2[:, None]), approximate="tanh")
        results.append((kind, scale, x + gate2[:, None] * block.mlp.fc2(hidden), positions))
    return results


@torch.no_grad()
def written_out(model, schedule, inputs, source_BChw, text_BTF, text_mask_BT=None):
    """The whole model from its definition, scale by scale in every block, without a mask or a cache."""
    pooled, text = written_out_text(model, text_BTF, text_mask_BT)
    config, last = model.config, schedule.num_scales - 1
    source_positions, target_positions = token_positions(schedule, config.conditioning, config.position_layout)
    groups, start = [], 0
    for scale in reversed(range(schedule.num_scales)) if config.conditioning == "full" else [last]:
        grid = schedule.grids[scale]
        tokens = pool_tokens(source_BChw.flatten(2).transpose(1, 2)[:, None], schedule.finest, grid)[:, 0]
        positions = source_positions[start : start + grid[0] * grid[1]]
        groups.append(("source", scale, model.input_proj(tokens) + model.level_embed[scale], positions))
        start += grid[0] * grid[1]
    for scale, (start, end) in enumerate(zip(schedule.offsets, schedule.offsets[1:])):
        if scale:
            tokens = model.input_proj(inputs[:, start - 1 : end - 1])
        else:
            tokens = (pooled + model.start_position)[:, None]
        groups.append(("target", scale, tokens + model.level_embed[scale], target_positions[start:end]))
    shared = model.shared_modulation(F.silu(pooled)).view(len(pooled), 6, -1)
    for index, block in enumerate(model.blocks):
        groups = written_out_block(model, index, block, groups, shared, text, text_mask_BT, schedule)
    x = torch.cat([x for kind, _, x, _ in groups if kind == "target"], dim=1)
    scale, shift = model.head_modulation(F.silu(pooled)).chunk(2, dim=-1)
    return model.head(layer_norm(x) * (1 + scale[:, None]) + shift[:, None]).view(*x.shape[:2], -1, 2)


# -- three uses, one result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", POSITION_LAYOUTS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_cached_loop_masked_forward_and_definition_agree(conditioning, layout, schedule):
    model = build(conditioning=conditioning, position_layout=layout)
    arguments = example(schedule)
    expected = written_out(model, schedule, **arguments)
    assert expected.std() > 0.1 and expected.shape == (2, schedule.offsets[-1], 16, 2)
    masked = all_scales(model, schedule, **arguments)
    torch.testing.assert_close(masked, expected, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(scale_by_scale(model, schedule, **arguments), masked, **CLOSE)


@pytest.mark.parametrize("num_aligned_blocks", [0, 1, 2, 3])
def test_any_number_of_aligned_blocks(num_aligned_blocks):
    model = build(num_blocks=3, num_aligned_blocks=num_aligned_blocks)
    arguments = example(PORTRAIT)
    masked = all_scales(model, PORTRAIT, **arguments)
    torch.testing.assert_close(masked, written_out(model, PORTRAIT, **arguments), atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(scale_by_scale(model, PORTRAIT, **arguments), masked, **CLOSE)


def test_no_aligned_block_is_finest_conditioning_and_each_block_matters():
    arguments = example(PORTRAIT)
    sar = [all_scales(build(num_blocks=3, num_aligned_blocks=count), PORTRAIT, **arguments) for count in range(4)]
    finest = all_scales(build(num_blocks=3, conditioning="finest", num_aligned_blocks=3), PORTRAIT, **arguments)
    assert torch.equal(sar[0], finest)
    for fewer, more in zip(sar, sar[1:]):
        assert (fewer - more).abs().max() > 1e-3


def test_other_schedules_on_the_same_model():
    """Masks are remembered by schedule: changing back and forth must not mix them up."""
    model = build(conditioning="sar")
    first = [all_scales(model, schedule, **example(schedule)) for schedule in (SQUARE, LANDSCAPE)]
    second = [all_scales(model, schedule, **example(schedule)) for schedule in (SQUARE, LANDSCAPE)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    torch.testing.assert_close(first[1], scale_by_scale(model, LANDSCAPE, **example(LANDSCAPE)), **CLOSE)


def test_training_and_inference_kernels_agree():
    """With gradients on the CPU attention is three plain operations, otherwise the fused kernel."""
    model = build()
    arguments = example(PORTRAIT)
    torch.testing.assert_close(model(PORTRAIT, **arguments), all_scales(model, PORTRAIT, **arguments), **CLOSE)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 7, 8).unbind(0)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    with torch.no_grad():
        fused = attend(q, k, v, mask, 0.3)
    torch.testing.assert_close(attend(q, k, v, mask, 0.3), fused)


# -- who depends on what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_logits_do_not_depend_on_later_scales(conditioning):
    model, schedule = build(conditioning=conditioning), PORTRAIT
    arguments = example(schedule)
    before = all_scales(model, schedule, **arguments)
    for scale in range(1, schedule.num_scales):
        start = schedule.offsets[scale]
        changed = arguments["inputs"].clone()
        changed[:, start - 1 :] += 1
        after = all_scales(model, schedule, **arguments | {"inputs": changed})
        torch.testing.assert_close(after[:, :start], before[:, :start], atol=1e-6, rtol=0)
        assert (after[:, start:] - before[:, start:]).abs().amax((0, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_scale_depends_on_the_source(conditioning):
    model = build(conditioning=conditioning)
    arguments = example(SQUARE)
    before = all_scales(model, SQUARE, **arguments)
    after = all_scales(model, SQUARE, **arguments | {"source_BChw": arguments["source_BChw"].roll(1, dims=-1)})
    changed = (after - before).abs().amax((0, 2, 3))
    # pooled to one cell, a shifted image is the same image: under "full" the first scale sees no more than that
    first = 1 if conditioning == "full" else 0
    assert changed[first:].min() > 1e-5
    other = all_scales(model, SQUARE, **arguments | {"source_BChw": arguments["source_BChw"] + 1})
    assert (other - before).abs().amax((0, 2, 3)).min() > 1e-4


def test_the_cache_of_the_source_is_the_source_part_of_the_masked_pass():
    """Source rows do not depend on targets: keys written at prefill stay as they are, whatever is generated."""
    model = build(conditioning="finest")
    arguments = example(PORTRAIT)
    inputs = arguments.pop("inputs")
    with torch.no_grad():
        cache = model(PORTRAIT, **arguments)
        before = [keys[:, :, : cache.num_source].clone() for keys in cache.keys]
        for scale, (start, end) in enumerate(zip(PORTRAIT.offsets, PORTRAIT.offsets[1:])):
            model(PORTRAIT, inputs[:, start - 1 : end - 1] if scale else None, scale=scale, cache=cache)
    assert all(torch.equal(keys[:, :, : cache.num_source], old) for keys, old in zip(cache.keys, before))


@pytest.mark.parametrize("run", [all_scales, scale_by_scale])
def test_batch_of_two_is_two_singles(run):
    model = build()
    arguments = example(PORTRAIT, num_text=6)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    drop = torch.tensor([False, True])
    together = run(model, PORTRAIT, **arguments, text_mask_BT=mask, drop_text_B=drop)
    for row, length in ((0, 6), (1, 3)):
        one = {name: tensor[row : row + 1] for name, tensor in arguments.items()}
        one["text_BTF"] = one["text_BTF"][:, :length]
        alone = run(model, PORTRAIT, **one, drop_text_B=drop[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@pytest.mark.parametrize("run", [all_scales, scale_by_scale])
def test_padded_text_is_unpadded_text(run):
    model = build()
    arguments = example(SQUARE, num_text=4)
    short = run(model, SQUARE, **arguments)
    mask = (torch.arange(9) < 4).expand(2, -1)
    padding = 100 * torch.randn(2, 5, TEXT_FEATURES, generator=torch.Generator().manual_seed(1))
    padded = arguments | {"text_BTF": torch.cat([arguments["text_BTF"], padding], dim=1)}
    torch.testing.assert_close(run(model, SQUARE, **padded, text_mask_BT=mask), short, **CLOSE)
    assert (run(model, SQUARE, **padded) - short).abs().max() > 1e-3
    everything = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(run(model, SQUARE, **arguments, text_mask_BT=everything), short)


@pytest.mark.parametrize("run", [all_scales, scale_by_scale])
def test_dropped_text_is_the_null_text_of_the_same_length(run):
    model = build()
    arguments = example(SQUARE)
    drop = torch.tensor([False, True])
    dropped = run(model, SQUARE, **arguments, drop_text_B=drop)
    kept = run(model, SQUARE, **arguments)
    torch.testing.assert_close(dropped[0], kept[0], **CLOSE)
    assert (dropped[1] - kept[1]).abs().max() > 1e-3
    null = arguments | {"text_BTF": model.null_text[None, :5].detach().expand(2, -1, -1)}
    torch.testing.assert_close(run(model, SQUARE, **null)[1], dropped[1], **CLOSE)
    other = arguments | {"text_BTF": arguments["text_BTF"] * torch.tensor([1.0, -3.0]).view(2, 1, 1)}
    assert torch.equal(run(model, SQUARE, **other, drop_text_B=drop), dropped)
    # the source stays
    source = arguments | {"source_BChw": arguments["source_BChw"] + 1}
    assert (run(model, SQUARE, **source, drop_text_B=drop)[1] - dropped[1]).abs().max() > 1e-3


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_rotation_equals_complex_multiplication():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 16)
    positions = torch.randint(0, 128, (10, 2))
    table = rotary_table(positions, 16, x.device)
    assert table[0].shape == table[1].shape == (10, 8) and table[0].dtype == torch.float32
    torch.testing.assert_close(rotate(x, table), turn(x, positions), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    origin = rotary_table(torch.zeros(10, 2, dtype=torch.int64), 16, x.device)
    assert torch.equal(rotate(x, origin), x)
    assert rotate(x.bfloat16(), table).dtype == torch.float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scale_aligned_reference_is_the_mean_of_covered_tokens(schedule):
    torch.manual_seed(0)
    source = torch.randn(2, 2, schedule.num_tokens[-1], 8)
    pooled = scale_aligned_reference(source, schedule)
    assert [part.shape[2] for part in pooled] == list(schedule.num_tokens)
    for part, grid in zip(pooled, schedule.grids):
        torch.testing.assert_close(part, pool_tokens(source, schedule.finest, grid))
    torch.testing.assert_close(pooled[0][:, :, 0], source.mean(2))
    assert torch.equal(pooled[-1], source)


def test_scale_aligned_reference_pools_in_float32():
    torch.manual_seed(0)
    source = torch.randn(1, 2, SQUARE.num_tokens[-1], 8).bfloat16()
    for half, exact in zip(scale_aligned_reference(source, SQUARE), scale_aligned_reference(source.float(), SQUARE)):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, exact.bfloat16())


def test_modulation_is_float32_and_keeps_the_dtype():
    torch.manual_seed(0)
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    torch.testing.assert_close(modulate(x, scale, shift), layer_norm(x) * (1 + scale) + shift)
    half = modulate(x.bfloat16(), scale, shift)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, modulate(x.bfloat16().float(), scale, shift).bfloat16())


def test_initialization_starts_near_chance_and_reaches_every_parameter():
    torch.manual_seed(0)
    model = VAREditTransformer(
        num_bits=16,
        width=64,
        num_blocks=2,
        num_heads=2,
        text_features=TEXT_FEATURES,
        num_text_heads=2,
        max_text_tokens=8,
    )
    model.initialize()
    arguments = example(SQUARE)
    logits = model(SQUARE, **arguments, drop_text_B=torch.tensor([True, False]))
    labels = (arguments["inputs"].new_zeros(2, SQUARE.offsets[-1], 16)).long()
    loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
    assert loss.item() == pytest.approx(math.log(2), abs=0.02)
    loss.backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_gradient_checkpointing_gives_the_same_gradients():
    arguments = example(PORTRAIT)
    gradients = []
    for checkpointing in (False, True):
        model = build(num_blocks=3, num_aligned_blocks=2).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.gradient_checkpointing
        logits = model(PORTRAIT, **arguments, drop_text_B=torch.tensor([True, False]))
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# -- storage and number formats ---------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model = build(conditioning="sar", num_aligned_blocks=2, position_layout="released")
    model.save_pretrained(tmp_path)
    loaded = VAREditTransformer.from_pretrained(tmp_path).eval()
    assert dict(loaded.config) == dict(model.config) | {"_name_or_path": loaded.config["_name_or_path"]}
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    arguments = example(SQUARE)
    assert torch.equal(all_scales(loaded, SQUARE, **arguments), all_scales(model, SQUARE, **arguments))


@pytest.fixture
def loaded_in_bfloat16(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    return model, VAREditTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()


def test_float32_parts_stay_float32_under_bfloat16(loaded_in_bfloat16):
    model, half = loaded_in_bfloat16
    keep = ("head", "head_modulation", "shared_modulation", "modulation_table", "log_scale")
    assert set(VAREditTransformer._keep_in_fp32_modules) == set(keep)
    original = model.state_dict()
    for name, tensor in half.state_dict().items():
        if set(keep) & set(name.split(".")):
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, original[name]), name
        else:
            assert tensor.dtype == torch.bfloat16, name
    assert {part for name in original for part in name.split(".")} >= set(keep)  # none is a name of the past
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_bfloat16_gives_float32_logits_near_the_float32_ones(tmp_path, conditioning):
    model = tiny_transformer(conditioning=conditioning)
    model.save_pretrained(tmp_path)
    half = VAREditTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    arguments = example(PORTRAIT)
    expected = all_scales(model, PORTRAIT, **arguments)
    for run in (all_scales, scale_by_scale):
        logits = run(half, PORTRAIT, **arguments)
        assert logits.dtype == torch.float32
        assert (logits - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_autocast_gives_float32_logits_and_gradients():
    model = tiny_transformer()
    arguments = example(PORTRAIT)
    expected = all_scales(model, PORTRAIT, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(PORTRAIT, **arguments)
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        cached = scale_by_scale(model, PORTRAIT, **arguments)
    for result in (logits.detach(), cached):
        assert (result - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_validation_under_inference_mode_does_not_spoil_training():
    """Masks are kept between calls; one made in inference mode must not enter a backward pass."""
    schedule = scale_schedule(512)  # more keys than the short attention path takes
    model = tiny_transformer(num_blocks=1, width=16, num_heads=1, num_text_heads=1)
    arguments = example(schedule, batch_size=1)
    with torch.inference_mode():
        before = model(schedule, **arguments)
    logits = model(schedule, **arguments)
    torch.testing.assert_close(logits, before, **CLOSE)
    logits.square().mean().backward()
    assert model.input_proj.weight.grad.any()


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="conditioning 'fine' .*sar, finest, full"):
        tiny_transformer(conditioning="fine")
    with pytest.raises(ValueError, match="position_layout 'paper' .*offset, released"):
        tiny_transformer(position_layout="paper")
    with pytest.raises(ValueError, match=r"width 60 .*num_heads\D*8\b"):
        tiny_transformer(width=60)
    with pytest.raises(ValueError, match=r"width 64 .*num_text_heads\D*3\b"):
        tiny_transformer(num_text_heads=3)


def test_too_long_text_is_refused():
    model = tiny_transformer(max_text_tokens=8)
    arguments = example(SQUARE, num_text=9)
    with pytest.raises(ValueError, match="9 tokens.* at most 8"):
        all_scales(model, SQUARE, **arguments)
    arguments.pop("inputs")
    with pytest.raises(ValueError, match="9 tokens.* at most 8"):
        model(SQUARE, **arguments)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_source_off_the_finest_grid_is_refused(conditioning):
    """Pooling would bring features of any size to the grid, and a mistake of the caller would go unseen."""
    model = tiny_transformer(conditioning=conditioning)
    arguments = example(SQUARE)
    for grid in ((4, 4), (16, 16), (9, 6)):
        with pytest.raises(ValueError, match=rf"{grid[0]} x {grid[1]} .*8 x 8"):
            all_scales(model, SQUARE, **arguments | {"source_BChw": torch.zeros(2, 16, *grid)})
