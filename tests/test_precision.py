"""bfloat16 where the device has it, and only there."""

import logging
import platform

import pytest
import torch
from training_runs import CPU, rows

from varedit.pipeline import load_pipeline
from varedit.runtime import computes_bfloat16, exact_convolutions
from varedit.training import optimizer, precision
from varedit.training.precision import autocast, in_bfloat16, report_precision
from varedit.training.run import train
from varedit.training.trainer import EditorTraining

pytest_plugins = ["training_runs"]


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def has(request, monkeypatch) -> bool:
    """A CPU with bfloat16 instructions, and one without."""
    for module in (precision, optimizer):
        monkeypatch.setattr(module, "computes_bfloat16", lambda device: request.param)
    return request.param


def test_every_device_has_an_answer():
    assert isinstance(computes_bfloat16("cpu"), bool) and computes_bfloat16("meta")
    if platform.machine() == "x86_64":  # AVX2 has no bfloat16, in no form
        assert not computes_bfloat16("cpu") or "AVX512" in torch.backends.cpu.get_cpu_capability()


def test_auto_takes_what_the_device_has_and_the_rest_is_as_told(editor_config, has):
    def found(*changes: str) -> bool:
        config = editor_config(*changes)
        with autocast(config, CPU.device):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (
                torch.bfloat16 if in_bfloat16(config, CPU.device) else torch.float32
            )
        return in_bfloat16(config, CPU.device)

    assert found("precision=auto") == has
    assert found("precision=bfloat16") and not found("precision=float32")
    assert found("precision=auto", "lora.rank=4", "frozen_dtype=nf4"), "4 bits become bfloat16"


def test_an_auto_run_is_the_run_of_that_precision(editor_config, tmp_path, has):
    losses = {}
    for name in ("auto", "bfloat16" if has else "float32"):
        train(
            editor_config(f"precision={name}", "steps=2", "optimizer.warm_up=0", "optimizer.name=muon"), tmp_path / name
        )
        losses[name] = rows(tmp_path / name, "loss")
    first, second = losses.values()
    assert first == second and len(first) == 2


def test_frozen_weights_follow_what_the_run_computes_in(editor_config, tmp_path, has):
    training = EditorTraining(editor_config("precision=auto", "lora.rank=4"), CPU, tmp_path)
    frozen = {name: p.dtype for name, p in training.transformer.named_parameters() if "to_qkv.base_layer" in name}
    assert frozen and set(frozen.values()) == {torch.bfloat16 if has else torch.float32}
    train(editor_config("precision=auto", "lora.rank=4", "steps=1", "optimizer.warm_up=0"), tmp_path / "run")


def test_slow_bfloat16_is_said(editor_config, has, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        report_precision(editor_config("precision=bfloat16"), CPU.device)
    assert ("slowly" in caplog.text) == (not has) and "computes in bfloat16" in caplog.text
    caplog.clear()
    monkeypatch.setattr("varedit.pipeline.computes_bfloat16", lambda device: has)
    load_pipeline(dtype=torch.bfloat16, device="cpu")
    assert ("slowly" in caplog.text) == (not has)
    caplog.clear()
    load_pipeline(device="cpu")
    assert "slowly" not in caplog.text


def test_convolutions_are_exact_for_a_while_only():
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    with exact_convolutions("cuda"):
        assert switch.fp32_precision == "ieee"
    with exact_convolutions("cpu"):
        assert switch.fp32_precision == before
    assert switch.fp32_precision == before
