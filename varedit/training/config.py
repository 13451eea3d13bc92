"""What a training run is told: one dataclass per training, read from a YAML file and `--set` overrides.

Every value is checked before any data is read. Imports neither PyTorch nor diffusers.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from varedit.presets import PRESETS
from varedit.scales import ASPECT_RATIOS, SIZES

FREE_ON_START = ("conditioning", "num_aligned_blocks", "position_layout")
"""Arguments of the transformer that change no weight's shape: they may be chosen anew when a training starts."""

NATIVE_ASPECTS = {
    1.0: 36.0, 0.666: 14.0, 1.5: 14.0, 0.75: 11.0, 1.333: 11.0, 0.8: 4.0, 1.25: 4.0, 0.571: 2.0, 1.75: 2.0, 0.5: 1.0,
    2.0: 1.0,
}  # fmt: skip
"""Height over width -> share, where the pairs have no shape of their own: about that of photographs."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pairs come from.

    Attributes:
        source: "world" (the procedural world), or a folder: of pairs (`pairs.jsonl`), or of packed shards.
        sizes: size class -> share of the steps. Each step has one size and one aspect template.
        fit: "native" or "square", how pictures are brought to a template: as the model will be used.
        objects, photos: folders of cut-outs and photographs for the world.
        aspects: height over width -> share of the steps, world only; a folder's pairs have shapes of their own.
        validation: folder of held-out pairs. Without it: the world's test split, or pairs held out of the folder.
        validation_count: how many held-out pairs the validation uses.
        num_workers: processes that read and prepare pairs, for each training process; 0 does it in line.
        max_bad_fraction: pairs that cannot be used are skipped and named in the log; more than this share is fatal.
    """

    source: str = "world"
    sizes: dict[int, float] = field(default_factory=lambda: {256: 1.0})
    fit: Literal["native", "square"] = "native"
    objects: str | None = None
    photos: str | None = None
    aspects: dict[float, float] = field(default_factory=lambda: dict(NATIVE_ASPECTS))
    validation: str | None = None
    validation_count: int = 32
    num_workers: int = 1
    max_bad_fraction: float = 0.01


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated.

    Attributes:
        name: "adamw" (the paper's), or "muon" for matrices and convolutions with AdamW for the rest.
        lr: peak learning rate of AdamW. muon_lr: of Muon.
        betas, eps: of AdamW. The defaults are those of Infinity's recipe.
        weight_decay: of matrices; vectors, norms, embeddings and modulation tables have none.
        warm_up: steps over which the rate rises linearly.
        decay: "constant", "linear" or "cosine", over the last `decay_fraction` of the steps down to
            `final_factor` of the peak.
        clip: largest gradient norm, a model.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-5
    muon_lr: float = 0.015
    betas: tuple[float, float] = (0.9, 0.97)
    eps: float = 1e-8
    weight_decay: float = 0.005
    warm_up: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: float = 0.4
    final_factor: float = 0.02
    clip: float = 5.0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters in place of full fine-tuning.

    Attributes:
        rank, alpha, dropout: as in peft; the update is scaled by alpha / rank.
        targets: ends of the names of the adapted linear layers.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_qkv", "proj", "to_q", "to_kv", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What both trainings have in common.

    Attributes:
        steps: optimizer steps.
        batch_size: pairs a step, over all processes.
        micro_batch_size: pairs a pass of one process; what is left of the batch is accumulated. The losses depend on
            it only by rounding, and on the number of processes likewise.
        seed: of everything: weights from zero, the order of the data, flips and dropouts.
        device: "auto", "cpu" or "cuda".
        precision: "bfloat16" computes in autocast with float32 weights, "float32" does not.
        sharding: "none": every process holds all weights. "fsdp": weights, gradients and optimizer state are sharded
            over the processes (FSDP2).
        compile: compile the blocks with torch.compile.
        ema_decay: of an average of the weights that validation, samples and the result use; 0 for none.
        log_every, validate_every, sample_every, save_every: in steps; 0 for never (the last step always saves).
        sample_count: edits or reconstructions of one sample picture.
        keep_checkpoints: older ones are deleted.
        async_checkpoints: write while training goes on (costs a copy of the state in main memory).
    """

    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int = 16
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    sharding: Literal["none", "fsdp"] = "none"
    compile: bool = False
    ema_decay: float = 0.0
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 500
    sample_count: int = 8
    save_every: int = 500
    keep_checkpoints: int = 2
    async_checkpoints: bool = False


@dataclass(frozen=True, kw_only=True)
class EditorConfig(RunConfig):
    """Training of the transformer; the image tokenizer and the text encoder are frozen.

    Attributes:
        start: model folder to go on from: converted (VAREdit, Infinity), or the `model` folder of a run. None trains
            from zero, and then needs `image_tokenizer`, `text_encoder`, and `preset` or `transformer`.
        preset: a name of `presets.PRESETS` whose transformer this is.
        transformer: arguments of `VAREditTransformer`, on top of the preset. With `start` only those that change no
            weight: conditioning, num_aligned_blocks, position_layout.
        image_tokenizer: folder of a trained tokenizer, or of a model that has one.
        text_encoder: folder or hub name of a text encoder, or folder of a model that has one.
        text_batch_size: 1 encodes every instruction alone and remembers it. More: those of a micro-batch are encoded
            together, this many at a time, and not remembered.
        drop_text: share of the pairs trained without the instruction (condition dropout).
        max_flip: largest share of flipped bits (bitwise self-correction).
        scale_weights: "sqrt_area": a token weighs sqrt(finest area / its scale's area); "equal": all alike.
        gradient_checkpointing: recompute the blocks in the backward pass.
        lora: train adapters on frozen weights.
        frozen_dtype: precision of the frozen transformer weights under LoRA.
    """

    start: str | None = None
    preset: str | None = None
    transformer: dict[str, int | str] = field(default_factory=dict)
    image_tokenizer: str | None = None
    text_encoder: str | None = None
    text_batch_size: int = 1
    drop_text: float = 0.1
    max_flip: float = 0.3
    scale_weights: Literal["sqrt_area", "equal"] = "sqrt_area"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(RunConfig):
    """Training of the image tokenizer. A batch of pairs is twice as many images.

    Attributes:
        start: tokenizer folder to go on from; None trains from zero.
        image_tokenizer: arguments of `VAREditImageTokenizer`.
        laplacian_weight: of L1 on a Laplacian pyramid, beside L1 with weight 1.
        commitment_weight: of the squared distance between features and canvas.
        entropy_weight: of the entropy regularisation: each bit decided, all bits used.
        perceptual_weight: of a perceptual module, which only the Python call can pass.
        adversarial_weight: of a patch discriminator's loss, from step `adversarial_start` on.
        drop_scales: share of the images that the decoder sees without their finest scales (a random number of
            them), so that coarse scales carry content.
    """

    start: str | None = None
    image_tokenizer: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    laplacian_weight: float = 1.0
    commitment_weight: float = 0.5
    entropy_weight: float = 0.0
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    drop_scales: float = 0.0


MAY_CHANGE = (
    "steps", "device", "log_every", "validate_every", "sample_every", "sample_count", "save_every",
    "keep_checkpoints", "async_checkpoints", "data.num_workers", "data.max_bad_fraction", "data.validation",
    "data.validation_count",
)  # fmt: skip
"""Fields that a resumed run may be given anew: all others would make it another run."""

Config = TypeVar("Config", bound=RunConfig)


def load_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config.

    Args:
        kind: `EditorConfig` or `TokenizerConfig`.
        path: YAML file.
        overrides: "field=value" or "group.field=value", the value in YAML; they win over the file.

    Raises:
        ValueError: the file or a value is unusable; one line with the value and the fix.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {str(path)!r} holds {type(values).__name__}; write one field: value a line")
    for override in overrides:
        _override(values, override)
    config = _build(kind, values, "")
    check(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write a config as YAML that `load_config` reads back as an equal config."""
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False), encoding="utf-8")


