"""Converter: every released layout, every key accounted for, nothing executed, nothing half-written.

The files are tiny random models of ours under the released names, so that this needs no recorded vectors.
"""

import argparse
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

from varedit import VAREditImageTokenizer, VAREditPipeline, VAREditTransformer
from varedit import convert as convert_module
from varedit.convert import ConvertError, convert
from varedit.presets import PRESETS
from varedit.testing import TEXT_FEATURES, tiny_image_tokenizer, tiny_text_encoder, tiny_transformer

CHUNKS = 2


def released_transformer(model: VAREditTransformer, num_chunks: int = CHUNKS) -> dict[str, torch.Tensor]:
    """Our parameters under the released names and in the released shapes."""
    chunk_length = model.config.num_blocks // num_chunks
    inner = {
        "self_attention.to_qkv": "sa.mat_qkv", "self_attention.log_scale": "sa.scale_mul_1H11", "self_attention": "sa",
        "cross_attention.to_q.": "ca.mat_q.", "cross_attention.to_kv": "ca.mat_kv", "cross_attention": "ca",
        "cross_norm": "ca_norm", "mlp": "ffn", "modulation_table": "ada_gss",
    }  # fmt: skip
    outer = {
        "input_proj": "word_embed", "level_embed": "lvl_embed.weight", "start_position": "pos_start",
        "null_text": "cfg_uncond", "text_pool.query": "text_proj_for_sos.ca.mat_q",
        "text_pool.to_kv": "text_proj_for_sos.ca.mat_kv", "text_pool": "text_proj_for_sos.ca",
        "text_proj.": "text_proj_for_ca.", "shared_modulation": "shared_ada_lin.1",
        "head_modulation": "head_nm.ada_lin.1",
    }  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        in_block = re.match(r"blocks\.(\d+)\.(.*)", name)
        key = in_block[2] if in_block else name
        ours, theirs = next(
            ((a, b) for a, b in (inner if in_block else outer).items() if key.startswith(a)), ("head", "head")
        )
        key = key.replace(ours, theirs, 1)
        if in_block:
            key = f"block_chunks.{int(in_block[1]) // chunk_length}.module.{int(in_block[1]) % chunk_length}.{key}"
        if "ada_gss" in key or "pos_start" in key:
            value = value[None, None]
        elif key.endswith("ca.mat_q"):
            value = value[None]
        elif "scale_mul" in key:
            value = value[None, :, None, None]
        state[key] = value.clone()
        if key.endswith("a.v_bias"):
            state[key.replace("v_bias", "zero_k_bias")] = torch.zeros_like(value)
    return state


def released_tokenizer(model: VAREditImageTokenizer, wrapped: bool = True) -> dict[str, torch.Tensor]:
    """Our parameters under the released names, with or without the inner `.conv` and `.norm`."""
    state = {}
    for name, value in model.state_dict().items():
        ladder = "down" if name.startswith("encoder") else "up"
        key = re.sub(r"levels\.(\d+)\.blocks", rf"{ladder}.\1.block", name)
        key = re.sub(r"levels\.(\d+)\.conv", rf"{ladder}.\1.{ladder}sample.conv", key)
        key = (
            key.replace("middle.0", "mid.block_1")
            .replace("middle.1", "mid.block_2")
            .replace("shortcut", "nin_shortcut")
        )
        if wrapped:
            layer, leaf = key.rsplit(".", 1)
            key = f"{layer}.{'norm' if 'norm' in layer.rsplit('.', 1)[-1] else 'conv'}.{leaf}"
        state[key] = value.clone()
    mask = 2 ** torch.arange(model.config.num_code_bits)
    return state | {"quantize.lfq.mask": mask, "quantizer.lfq.mask": mask.clone()}


@pytest.fixture(scope="module")
def transformer() -> VAREditTransformer:
    return tiny_transformer(num_blocks=4)


