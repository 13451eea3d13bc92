"""A transformer made deeper: the same computation, and every part of it can be trained."""

import pytest
import torch

from varedit.scales import scale_schedule
from varedit.testing import tiny_transformer
from varedit.training.growth import deepen

SCHEDULE = scale_schedule(128)


def logits_of(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    config, (h, w) = model.config, SCHEDULE.finest
    return model(
        SCHEDULE,
        torch.randn(2, SCHEDULE.offsets[-1] - 1, config.num_bits, generator=generator),
        source_BChw=torch.randn(2, config.num_bits, h, w, generator=generator),
        text_BTF=torch.randn(2, 5, config.text_features, generator=generator),
    )


@pytest.mark.parametrize("num_blocks", [3, 4, 5, 8, 12])
def test_a_deeper_model_computes_the_same(num_blocks):
    model = tiny_transformer(num_blocks=3)
    deeper = deepen(model, num_blocks)
    assert deeper.config.num_blocks == len(deeper.blocks) == num_blocks and len(model.blocks) == 3
    assert torch.equal(logits_of(model), logits_of(deeper))


def test_it_is_saved_and_loaded_as_what_it_is(tmp_path):
    deeper = deepen(tiny_transformer(num_blocks=3), 5)
    deeper.save_pretrained(tmp_path)
    loaded = type(deeper).from_pretrained(tmp_path)
    assert loaded.config.num_blocks == 5 and torch.equal(logits_of(loaded), logits_of(deeper))


def test_copies_are_spread_and_none_is_the_last():
    model = tiny_transformer(num_blocks=6)
    deeper = deepen(model, 9)
    empty = [index for index, block in enumerate(deeper.blocks) if not block.mlp.fc2.weight.any()]
    assert empty == [2, 4, 7]
    for copy, origin in zip(empty, (1, 2, 4)):
        assert torch.equal(deeper.blocks[copy].mlp.fc1.weight, model.blocks[origin].mlp.fc1.weight)


def test_old_and_new_blocks_learn_and_share_nothing():
    model = tiny_transformer(num_blocks=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    deeper = deepen(model, 3)
    optimizer = torch.optim.SGD(deeper.parameters(), 0.1)
    for _ in range(2):  # a branch that is zero hides what lies before it from the first step
        optimizer.zero_grad()
        logits_of(deeper).square().mean().backward()
        optimizer.step()
    still = [name for name, parameter in deeper.blocks.named_parameters() if not parameter.grad.any()]
    assert not still
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_is_not_made_shallower():
    with pytest.raises(ValueError, match="num_blocks is 1, the model has 2; a model can only be made deeper"):
        deepen(tiny_transformer(), 1)
