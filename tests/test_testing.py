"""The tiny components: the same in every process, small, and with every weight in use."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from varedit.pipeline import VAREditPipeline
from varedit.scales import ScaleSchedule, scale_schedule
from varedit.testing import TEXT_FEATURES, tiny_image_tokenizer, tiny_pipeline, tiny_text_encoder, tiny_transformer


def state(pipeline: VAREditPipeline) -> dict[str, Tensor]:
    modules = ("transformer", "image_tokenizer", "text_encoder")
    return {f"{m}.{key}": value for m in modules for key, value in getattr(pipeline, m).state_dict().items()}


def test_the_seed_is_the_whole_difference():
    torch.manual_seed(3)
    first = state(tiny_pipeline(0))
    torch.manual_seed(4)
    second, other = state(tiny_pipeline(0)), state(tiny_pipeline(1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["transformer.head.weight"], other["transformer.head.weight"])


def test_it_is_tiny():
    assert sum(value.nbytes for value in state(tiny_pipeline()).values()) < 4e6


def test_components_are_in_evaluation_mode():
    pipeline = tiny_pipeline()
    assert not any(module.training for module in pipeline.components.values() if isinstance(module, torch.nn.Module))


def test_the_tokenizer_reads_any_text():
    tokenizer, _ = tiny_text_encoder()
    for text in ("sepia", "Füge Schnee hinzu", "空を赤く", "\t\n 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) + 1 and None not in ids


def transformer_logits(model: torch.nn.Module, schedule: ScaleSchedule) -> Tensor:
    """Logits of all scales for two images, one with and one without its instruction."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            schedule,
            torch.randn(2, schedule.offsets[-1] - 1, 16, generator=generator),
            source_BChw=torch.randn(2, 16, *schedule.finest, generator=generator),
            text_BTF=torch.randn(2, 3, TEXT_FEATURES, generator=generator),
            drop_text_B=torch.tensor([False, True]),
        )


def assert_every_weight_matters(model: torch.nn.Module, compute: Callable[[], Tensor]) -> None:
    """So that a test on tiny components notices a part that is left out."""
    with torch.no_grad():
        expected = compute()
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
            change = (compute() - expected).abs().max()
            parameter.copy_(kept)
            assert change > 1e-3, name


def test_every_weight_of_the_transformer_matters():
    model, schedule = tiny_transformer(), scale_schedule(128)
    assert_every_weight_matters(model, lambda: transformer_logits(model, schedule))


def test_every_weight_of_the_image_tokenizer_matters():
    model = tiny_image_tokenizer()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert_every_weight_matters(model, lambda: model(image))


@pytest.mark.parametrize("size", [128, 256])
def test_bits_of_random_weights_are_not_trivial(size):
    """Neither all alike nor decided by the sign of one feature: about half ones at every scale."""
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    edited = tiny_pipeline(size=size)(image, "sepia", seed=0)
    for bits in edited.bits[0][1:]:
        assert 0.2 < bits.float().mean() < 0.8