@pytest.fixture(scope="module")
def image_tokenizer() -> VAREditImageTokenizer:
    return tiny_image_tokenizer(stem_patch=1, multipliers=(1, 2, 1, 1), num_groups=32)  # as all released ones


@pytest.fixture
def files(tmp_path, transformer, image_tokenizer):
    """The two files in their plainest layout."""
    return {
        "transformer": save_pth(released_transformer(transformer), tmp_path / "t.pth"),
        "image_tokenizer": save_pth(released_tokenizer(image_tokenizer), tmp_path / "v.pth"),
    }


def save_pth(state, path):
    torch.save(state, path)
    return path


def save_pieces(state, folder, kind):
    """Two pieces and their index, as transformers and diffusers write them."""
    folder.mkdir()
    keys = sorted(state)
    weight_map = {}
    for index, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{index + 1:05d}-of-00002.{kind}"
        piece = {key: state[key] for key in part}
        save_file(piece, folder / name) if kind == "safetensors" else torch.save(piece, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"model.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_same(model, expected) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def visible(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- layouts and sizes ---------------------------------------------------------------------------------------------


def write_layout(layout, state, nesting, folder):
    """`state` in one of the layouts; `nesting` names the containers of its kind of file."""
    if layout == "nested":
        for key in reversed(nesting):
            state = {key: state, "step": 3}
        return save_pth(state, folder / f"{nesting[0]}.pth")
    if layout == "legacy":
        path = folder / f"{nesting[0]}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(path)
        return path
    if layout == "safetensors":
        save_file(state, folder / f"{nesting[0]}.safetensors")
        return folder / f"{nesting[0]}.safetensors"
    if layout == "folder":
        (folder / nesting[0]).mkdir()
        save_pth(state, folder / nesting[0] / "weights.pth")
        return folder / nesting[0]
    if layout.startswith("pieces"):
        return save_pieces(state, folder / nesting[0], layout.split()[1])
    return save_pth(state, folder / f"{nesting[0]}.pth")


@pytest.mark.parametrize(
    "layout", ["bare", "nested", "legacy", "folder", "safetensors", "pieces safetensors", "pieces bin", "pieces pth"]
)
def test_layouts_give_the_same_model(layout, transformer, image_tokenizer, tmp_path):
    output = convert(
        write_layout(layout, released_transformer(transformer), ("trainer", "gpt_fsdp"), tmp_path),
        write_layout(layout, released_tokenizer(image_tokenizer), ("vae",), tmp_path),
        tmp_path / "out",
    )
    pipeline = VAREditPipeline.from_pretrained(output)
    assert_same(pipeline.transformer, transformer)
    assert_same(pipeline.image_tokenizer, image_tokenizer)
    sizes = dict(pipeline.transformer.config) | {"position_layout": "offset"}
    assert {name: sizes[name] for name in transformer.config if name[0] != "_"} == {
        name: value for name, value in transformer.config.items() if name[0] != "_"
    }
    assert list(pipeline.image_tokenizer.config.multipliers) == [1, 2, 1, 1]
    assert pipeline.image_tokenizer.config.patch_size == 2


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_blocks_in_chunks(num_chunks, transformer, files, tmp_path):
    save_pth(released_transformer(transformer, num_chunks), files["transformer"])
    output = convert(**files, output=tmp_path / "out")
    assert_same(VAREditTransformer.from_pretrained(output, subfolder="transformer"), transformer)


def test_tokenizer_keys_without_inner_names(image_tokenizer, files, tmp_path):
    save_pth(released_tokenizer(image_tokenizer, wrapped=False), files["image_tokenizer"])
    output = convert(**files, output=tmp_path / "out")
    assert_same(VAREditImageTokenizer.from_pretrained(output, subfolder="image_tokenizer"), image_tokenizer)


def test_tokenizer_of_stride_16_without_patchify(transformer, files, tmp_path):
    tokenizer = tiny_image_tokenizer(
        num_code_bits=16, stem_patch=1, multipliers=(1, 1, 2, 1, 1), num_blocks=2, patch_size=1
    )
    save_pth(released_tokenizer(tokenizer), files["image_tokenizer"])
    loaded = VAREditPipeline.from_pretrained(convert(**files, output=tmp_path / "out")).image_tokenizer
    assert_same(loaded, tokenizer)
    assert (loaded.config.num_blocks, loaded.config.patch_size, loaded.stride) == (2, 1, 16)


def test_converted_folder_edits_like_the_original(transformer, image_tokenizer, files, tmp_path):
    output = convert(**files, output=tmp_path / "out", position_layout="offset", fit="native", size=128)
    converted = VAREditPipeline.from_pretrained(output)
    original = VAREditPipeline(transformer, image_tokenizer, size=128)
    torch.manual_seed(0)
    arguments = {"prompt_embeds": torch.randn(4, TEXT_FEATURES), "seed": 1}
    image = Image.effect_noise((128, 128), 80).convert("RGB")
    ours, theirs = converted(image, **arguments), original(image, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours.bits[0], theirs.bits[0]))
    with pytest.raises(ValueError, match="prompt_embeds"):
        converted(image, "make it blue")


