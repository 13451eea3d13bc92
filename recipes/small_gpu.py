"""The 256-pixel sibling of the default model, to be trained from zero on one large GPU in 30 to 60 minutes.

    python recipes/small_gpu.py tokenizer --run RUN --objects DIR --photos DIR    # again and again, until it is done
    python recipes/small_gpu.py editor    --run RUN --objects DIR --photos DIR    # likewise
    python recipes/small_gpu.py export    --run RUN --output DIR

The same config family as tiny_two_core_cpu.py: `--preset cpu` is its model, trained by this script; `--preset check`
is a scaled-down one that shows in a minute whether everything works. A call trains for `--minutes`, saves, and ends;
the next one goes on exactly: rates are a function of the step, and pairs, flips and dropouts of (seed, step). Where
the time will not do for all steps, `--last` lets the rates fall within a call, by the clock. Pairs are made by worker
processes on the fly, so no pair is seen twice and nothing is cached. Checkpoints stay in RUN (about 400 MB); `export
--shard 15MB --no-text-encoder` writes the model in small files, `assemble` puts the frozen text encoder back. Its
matrices are stored in float8, so that the whole stays under 100 MB; the editor is trained with them rounded so. Not
run on a GPU yet: the numbers of steps are estimates; the log says what is left at the speed found.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from tiny_two_core_cpu import (
    ASPECTS,
    AVERAGE_DECAY,
    DEFAULTS,
    EDITOR,
    EDITS,
    GROUNDING_BLOCKS,
    MASK_WEIGHT,
    NAME_WEIGHT,
    SIZE,
    TOKENIZER,
    Folder,
    Run,
    wording,
)
from torch import Tensor, nn
from wall_clock import Progress

from varedit.data.features import load_text_encoder
from varedit.data.synthetic import World
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.machine import num_cores
from varedit.model_folder import forget_origin
from varedit.pipeline import DEFAULT_MODEL, VAREditPipeline
from varedit.quantizer import encode_bits, patchify, teacher_forcing
from varedit.runtime import computes_bfloat16
from varedit.scales import ScaleSchedule, scale_schedule
from varedit.text import encode_prompts, pad_text
from varedit.training.grounding import Grounding, phrase_embeddings, phrase_rows
from varedit.training.objective import bit_accuracy, edit_weights, laplacian_loss, objective
from varedit.training.optimizer import muon_and_adamw
from varedit.training.trainer import compile_blocks
from varedit.training.updates import Average
from varedit.transformer import VAREditTransformer

logger = logging.getLogger("recipe")
app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Preset:
    """A size of the family.

    Attributes:
        size: of the pictures.
        tokenizer, editor: arguments of the two models.
        tokenizer_steps, editor_steps: of the two trainings; tokenizer_pairs, editor_pairs: pairs a step.
        muon_lr: peak rate; AdamW's is a tenth.
    """

    size: int
    tokenizer: dict
    editor: dict
    tokenizer_steps: int
    tokenizer_pairs: int
    editor_steps: int
    editor_pairs: int
    read: tuple[int, int]
    """Blocks at which `Grounding` reads the names and the change mask."""
    muon_lr: float = 0.015


PRESETS = {
    "gpu": Preset(
        size=256,
        tokenizer=TOKENIZER | {"base_width": 48, "num_groups": 8},
        editor=EDITOR | {"width": 384, "num_blocks": 12, "num_heads": 6, "num_text_heads": 6, "num_levels": 7},
        tokenizer_steps=12_000,
        tokenizer_pairs=32,
        editor_steps=12_000,
        editor_pairs=96,
        read=(3, 7),
    ),
    "cpu": Preset(
        size=SIZE,
        tokenizer=TOKENIZER,
        editor=EDITOR,
        tokenizer_steps=4_000,
        tokenizer_pairs=4,
        editor_steps=6_000,
        editor_pairs=16,
        read=GROUNDING_BLOCKS,
    ),
    "check": Preset(
        size=128,
        tokenizer=TOKENIZER | {"base_width": 12, "multipliers": (1, 1, 2)},
        editor=EDITOR | {"width": 32, "num_blocks": 2, "num_heads": 2, "num_text_heads": 2},
        tokenizer_steps=6,
        tokenizer_pairs=2,
        editor_steps=6,
        editor_pairs=2,
        read=(0, 0),
    ),
}

Chosen = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")]
Steps = Annotated[int | None, typer.Option(help="Of the whole training, over all calls.", show_default="the preset's")]
Minutes = Annotated[float, typer.Option(help="Of this call.")]
Last = Annotated[bool, typer.Option("--last", help="The rates fall to their end within this call.")]
Workers = Annotated[int | None, typer.Option(help="Processes that make pairs.", show_default="a core each but one")]


# -- pairs --


def slots(count: int = 60) -> list[float]:
    """`ASPECTS` as a fixed round of so many templates, each at least once.

    A batch's template is a function of its number modulo the length of the round, so that a worker needs the worlds,
    each with its own memory of photographs, of a few templates only.
    """
    total = sum(ASPECTS.values())
    exact = {ratio: count * share / total for ratio, share in ASPECTS.items()}
    found = {ratio: max(1, int(number)) for ratio, number in exact.items()}
    for ratio in sorted(exact, key=lambda ratio: found[ratio] - exact[ratio])[: count - sum(found.values())]:
        found[ratio] += 1
    order = np.random.default_rng(0).permutation(sum(found.values()))
    return list(np.repeat(list(found), list(found.values()))[order].tolist())


@dataclass
class PairBatch:
    """Pairs of one template: uint8 (B, H, W, 3) twice, bool (B, H, W), instructions, and what `phrase_rows` says."""

    schedule: ScaleSchedule
    source: np.ndarray | Tensor
    target: np.ndarray | Tensor
    mask: np.ndarray | Tensor
    prompts: list[str]
    phrases: list[str]
    name_rows: np.ndarray | Tensor

    def pin_memory(self) -> "PairBatch":
        """Called by the loader's own thread: from pinned tensors a copy to the device does not hold up the training."""
        arrays = {name: getattr(self, name) for name in ("source", "target", "mask", "name_rows")}
        return replace(self, **{name: torch.from_numpy(array).pin_memory() for name, array in arrays.items()})


