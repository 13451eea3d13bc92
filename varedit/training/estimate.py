"""What a run would take, without running it: shapes, numbers of parameters and memory, from tensors without values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # unlike the meta device it lets autocast be switched

from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.presets import PRESETS
from varedit.scales import ASPECT_RATIOS, NUM_SCALES, ScaleSchedule, scale_schedule
from varedit.training.checkpoint import training_state
from varedit.training.config import EditorConfig, check_processes, transformer_arguments
from varedit.training.trainer import adapt
from varedit.training.typed_yaml import construct
from varedit.training.updates import Average, build_optimizers, trainable
from varedit.transformer import VAREditTransformer, attention_mask

GIB = 1 << 30
# Bytes a token, channel and block that the backward pass needs in bfloat16, all kept or only the blocks' inputs.
_KEPT, _KEPT_CHECKPOINTED = 46, 4
_BYTES_NF4 = 0.5 + 1 / 64  # a weight: four bits, and an int8 scale for 64 of them
_BYTES_LOGITS = 4 * 4  # float32: logits, their gradient, and two temporaries of the loss


@dataclass(frozen=True)
class Estimate:
    """Of one process. Sizes in bytes.

    Attributes:
        num_parameters: of the transformer, adapters included; num_trained: of those.
        num_companions: of image tokenizer and text encoder.
        num_tokens: of the longest sequence, source and target.
        weights: of the transformer; gradients; optimizer: its state; average: of the weights, if any.
        companions: weights of the frozen image tokenizer (float32) and text encoder (bfloat16).
        gathered: weights that sharding brings together for a moment.
        activations: of one micro-batch, an estimate.
    """

    num_parameters: int
    num_trained: int
    num_companions: int
    num_tokens: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    companions: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.average, self.companions, self.gathered)
        return sum(parts) + self.activations

    def lines(self) -> list[str]:
        """For people."""
        sizes = ("weights", "gradients", "optimizer", "average", "companions", "gathered", "activations", "total")
        return [
            f"parameters: {self.num_parameters:,}, trained {self.num_trained:,}; "
            f"image tokenizer and text encoder {self.num_companions:,}",
            f"longest sequence: {self.num_tokens:,} tokens",
            "memory of each process in GiB (activations are an estimate):",
            *(f"  {name:<12}{getattr(self, name) / GIB:8.2f}" for name in sizes),
        ]


def estimate(config: EditorConfig, num_processes: int = 1) -> Estimate:
    """Build the run from tensors without values, run its forward pass at every size, and add up memory.

    A model folder that is not there is stood in for by the config's preset.

    Raises:
        ValueError: neither the folder nor a preset tells the architecture; the parts do not fit together.
    """
    check_processes(config, num_processes)
    with torch.device("meta"):
        transformer = _transformer(config)
        tokenizer, num_text = _companions(config)
    if tokenizer.num_token_bits != transformer.config.num_bits:
        raise ValueError(
            f"the transformer predicts {transformer.config.num_bits} bits a token, the image tokenizer has "
            f"{tokenizer.num_token_bits}; they are not from the same model"
        )
    longest = _longest_sequence(transformer, _schedules(config, transformer))
    modules: dict[str, nn.Module] = {"transformer": transformer}
    parameters = trainable(modules)
    optimizers = build_optimizers(modules, config.optimizer)
    average = Average(parameters, config.ema_decay) if config.ema_decay else None
    state = training_state(parameters, optimizers, average)
    shards = num_processes if config.sharding == "fsdp" else 1
    trained = sum(value.numel() for value in parameters.values())
    block = sum(value.numel() for value in transformer.blocks[0].parameters())
    num_tokenizer = sum(value.numel() for value in tokenizer.parameters())
    return Estimate(
        num_parameters=sum(value.numel() for value in transformer.parameters()),
        num_trained=trained,
        num_companions=num_tokenizer + num_text,
        num_tokens=longest,
        weights=(_bytes(transformer.parameters()) - _saved_by_nf4(config, transformer)) // shards,
        gradients=_bytes(parameters.values()) // shards,
        optimizer=_bytes(v for k, v in state.items() if not k.startswith(("weight.", "average."))) // shards,
        average=_bytes(v for k, v in state.items() if k.startswith("average.")) // shards,
        companions=4 * num_tokenizer + 2 * num_text,
        gathered=2 * block * 2 if shards > 1 else 0,  # this block and the next, bfloat16
        activations=_activations(config, transformer, longest),
    )


def _transformer(config: EditorConfig) -> VAREditTransformer:
    """The run's transformer, with adapters if asked for. Raises ValueError."""
    arguments: dict[str, Any] = dict(transformer_arguments(config))
    if config.start is not None and Path(config.start, "transformer", "config.json").is_file():
        saved = VAREditTransformer.load_config(config.start, subfolder="transformer")
        arguments = {k: v for k, v in saved.items() if not k.startswith("_")} | dict(config.transformer)
    elif config.preset is None and config.start is not None:
        raise ValueError(f"no model in start {config.start!r}; make it first, or name its preset for a dry run")
    transformer = construct(VAREditTransformer, arguments, "transformer")
    if config.lora is not None:
        if config.frozen_dtype != "float32":
            for name, parameter in list(transformer.named_parameters()):
                if not any(part in name for part in transformer._keep_in_fp32_modules):
                    owner, _, last = name.rpartition(".")
                    setattr(transformer.get_submodule(owner), last, nn.Parameter(parameter.detach().bfloat16()))
        adapt(transformer, config)
    return transformer


