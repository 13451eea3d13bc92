"""Released checkpoints -> our model folders. The released names live in this file only.

Every size is inferred from the tensors, every key is accounted for, files are memory-mapped and written tensor by
tensor: no model is ever built with weights in it. Loading is restricted to tensors: a pickle with code is refused.
"""

import json
import logging
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn

from varedit.checkpoint_files import Checkpoint, ConvertError, first_line, open_checkpoint
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.model_folder import check_folder, written_whole
from varedit.pipeline import VAREditPipeline
from varedit.presets import PRESETS, Preset
from varedit.scales import NUM_SCALES
from varedit.transformer import POSITION_LAYOUTS, VAREditTransformer

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 2**30
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FITS = ("native", "square")

Shape = tuple[int, ...]


def convert(
    transformer: str | os.PathLike,
    image_tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    text_encoder: str | os.PathLike | None = None,
    preset: str | None = None,
    position_layout: str | None = None,
    fit: str | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a released VAREdit or Infinity checkpoint to a folder that `VAREditPipeline.from_pretrained` loads.

    Args:
        transformer, image_tokenizer: a `.pth` (a bare state dict, or one under `trainer.gpt_fsdp` or `vae`), a
            `.safetensors`, or a folder of pieces with their index.
        output: folder to write. It appears at the end, whole; an interrupted conversion leaves nothing.
        text_encoder: folder or hub name of a transformers text encoder; an encoder-decoder's encoder is kept.
            None: the folder runs with `prompt_embeds` only.
        preset: one of `presets.PRESETS`; checks the sizes, and says what tensors cannot.
        position_layout, fit, size: override the preset. Without preset: "released", "square", 512.
        dtype: of the stored transformer and text encoder: float32 or bfloat16; None keeps each tensor's own. The image
            tokenizer keeps its own always, and what the transformer computes in float32 is stored in float32.
        overwrite: replace an existing model folder.

    Returns:
        The folder.

    Raises:
        ConvertError: a file is unreadable or holds more than tensors; keys are missing, extra or of another shape; the
            parts do not belong together.
        ValueError: `output` exists or cannot be written.
    """
    output = Path(output)
    settings = _settings(preset, position_layout, fit, size)
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ConvertError(f"dtype {dtype} is not supported (T5 overflows in float16); use float32 or bfloat16")
    check_folder(output, overwrite)
    parts = _match_parts(Path(transformer), Path(image_tokenizer), settings)
    with written_whole(output) as folder:
        components = {"text_encoder": None, "tokenizer": None}
        if text_encoder is not None:
            text_features = parts["transformer"].model.config.text_features
            components = _save_text_encoder(text_encoder, text_features, folder, dtype)
        _write_part(parts["transformer"], folder / "transformer", dtype)
        _write_part(parts["image_tokenizer"], folder / "image_tokenizer", None)
        components |= {name: part.model for name, part in parts.items()}
        VAREditPipeline(**components, **settings.pipeline).save_config(folder)
    if settings.assumed:
        listed = ", ".join(f"{name} {value}" for name, value in settings.assumed.items())
        logger.warning("no preset: assumed %s; pass a preset or these values if the model is another", listed)
    if text_encoder is None:
        known = f", for example {PRESETS[preset].text_encoder}" if preset else ""
        logger.warning("%s has no text encoder: edits need prompt_embeds, or convert with one%s", output, known)
    return output


# -- what tensors cannot tell --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """Values of the output; `assumed` are those that nobody gave."""

    preset: Preset | None
    position_layout: str
    pipeline: Mapping[str, int | float | str]
    assumed: Mapping[str, int | str]


def _settings(preset: str | None, position_layout: str | None, fit: str | None, size: int | None) -> _Settings:
    if preset is not None and preset not in PRESETS:
        raise ConvertError(f"preset {preset!r} is unknown; use one of {', '.join(PRESETS)}")
    if position_layout not in (None, *POSITION_LAYOUTS):
        raise ConvertError(f"position_layout {position_layout!r} is unknown; use one of {', '.join(POSITION_LAYOUTS)}")
    if fit not in (None, *_FITS):
        raise ConvertError(f"fit {fit!r} is unknown; use one of {', '.join(_FITS)}")
    if size is not None and size not in NUM_SCALES:
        raise ConvertError(f"size {size} is not a size class; use one of {', '.join(map(str, NUM_SCALES))}")
    if preset is None:
        assumed = {"position_layout": "released", "fit": "square", "size": 512}
        given = {"position_layout": position_layout, "fit": fit, "size": size}
        assumed = {name: value for name, value in assumed.items() if given[name] is None}
        pipeline = {"fit": fit or "square", "size": size or 512}
        return _Settings(None, position_layout or "released", pipeline, assumed)
    known = PRESETS[preset]
    pipeline = {name: getattr(known, name) for name in ("fit", "size", "guidance_scale", "temperature", "top_p")}
    pipeline |= {name: value for name, value in (("fit", fit), ("size", size)) if value is not None}
    return _Settings(known, position_layout or known.position_layout, pipeline, {})


# -- released names: our name -> theirs ----------------------------------------------------------------------------

_TRANSFORMER_KEYS = {
    "input_proj.weight": "word_embed.weight",
    "input_proj.bias": "word_embed.bias",
    "level_embed": "lvl_embed.weight",
    "start_position": "pos_start",
    "null_text": "cfg_uncond",
    "text_norm.weight": "text_norm.weight",
    "text_pool.query": "text_proj_for_sos.ca.mat_q",
    "text_pool.to_kv.weight": "text_proj_for_sos.ca.mat_kv.weight",
    "text_pool.v_bias": "text_proj_for_sos.ca.v_bias",
    "text_pool.proj.weight": "text_proj_for_sos.ca.proj.weight",
    "text_pool.proj.bias": "text_proj_for_sos.ca.proj.bias",
    "text_proj.0.weight": "text_proj_for_ca.0.weight",
    "text_proj.0.bias": "text_proj_for_ca.0.bias",
    "text_proj.2.weight": "text_proj_for_ca.2.weight",
    "text_proj.2.bias": "text_proj_for_ca.2.bias",
    "shared_modulation.weight": "shared_ada_lin.1.weight",
    "shared_modulation.bias": "shared_ada_lin.1.bias",
    "head_modulation.weight": "head_nm.ada_lin.1.weight",
    "head_modulation.bias": "head_nm.ada_lin.1.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
_BLOCK_KEYS = {
    "modulation_table": "ada_gss",
    "self_attention.to_qkv.weight": "sa.mat_qkv.weight",
    "self_attention.q_bias": "sa.q_bias",
    "self_attention.v_bias": "sa.v_bias",
    "self_attention.log_scale": "sa.scale_mul_1H11",
    "self_attention.proj.weight": "sa.proj.weight",
    "self_attention.proj.bias": "sa.proj.bias",
    "cross_norm.weight": "ca_norm.weight",
    "cross_norm.bias": "ca_norm.bias",
    "cross_attention.to_q.weight": "ca.mat_q.weight",
    "cross_attention.to_q.bias": "ca.mat_q.bias",
    "cross_attention.to_kv.weight": "ca.mat_kv.weight",
    "cross_attention.v_bias": "ca.v_bias",
    "cross_attention.proj.weight": "ca.proj.weight",
    "cross_attention.proj.bias": "ca.proj.bias",
    "mlp.fc1.weight": "ffn.fc1.weight",
    "mlp.fc1.bias": "ffn.fc1.bias",
    "mlp.fc2.weight": "ffn.fc2.weight",
    "mlp.fc2.bias": "ffn.fc2.bias",
}
_BLOCK = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.")
_ZERO_KEYS = re.compile(r"(block_chunks\.\d+\.module\.\d+\.(sa|ca)|text_proj_for_sos\.ca)\.zero_k_bias")
_QUANTIZER_KEYS = re.compile(r"(quantize|quantizer)\.lfq\.mask")


def _transformer_key(name: str, chunk_length: int) -> str:
    """Released blocks are stored in chunks: `block_chunks.i.module.j` is block i * (depth / chunks) + j."""
    if not name.startswith("blocks."):
        return _TRANSFORMER_KEYS[name]
    _, index, inner = name.split(".", 2)
    chunk, place = divmod(int(index), chunk_length)
    return f"block_chunks.{chunk}.module.{place}.{_BLOCK_KEYS[inner]}"


def _tokenizer_key(name: str) -> str:
    side, inner = name.split(".", 1)
    ladder = "down" if side == "encoder" else "up"
    inner = re.sub(r"^levels\.(\d+)\.blocks\.", rf"{ladder}.\1.block.", inner)
    inner = re.sub(r"^levels\.(\d+)\.conv\.", rf"{ladder}.\1.{ladder}sample.conv.", inner)
    inner = re.sub(r"^middle\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", inner)
    return f"{side}.{inner.replace('.shortcut.', '.nin_shortcut.')}"


def _without_wrapper(key: str) -> str:
    """A tokenizer key without the inner `.conv` or `.norm` that some files have around convolutions and norms."""
    return re.sub(r"(?<!sample)\.(conv|norm)\.(weight|bias)$", r".\2", key)


def _released_shape(name: str, shape: Shape) -> Shape:
    """Shape of one of our parameters in a released file, where some have extra dimensions of 1."""
    if name == "start_position" or name.endswith(".modulation_table"):
        return (1, 1, *shape)
    if name == "text_pool.query":
        return (1, *shape)
    return (1, *shape, 1, 1) if name.endswith(".log_scale") else shape


# -- inferring sizes and accounting for keys -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One component: its model on the meta device (shapes, no values), and the file key of each of its parameters."""

    model: nn.Module
    checkpoint: Checkpoint
    keys: dict[str, str]


def _match_parts(transformer: Path, image_tokenizer: Path, settings: _Settings) -> dict[str, _Part]:
    tokenizer = _match_tokenizer(image_tokenizer, transformer_checkpoint := open_checkpoint(transformer))
    editor = _match_transformer(transformer_checkpoint, settings.position_layout)
    size = settings.pipeline["size"]
    if NUM_SCALES[size] > editor.model.config.num_levels:
        raise ConvertError(
            f"size {size} has {NUM_SCALES[size]} scales, {transformer} has {editor.model.config.num_levels} level "
            "embeddings; pass a smaller size"
        )
    if settings.preset:
        for part, wanted in ((editor, settings.preset.transformer), (tokenizer, settings.preset.image_tokenizer)):
            for name, value in wanted.items():
                found = part.model.config[name]
                if name != "position_layout" and value != (tuple(found) if isinstance(found, list) else found):
                    raise ConvertError(
                        f"{part.checkpoint.path} has {name} {found}, the preset {value}; pass its own preset, or none"
                    )
    return {"transformer": editor, "image_tokenizer": tokenizer}


def _match_transformer(checkpoint: Checkpoint, position_layout: str) -> _Part:
    blocks = {(int(found[1]), int(found[2])) for found in map(_BLOCK.match, checkpoint.shapes) if found}
    num_chunks, chunk_length = (max(column, default=0) + 1 for column in (zip(*blocks) if blocks else ((), ())))
    if len(blocks) != num_chunks * chunk_length:
        raise ConvertError(
            f"{checkpoint.path}: {len(blocks)} blocks where {num_chunks} chunks of {chunk_length} belong; "
            f"found block_chunks.i.module.j for (i, j) = {sorted(blocks)[:8]}; fetch it again"
        )
    size_of = checkpoint.size_of
    config = {
        "num_bits": size_of("word_embed.weight", 1, 2),
        "width": size_of("word_embed.weight", 0, 2),
        "num_blocks": len(blocks),
        "num_heads": size_of("block_chunks.0.module.0.sa.scale_mul_1H11", 1, 4),
        "text_features": size_of("text_norm.weight", 0, 1),
        "num_text_heads": size_of("text_proj_for_sos.ca.mat_q", 1, 3),
        "max_text_tokens": size_of("cfg_uncond", 0, 2),
        "num_levels": size_of("lvl_embed.weight", 0, 2),
        "position_layout": position_layout,
    }
    model = _on_meta(VAREditTransformer, config, checkpoint)
    keys = {name: _transformer_key(name, chunk_length) for name in model.state_dict()}
    parameter_free = [key for key in checkpoint.shapes if _ZERO_KEYS.fullmatch(key)]
    for key, tensor in checkpoint.load(parameter_free).items():
        if tensor.any():
            raise ConvertError(f"{checkpoint.path}: {key} is not zero, but keys have no bias in this model")
    return _account(model, checkpoint, keys, parameter_free)


def _match_tokenizer(path: Path, transformer: Checkpoint) -> _Part:
    checkpoint = open_checkpoint(path)
    stored: dict[str, str] = {}
    for key in checkpoint.shapes:
        other = stored.setdefault(_without_wrapper(key), key)
        if other != key:
            raise ConvertError(f"{path}: {other} and {key} are the same weight; fetch it again")

    def size_of(key: str, dim: int) -> int:
        return checkpoint.size_of(stored.get(key, key), dim, 4)

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in stored if key.startswith(prefix)})

    base_width, num_code_bits = size_of("encoder.conv_in.weight", 0), size_of("encoder.conv_out.weight", 0)
    num_levels = count("encoder.down.")
    widths = [size_of(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(num_levels)]
    if not widths or any(width % base_width for width in widths):
        raise ConvertError(f"{path}: level widths {widths} are no multiples of {base_width}; fetch it again")
    num_bits = transformer.size_of("word_embed.weight", 1, 2)
    patch_size = math.isqrt(num_bits // num_code_bits)
    if patch_size < 1 or patch_size**2 * num_code_bits != num_bits:
        raise ConvertError(
            f"{transformer.path} has {num_bits} bits a token, {path} {num_code_bits} a code; take both from one model"
        )
    config = {
        "num_code_bits": num_code_bits,
        "base_width": base_width,
        "multipliers": tuple(width // base_width for width in widths),
        "num_blocks": count("encoder.down.0.block."),
        "patch_size": patch_size,
    }
    model = _on_meta(VAREditImageTokenizer, config, checkpoint)
    keys = {name: _tokenizer_key(name) for name in model.state_dict()}
    parameter_free = [key for key in checkpoint.shapes if _QUANTIZER_KEYS.fullmatch(key)]
    return _account(model, checkpoint, {name: stored.get(key, key) for name, key in keys.items()}, parameter_free)


def _on_meta(model_class: Callable[..., nn.Module], config: dict, checkpoint: Checkpoint) -> nn.Module:
    try:
        with torch.device("meta"):
            return model_class(**config)
    except ValueError as error:
        raise ConvertError(f"{checkpoint.path}: {error}") from error


def _account(model: nn.Module, checkpoint: Checkpoint, keys: dict[str, str], parameter_free: list[str]) -> _Part:
    """Check that the file has every parameter, in its shape, and nothing else. Raises ConvertError with the names."""
    shapes = {keys[name]: _released_shape(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    found = checkpoint.shapes
    problems = {
        "missing": [key for key in shapes if key not in found],
        "unknown": sorted(found.keys() - shapes.keys() - set(parameter_free)),
        "of another shape": [
            f"{key} {found[key]} instead of {shape}" for key, shape in shapes.items() if found.get(key, shape) != shape
        ],
        "of an unusable dtype": [
            f"{key} {checkpoint.dtypes[key]}"
            for key in shapes
            if key in found and checkpoint.dtypes[key] not in (*_DTYPE_NAMES, torch.float64)
        ],
    }
    told = [
        f"{len(names)} keys {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if told:
        raise ConvertError(
            f"{checkpoint.path} is no complete {type(model).__name__}, {'; '.join(told)}; fetch it again"
        )
    logger.info("%s: %d parameters, %d parameter-free keys", checkpoint.path, len(shapes), len(parameter_free))
    return _Part(model, checkpoint, keys)


# -- writing -------------------------------------------------------------------------------------------------------


def _write_part(part: _Part, folder: Path, dtype: torch.dtype | None) -> None:
    """Write config.json and the weights in the layout of diffusers, in shards where they are large.

    The input's pages stay in memory while a shard is written, so a shard takes at most one input file's worth of them.
    """
    part.model.save_config(folder)
    in_float32 = set(part.model._keep_in_fp32_modules or ())
    stored = {name: part.checkpoint.dtypes[key] for name, key in part.keys.items()}
    dtypes = {name: dtype or stored[name] for name in part.keys}
    for name, wanted in dtypes.items():
        if in_float32 & set(name.split(".")) or wanted == torch.float64:
            dtypes[name] = torch.float32
    limit = min(MAX_SHARD_BYTES, part.checkpoint.largest_file)
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(part.keys, key=lambda name: str(part.checkpoint.file_of[part.keys[name]])):
        num_bytes = part.model.get_parameter(name).numel() * stored[name].itemsize
        if shards[-1] and filled + num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    weight_map, total = {}, 0
    for index, names in enumerate(shards):
        ending = f"-{index + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"diffusion_pytorch_model{ending}.safetensors"
        total += _write_shard(part, names, dtypes, file)
        weight_map |= dict.fromkeys(names, file.name)
        logger.info("wrote %s", file.name)
    if len(shards) > 1:
        index_json = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index_json + "\n")


def _write_shard(part: _Part, names: list[str], dtypes: dict[str, torch.dtype], file: Path) -> int:
    """Write one safetensors file tensor by tensor, which the library cannot (it takes all tensors at once).

    The format: length of the header as 8 bytes little-endian, the header as JSON padded to 8 bytes, the values.
    Wider dtypes come first, so that every tensor is aligned.

    Returns:
        Bytes of all values.
    """
    names = sorted(names, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name in names:
        parameter = part.model.get_parameter(name)
        end = total + parameter.numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtypes[name]], "shape": list(parameter.shape), "data_offsets": [total, end]
        }  # fmt: skip
        total = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    tensors = part.checkpoint.load(part.keys[name] for name in names)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            values = tensors[part.keys[name]].to(dtypes[name]).contiguous().flatten()
            stream.write(values.view(torch.uint8).numpy())
    return total


def _save_text_encoder(source: str | os.PathLike, text_features: int, folder: Path, dtype: torch.dtype | None) -> dict:
    """Save a transformers text encoder and its tokenizer; returns them, the encoder without its values."""
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer  # takes seconds

    source = str(source)
    try:
        width = AutoConfig.from_pretrained(source, trust_remote_code=False).hidden_size
        if width != text_features:
            raise ConvertError(
                f"text encoder {source!r} has width {width}, the transformer takes {text_features}; pass its encoder"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        encoder, loading = AutoModelForTextEncoding.from_pretrained(
            source, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
        )
    except ConvertError:
        raise
    except (
        OSError, ValueError, RuntimeError, ImportError, AttributeError, SafetensorError,
        UnpicklingError, EOFError,  # of a damaged pytorch_model.bin, or one with code in it
    ) as error:  # fmt: skip
        raise ConvertError(f"text encoder {source!r}: {first_line(error)}; pass a folder or hub name") from error
    wrong = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if wrong:
        raise ConvertError(f"text encoder {source!r} lacks {', '.join(map(str, wrong[:5]))}; fetch it again")
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return {"text_encoder": encoder.to("meta"), "tokenizer": tokenizer}
