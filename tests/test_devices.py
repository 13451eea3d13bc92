"""Edits and trainings on another device than the CPU, see `another_device.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from varedit.pipeline import DEFAULT_MODEL

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a PyTorch in which a device can be written in Python",
)


def run_elsewhere(*names: str) -> None:
    script = Path(__file__).with_name("another_device.py")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, script, *names], capture_output=True, text=True, env=one_thread, check=False)
    assert ran.returncode == 0, ran.stderr[:10_000]  # an operation that is missing lists hundreds of devices last


def test_edits_are_the_same_on_another_device():
    run_elsewhere("edits")


@pytest.mark.slow
def test_offloaded_edits_and_scores_are_the_same_on_another_device():
    run_elsewhere("offload", "scores")


@pytest.mark.slow
def test_trainings_run_on_another_device_as_on_the_cpu():
    run_elsewhere("training", "tokenizer")


@pytest.mark.slow
@pytest.mark.skipif(not (DEFAULT_MODEL / "model_index.json").exists(), reason="needs the default model's text encoder")
def test_the_gpu_recipe_runs_on_another_device():
    run_elsewhere("gpu_recipe")