# -- precision and shards ------------------------------------------------------------------------------------------


def stored_dtypes(folder) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}
    return found


@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_bfloat16_keeps_float32_parts(stored, dtype, transformer, image_tokenizer, files, tmp_path):
    state = {key: value.to(stored) for key, value in released_transformer(transformer).items()}
    save_pth(state, files["transformer"])
    output = convert(**files, output=tmp_path / "out", dtype=dtype)
    parts = set(VAREditTransformer._keep_in_fp32_modules)
    found = stored_dtypes(output / "transformer")
    assert found.keys() == transformer.state_dict().keys()
    assert {name: "F32" if parts & set(name.split(".")) else "BF16" for name in found} == found
    assert set(stored_dtypes(output / "image_tokenizer").values()) == {"F32"}
    loaded = VAREditPipeline.from_pretrained(output, dtype=torch.bfloat16).transformer
    for name, value in loaded.state_dict().items():
        wanted = transformer.state_dict()[name].to(stored)
        assert torch.equal(value.float(), wanted.to(value.dtype).float()), name


def test_float32_from_bfloat16(transformer, files, tmp_path):
    save_pth({k: v.bfloat16() for k, v in released_transformer(transformer).items()}, files["transformer"])
    output = convert(**files, output=tmp_path / "out", dtype=torch.float32)
    assert set(stored_dtypes(output / "transformer").values()) == {"F32"}


