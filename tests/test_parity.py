"""Our modules against recorded outputs of the released system: `.pth` files -> convert -> pipeline -> numbers.

The measuring is that of benchmarks/parity.py; here are the limits.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

LOGIT_LIMIT = 1e-3
LOSS_LIMIT = 1e-5
FEATURE_LIMIT = 1e-4
RUNS = ("greedy_cfg4", "greedy_nocfg")

SIZES = [pytest.param("0.06M", id="256px"), pytest.param("0.25M", id="512px", marks=pytest.mark.slow)]
NAMES = ("bsq32_f16", "bsq14_f8_patchify")


def _benchmark() -> ModuleType:
    file = Path(__file__).resolve().parent.parent / "benchmarks" / "parity.py"
    if not file.is_file():
        pytest.skip("needs benchmarks/parity.py of the repository")
    spec = importlib.util.spec_from_file_location("benchmark_parity", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    return _benchmark()


@pytest.fixture(scope="module", params=NAMES)
def converted(request, parity, parity_dir, tmp_path_factory):
    """Name of a vector set, and its pipeline, loaded from a converted folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, parity.load_converted(parity_dir, request.param, folder)


@pytest.fixture(params=SIZES)
def case(request, parity, parity_dir, converted):
    name, pipeline = converted
    return parity.load_case(pipeline, parity_dir, name, request.param)


def test_schedule_is_the_recorded_one(case):
    assert [list(grid) for grid in case.schedule.grids] == case.info["schedule"]
    assert list(case.schedule.image_hw) == case.info["image_hw"]


def test_tokenizer_and_quantizer(parity, case):
    errors = parity.tokenizer_errors(case)
    assert errors.pop("quantizer_bits_differing") == 0
    assert errors.pop("labels_differing") == 0
    assert max(errors.values()) < FEATURE_LIMIT, errors


def test_teacher_forced_logits_and_losses(parity, case):
    errors = parity.teacher_forced_errors(case)
    assert errors["logits"] < LOGIT_LIMIT
    assert errors["loss_mean"] < LOSS_LIMIT
    assert errors["loss_reweighted"] < LOSS_LIMIT


@pytest.mark.parametrize("run", RUNS)
def test_greedy_edit(parity, case, run):
    forced_error = parity.teacher_forced_errors(case)["logits"]
    errors = parity.greedy_errors(case, run, forced_error)
    assert errors["logits"] is None or errors["logits"] < LOGIT_LIMIT
    assert errors["scales_equal"] >= errors["scales_to_compare"] >= 4, errors
    if errors["scales_equal"] == errors["num_scales"]:
        assert errors["image_levels"] <= 1