def _companions(config: EditorConfig) -> tuple[VAREditImageTokenizer, int]:
    """The image tokenizer, and the number of parameters of the text encoder."""
    source = config.image_tokenizer or config.start or ""
    folder = Path(source, "image_tokenizer") if Path(source, "model_index.json").is_file() else Path(source)
    preset = PRESETS[config.preset] if config.preset else None
    if (folder / "config.json").is_file():
        tokenizer = VAREditImageTokenizer.from_config(VAREditImageTokenizer.load_config(folder))
    elif preset is not None:
        tokenizer = VAREditImageTokenizer(**preset.image_tokenizer)
    else:
        raise ValueError(f"no image tokenizer in {source!r}; train or convert one first")
    text = Path(config.text_encoder or config.start or "")
    text = text / "text_encoder" if (text / "model_index.json").is_file() else text
    if (text / "config.json").is_file():
        from transformers import AutoConfig, AutoModelForTextEncoding

        encoder = AutoModelForTextEncoding.from_config(AutoConfig.from_pretrained(text))
        return tokenizer, sum(value.numel() for value in encoder.parameters())
    if preset is None:
        return tokenizer, 0
    known = VAREditTransformer(**preset.transformer)
    others = sum(v.numel() for module in (known, tokenizer) for v in module.parameters())
    return tokenizer, preset.num_parameters - others


def _schedules(config: EditorConfig, transformer: VAREditTransformer) -> list[ScaleSchedule]:
    for size in config.data.sizes:
        if NUM_SCALES[size] > transformer.config.num_levels:
            raise ValueError(f"config field data.sizes has {size}; the transformer has too few levels for it")
    ratios: tuple = (1.0,) if config.data.fit == "square" else ASPECT_RATIOS
    if config.data.source == "world" and config.data.fit == "native":
        ratios = tuple(config.data.aspects)
    return [scale_schedule(size, ratio) for size in config.data.sizes for ratio in ratios]


@torch.no_grad()
def _longest_sequence(transformer: VAREditTransformer, schedules: list[ScaleSchedule]) -> int:
    """Run all scales of every schedule, without values; returns the most tokens, source and target together."""
    settings, lengths, cpu = transformer.config, [], torch.device("cpu")
    # Masks are remembered by the model, so they must be real ones: made before the mode is on.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        bare = VAREditTransformer.from_config(settings)  # adapters change no shape
    for schedule in schedules:
        for aligned in (False, True):
            attention_mask(schedule, settings.conditioning, aligned, cpu)
        with mode:
            num_targets = schedule.offsets[-1]
            logits = bare(
                schedule,
                torch.empty(1, num_targets - schedule.num_tokens[0], settings.num_bits),
                source_BChw=torch.empty(1, settings.num_bits, *schedule.finest),
                text_BTF=torch.empty(1, 8, settings.text_features),
                text_mask_BT=torch.ones(1, 8, dtype=torch.bool),
            )
            assert logits.shape == (1, num_targets, settings.num_bits, 2)
        num_source = num_targets if settings.conditioning == "full" else schedule.num_tokens[-1]
        lengths.append(num_targets + num_source)
    return max(lengths)


def _activations(config: EditorConfig, transformer: VAREditTransformer, num_tokens: int) -> int:
    settings, batch = transformer.config, config.micro_batch_size
    scale = 2 if config.precision == "float32" else 1  # "auto": as on a graphics card
    layer = num_tokens * settings.width * batch * scale
    blocks = settings.num_blocks
    kept = (_KEPT_CHECKPOINTED * blocks + _KEPT) * layer if config.gradient_checkpointing else _KEPT * blocks * layer
    masks = 3 * num_tokens**2  # boolean, and as a bias in the kernel
    return kept + masks + batch * num_tokens * settings.num_bits * 2 * _BYTES_LOGITS


def _saved_by_nf4(config: EditorConfig, transformer: VAREditTransformer) -> int:
    """Bytes that the blocks' linear layers, counted in bfloat16, are smaller."""
    if config.lora is None or config.frozen_dtype != "nf4":
        return 0
    layers = ((name, layer) for name, layer in transformer.blocks.named_modules() if isinstance(layer, nn.Linear))
    return int(sum(layer.weight.numel() for name, layer in layers if ".lora_" not in name) * (2 - _BYTES_NF4))


def _bytes(values) -> int:
    tensors: list[Tensor] = list(values)
    return sum(value.numel() * value.element_size() for value in tensors)
