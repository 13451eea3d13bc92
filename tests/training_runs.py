"""What tests of training share: a model of tiny random parts, pairs, a config, and how to read a run.

PYTEST_DONT_REWRITE: there is no assertion in here.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from varedit.data.record import Record, write_folder
from varedit.testing import tiny_pipeline
from varedit.training.config import EditorConfig, load_config
from varedit.training.processes import Processes

CPU = Processes(0, 1, torch.device("cpu"))
SHAPES = [(128, 128), (128, 128), (96, 150), (150, 96), (128, 128), (96, 150)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model folder of tiny random parts."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    """Six pairs of three shapes: noise, and the same noise inverted."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in SHAPES]
    write_folder((Record(p, 255 - p, ("invert it", f"invert {i}")) for i, p in enumerate(pictures)), folder)
    return folder


@pytest.fixture
def editor_config(tmp_path, model_folder, pairs_folder) -> Callable[..., EditorConfig]:
    """Makes configs: a run of six steps on the six pairs, with overrides. The file is tmp_path/config.yaml."""
    values = {
        "start": str(model_folder), "steps": 6, "batch_size": 4, "micro_batch_size": 2, "precision": "float32",
        "device": "cpu", "log_every": 1, "validate_every": 0, "sample_every": 0, "save_every": 2,
        "data": {"source": str(pairs_folder), "sizes": {128: 1}, "num_workers": 0, "validation_count": 0},
        "optimizer": {"lr": 1e-3, "warm_up": 2},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return lambda *overrides: load_config(EditorConfig, path, overrides)


def from_zero(model: Path, **transformer: int) -> list[str]:
    """Overrides for training a small transformer from zero, with the model's other parts."""
    arguments = {"num_bits": 16, "width": 32, "num_blocks": 1, "num_heads": 2, "text_features": 32}
    arguments |= {"num_text_heads": 2, "max_text_tokens": 64, "num_levels": 5} | transformer
    changes = ["start=null", f"image_tokenizer={model}", f"text_encoder={model}"]
    return changes + [f"transformer.{name}={value}" for name, value in arguments.items()]


def rows(run: Path, key: str = "loss") -> list:
    """The values of one metric, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(run: Path) -> dict[str, Tensor]:
    """The transformer of a run's result."""
    return load_file(next((run / "model/transformer").glob("*.safetensors")))