def test_large_parts_are_written_in_shards(transformer, image_tokenizer, files, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "MAX_SHARD_BYTES", 500_000)
    output = convert(**files, output=tmp_path / "out")
    for part, expected in (("transformer", transformer), ("image_tokenizer", image_tokenizer)):
        index = json.loads((output / part / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.state_dict().keys()
        assert set(index["weight_map"].values()) == {file.name for file in (output / part).glob("*.safetensors")}
        assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in expected.state_dict().values())
    pipeline = VAREditPipeline.from_pretrained(output)
    assert_same(pipeline.transformer, transformer)
    assert_same(pipeline.image_tokenizer, image_tokenizer)


# -- every key is accounted for ------------------------------------------------------------------------------------

TRANSFORMER_KEYS = ["word_embed.weight", "block_chunks.1.module.0.sa.q_bias", "cfg_uncond", "head.bias"]
TOKENIZER_KEYS = ["encoder.conv_in.conv.weight", "decoder.up.2.block.0.norm1.norm.bias", "encoder.conv_out.conv.bias"]
KEYS = [("transformer", key) for key in TRANSFORMER_KEYS] + [("image_tokenizer", key) for key in TOKENIZER_KEYS]


def spoil(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def refused(files, tmp_path, *mentioned: str, **options) -> str:
    """Conversion is refused in one line with these words, and leaves nothing."""
    before = visible(tmp_path)
    with pytest.raises(ConvertError) as caught:
        convert(**files, output=tmp_path / "out", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in mentioned), message
    assert visible(tmp_path) == before
    return message


@pytest.mark.parametrize(("part", "key"), KEYS)
def test_missing_key_is_named(part, key, files, tmp_path):
    spoil(files[part], lambda state: state.pop(key))
    refused(files, tmp_path, files[part].name, "missing", key.replace(".conv.", ".").replace(".norm.", "."))


@pytest.mark.parametrize(("part", "key"), [pair for pair in KEYS if pair[1] != "cfg_uncond"])
def test_misshapen_key_is_refused(part, key, files, tmp_path):
    def grow(state):  # of cfg_uncond one row more is just a longer instruction
        state[key] = torch.cat([state[key], state[key][:1]])

    spoil(files[part], grow)
    refused(files, tmp_path, files[part].name)


def test_misshapen_key_is_named_with_both_shapes(files, tmp_path):
    key = "block_chunks.0.module.1.ffn.fc1.weight"
    spoil(files["transformer"], lambda state: state.update({key: torch.zeros(3, 5)}))
    refused(files, tmp_path, key, "(3, 5)", "(256, 64)")


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "block_chunks.0.module.0.sa.k_bias"),
        ("transformer", "block_chunks.0.module.00.sa.q_bias"),
        ("transformer", "optimizer.step"),
        ("image_tokenizer", "encoder.mid.attn_1.q.weight"),
        ("image_tokenizer", "quantize.embedding"),
    ],
)
def test_unknown_key_is_named(part, key, files, tmp_path):
    spoil(files[part], lambda state: state.update({key: torch.zeros(2)}))
    refused(files, tmp_path, key, "unknown")


@pytest.mark.parametrize("key", ["block_chunks.0.module.1.sa.zero_k_bias", "text_proj_for_sos.ca.zero_k_bias"])
def test_key_bias_must_be_zero(key, files, tmp_path):
    spoil(files["transformer"], lambda state: state[key].view(-1)[-1].fill_(0.1))
    refused(files, tmp_path, key, "not zero")


def test_whole_block_missing(files, tmp_path):
    def drop(state):
        for key in [key for key in state if key.startswith("block_chunks.1.module.0.")]:
            state.pop(key)

    spoil(files["transformer"], drop)
    refused(files, tmp_path, "3 blocks")


def test_absurd_block_number_is_refused_at_once(files, tmp_path):
    key = f"block_chunks.{10**12}.module.0.sa.q_bias"
    spoil(files["transformer"], lambda state: state.update({key: torch.zeros(64)}))
    refused(files, tmp_path, "blocks")


def test_same_weight_under_two_names(files, tmp_path):
    bare = {"encoder.conv_in.bias": torch.zeros(32)}
    spoil(files["image_tokenizer"], lambda state: state.update(bare))
    refused(files, tmp_path, "encoder.conv_in.bias", "encoder.conv_in.conv.bias")


def test_integers_are_no_weights(files, tmp_path):
    spoil(files["transformer"], lambda state: state.update({"head.bias": torch.zeros(32, dtype=torch.int64)}))
    refused(files, tmp_path, "head.bias", "int64")


def test_parts_of_different_models(files, tmp_path):
    tokenizer = tiny_image_tokenizer(num_code_bits=6, stem_patch=1, multipliers=(1, 1, 1, 1))
    save_pth(released_tokenizer(tokenizer), files["image_tokenizer"])
    refused(files, tmp_path, "16 bits a token", "6 a code")


def test_files_swapped(files, tmp_path):
    swapped = {"transformer": files["image_tokenizer"], "image_tokenizer": files["transformer"]}
    refused(swapped, tmp_path, "is missing", "right file")


# -- hostile and damaged files -------------------------------------------------------------------------------------


