"""Adapters: nothing until trained, the same bits wherever they are kept, and the base model untouched without them."""

import pytest
import torch
from torch import Tensor

from varedit.lora import add_lora, load_lora, merge_lora, save_lora, stack_lora, unload_lora
from varedit.pipeline import VAREditPipeline
from varedit.testing import tiny_pipeline, tiny_transformer


def bits(pipeline: VAREditPipeline) -> Tensor:
    """All bits of one edit, greedy."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    return torch.cat([part.flatten() for part in pipeline(picture, "sepia", seed=1, temperature=0.0).bits[0]])


def train_a_little(pipeline: VAREditPipeline, seed: int) -> None:
    """Give the adapters values of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in pipeline.transformer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture
def trained(tmp_path) -> tuple[VAREditPipeline, Tensor, Tensor]:
    """A pipeline with trained adapters, its bits before and after; the adapters are saved in tmp_path."""
    pipeline = tiny_pipeline()
    before = bits(pipeline)
    add_lora(pipeline.transformer, rank=4, alpha=8)
    assert torch.equal(bits(pipeline), before), "new adapters must change nothing"
    train_a_little(pipeline, seed=0)
    save_lora(pipeline.transformer, tmp_path)
    return pipeline, before, bits(pipeline)


def test_only_adapters_are_trainable_and_only_in_the_blocks():
    transformer = tiny_transformer()
    add_lora(transformer, rank=4, alpha=8, targets=("proj", "fc1"))
    names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert names and all(".lora_" in name and name.startswith("blocks.") for name in names)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == {"proj", "fc1"}


def test_saved_and_loaded_adapters_give_the_same_bits(trained, tmp_path):
    _, before, after = trained
    assert not torch.equal(before, after)
    fresh = tiny_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(bits(fresh), after)


def test_dropout_belongs_to_training(tmp_path):
    pipeline = tiny_pipeline()
    add_lora(pipeline.transformer, rank=4, alpha=8, dropout=0.5)
    train_a_little(pipeline, seed=0)
    save_lora(pipeline.transformer, tmp_path)
    after = bits(pipeline)
    fresh = tiny_pipeline()
    load_lora(fresh, tmp_path)
    assert torch.equal(bits(fresh), after) and torch.equal(bits(fresh), after)
    pipeline.transformer.train()
    assert not torch.equal(bits(pipeline), after), "dropout does nothing in training"


def test_merged_adapters_give_the_same_bits_and_leave_plain_layers(trained, tmp_path):
    pipeline, before, after = trained
    merge_lora(pipeline)
    assert torch.equal(bits(pipeline), after)
    assert not any("lora" in name for name in pipeline.transformer.state_dict())
    pipeline.save_pretrained(tmp_path / "merged")
    assert torch.equal(bits(VAREditPipeline.from_pretrained(tmp_path / "merged")), after)


def test_unloaded_adapters_leave_the_base_models_bits(trained):
    pipeline, before, _ = trained
    expected = tiny_pipeline().transformer.state_dict()
    unload_lora(pipeline)
    assert torch.equal(bits(pipeline), before)
    actual = pipeline.transformer.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_stacked_adapters_add_up(trained, tmp_path):
    _, before, after = trained
    fresh = tiny_pipeline()
    load_lora(fresh, tmp_path, name="one")
    load_lora(fresh, tmp_path, name="two")
    stack_lora(fresh, {"one": 0.5, "two": 0.5})
    assert torch.equal(bits(fresh), after)
    stack_lora(fresh, {"one": 0.0})
    assert torch.equal(bits(fresh), before)
    with pytest.raises(ValueError, match="'three'.*one, two"):
        stack_lora(fresh, {"three": 1.0})


def test_adapters_of_two_trainings_stack_and_merge_in_any_order(trained, tmp_path):
    _, before, first = trained
    other = tiny_pipeline()
    add_lora(other.transformer, rank=2, alpha=2, targets=("to_qkv", "fc1"))
    train_a_little(other, seed=1)
    save_lora(other.transformer, tmp_path / "other")
    second = bits(other)
    results = []
    for names in (("one", "two"), ("two", "one")):
        fresh = tiny_pipeline()
        for name in names:
            fresh.load_lora_weights(tmp_path if name == "one" else tmp_path / "other", name=name)
        stack_lora(fresh, {"one": 0.8, "two": 0.5})
        results.append(bits(fresh))
        merge_lora(fresh)
        results.append(bits(fresh))
    assert all(torch.equal(results[0], result) for result in results)
    assert not any(torch.equal(results[0], single) for single in (before, first, second))


def test_the_command_merges_into_a_model_folder(trained, varedit, model_folder, tmp_path):
    _, before, after = trained
    assert torch.equal(bits(VAREditPipeline.from_pretrained(model_folder)), before)
    merged = tmp_path / "merged"
    merge = ["train", "merge", "--model", model_folder, "-o", merged, "--dtype=float32"]
    ran = varedit(*merge, tmp_path)
    assert ran.code == 0 and "1 merged" in ran.out, ran.err
    assert torch.equal(bits(VAREditPipeline.from_pretrained(merged)), after)
    assert not any(str(model_folder) in path.read_text() for path in merged.rglob("*.json"))
    varedit(*merge, tmp_path).assert_refused("merged", "--overwrite")
    varedit(*merge, tmp_path, f"{tmp_path}=0.5", "--overwrite").assert_refused("named twice")
    assert varedit(*merge, f"{tmp_path}=0", "--overwrite").code == 0
    assert torch.equal(bits(VAREditPipeline.from_pretrained(merged)), before)
    varedit(*merge, f"{tmp_path}=much", "--overwrite").assert_refused("much", "no number")
    varedit(*merge, tmp_path / "none", "--overwrite").assert_refused("none", "not there")
    (tmp_path / "file").touch()
    inside = ["train", "merge", "--model", model_folder, "-o", tmp_path / "file" / "merged", tmp_path]
    varedit(*inside).assert_refused("cannot write", "choose another")
    assert torch.equal(bits(VAREditPipeline.from_pretrained(merged)), before)


def test_refusals(trained, tmp_path):
    fresh = tiny_pipeline()
    with pytest.raises(ValueError, match="not there"):
        load_lora(fresh, tmp_path / "none")
    with pytest.raises(ValueError, match="no adapter"):
        merge_lora(fresh)
    load_lora(fresh, tmp_path)
    with pytest.raises(ValueError, match="loaded already"):
        load_lora(fresh, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        load_lora(tiny_pipeline(width=128, num_heads=4), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        load_lora(tiny_pipeline(num_blocks=1), tmp_path)
    with pytest.raises(ValueError, match="'query'"):
        add_lora(tiny_transformer(), rank=4, alpha=8, targets=("query",))
