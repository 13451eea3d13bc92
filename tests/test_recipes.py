"""The recipes: those for large machines on paper and on a tiny copy of the model, those for small ones for a step."""

from pathlib import Path

import pytest
from training_runs import rows

from varedit.training.config import EditorConfig, TokenizerConfig, load_config
from varedit.training.run import train

pytest_plugins = ["training_runs"]

RECIPES = Path(__file__).parent.parent / "recipes"
LARGE = ["lora_2b_24gb", "qlora_8b_24gb", "paper_2b_stage1_8gpu", "paper_2b_stage2_8gpu"]
NUM_2B, NUM_8B = 2_204_564_032, 8_375_791_824
"""Parameters of the released transformers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_recipes_that_cannot_run_here_fit_on_paper(name):
    """The full size on meta tensors: shapes of every bucket, parameters, memory of each process."""
    from varedit.training.estimate import GIB, estimate

    found = estimate(load_config(EditorConfig, RECIPES / f"{name}.yaml"), 1 if "lora" in name else 8)
    num_adapters = found.num_trained if "lora" in name else 0
    assert found.num_parameters - num_adapters == (NUM_8B if "8b" in name else NUM_2B)
    assert found.num_companions > 1_223_527_424  # the text encoder's
    assert found.num_tokens >= (777 if "stage1" in name else 3545)
    assert found.total < (24 if "lora" in name else 80) * GIB, "\n".join(found.lines())
    if not num_adapters:  # float32 weights and gradients, two moments
        assert found.weights + found.gradients + found.optimizer == pytest.approx(2 * NUM_2B, rel=1e-3)


@pytest.mark.parametrize("name", LARGE)
def test_their_first_steps_on_a_tiny_copy(tmp_path, model_folder, pairs_folder, name):
    changes = [f"start={model_folder}", "preset=null", f"data.source={pairs_folder}", "data.sizes={128: 1}"]
    changes += ["data.num_workers=0", "data.validation_count=2", "data.fit=square", "steps=2", "batch_size=2"]
    changes += ["micro_batch_size=1", "optimizer.warm_up=0", "sharding=none", "validate_every=2", "sample_every=0"]
    changes += ["device=cpu", "log_every=1"]
    if "qlora" in name:  # 4 bits need wider layers; test_trainer.py has them
        changes += ["frozen_dtype=bfloat16"]
    train(load_config(EditorConfig, RECIPES / f"{name}.yaml", changes), tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 2 and (tmp_path / "run" / ("lora" if "lora" in name else "model")).is_dir()


def test_the_smoke_recipes_take_their_first_step(tmp_path, model_folder):
    small = ["steps=1", "batch_size=2", "micro_batch_size=2", "optimizer.warm_up=0", "validate_every=0", "log_every=1"]
    small += ["data.validation_count=0", "data.num_workers=1"]
    editor = [f"image_tokenizer={model_folder}", f"text_encoder={model_folder}", "transformer.num_bits=16"]
    editor += ["transformer.text_features=32", "transformer.width=64"]
    train(load_config(EditorConfig, RECIPES / "smoke_cpu.yaml", small + editor), tmp_path / "editor")
    train(load_config(TokenizerConfig, RECIPES / "smoke_tokenizer_cpu.yaml", small), tmp_path / "tokenizer")
    for name in ("editor", "tokenizer"):
        assert rows(tmp_path / name, "step") == [1]