class Payload:
    """A pickle that creates a file when it is loaded without restrictions."""

    def __init__(self, marker) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("part", ["transformer", "image_tokenizer"])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_pickle_with_code_is_refused_unexecuted(part, how, files, tmp_path):
    marker = tmp_path / "executed"
    content = {"word_embed.weight": torch.zeros(2), "payload": Payload(marker)}
    if how == "plain pickle":
        files[part].write_bytes(pickle.dumps(content))
    else:
        torch.save(content, files[part], _use_new_zipfile_serialization=how == "zip")
    refused(files, tmp_path, files[part].name, *(() if how == "plain pickle" else ("mkdir", "nothing was executed")))
    assert not marker.exists()
    if how == "zip":
        torch.load(files[part], weights_only=False)  # the payload is real
        assert marker.exists()


def test_pickle_with_code_among_pieces_is_refused_unexecuted(transformer, files, tmp_path):
    folder = save_pieces(released_transformer(transformer), tmp_path / "pieces", "bin")
    marker = tmp_path / "executed"
    torch.save({"payload": Payload(marker)}, folder / "model-00002-of-00002.bin")
    refused(files | {"transformer": folder}, tmp_path, "model-00002-of-00002.bin", "executed")
    assert not marker.exists()


def test_a_command_line_kept_beside_the_weights_is_no_obstacle(files, tmp_path):
    state = torch.load(files["transformer"], weights_only=True)
    torch.save({"args": argparse.Namespace(depth=2), "trainer": {"gpt_fsdp": state}}, files["transformer"])
    assert convert(**files, output=tmp_path / "out").is_dir()


def corrupt(how, path):
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint" * 9}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "text"])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_damaged_file(how, kind, transformer, files, tmp_path):
    if kind == "safetensors":
        files["transformer"] = tmp_path / "t.safetensors"
        save_file(released_transformer(transformer), files["transformer"])
    corrupt(how, files["transformer"])
    refused(files, tmp_path, files["transformer"].name, "fetch it again")


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"vae": 3}, {"trainer": {"gpt_fsdp": {"a": "text"}}}, {}, torch.zeros(3)]
)
def test_not_a_state_dict(content, files, tmp_path):
    save_pth(content, files["transformer"])
    refused(files, tmp_path, files["transformer"].name)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(32), torch.zeros(32).to_sparse(), torch.zeros(32, device="meta")]
)
def test_tensor_without_values_of_its_own(tensor, files, tmp_path):
    spoil(files["transformer"], lambda state: state.update({"head.bias": tensor}))
    refused(files, tmp_path, "head.bias")


def test_no_such_file_and_unknown_kind(files, tmp_path):
    refused(files | {"transformer": tmp_path / "none.pth"}, tmp_path, "none.pth", "no such")
    (tmp_path / "weights.gguf").write_bytes(b"x")
    refused(files | {"transformer": tmp_path / "weights.gguf"}, tmp_path, "weights.gguf", ".safetensors")
    (tmp_path / "empty").mkdir()
    refused(files | {"transformer": tmp_path / "empty"}, tmp_path, "0 checkpoints")


@pytest.mark.parametrize("problem", ["no json", "no map", "piece missing", "outside", "key missing", "key twice"])
def test_bad_index(problem, transformer, files, tmp_path):
    folder = save_pieces(released_transformer(transformer), tmp_path / "pieces", "safetensors")
    index = folder / "model.safetensors.index.json"
    pieces = sorted(folder.glob("*.safetensors"))
    if problem == "no json":
        index.write_text("{")
    elif problem == "no map":
        index.write_text('{"weight_map": [1]}')
    elif problem == "piece missing":
        pieces[1].unlink()
    elif problem == "outside":
        pieces[1].rename(tmp_path / "elsewhere.safetensors")
        index.write_text(index.read_text().replace(pieces[1].name, "../elsewhere.safetensors"))
    elif problem == "key missing":
        save_file({"head.bias": torch.zeros(32)}, pieces[1])
    else:
        save_file(released_transformer(transformer), pieces[1])
    refused(files | {"transformer": folder}, tmp_path, str(folder))


