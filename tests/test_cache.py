"""Keys and values kept while an image is generated: what a scale sees is one view, and nothing leaks between runs."""

import pytest
import torch

from varedit.cache import KeyValueCache
from varedit.scales import scale_schedule
from varedit.testing import TEXT_FEATURES, tiny_transformer
from varedit.transformer import CONDITIONINGS

SQUARE, PORTRAIT = scale_schedule(128), scale_schedule(128, 1.5)


def empty_cache(num_source=3, batch_size=2):
    angles = torch.zeros(6, 2)
    mask = torch.ones(batch_size, 1, dtype=torch.bool)
    return KeyValueCache(num_source, mask, torch.zeros(batch_size, 4), torch.zeros(batch_size, 6, 4), (angles, angles))


def draw(num_tokens, seed, batch_size=2):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch_size, 2, num_tokens, 4, generator=generator) for _ in range(2))


def test_a_scale_sees_the_source_and_the_targets_so_far():
    cache = empty_cache()
    source = list(draw(3, 0))
    cache.add_block(*source, num_targets=6)
    assert [tuple(t.shape) for t in (*cache.keys, *cache.values)] == [(2, 2, 9, 4)] * 2
    first, second = list(draw(1, 1)), list(draw(5, 2))
    for seen, *parts in zip(cache.append(0, 0, *first, 0, 3), source, first):
        assert torch.equal(seen, torch.cat(parts, dim=2))
    for seen, *parts in zip(cache.append(0, 1, *second, 1, 3), source, first, second):
        assert torch.equal(seen, torch.cat(parts, dim=2))


def test_a_scale_may_see_the_last_source_tokens_only():
    cache = empty_cache()
    source, target = list(draw(3, 0)), list(draw(1, 1))
    cache.add_block(*source, num_targets=6)
    for num_visible in (0, 1, 2, 3):
        for seen, before, new in zip(cache.append(0, 0, *target, 0, num_visible), source, target):
            assert torch.equal(seen, torch.cat([before[:, :, 3 - num_visible :], new], dim=2))


def test_what_a_scale_sees_is_a_view_not_a_copy():
    cache = empty_cache()
    cache.add_block(*draw(3, 0), num_targets=6)
    pointers = [tensor.data_ptr() for tensor in (cache.keys[0], cache.values[0])]
    for scale, (start, count) in enumerate(((0, 1), (1, 5))):
        seen = cache.append(0, scale, *draw(count, scale), start, 3)
        assert [part.untyped_storage().data_ptr() for part in seen] == pointers
        assert [part.data_ptr() for part in seen] == pointers  # from the first source token on
    assert [tensor.data_ptr() for tensor in (cache.keys[0], cache.values[0])] == pointers


def test_blocks_do_not_share_memory():
    cache = empty_cache()
    for seed in (0, 1):
        cache.add_block(*draw(3, seed), num_targets=6)
    untouched = cache.keys[1][:, :, :3].clone()
    cache.append(0, 0, *draw(1, 5), 0, 3)
    assert torch.equal(cache.keys[1][:, :, :3], untouched)


def test_scale_aligned_reference_takes_the_place_of_the_source():
    cache = empty_cache()
    finest = list(draw(3, 0))
    cache.add_block(*finest, num_targets=4)
    cache.add_block(*finest, num_targets=4)
    coarse, targets = list(draw(1, 1)), [list(draw(1, 2)), list(draw(3, 3))]
    cache.add_aligned_source(0, [coarse[0], finest[0]], [coarse[1], finest[1]])
    for seen, pooled, new in zip(cache.append(0, 0, *targets[0], 0, 1), coarse, targets[0]):
        assert torch.equal(seen, torch.cat([pooled, new], dim=2))
    for seen, source, *new in zip(cache.append(0, 1, *targets[1], 1, 3), finest, *targets):
        assert torch.equal(seen, torch.cat([source, *new], dim=2))
    # a block without it keeps the finest source at every scale
    for seen, source, new in zip(cache.append(1, 0, *targets[0], 0, 3), finest, targets[0]):
        assert torch.equal(seen, torch.cat([source, new], dim=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_the_keys(dtype):
    cache = empty_cache()
    cache.add_block(*(part.to(dtype) for part in draw(3, 0)), num_targets=6)
    assert cache.keys[0].dtype == cache.values[0].dtype == dtype


# -- in the model ---------------------------------------------------------------------------------------------------


def conditions(schedule, seed, batch_size=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "source_BChw": torch.randn(batch_size, 16, *schedule.finest, generator=generator),
        "text_BTF": torch.randn(batch_size, 3 + seed, TEXT_FEATURES, generator=generator),
    }


def inputs_of(schedule, scale, seed):
    if scale == 0:
        return None
    return torch.randn(1, schedule.num_tokens[scale], 16, generator=torch.Generator().manual_seed(100 * seed + scale))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_size_after_prefill(conditioning):
    model = tiny_transformer(conditioning=conditioning)
    with torch.no_grad():
        cache = model(PORTRAIT, **conditions(PORTRAIT, 1))
    num_source = PORTRAIT.offsets[-1] if conditioning == "full" else PORTRAIT.num_tokens[-1]
    assert cache.num_source == num_source
    assert [tuple(keys.shape) for keys in cache.keys] == [(1, 2, num_source + PORTRAIT.offsets[-1], 32)] * 2
    assert [tuple(keys.shape) for keys in cache.text_keys] == [(1, 2, 4, 32)] * 2
    assert sorted(cache.source_keys) == sorted(cache.source_values) == ([0] if conditioning == "sar" else [])
    if conditioning == "sar":
        assert [keys.shape[2] for keys in cache.source_keys[0]] == list(PORTRAIT.num_tokens)
    assert all(table.shape == (PORTRAIT.offsets[-1], 16) for table in cache.rotary)
    assert not any(keys.requires_grad for keys in cache.keys)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_interleaved_generations_do_not_disturb_each_other(conditioning):
    """All state is in the cache: two runs of different shape take turns on one model."""
    model = tiny_transformer(conditioning=conditioning)
    runs = [(SQUARE, 1), (PORTRAIT, 2)]
    alone = []
    for schedule, seed in runs:
        cache = model(schedule, **conditions(schedule, seed))
        alone.append([model(schedule, inputs_of(schedule, k, seed), scale=k, cache=cache) for k in range(5)])
    caches = [model(schedule, **conditions(schedule, seed)) for schedule, seed in runs]
    for scale in range(5):
        for (schedule, seed), cache, expected in zip(runs, caches, alone):
            logits = model(schedule, inputs_of(schedule, scale, seed), scale=scale, cache=cache)
            assert torch.equal(logits, expected[scale])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_a_scale_can_be_run_again(conditioning):
    """Going back to an earlier scale overwrites what came after it."""
    model = tiny_transformer(conditioning=conditioning)
    cache = model(PORTRAIT, **conditions(PORTRAIT, 1))
    first = [model(PORTRAIT, inputs_of(PORTRAIT, k, 1), scale=k, cache=cache) for k in range(5)]
    other = model(PORTRAIT, inputs_of(PORTRAIT, 2, 9), scale=2, cache=cache)
    assert not torch.equal(other, first[2])
    for scale in (2, 3, 4):
        again = model(PORTRAIT, inputs_of(PORTRAIT, scale, 1), scale=scale, cache=cache)
        assert torch.equal(again, first[scale])
