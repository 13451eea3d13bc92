"""What a training run is told: one dataclass per training, read from a YAML file and `--set` overrides.

Every value is checked before any data is read. Imports neither PyTorch nor diffusers.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from varedit.presets import PRESETS
from varedit.scales import ASPECT_RATIOS, SIZES
from varedit.training.typed_yaml import build, flat, override, plain

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
        aspects: height over width -> share of the steps, for the world with fit "native" only; a folder's pairs have
            shapes of their own.
        validation: folder of held-out pairs. Without it: the world's test split, or pairs held out of the folder.
        validation_count: how many held-out pairs the validation uses.
        num_workers: processes that read and prepare pairs, for each training process; 0 does it in line.
        max_bad_fraction: pairs that cannot be used are skipped and counted, the first 20 named; more than this share is
            fatal.
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
        name: "adamw" (Infinity's), or "muon" for matrices and convolutions with AdamW for the rest.
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
        max_minutes: end after this time of training, if the steps are not done before, and decay the learning rate
            by whichever is further, steps or time; 0 for no limit. Such a run cannot be reproduced bit by bit.
        batch_size: pairs a step, over all processes.
        micro_batch_size: pairs a pass of one process; what is left of the batch is accumulated. The losses depend on
            it only by rounding, and on the number of processes likewise.
        seed: of everything: weights from zero, the order of the data, flips and dropouts.
        device: "auto", "cpu" or "cuda".
        precision: "bfloat16" computes in autocast with float32 weights, "float32" does not; "auto" takes bfloat16 where
            the device has it (many CPUs compute it a hundred times slower than float32).
        sharding: "none": every process holds all weights. "fsdp": weights, gradients and optimizer state are sharded
            over the processes (FSDP2).
        compile: compile the blocks with torch.compile.
        ema_decay: of an average of the weights that validation, samples and the result use; 0 for none.
        log_every, validate_every, sample_every, save_every: in steps; 0 for never (the last step always saves).
        sample_count: edits or reconstructions of one sample picture.
        keep_checkpoints: older ones are deleted.
        async_checkpoints: write while training goes on (costs a copy of the state in main memory).
        wandb: send config, metrics and sample pictures to Weights & Biases, under the account that its package knows.
    """

    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    max_minutes: float = 0.0
    batch_size: int = 16
    micro_batch_size: int = 16
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
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
    wandb: bool = False


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
        edit_weight: a token inside the change mask weighs this much more, in training; the paper's 1 needs no masks.
            Pairs without a mask count as changed everywhere. The validation loss is always that of 1.
        gradient_checkpointing: recompute the blocks in the backward pass.
        lora: train adapters on frozen weights.
        frozen_dtype: precision of the frozen transformer weights under LoRA. "nf4" is QLoRA: the linear layers of the
            blocks in 4 bits, the rest in bfloat16. "bfloat16" is float32 where the run computes in that.
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
    edit_weight: float = 1.0
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    frozen_dtype: Literal["float32", "bfloat16", "nf4"] = "bfloat16"


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
    "steps", "max_minutes", "device", "sharding", "log_every", "validate_every", "sample_every", "sample_count",
    "save_every", "keep_checkpoints", "async_checkpoints", "wandb", "data.num_workers", "data.max_bad_fraction",
    "data.validation", "data.validation_count",
)  # fmt: skip
"""Fields that a resumed run may be given anew: all others would make it another run. What is held out of the very
folder that is trained on must stay, see `sources`."""

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
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ValueError(f"config {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {str(path)!r} holds {type(values).__name__}; write one field: value a line")
    for text in overrides:
        override(values, text)
    config = build(kind, values)
    check(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write a config as YAML that `load_config` reads back as an equal config."""
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(plain(asdict(config)), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)


def changed_fields(config: RunConfig, other: RunConfig) -> list[str]:
    """Names of the fields, such as "data.sizes", in which two configs of one kind differ."""
    first, second = flat(config), flat(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


# -- checking --------------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"config field {message}")


_AT_LEAST: dict[str, float] = {
    "steps": 1, "max_minutes": 0, "batch_size": 1, "micro_batch_size": 1, "seed": 0, "log_every": 1,
    "validate_every": 0, "sample_every": 0, "sample_count": 1, "save_every": 0, "keep_checkpoints": 1,
    "data.validation_count": 0, "data.num_workers": 0, "optimizer.warm_up": 0, "optimizer.weight_decay": 0,
    "text_batch_size": 1, "lora.rank": 1, "laplacian_weight": 0, "commitment_weight": 0, "entropy_weight": 0,
    "perceptual_weight": 0, "adversarial_weight": 0, "adversarial_start": 0,
}  # fmt: skip
_MAX_STEPS = 100_000_000  # what is planned of each step takes memory
_POSITIVE = ("edit_weight", "optimizer.lr", "optimizer.muon_lr", "optimizer.eps", "optimizer.clip", "lora.alpha")
_BELOW_ONE = ("ema_decay", "drop_text", "max_flip", "drop_scales", "lora.dropout")
_SHARES = ("data.max_bad_fraction", "optimizer.decay_fraction", "optimizer.final_factor")


def check(config: RunConfig) -> None:
    """Raise ValueError for a value out of range or a combination that cannot work."""
    values = flat(config)
    for name, least in _AT_LEAST.items():
        _require(values.get(name, least) >= least, f"{name} is {values.get(name)}; give at least {least}")
    _require(config.steps <= _MAX_STEPS, f"steps is {config.steps}; give at most {_MAX_STEPS}")
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


def check_packages(config: RunConfig) -> None:
    """Raise ValueError if the config needs a package that is not installed."""
    needed = {"wandb": "wandb"} if config.wandb else {}
    if isinstance(config, EditorConfig) and config.lora is not None:
        needed["lora"] = "peft"
        if config.frozen_dtype == "nf4":
            needed["frozen_dtype nf4"] = "torchao"
    for name, package in needed.items():
        _require(
            importlib.util.find_spec(package) is not None,
            f"{name} needs the package {package}; install it with pip install {package}, or leave the field out",
        )


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
    elif data.fit == "square":
        _require(
            data.aspects == NATIVE_ASPECTS or set(data.aspects) == {1.0},
            f"data.aspects has {', '.join(f'{r:g}' for r in data.aspects)} with data.fit square, where every picture "
            "is square; remove it, or set data.fit to native",
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
    _require(
        config.edit_weight == 1 or config.scale_weights == "sqrt_area",
        f"edit_weight is {config.edit_weight} with scale_weights equal; set scale_weights to sqrt_area",
    )
    if config.lora is None:
        _require(config.frozen_dtype != "nf4", "frozen_dtype is nf4 without lora; give lora, as in lora.rank=16")
    else:
        _require(config.optimizer.name == "adamw", "optimizer.name is muon with lora; adapters train with adamw")
        _require(
            config.precision != "float32" or config.frozen_dtype == "float32",
            f"frozen_dtype is {config.frozen_dtype} with precision float32; set frozen_dtype to float32, or precision "
            "to bfloat16",
        )
        if config.frozen_dtype == "nf4":
            _require(config.sharding == "none", "sharding is fsdp with frozen_dtype nf4; set sharding to none")
            _require(not config.compile, "compile is true with frozen_dtype nf4; set it to false")
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
