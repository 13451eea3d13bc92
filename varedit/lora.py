"""Adapters on the transformer (LoRA): add, save, load, stack, merge. Thin over peft and diffusers' adapter mixin.

The rest of a model (image tokenizer, text encoder) is never adapted.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from varedit.pipeline import VAREditPipeline
from varedit.transformer import VAREditTransformer

DEFAULT_NAME = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
TARGETS = ("to_qkv", "proj", "to_q", "to_kv", "fc1", "fc2")
"""The linear layers of the blocks."""
_NF4_BLOCK = 64 * 256  # 64 weights share a scale, 256 scales share one of theirs


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError("adapters need the package peft; pip install peft") from error


def add_lora(
    transformer: VAREditTransformer, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = TARGETS
) -> None:
    """Put new adapters into a transformer; they alone are trainable then, float32, and change nothing yet.

    Args:
        rank, alpha, dropout: as in peft; the update is scaled by alpha / rank.
        targets: ends of the names of linear layers inside the blocks.

    Raises:
        ValueError: a target that no block has, or peft is not installed.
    """
    _need_peft()
    from peft import LoraConfig

    names = [name for name, _ in transformer.named_modules() if name.startswith("blocks.")]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise ValueError(f"lora target {target!r} is no layer of a block; choose from {', '.join(TARGETS)}")
    transformer.requires_grad_(False)
    pattern = rf"blocks\..*\.({'|'.join(targets)})"  # a whole match: text_pool.proj is not meant
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)  # type: ignore[arg-type]
    transformer.add_adapter(settings)
    transformer.train(transformer.training)  # new layers begin in training mode, whatever mode the others are in
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def quantize_blocks(transformer: VAREditTransformer) -> None:
    """Round the linear layers of the blocks to 4 bits, in place; with `add_lora` this is QLoRA (Dettmers et al. 2023).

    NF4 with double quantization, about 0.52 bytes a weight. They can no longer be trained, saved or merged into; the
    adapters trained on them are loaded into the unquantized model.

    Raises:
        ValueError: torchao is not installed, or a layer does not divide into its blocks.
    """
    try:
        from torchao.quantization import to_nf4
    except ImportError as error:
        raise ValueError("4-bit weights need the package torchao; pip install 'torchao>=0.18'") from error
    for name, layer in transformer.named_modules():
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            count = layer.weight.numel()
            if count % _NF4_BLOCK:
                raise ValueError(
                    f"{name} has {count} weights, no multiple of {_NF4_BLOCK} as 4 bits need; use bfloat16 here"
                )
            layer.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)


def save_lora(transformer: VAREditTransformer, folder: str | os.PathLike, name: str = DEFAULT_NAME) -> Path:
    """Write one adapter as safetensors, rank and alpha with it; returns the file."""
    transformer.save_lora_adapter(folder, adapter_name=name, weight_name=WEIGHTS)
    return Path(folder) / WEIGHTS


def load_lora(pipeline: VAREditPipeline, source: str | os.PathLike, name: str = DEFAULT_NAME) -> None:
    """Load an adapter into a pipeline; it is active at once, in place of others.

    Args:
        source: the file that `save_lora` wrote, or its folder.
        name: to tell several adapters apart.

    Raises:
        ValueError: no such file, the name is taken, or the adapter is not for this transformer.
    """
    _need_peft()
    path = Path(source)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"adapter {str(source)!r} is not there; give a folder with {WEIGHTS}, or the file")
    if name in getattr(pipeline.transformer, "peft_config", {}):
        raise ValueError(f"an adapter named {name!r} is loaded already; give another name, or unload it")
    _check_fits(pipeline.transformer, path)
    pipeline.transformer.load_lora_adapter(str(path.parent), weight_name=path.name, adapter_name=name, prefix=None)
    pipeline.transformer.set_adapters([name])
    pipeline.transformer.train(pipeline.transformer.training)  # or an adapter trained with dropout would drop out here


def stack_lora(pipeline: VAREditPipeline, scales: Mapping[str, float]) -> None:
    """Use several loaded adapters together, each with a factor: {"style": 0.7, "snow": 1.0}. Others are off.

    Raises:
        ValueError: an adapter that is not loaded.
    """
    loaded = list(getattr(pipeline.transformer, "peft_config", {}))
    for name in scales:
        if name not in loaded:
            raise ValueError(f"no adapter named {name!r} is loaded; there are {', '.join(loaded) or 'none'}")
    pipeline.transformer.set_adapters(list(scales), list(scales.values()))


def merge_lora(pipeline: VAREditPipeline) -> None:
    """Add the active adapters into the weights and forget them: no cost at inference, and the model can be saved."""
    if not getattr(pipeline.transformer, "peft_config", {}):
        raise ValueError("no adapter is loaded; load one before merging")
    pipeline.transformer.fuse_lora(safe_fusing=True, adapter_names=pipeline.transformer.active_adapters())
    unload_lora(pipeline)
    pipeline.transformer.register_to_config(_name_or_path=None)  # no longer the folder's: edits record other weights


def unload_lora(pipeline: VAREditPipeline) -> None:
    """Take all adapters out: the model is as it was before (or as merged)."""
    pipeline.transformer.unload_lora()
    pipeline.transformer.__dict__.pop("peft_config", None)
    pipeline.transformer._hf_peft_config_loaded = False


def _check_fits(transformer: VAREditTransformer, path: Path) -> None:
    """Every adapted layer must exist here, with the same width."""
    from safetensors import SafetensorError, safe_open

    modules = dict(transformer.named_modules())
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"adapter {str(path)!r} cannot be read: {error}") from error
    for key, shape in shapes.items():
        layer, found, _ = key.partition(".lora_")
        module = modules.get(layer)
        module = getattr(module, "base_layer", module)
        if not found or module is None:
            raise ValueError(f"adapter {str(path)!r} is for another model: this one has no layer {layer}")
        width = module.in_features if ".lora_A." in key else module.out_features
        if width != (shape[1] if ".lora_A." in key else shape[0]):
            raise ValueError(f"adapter {str(path)!r} is for another model: {layer} has another width here")