def changed_fields(config: RunConfig, other: RunConfig) -> list[str]:
    """Names of the fields, such as "data.sizes", in which two configs of one kind differ."""
    first, second = _flat(config), _flat(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


# -- reading ---------------------------------------------------------------------------------------------------------


def _override(values: dict[str, Any], text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ValueError(f"--set {text!r} is not an override; write field=value, as in data.num_workers=2")
    *groups, last = name.strip().split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise ValueError(f"--set {text!r}: {group} has no fields of its own")
    try:
        values[_key(last)] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML; quote it") from error


def _key(text: str) -> Any:
    """A key as YAML reads it, so that sizes.128 meets the file's 128."""
    return yaml.safe_load(text) if text.isdigit() else text


def _build(kind: type, values: dict[str, Any], prefix: str) -> Any:
    known = {item.name: item for item in fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(known)}"
            raise ValueError(f"config field {prefix}{name} is unknown; {hint}")
    return kind(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """The value as the type asks, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, f"{name}.")
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, name, hint)
    if origin is Literal and value in arguments and type(value) in map(type, arguments):
        return value
    if origin is dict and isinstance(value, dict):
        key_type, value_type = arguments
        return {_convert(key_type, k, f"{name} key"): _convert(value_type, v, f"{name}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, name) for item in value)
        if len(value) == len(arguments):
            return tuple(_convert(kind, item, name) for kind, item in zip(arguments, value))
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 6e-5, without a point, as text
            return float(value)
        except (TypeError, ValueError):
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is type(None) and value is None:
        return None
    raise ValueError(f"config field {name} is {value!r}; give {_spell(hint)}")


def _convert_union(arguments: tuple, value: Any, name: str, hint: Any) -> Any:
    if type(None) in arguments and value is None:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    if len(kinds) == 1:  # the message then names the field inside
        return _convert(kinds[0], value, name)
    for kind in kinds:
        try:
            return _convert(kind, value, name)
        except ValueError:
            continue
    raise ValueError(f"config field {name} is {value!r}; give {_spell(hint)}")


def _spell(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is dict:
        return f"a table of {_spell(arguments[0])}: {_spell(arguments[1])}"
    if origin is tuple:
        return f"a list of {_spell(arguments[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(kind) for kind in arguments)
    return "a table of " + ", ".join(item.name for item in fields(hint))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        flat |= _flat(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return flat


# -- checking --------------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"config field {message}")


_AT_LEAST: dict[str, float] = {
    "steps": 1, "batch_size": 1, "micro_batch_size": 1, "seed": 0, "log_every": 1, "validate_every": 0,
    "sample_every": 0, "sample_count": 1, "save_every": 0, "keep_checkpoints": 1, "data.validation_count": 0,
    "data.num_workers": 0, "optimizer.warm_up": 0, "text_batch_size": 1, "lora.rank": 1, "laplacian_weight": 0,
    "commitment_weight": 0, "entropy_weight": 0, "perceptual_weight": 0, "adversarial_weight": 0,
    "adversarial_start": 0, "optimizer.weight_decay": 0,
}  # fmt: skip
_POSITIVE = ("optimizer.lr", "optimizer.muon_lr", "optimizer.eps", "optimizer.clip", "lora.alpha")
_BELOW_ONE = ("ema_decay", "drop_text", "max_flip", "drop_scales", "lora.dropout")
_SHARES = ("data.max_bad_fraction", "optimizer.decay_fraction", "optimizer.final_factor")


def check(config: RunConfig) -> None:
    """Raise ValueError for a value out of range or a combination that cannot work."""
    values = _flat(config)
    for name, least in _AT_LEAST.items():
        _require(values.get(name, least) >= least, f"{name} is {values.get(name)}; give at least {least}")
    for name in _POSITIVE:
        _require(values.get(name, 1) > 0, f"{name} is {values.get(name)}; give more than 0")
    for name in _BELOW_ONE:
        _require(0 <= values.get(name, 0) < 1, f"{name} is {values.get(name)}; give 0 or more and less than 1")
    for name in _SHARES:
        _require(0 <= values.get(name, 0) <= 1, f"{name} is {values.get(name)}; give 0 to 1")
    _require(
        config.batch_size % config.micro_batch_size == 0,
        f"batch_size is {config.batch_size}; make it a multiple of micro_batch_size {config.micro_batch_size}",
    )
    warm_up = config.optimizer.warm_up
    _require(warm_up < config.steps, f"optimizer.warm_up is {warm_up}; make it less than steps {config.steps}")
    _require(all(0 <= beta < 1 for beta in config.optimizer.betas), "optimizer.betas must lie from 0 to below 1")
    _check_data(config.data)
    if isinstance(config, EditorConfig):
        _check_editor(config)
    elif isinstance(config, TokenizerConfig):
        _check_tokenizer(config)


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Raise ValueError if the config does not fit the number of processes."""
    num_micro = config.batch_size // config.micro_batch_size
    _require(
        num_micro % num_processes == 0,
        f"batch_size is {config.batch_size}, {num_micro} micro-batches; make their number a multiple of the "
        f"{num_processes} processes",
    )
    if config.sharding == "fsdp" and num_processes == 1:
        raise ValueError("config field sharding is fsdp with one process; start several with torchrun, or set none")


def _check_data(data: DataConfig) -> None:
    _require(bool(data.sizes), "data.sizes is empty; give at least one size, as in {256: 1}")
    for size, share in data.sizes.items():
        _require(size in SIZES, f"data.sizes has {size}; choose from {', '.join(map(str, SIZES))}")
        _require(share > 0, f"data.sizes gives {size} the share {share}; give more than 0, or leave it out")
    for ratio, share in data.aspects.items():
        _require(
            ratio in ASPECT_RATIOS,
            f"data.aspects has {ratio}; choose from {', '.join(f'{r:g}' for r in ASPECT_RATIOS)}",
        )
        _require(share > 0, f"data.aspects gives {ratio} the share {share}; give more than 0, or leave it out")
    _require(bool(data.aspects), "data.aspects is empty; give at least one, as in {1.0: 1}")
    if data.source != "world":
        for name in ("objects", "photos"):
            _require(getattr(data, name) is None, f"data.{name} is only for data.source world; remove it")
        _require(
            data.aspects == NATIVE_ASPECTS,
            "data.aspects is only for data.source world; a folder's pairs have their own",
        )


def _check_editor(config: EditorConfig) -> None:
    if config.preset is not None:
        _require(config.preset in PRESETS, f"preset is {config.preset!r}; choose from {', '.join(PRESETS)}")
    if config.start is None:
        for name in ("image_tokenizer", "text_encoder"):
            _require(getattr(config, name) is not None, f"{name} is missing; give a folder, or start from a model")
        _require(
            bool(config.preset or config.transformer), "transformer is empty; give its arguments, a preset, or start"
        )
        _require(config.lora is None, "lora needs weights to adapt; give the model folder as start")
    else:
        for name in config.transformer:
            _require(
                name in FREE_ON_START,
                f"transformer.{name} is fixed by the model in start; only {', '.join(FREE_ON_START)} may be given",
            )
    if config.lora is not None:
        _require(config.optimizer.name == "adamw", "optimizer.name is muon with lora; adapters train with adamw")
        _require(
            config.precision == "bfloat16" or config.frozen_dtype == "float32",
            "frozen_dtype is bfloat16 with precision float32; set frozen_dtype to float32, or precision to bfloat16",
        )
        _require(bool(config.lora.targets), "lora.targets is empty; name at least one layer, as in [to_qkv, proj]")


def _check_tokenizer(config: TokenizerConfig) -> None:
    _require(config.sharding == "none", "sharding is fsdp; a tokenizer is small, train it with sharding none")
    _require(not config.compile, "compile is true; the tokenizer's training is not compiled, set it to false")
    if config.start is not None:
        _require(not config.image_tokenizer, "image_tokenizer is fixed by the tokenizer in start; remove one of them")


def transformer_arguments(config: EditorConfig) -> Mapping[str, int | str]:
    """Arguments of `VAREditTransformer` that preset and config name, the config's last."""
    base = PRESETS[config.preset].transformer if config.preset else {}
    return {**base, **config.transformer}