class Pairs(torch.utils.data.IterableDataset):
    """Endless batches from number `first` on; number n is a function of (seed, n), whoever makes it."""

    def __init__(
        self, objects: Path | None, photos: Path | None, size: int, batch_size: int, seed: int, first: int,
        weights: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.folders, self.size, self.batch_size, self.seed, self.first, self.weights = (
            (objects, photos), size, batch_size, seed, first, weights,
        )  # fmt: skip

    def __iter__(self) -> Iterator[PairBatch]:
        worker = torch.utils.data.get_worker_info()
        start, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        round_of, worlds = slots(), dict[float, World]()
        number = self.first + start  # the loader takes from its workers in turn, so that numbers come in order
        while True:
            ratio = round_of[number % len(round_of)]
            if ratio not in worlds:
                worlds[ratio] = World(*self.folders, "train", self.size, ratio, self.weights)
            pairs = [worlds[ratio].pair(self.seed, number * self.batch_size + i) for i in range(self.batch_size)]
            source, target, mask = (np.stack([getattr(pair, name) for pair in pairs]) for name in
                                    ("source", "target", "mask"))  # fmt: skip
            schedule = scale_schedule(self.size, ratio)
            phrases, name_rows = phrase_rows([pair.scene for pair in pairs], schedule.finest)
            prompts = [wording(pair) for pair in pairs]
            yield PairBatch(schedule, source, target, mask, prompts, phrases, name_rows.numpy())
            number += stride


def _as_it_is(batch: PairBatch) -> PairBatch:
    """Arrays stay arrays: they travel through pipes. Tensors would need shared memory, which containers lack."""
    return batch


def loader(dataset: Pairs, num_workers: int | None) -> Iterator[PairBatch]:
    count = max(1, num_cores() - 1) if num_workers is None else num_workers
    options = {"prefetch_factor": 3} if count else {}
    pinned = torch.cuda.is_available()
    return iter(
        torch.utils.data.DataLoader(
            dataset, None, num_workers=count, collate_fn=_as_it_is, pin_memory=pinned, **options
        )
    )


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(array).to(device, non_blocking=True)


def to_images(batch: PairBatch, device: torch.device) -> Tensor:
    """Sources, then targets: float32 [-1, 1], (2B, 3, H, W), channels last."""
    pixels = torch.cat([to_device(batch.source, device), to_device(batch.target, device)])
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# -- training in calls --


class Chunk(Progress):
    """One call's part of a training of so many steps: rates are a function of the step alone.

    In a `last` call they fall over its minutes as well, should there be steps left at its end.
    """

    def __init__(
        self, run: Path, name: str, minutes: float, steps: int, model: nn.Module, optimizers: list,
        average: Average | None = None, warm_up: int = 60, last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(run, name, minutes, model, optimizers, average)
        self.budget += self.elapsed
        self.steps, self.warm_up, self.seconds, self.last = steps, warm_up, minutes * 60, last

    @property
    def done(self) -> bool:
        return self.step >= self.steps or super().done

    def update(self, loss: Tensor, clip: float) -> None:
        """One step of the optimizers: linear warm-up, constant, linear to 2 % over the last 40 % of the steps."""
        left = (1 - self.step / self.steps) / 0.4
        if self.last:
            left = min(left, max(0.0, self.budget - self.elapsed) / self.seconds)
        factor = min(1.0, (self.step + 1) / self.warm_up) * min(1.0, 0.02 + 0.98 * left)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in self.optimizers:
            optimizer.step()

    def finish(self) -> None:
        self.save()
        left = (self.steps - self.step) * self.elapsed / max(self.step, 1) / 60
        logger.info(
            "step %d of %d after %.1f minutes; %.1f minutes left", self.step, self.steps, self.elapsed / 60, left
        )


def device_of() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every shape, and texts are of many lengths
    return torch.device("cuda")


def preset_of(name: str) -> Preset:
    if name not in PRESETS:
        raise typer.BadParameter(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of one step, so that a resumed training draws the same."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


@app.command()
def tokenizer(
    run: Run, preset: Chosen = "gpu", minutes: Minutes = 8.5, steps: Steps = None, objects: Folder = None,
    photos: Folder = None, num_workers: Workers = None, seed: int = 0, last: Last = False,
) -> None:  # fmt: skip
    """Train the image tokenizer for some minutes: L1, Laplacian L1, commitment."""
    chosen, device = preset_of(preset), device_of()
    torch.manual_seed(seed)
    model = VAREditImageTokenizer(**chosen.tokenizer)
    model.initialize()
    model = model.train().to(device, memory_format=torch.channels_last)
    optimizers = muon_and_adamw(model, chosen.muon_lr, chosen.muon_lr / 10)
    progress = Chunk(run, "tokenizer", minutes, steps or chosen.tokenizer_steps, model, optimizers, last=last)
    dataset = Pairs(objects, photos, chosen.size, chosen.tokenizer_pairs, seed, progress.step)
    batches = loader(dataset, num_workers)
    while not progress.done:
        batch = next(batches)
        image = to_images(batch, device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device)):
            features = model.encoder(image).float()
            _, canvas = encode_bits(features.detach(), batch.schedule, model.config.patch_size)
            predicted = model.decoder(features + (canvas - features).detach()).float()
        commitment = (features - canvas).square().mean()
        loss = (predicted - image).abs().mean() + laplacian_loss(predicted, image) + 0.5 * commitment
        progress.update(loss, clip=1.0)
        metrics = {}
        if (progress.step + 1) % 20 == 0:  # reading a number waits for the device
            psnr = 10 * torch.log10(4 / (predicted.detach().clamp(-1, 1) - image).square().mean((1, 2, 3))).mean()
            metrics = {"loss": loss.item(), "psnr": psnr.item(), "commitment": commitment.item()}
        progress.advance(len(image), metrics)
    progress.finish()


@app.command()
def editor(
    run: Run, preset: Chosen = "gpu", minutes: Minutes = 8.5, steps: Steps = None, objects: Folder = None,
    photos: Folder = None, num_workers: Workers = None, seed: int = 1, last: Last = False, edit_weight: float = 4.0,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the blocks.")] = False,
) -> None:  # fmt: skip
    """Train the editor for some minutes, on the frozen tokenizer and the frozen text encoder."""
    chosen, device = preset_of(preset), device_of()
    image_tokenizer = load_part(run, "tokenizer", VAREditImageTokenizer(**chosen.tokenizer)).to(device)
    text = Text(device, chosen.editor["max_text_tokens"])
    torch.manual_seed(seed)
    model = VAREditTransformer(**chosen.editor)
    model.initialize()
    parts = nn.ModuleDict({"transformer": model, "grounding": Grounding(model, *chosen.read)}).train().to(device)
    optimizers = muon_and_adamw(parts, chosen.muon_lr, chosen.muon_lr / 10, prefix="transformer.blocks.")
    average = Average(dict(model.named_parameters()), AVERAGE_DECAY)
    progress = Chunk(run, "editor", minutes, steps or chosen.editor_steps, parts, optimizers, average, last=last)
    if compile:
        compile_blocks(model)
    dataset = Pairs(objects, photos, chosen.size, chosen.editor_pairs, seed, progress.step, EDITS)
    batches, patch_size = loader(dataset, num_workers), image_tokenizer.config.patch_size
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=computes_bfloat16(device))
    while not progress.done:
        batch, generator = next(batches), step_generator(seed, progress.step, device)
        with torch.no_grad(), autocast():
            source, target = image_tokenizer.encode(to_images(batch, device)).float().contiguous().chunk(2)
        source_BChw = patchify(source, patch_size).transpose(1, 2).unflatten(2, batch.schedule.finest)
        forced = teacher_forcing(target, batch.schedule, patch_size, max_flip=0.3, generator=generator)
        drop_B = torch.rand(len(source), generator=generator, device=device) < 0.1
        text_BTF, mask_BT = text(batch.prompts)
        # Before the model, whose kernels a copy to the device would wait for.
        mask_BHW, name_BS = to_device(batch.mask, device), to_device(batch.name_rows, device)
        names_PF = text.names(batch.phrases)
        with autocast():
            logits = model(
                batch.schedule, forced.inputs_BLC, source_BChw=source_BChw,
                text_BTF=text_BTF, text_mask_BT=mask_BT, drop_text_B=drop_B,
            )  # fmt: skip
        weights_BL = edit_weights(mask_BHW, batch.schedule, edit_weight)
        loss = objective(logits, forced.bits_BLC, batch.schedule, weights_BL)
        name_loss, mask_loss = parts["grounding"](batch.schedule, name_BS, names_PF, mask_BHW)
        progress.update(loss + NAME_WEIGHT * name_loss + MASK_WEIGHT * mask_loss, clip=2.0)
        metrics = {}
        if (progress.step + 1) % 20 == 0:
            accuracy = bit_accuracy(logits.detach(), forced.bits_BLC, batch.schedule)
            metrics = {
                "loss": loss.item(), "name_loss": name_loss.item(), "mask_loss": mask_loss.item(),
                "accuracy": [round(a, 4) for a in accuracy.tolist()],
            }  # fmt: skip
        progress.advance(len(source), metrics)
    progress.finish()


TEXT_STORAGE = torch.float8_e4m3fn


def rounded_text_encoder(dtype: torch.dtype) -> tuple:
    """Tokenizer and frozen text encoder of the default model, its matrices rounded to `TEXT_STORAGE`."""
    tokenizer, encoder = load_text_encoder(str(DEFAULT_MODEL), dtype)
    for parameter in encoder.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(TEXT_STORAGE).to(dtype)
    return tokenizer, encoder


class Text:
    """The frozen text encoder. What is remembered was encoded alone, so that a resumed run rounds alike."""

    def __init__(self, device: torch.device, max_tokens: int) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.tokenizer, encoder = rounded_text_encoder(dtype)
        self.encoder, self.max_tokens = encoder.to(device), max_tokens
        self._names: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text_BTF, mask_BT = pad_text(self._states(prompts, batch_size=64))
        return text_BTF.float(), mask_BT

    def names(self, phrases: list[str]) -> Tensor:
        """Embeddings of phrases, float32 (P, F); one row of zeros where there are none."""
        if not phrases:
            return torch.zeros(1, self.encoder.config.hidden_size, device=self.encoder.device)
        new = [phrase for phrase in phrases if phrase not in self._names]
        if new:
            self._names |= zip(new, phrase_embeddings(self._states(new, batch_size=1)))
        return torch.stack([self._names[phrase] for phrase in phrases])

    def _states(self, prompts: list[str], batch_size: int) -> list[Tensor]:
        return encode_prompts(prompts, self.tokenizer, self.encoder, self.max_tokens, batch_size)


# -- what comes out --


def load_part(run: Path, name: str, model: nn.Module) -> nn.Module:
    """The trained weights of a checkpoint, frozen."""
    path = run / f"{name}.pt"
    if not path.exists():
        raise typer.BadParameter(f"{path} does not exist; train the {name} first")
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["average" if name == "editor" else "model"])
    return model.eval().requires_grad_(False)


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="Folder of the model.")],
    preset: Chosen = "gpu",
    shard: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    text_encoder: Annotated[bool, typer.Option(help="Put the frozen text encoder in.")] = True,
) -> None:
    """Write the model in bfloat16. Without the text encoder it is for `assemble`."""
    chosen = preset_of(preset)
    pipeline = VAREditPipeline(
        load_part(run, "editor", VAREditTransformer(**chosen.editor)),
        load_part(run, "tokenizer", VAREditImageTokenizer(**chosen.tokenizer)),
        size=chosen.size,
        **DEFAULTS,
    )
    pipeline.save_pretrained(run / "export")
    _save(run / "export", output, shard, text_encoder)


@app.command()
def assemble(
    parts: Annotated[Path, typer.Argument(help="Folder that `export --no-text-encoder` wrote.")],
    output: Annotated[Path, typer.Option(help="Folder of the model.")],
) -> None:
    """Put the text encoder to an exported model, and its small files together."""
    _save(parts, output, "5GB", True)


def _save(parts: Path, output: Path, shard: str, with_text: bool) -> None:
    """Read a model without text encoder in bfloat16 and write it, with the rounded one if asked for."""
    companions = {}
    if with_text:
        companions["tokenizer"], companions["text_encoder"] = rounded_text_encoder(torch.bfloat16)
    pipeline = VAREditPipeline.from_pretrained(parts, dtype=torch.bfloat16, **companions)
    pipeline.save_pretrained(output, max_shard_size=shard)
    forget_origin(output)
    for path in (output / "text_encoder").glob("*.safetensors"):  # the same values in half the bytes
        weights = {name: w.to(TEXT_STORAGE) if w.dim() == 2 else w for name, w in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    largest = max(path.stat().st_size for path in output.rglob("*.safetensors"))
    total = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    logger.info("%s: %.1f MB, largest file %.1f MB", output, total / 1e6, largest / 1e6)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    app()
