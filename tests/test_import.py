"""The package's public names, resolved lazily."""

import subprocess
import sys

import pytest

import varedit

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import varedit").intersection(HEAVY)


def test_schedules_need_no_torch():
    loaded = modules_after("from varedit import nearest_schedule; nearest_schedule(256, 800, 1200)")
    assert not loaded.intersection(HEAVY)


def test_every_public_name_resolves():
    for name in varedit.__all__:
        assert getattr(varedit, name) is not None
        assert name in dir(varedit)


def test_public_classes_are_those_of_their_modules():
    from varedit.pipeline import VAREditPipeline
    from varedit.scales import ScaleSchedule

    assert varedit.VAREditPipeline is VAREditPipeline
    assert varedit.ScaleSchedule is ScaleSchedule


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        varedit.Nonsense  # noqa: B018