# -- output --------------------------------------------------------------------------------------------------------


def test_existing_output_is_kept_unless_overwritten(files, tmp_path):
    output = convert(**files, output=tmp_path / "out", size=512)
    with pytest.raises(ValueError, match="exists"):
        convert(**files, output=output, size=256)
    assert VAREditPipeline.from_pretrained(output).config.size == 512
    convert(**files, output=output, size=256, overwrite=True)
    assert VAREditPipeline.from_pretrained(output).config.size == 256
    assert visible(tmp_path) == {"t.pth", "v.pth", "out"}


def test_overwrite_spares_what_is_no_model(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="no model folder"):
        convert(**files, output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "dear"


def test_failed_conversion_keeps_the_old_folder(files, tmp_path):
    output = convert(**files, output=tmp_path / "out", size=512)
    with pytest.raises(ConvertError, match="text encoder"):  # fails after the folder was begun
        convert(**files, output=output, text_encoder=tmp_path / "nothing", overwrite=True)
    assert VAREditPipeline.from_pretrained(output).config.size == 512
    assert visible(tmp_path) == {"t.pth", "v.pth", "out"}


def test_unwritable_output(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        convert(**files, output=tmp_path / "file" / "out")


def test_permissions_are_the_usual_ones(text_folder, files, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    output = convert(**files, output=tmp_path / "out", text_encoder=text_folder, size=128)
    for path in (output, *output.rglob("*")):
        usual = tmp_path / ("folder" if path.is_dir() else "file")
        assert path.stat().st_mode == usual.stat().st_mode, path


# -- presets and flags ---------------------------------------------------------------------------------------------


def test_without_preset_the_released_layout_is_assumed_and_told(files, tmp_path, caplog):
    pipeline = VAREditPipeline.from_pretrained(convert(**files, output=tmp_path / "out"))
    assert pipeline.transformer.config.position_layout == "released"
    assert (pipeline.config.fit, pipeline.config.size) == ("square", 512)
    assert "assumed position_layout released, fit square, size 512" in caplog.text
    assert pipeline.text_encoder is None
    assert "prompt_embeds" in caplog.text


def test_preset_supplies_what_tensors_cannot_tell_and_flags_override(files, tmp_path, monkeypatch, transformer):
    tokenizer = {"num_code_bits": 4, "base_width": 32, "multipliers": (1, 2, 1, 1), "num_blocks": 1, "patch_size": 2}
    preset = convert_module.Preset(
        {"width": 64, "position_layout": "offset"}, tokenizer, 256, "native", 2.0, 0.3, 0.9, 1
    )
    monkeypatch.setitem(PRESETS, "small", preset)
    pipeline = VAREditPipeline.from_pretrained(convert(**files, output=tmp_path / "a", preset="small"))
    assert pipeline.transformer.config.position_layout == "offset"
    settings = ("size", "fit", "guidance_scale", "temperature", "top_p")
    assert [pipeline.config[name] for name in settings] == [256, "native", 2.0, 0.3, 0.9]
    output = convert(**files, output=tmp_path / "b", preset="small", position_layout="released", fit="square", size=128)
    pipeline = VAREditPipeline.from_pretrained(output)
    assert pipeline.transformer.config.position_layout == "released"
    assert [pipeline.config[name] for name in settings] == [128, "square", 2.0, 0.3, 0.9]


def test_preset_of_another_model(files, tmp_path):
    refused(files, tmp_path, "t.pth", "num_bits 16", "32", preset="2b-512")


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [
        ({"preset": "3b"}, "2b-512"),
        ({"size": 500}, "512"),
        ({"fit": "round"}, "square"),
        ({"position_layout": "raster"}, "released"),
        ({"dtype": torch.float16}, "bfloat16"),
    ],
)
def test_unknown_options(options, mentioned, files, tmp_path):
    refused(files, tmp_path, str(next(iter(options.values()))), mentioned, **options)


def test_size_beyond_the_level_embeddings(files, tmp_path):
    save_pth(released_transformer(tiny_transformer(num_blocks=2, num_levels=10)), files["transformer"])
    refused(files, tmp_path, "size 768", "10", size=768)


def test_presets_are_the_released_sizes():
    with torch.device("meta"):
        counts = {
            name: sum(
                p.numel()
                for part in (VAREditTransformer(**preset.transformer), VAREditImageTokenizer(**preset.image_tokenizer))
                for p in part.parameters()
            )
            for name, preset in PRESETS.items()
        }
    text = {preset.num_parameters - counts[name] for name, preset in PRESETS.items()}
    assert text == {1_223_527_424}  # the encoder of FLAN-T5-XL
    assert {name: round(count / 1e9, 1) for name, count in counts.items() if "512" in name} == {
        "2b-512": 2.3,
        "8b-512": 8.5,
    }
    for preset in PRESETS.values():
        assert preset.transformer["num_bits"] == (
            preset.image_tokenizer["num_code_bits"] * preset.image_tokenizer["patch_size"] ** 2
        )


def test_presets_import_no_torch():
    code = "import sys, varedit.presets; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- text encoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A full encoder-decoder T5 with its tokenizer, as FLAN-T5 is released."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer, _ = tiny_text_encoder()
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=258, d_model=TEXT_FEATURES, d_kv=16, d_ff=64, num_layers=2, num_heads=2, tie_word_embeddings=False
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_text_encoder_is_kept_without_its_decoder(text_folder, files, tmp_path):
    output = convert(**files, output=tmp_path / "out", text_encoder=text_folder, size=128)
    pipeline = VAREditPipeline.from_pretrained(output)
    assert type(pipeline.text_encoder).__name__ == "T5EncoderModel"
    original = T5ForConditionalGeneration.from_pretrained(text_folder).get_encoder().eval()
    ids = torch.tensor([pipeline.tokenizer("make it blue")["input_ids"]])
    with torch.no_grad():
        ours = pipeline.text_encoder(input_ids=ids).last_hidden_state
        theirs = original(input_ids=ids).last_hidden_state
    assert torch.equal(ours, theirs)
    result = pipeline(Image.new("RGB", (128, 128), "red"), "make it blue", seed=0)
    assert result.images[0].size == (128, 128)


def test_text_encoder_dtype(text_folder, files, tmp_path):
    output = convert(**files, output=tmp_path / "out", text_encoder=str(text_folder), dtype=torch.bfloat16)
    assert "BF16" in set(stored_dtypes(output / "text_encoder").values())


def test_the_command_writes_a_folder_that_edits(text_folder, files, transformer, tmp_path, monkeypatch, varedit):
    """With every option a tiny model allows; the preset is one of its sizes."""
    sizes = {"num_code_bits": 4, "base_width": 32, "multipliers": (1, 2, 1, 1), "num_blocks": 1, "patch_size": 2}
    preset = convert_module.Preset({"width": 64, "position_layout": "offset"}, sizes, 256, "native", 2.0, 0.3, 0.9, 1)
    monkeypatch.setitem(PRESETS, "small", preset)
    output = tmp_path / "out"
    released = ["--transformer", files["transformer"], "--image-tokenizer", files["image_tokenizer"], "-o", output]
    common = ["convert", *released, "--preset=small", "--text-encoder", text_folder]
    ran = varedit(*common, "--position-layout=released", "--fit=square", "--size=128", "--dtype=bfloat16")
    assert ran.code == 0 and f"{output}: written" in ran.out, ran.err
    for part in ("transformer", "text_encoder"):
        assert "BF16" in set(stored_dtypes(output / part).values())
    config = VAREditPipeline.load_config(str(output))
    settings = ("size", "fit", "guidance_scale", "temperature", "top_p")
    assert [config[name] for name in settings] == [128, "square", 2.0, 0.3, 0.9]
    assert VAREditTransformer.load_config(output, subfolder="transformer")["position_layout"] == "released"

    varedit(*common).assert_refused("out", "exists")
    assert VAREditPipeline.load_config(str(output))["size"] == 128
    assert varedit(*common, "--overwrite", "--size=128").code == 0
    pipeline = VAREditPipeline.from_pretrained(output)
    assert_same(pipeline.transformer, transformer)
    assert (pipeline.transformer.config.position_layout, pipeline.config.fit) == ("offset", "native")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    assert varedit("edit", tmp_path / "photo.png", "make it blue", "--model", output).code == 0
    with Image.open(tmp_path / "photo.edited.png") as image:
        assert image.size == (60, 40)


def test_text_encoder_of_another_width(text_folder, files, tmp_path):
    save_pth(released_transformer(tiny_transformer(num_blocks=2, text_features=48)), files["transformer"])
    refused(files, tmp_path, str(text_folder), "width 32", "48", text_encoder=text_folder)


def test_text_encoder_that_is_none(files, tmp_path):
    (tmp_path / "hollow").mkdir()
    refused(files, tmp_path, "text encoder", "hollow", text_encoder=tmp_path / "hollow")


def test_text_encoder_with_missing_weights(text_folder, files, tmp_path):
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for file in text_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with safe_open(text_folder / "model.safetensors", "pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys() if "encoder.block.1" not in key}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(files, tmp_path, "incomplete", "encoder.block.1", text_encoder=folder)


# -- recorded vectors: the real released names ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bsq32_f16", "bsq14_f8_patchify"])
@pytest.mark.parametrize("layout", ["bare", "safetensors", "pieces pth"])
def test_recorded_weights_in_other_layouts(name, layout, parity_dir, tmp_path):
    """The nested layout goes through tests/test_parity.py to the recorded outputs; the others must equal it."""
    with safe_open(parity_dir / f"{name}.weights.safetensors", "pt") as tensors:
        weights = {key: tensors.get_tensor(key) for key in tensors.keys()}
    parts = {
        prefix: {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for prefix in ("transformer.", "vae.")
    }
    bare = {re.sub(r"(?<!sample)\.(conv|norm)\.(weight|bias)$", r".\2", key): v for key, v in parts["vae."].items()}
    assert bare.keys() != parts["vae."].keys()
    converted = []
    for index, (used, tokenizer) in enumerate((("nested", parts["vae."]), (layout, bare))):
        folder = tmp_path / str(index)
        folder.mkdir()
        output = convert(
            write_layout(used, parts["transformer."], ("trainer", "gpt_fsdp"), folder),
            write_layout(used, tokenizer, ("vae",), folder),
            folder / "out",
        )
        converted.append(VAREditPipeline.from_pretrained(output))
    assert_same(converted[1].transformer, converted[0].transformer)
    assert_same(converted[1].image_tokenizer, converted[0].image_tokenizer)


# -- the text encoder's files ----------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_is_one_line(text_folder, files, tmp_path):
    """The library that writes the text encoder has an error of its own for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow larger
    try:
        with pytest.raises(ValueError, match=r"cannot write .*out: .*; make room") as error:
            convert(**files, output=tmp_path / "out", text_encoder=text_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error.value.__cause__, SafetensorError) and "\n" not in str(error.value)
    assert visible(tmp_path) == {"t.pth", "v.pth"}


@pytest.mark.parametrize("damage", ["cut off", "text in place of a pickle", "an empty pickle"])
def test_a_damaged_text_encoder_is_named(damage, text_folder, files, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(text_folder, folder)
    weights = folder / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
        (folder / "pytorch_model.bin").write_text("not found" if "text" in damage else "")
    with pytest.raises(ConvertError, match=r"text encoder '.*t5': .*; pass a folder or hub name"):
        convert(**files, output=tmp_path / "out", text_encoder=folder)
