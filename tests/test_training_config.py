"""Configs: read back as written, and every mistake refused in one line that names the field, the value and the fix."""

from pathlib import Path

import pytest
import yaml

from varedit.cli import main
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.training.config import (
    EditorConfig,
    TokenizerConfig,
    changed_fields,
    check_processes,
    load_config,
    save_config,
)
from varedit.training.typed_yaml import construct
from varedit.transformer import VAREditTransformer

START = {"start": "model"}


def write(folder: Path, values: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def refused(folder: Path, values: dict, kind=EditorConfig, overrides=()) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_config(kind, write(folder, values), overrides)
    message = str(caught.value)
    assert "\n" not in message and ("; " in message or ": " in message)
    return message


def test_a_config_reads_back_as_written(tmp_path):
    values = START | {
        "data": {"sizes": {128: 1, 256: 2}, "aspects": {1.5: 1}},
        "optimizer": {"lr": "6e-5", "betas": [0.9, 0.95]},
        "lora": {"rank": 4, "targets": ["to_qkv", "fc1"]},
    }
    config = load_config(EditorConfig, write(tmp_path, values))
    assert config.optimizer.lr == 6e-5 and config.data.sizes == {128: 1.0, 256: 2.0}
    assert config.lora is not None and config.lora.targets == ("to_qkv", "fc1")
    save_config(config, tmp_path / "again.yaml")
    assert load_config(EditorConfig, tmp_path / "again.yaml") == config


def test_overrides_win_and_may_open_a_group(tmp_path):
    path = write(tmp_path, START | {"steps": 5, "data": {"num_workers": 3}})
    config = load_config(EditorConfig, path, ["steps=7", "lora.rank=2", "data.sizes.128=1", "optimizer.decay=cosine"])
    assert (config.steps, config.lora.rank, config.data.num_workers) == (7, 2, 3)
    assert config.data.sizes == {128: 1.0} and config.optimizer.decay == "cosine"


def test_changed_fields_names_them(tmp_path):
    path = write(tmp_path, START)
    first = load_config(EditorConfig, path)
    assert changed_fields(first, first) == []
    second = load_config(EditorConfig, path, ["seed=3", "data.sizes={128: 1}", "lora.rank=4"])
    assert {"data.sizes", "seed", "lora.rank"} <= set(changed_fields(first, second))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"batch_sise": 4}, ["batch_sise", "did you mean batch_size"]),
        ({"data": {"colour": 1}}, ["data.colour", "fields are"]),
        ({"steps": "many"}, ["steps", "'many'", "whole number"]),
        ({"steps": True}, ["steps", "True"]),
        ({"steps": 1.5}, ["steps", "1.5"]),
        ({"compile": 1}, ["compile", "true or false"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr", "'fast'", "a finite number"]),
        ({"optimizer": {"lr": float("inf")}}, ["optimizer.lr", "inf", "a finite number"]),
        ({"max_minutes": float("nan")}, ["max_minutes", "nan"]),
        ({"steps": 10**12}, ["steps", "at most 100000000"]),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas", "list"]),
        ({"optimizer": 3}, ["optimizer", "a table of name, lr"]),
        ({"lora": {"rank": "big"}}, ["lora.rank", "'big'"]),
        ({"precision": "float16"}, ["precision", "float32, bfloat16"]),
        ({"data": {"sizes": {200: 1}}}, ["data.sizes", "200", "128, 256"]),
        ({"data": {"sizes": {}}}, ["data.sizes", "empty"]),
        ({"data": {"aspects": {1.1: 1}}}, ["data.aspects", "1.1"]),
        ({"data": {"fit": "square", "aspects": {1.0: 1, 1.5: 2}}}, ["data.aspects", "1, 1.5", "data.fit"]),
        ({"data": {"source": "pairs", "photos": "p"}}, ["data.photos", "world"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"optimizer": {"lr": 0}}, ["optimizer.lr", "more than 0"]),
        ({"max_flip": 1.0}, ["max_flip", "less than 1"]),
        ({"batch_size": 10, "micro_batch_size": 4}, ["batch_size", "10", "multiple"]),
        ({"steps": 10, "optimizer": {"warm_up": 10}}, ["optimizer.warm_up", "less than steps 10"]),
        ({"transformer": {"width": 64}}, ["transformer.width", "start"]),
        ({"lora": {}, "optimizer": {"name": "muon"}}, ["muon", "lora", "adamw"]),
        ({"lora": {}, "precision": "float32"}, ["frozen_dtype", "float32"]),
        ({"frozen_dtype": "nf4"}, ["frozen_dtype", "nf4", "lora"]),
        ({"frozen_dtype": "nf4", "lora": {}, "sharding": "fsdp"}, ["sharding", "nf4", "none"]),
        ({"frozen_dtype": "nf4", "lora": {}, "compile": True}, ["compile", "nf4", "false"]),
        ({"edit_weight": 4, "scale_weights": "equal"}, ["edit_weight", "sqrt_area"]),
        ({"edit_weight": 0}, ["edit_weight", "more than 0"]),
        ({"max_minutes": -1}, ["max_minutes", "at least 0"]),
        ({"wandb": "offline"}, ["wandb", "true or false"]),
        ({"start": None}, ["image_tokenizer", "missing"]),
        ({"start": None, "image_tokenizer": "a", "text_encoder": "b"}, ["transformer", "preset"]),
        (
            {"start": None, "image_tokenizer": "a", "text_encoder": "b", "preset": "2b-512", "lora": {}},
            ["lora", "start"],
        ),
        ({"preset": "3b"}, ["preset", "'3b'", "infinity-2b"]),
    ],
)
def test_mistakes_are_refused(tmp_path, values, words):
    message = refused(tmp_path, START | values)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "values, word",
    [({"sharding": "fsdp"}, "sharding"), ({"compile": True}, "compile"), ({"drop_text": 0.1}, "drop_text"),
     ({"start": "a", "image_tokenizer": {"num_code_bits": 4}}, "image_tokenizer")],
)  # fmt: skip
def test_mistakes_in_a_tokenizer_config(tmp_path, values, word):
    assert word in refused(tmp_path, values, TokenizerConfig)


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=1", "seed=[1", "steps=2020-13-45"])
def test_overrides_that_are_none(tmp_path, override):
    assert "--set" in refused(tmp_path, START | {"steps": 5}, overrides=[override])


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(EditorConfig, tmp_path / "none.yaml")
    for content in (b"a: [", b"\xff\xfe", b"- 1\n", b"steps: 2020-13-45", b"[" * 20_000):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            load_config(EditorConfig, tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"widht": 64}, r"transformer\.widht is unknown; did you mean width\?"),
        ({"width": "wide"}, r"transformer\.width is 'wide'; give a whole number"),
        ({"width": -32}, r"transformer\.width is -32; give at least 1"),
        ({"num_heads": 0}, r"transformer\.num_heads is 0; give at least 1"),
        ({"num_blocks": 0}, r"transformer\.num_blocks is 0; give at least 1"),
        ({"width": 33, "num_heads": 2}, r"transformer cannot be: width 33 must be a multiple"),
        ({"num_aligned_blocks": -1}, r"transformer\.num_aligned_blocks is -1; give at least 0"),
        ({"conditioning": 3}, r"transformer\.conditioning is 3; give a text"),
    ],
)
def test_transformers_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=f"^config field {words}"):
        construct(VAREditTransformer, values, "transformer")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"base_widht": 8}, r"\.base_widht is unknown; did you mean base_width\?"),
        ({"multipliers": 3}, r"\.multipliers is 3; give a list of a whole number"),
        ({"multipliers": ()}, r"\.multipliers is \(\); give at least 1"),
        ({"multipliers": (1, 0)}, r"\.multipliers is \(1, 0\); give at least 1"),
        ({"num_groups": 0}, r"\.num_groups is 0; give at least 1"),
        ({"patch_size": 5}, r" cannot be: stride 16 times patch_size 5 must be 16 pixels"),
    ],
)
def test_tokenizers_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=f"^config field image_tokenizer{words}"):
        construct(VAREditImageTokenizer, values, "image_tokenizer")


def test_numbers_of_processes(tmp_path):
    config = load_config(EditorConfig, write(tmp_path, START | {"batch_size": 12, "micro_batch_size": 4}))
    check_processes(config, 3)
    with pytest.raises(ValueError, match="3 micro-batches.*2 processes"):
        check_processes(config, 2)
    sharded = load_config(EditorConfig, tmp_path / "config.yaml", ["sharding=fsdp"])
    with pytest.raises(ValueError, match="torchrun"):
        check_processes(sharded, 1)


def test_the_command_exits_2_before_anything_is_written(tmp_path, capsys):
    path = write(tmp_path, START | {"batch_sise": 4})
    with pytest.raises(SystemExit) as caught:
        main(["train", "editor", "--config", str(path), "--output", str(tmp_path / "run")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "batch_size" in error
    assert not (tmp_path / "run").exists()
