"""The default model: a 128-pixel tokenizer and editor trained from zero on two CPU cores.

    python recipes/tiny_two_core_cpu.py tokenizer --run RUN --minutes 14  --objects DIR --photos DIR
    python recipes/tiny_two_core_cpu.py editor    --run RUN --minutes 90  --objects DIR --photos DIR
    python recipes/tiny_two_core_cpu.py export    --run RUN --output varedit/models/tiny
    python recipes/tiny_two_core_cpu.py mean      MODEL MODEL --output varedit/models/tiny
    python recipes/tiny_two_core_cpu.py evaluate  --run RUN --objects DIR --photos DIR

The frozen text encoder, all-MiniLM-L6-v2, is taken from the default model.

Both trainings follow a schedule in wall-clock time, checkpoint every two minutes and go on from the last checkpoint
when started again. Pairs are made on the fly by the procedural world, in native aspect ratios, so no pair is seen
twice. `--start MODEL` goes on from a model's weights, of a trained editor best at a low rate (`--muon-lr 0.002`: a high
one first undoes what was learned), and makes a shallower editor deeper; the shipped weights took several rounds
(docs/default_model_training.md).
`--objects` and `--photos` are folders of cut-outs and photographs; without them the world draws its own.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from wall_clock import Progress

from varedit.data.features import load_text_encoder
from varedit.data.synthetic import Pair, World
from varedit.image_processor import to_pil
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.model_folder import forget_origin, written_whole
from varedit.next_scale import next_scales
from varedit.pipeline import DEFAULT_MODEL, VAREditPipeline, load_pipeline
from varedit.quantizer import TeacherForcing, encode_bits, patchify, teacher_forcing
from varedit.runtime import computes_bfloat16
from varedit.sampling import Sampling
from varedit.scales import ScaleSchedule, scale_schedule
from varedit.text import encode_prompts, pad_text
from varedit.training.grounding import Grounding, phrase_embeddings, phrase_rows
from varedit.training.growth import deepen
from varedit.training.objective import bit_accuracy, edit_weights, laplacian_loss, objective
from varedit.training.optimizer import muon_and_adamw
from varedit.training.updates import Average
from varedit.transformer import VAREditTransformer

app = typer.Typer(add_completion=False, help=__doc__)

SIZE = 128
DEFAULTS = {"guidance_scale": 2.0, "temperature": 0.5, "top_p": 1.0}
TOKENIZER = {
    "num_code_bits": 14,
    "base_width": 32,
    "multipliers": (1, 2, 4),
    "num_blocks": 1,
    "stem_patch": 2,
    "patch_size": 2,
    "num_groups": 4,
}
EDITOR = {
    "num_bits": 56, "width": 256, "num_blocks": 9, "num_heads": 4, "text_features": 384, "num_text_heads": 4,
    "max_text_tokens": 64, "num_levels": 5, "position_layout": "fixed_offset",
}  # fmt: skip
ASPECTS = {1.0: 46, 0.666: 14, 1.5: 14, 0.75: 8, 1.333: 8, 0.8: 3, 1.25: 3, 0.571: 1, 1.75: 1, 0.5: 1, 2.0: 1}
"""Height over width -> share of the batches."""
EDITS = {
    "tone": 11, "style": 9, "weather": 2, "recolour": 7, "remove": 14, "add": 24, "background": 3, "replace": 12,
    "move": 5, "resize": 4, "rotate": 3, "material": 5, "text": 5, "composition": 6,
}  # fmt: skip
"""Edit type -> share of the editor's pairs. Edits of one object come oftener than in the benchmark: they are learned
last."""
NAME_WEIGHT, MASK_WEIGHT = 0.05, 0.2
GROUNDING_BLOCKS = (1, 5)
"""Where `Grounding` reads names and change mask: blocks 1 and 3 of the six that the editor once had."""
NEW_BLOCK_FACTOR = 4.0
"""How much faster blocks learn that begin empty in a trained editor."""
AVERAGE_DECAY = 0.995
"""Of the moving average of the editor's weights, per step: about the last 200 steps count. It is what is exported."""

Run = Annotated[Path, typer.Option(help="Folder of this run: checkpoints and logs.")]
Folder = Annotated[Path | None, typer.Option()]
Start = Annotated[Path | None, typer.Option(help="A model folder to go on from; without it, from zero.")]


@dataclass
class Batch:
    """Pairs of one bucket: images float32 [-1, 1] (B, 3, H, W), change masks bool (B, H, W)."""

    schedule: ScaleSchedule
    source_B3HW: Tensor
    target_B3HW: Tensor
    mask_BHW: Tensor
    pairs: list[Pair]


def to_batch(pairs: list[Pair], schedule: ScaleSchedule) -> Batch:
    source, target = (
        torch.from_numpy(np.stack([getattr(pair, name) for pair in pairs])).permute(0, 3, 1, 2).float() / 127.5 - 1
        for name in ("source", "target")
    )
    mask = torch.from_numpy(np.stack([pair.mask for pair in pairs]))
    return Batch(schedule, source, target, mask, pairs)


class Stream(torch.utils.data.IterableDataset):
    """Endless pairs, a batch at a time, from pair number `first` on.

    Pair n is a function of (seed, n) and the shape of its batch, so a resume repeats nothing and skips nothing; with
    another batch size it goes on at the next whole batch.
    """

    def __init__(
        self, objects: Path | None, photos: Path | None, batch_size: int, seed: int, first: int, weights: dict | None
    ) -> None:
        self.folders, self.batch_size, self.seed, self.first = (objects, photos), batch_size, seed, first
        self.weights = weights

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worlds: dict[float, World] = {}
        ratios, weights = np.array(list(ASPECTS)), np.array(list(ASPECTS.values()), float)
        number = -(-self.first // self.batch_size)
        while True:
            ratio = float(np.random.default_rng((self.seed, number)).choice(ratios, p=weights / weights.sum()))
            if ratio not in worlds:
                objects, photos = self.folders
                worlds[ratio] = World(objects, photos, "train", SIZE, ratio, self.weights)
            pairs = [worlds[ratio].pair(self.seed, number * self.batch_size + i) for i in range(self.batch_size)]
            yield to_batch(pairs, scale_schedule(SIZE, ratio))
            number += 1


def stream(
    objects: Path | None, photos: Path | None, batch_size: int, seed: int, first: int, weights: dict | None = None
) -> Iterator[Batch]:
    dataset = Stream(objects, photos, batch_size, seed, first, weights)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))


@app.command()
def tokenizer(
    run: Run, minutes: float = 14, objects: Folder = None, photos: Folder = None, start: Start = None,
    batch_size: int = 8, seed: int = 0, muon_lr: float = 0.015,
) -> None:  # fmt: skip
    """Train the image tokenizer: L1, Laplacian L1, commitment."""
    torch.manual_seed(seed)
    model = VAREditImageTokenizer(**TOKENIZER)
    if start:
        model.load_state_dict(load_pipeline(str(start), dtype=torch.float32).image_tokenizer.state_dict())
    else:
        model.initialize()
    model = model.train().to(memory_format=torch.channels_last)
    progress = Progress(run, "tokenizer", minutes, model, muon_and_adamw(model, muon_lr=muon_lr, adamw_lr=muon_lr / 10))
    for batch in stream(objects, photos, batch_size // 2, seed, progress.samples // 2):
        if progress.done:
            break
        progress.rates(warm_up=60)
        image = torch.cat([batch.source_B3HW, batch.target_B3HW]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            features = model.encoder(image).float()
            _, canvas = encode_bits(features.detach(), batch.schedule, model.config.patch_size)
            predicted = model.decoder(features + (canvas - features).detach()).float()
        commitment = (features - canvas).square().mean()
        loss = (predicted - image).abs().mean() + laplacian_loss(predicted, image) + 0.5 * commitment
        for optimizer in progress.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in progress.optimizers:
            optimizer.step()
        psnr = 10 * torch.log10(4 / (predicted.detach().clamp(-1, 1) - image).square().mean((1, 2, 3))).mean()
        progress.advance(len(image), {"loss": loss.item(), "psnr": psnr.item(), "commitment": commitment.item()})


def load_tokenizer(run: Path) -> VAREditImageTokenizer:
    model = VAREditImageTokenizer(**TOKENIZER)
    model.load_state_dict(torch.load(run / "tokenizer.pt", weights_only=True)["model"])
    return model.eval().requires_grad_(False)


class TextCache:
    """Token states of the instructions seen lately."""

    def __init__(self, max_tokens: int, capacity: int = 50_000) -> None:
        self.tokenizer, self.text_encoder = load_text_encoder(str(DEFAULT_MODEL), torch.float32)
        self.max_tokens, self.capacity, self.states = max_tokens, capacity, {}

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.states]
        if len(self.states) + len(new) > self.capacity:
            self.states.clear()
            new = list(dict.fromkeys(prompts))
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            states = encode_prompts(new, self.tokenizer, self.text_encoder, self.max_tokens, batch_size=32)
        self.states |= {prompt: state.bfloat16() for prompt, state in zip(new, states)}
        text_BTF, mask_BT = pad_text([self.states[prompt] for prompt in prompts])
        return text_BTF.float(), mask_BT


@torch.no_grad()
def encode_batch(model: VAREditImageTokenizer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Source on the token grid (B, C, h, w) and target features (B, d, h', w')."""
    image = torch.cat([batch.source_B3HW, batch.target_B3HW]).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
        source, target = model.encoder(image).float().contiguous().chunk(2)
    source = patchify(source, model.config.patch_size).transpose(1, 2).unflatten(2, batch.schedule.finest)
    return source, target


def wording(pair: Pair) -> str:
    """The instruction; where it may be longer than the editor takes (two wordy clauses), the shortest there is."""
    return pair.instruction if len(pair.instruction) < 180 else min(pair.instructions, key=len)


def names_of(batch: Batch, text: TextCache) -> tuple[Tensor, Tensor]:
    """What `Grounding` needs to know of a batch: rows (B, S) and the embeddings (P, F) they point into."""
    phrases, name_BS = phrase_rows([pair.scene for pair in batch.pairs], batch.schedule.finest)
    if not phrases:
        return name_BS, torch.zeros(1, EDITOR["text_features"])
    text_BTF, mask_BT = text(phrases)
    return name_BS, phrase_embeddings([text_TF[mask_T] for text_TF, mask_T in zip(text_BTF, mask_BT)])


def grown(model: VAREditTransformer, name: str) -> VAREditTransformer:
    """An editor of this recipe that goes on from a model of the same kind, made deeper if it is shallower."""
    other = [key for key, value in EDITOR.items() if key != "num_blocks" and model.config[key] != value]
    if other or model.config.num_blocks > EDITOR["num_blocks"]:
        key = (other or ["num_blocks"])[0]
        raise typer.BadParameter(
            f"--start {name}: {key} is {model.config[key]}, this recipe's is {EDITOR[key]}; give one of its own models"
        )
    return deepen(model, EDITOR["num_blocks"])


@torch.no_grad()
def force(
    model: VAREditTransformer, schedule: ScaleSchedule, source_BChw: Tensor, target_BChw: Tensor,
    text_BTF: Tensor, mask_BT: Tensor, own: float,
) -> TeacherForcing:  # fmt: skip
    """Inputs and labels: a share of the pairs, the first ones, on canvases of bits that the editor draws by now, with
    the settings that it is used with; the others on the target's own with flips.
    """
    patch_size, num_own, parts = TOKENIZER["patch_size"], round(len(source_BChw) * own), []
    if num_own:
        given = source_BChw[:num_own], text_BTF[:num_own], mask_BT[:num_own], torch.randint(2**62, (num_own,))
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            drawn = list(next_scales(model, schedule, patch_size, *given, Sampling(**DEFAULTS)))
        own_bits = [bits for bits, _ in drawn]
        parts.append(teacher_forcing(target_BChw[:num_own], schedule, patch_size, own_bits=own_bits))
    if num_own < len(target_BChw):
        parts.append(teacher_forcing(target_BChw[num_own:], schedule, patch_size, max_flip=0.3))
    return TeacherForcing.join(parts)


@app.command()
def editor(
    run: Run, minutes: float = 90, objects: Folder = None, photos: Folder = None, start: Start = None,
    batch_size: int = 32, seed: int = 1, edit_weight: float = 4.0, muon_lr: float = 0.015,
    decay: Annotated[float, typer.Option(min=0.01, max=1)] = 0.4,
    own: Annotated[float, typer.Option(min=0, max=1, help="Share of the pairs seen with bits of its own.")] = 0.0,
    new_block: Annotated[list[int] | None, typer.Option(help="An added block, learns faster; repeatable.")] = None,
) -> None:  # fmt: skip
    """Train the editor on the frozen tokenizer's features and the frozen text encoder's states.

    The learning rate falls over the last `decay` of the minutes. A run that is over goes on with more --minutes.
    """
    torch.manual_seed(seed)
    wrong = sorted(set(new_block or []) - set(range(EDITOR["num_blocks"])))
    if wrong:
        raise typer.BadParameter(f"--new-block {wrong[0]}: the editor has the blocks 0 to {EDITOR['num_blocks'] - 1}")
    model = VAREditTransformer(**EDITOR)
    if start:
        pipeline = load_pipeline(str(start), dtype=torch.float32)
        model = grown(pipeline.transformer, str(start))
        if not (run / "tokenizer.pt").exists():  # `export` and `evaluate` take it from there
            run.mkdir(parents=True, exist_ok=True)
            torch.save({"model": pipeline.image_tokenizer.state_dict()}, run / "tokenizer.pt")
    else:
        model.initialize()
    image_tokenizer = load_tokenizer(run).to(memory_format=torch.channels_last)
    parts = torch.nn.ModuleDict({"transformer": model, "grounding": Grounding(model, *GROUNDING_BLOCKS)}).train()
    text = TextCache(EDITOR["max_text_tokens"])
    factors = {f"transformer.blocks.{block}.": NEW_BLOCK_FACTOR for block in new_block or []}
    optimizers = muon_and_adamw(parts, muon_lr, muon_lr / 10, prefix="transformer.blocks.", factors=factors)
    average = Average(dict(model.named_parameters()), AVERAGE_DECAY)
    progress = Progress(run, "editor", minutes, parts, optimizers, average)
    for batch in stream(objects, photos, batch_size, seed, progress.samples, EDITS):
        if progress.done:
            break
        progress.rates(warm_up=60, decay=decay)
        source_BChw, target_BChw = encode_batch(image_tokenizer, batch)
        text_BTF, mask_BT = text([wording(pair) for pair in batch.pairs])
        drop_B = torch.rand(len(source_BChw)) < 0.1
        forced = force(model, batch.schedule, source_BChw, target_BChw, text_BTF, mask_BT, own)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            logits = model(
                batch.schedule, forced.inputs_BLC, source_BChw=source_BChw,
                text_BTF=text_BTF, text_mask_BT=mask_BT, drop_text_B=drop_B,
            )  # fmt: skip
        weights_BL = edit_weights(batch.mask_BHW, batch.schedule, edit_weight)
        loss = objective(logits, forced.bits_BLC, batch.schedule, weights_BL)
        name_loss, mask_loss = parts["grounding"](batch.schedule, *names_of(batch, text), batch.mask_BHW)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + NAME_WEIGHT * name_loss + MASK_WEIGHT * mask_loss).backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 2.0)
        for optimizer in optimizers:
            optimizer.step()
        accuracy = bit_accuracy(logits.detach(), forced.bits_BLC, batch.schedule)
        metrics = {
            "loss": loss.item(), "name_loss": name_loss.item(), "mask_loss": mask_loss.item(),
            "accuracy": [round(a, 4) for a in accuracy.tolist()],
        }  # fmt: skip
        progress.advance(len(source_BChw), metrics)


def build_pipeline(run: Path) -> VAREditPipeline:
    """The trained parts as one float32 pipeline, weights rounded to bfloat16 as they are shipped."""
    editor_model = VAREditTransformer(**EDITOR)
    editor_model.load_state_dict(torch.load(run / "editor.pt", weights_only=True)["average"])
    text_tokenizer, text_encoder = load_text_encoder(str(DEFAULT_MODEL), torch.float32)
    for name, parameter in editor_model.named_parameters():
        if not any(part in name for part in editor_model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16().float()
    image_tokenizer = load_tokenizer(run).bfloat16().float()
    return VAREditPipeline(editor_model.eval(), image_tokenizer, text_encoder, text_tokenizer, size=SIZE, **DEFAULTS)


def ship(pipeline: VAREditPipeline, output: Path) -> None:
    """Write a model folder in bfloat16."""
    with tempfile.TemporaryDirectory() as folder, written_whole(output) as partial:
        pipeline.save_pretrained(folder)
        VAREditPipeline.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(partial)
        forget_origin(partial)


@app.command()
def export(run: Run, output: Path = Path("varedit/models/tiny")) -> None:
    """Write the model folder that ships with the package."""
    ship(build_pipeline(run), output)


@app.command()
def mean(
    models: Annotated[list[Path], typer.Argument(help="Model folders that went on from one another.")],
    output: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("varedit/models/tiny"),
) -> None:
    """Write the mean of several models' editors, with the other parts of the first model."""
    pipelines = [load_pipeline(str(model), dtype=torch.float32) for model in models]
    states = [pipeline.transformer.state_dict() for pipeline in pipelines]
    for model, state in zip(models, states):
        if {name: w.shape for name, w in state.items()} != {name: w.shape for name, w in states[0].items()}:
            raise typer.BadParameter(f"{model} has another size than {models[0]}; give models of one training")
    weights = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    pipelines[0].transformer.load_state_dict(weights)
    ship(pipelines[0], output)


def edit_scores(pair: Pair, source: np.ndarray, target: np.ndarray, result: np.ndarray) -> dict:
    """How well one edit was done; arguments are reconstructions and the result, float (H, W, 3) in 0..255.

    closer: inside the mask nearer to the target than to the source. half: at most half of the way left.
    outside: PSNR in dB to the source outside the mask, None where there is no outside.
    """
    inside, outside = pair.mask, ~pair.mask
    way = np.abs(source - target)[inside].mean()
    left, back = np.abs(result - target)[inside].mean(), np.abs(result - source)[inside].mean()
    error = np.square(result - source)[outside].mean() if outside.mean() > 0.02 else None
    psnr = None if error is None else 10 * np.log10(255**2 / max(error, 1e-3))
    return {"closer": bool(left < back), "half": bool(left < way / 2), "left": left / max(way, 1e-6), "outside": psnr}


@app.command()
def evaluate(
    run: Run, model: str = "", objects: Folder = None, photos: Folder = None, count: int = 400,
    batch_size: int = 50, guidance_scale: float = 3.0, temperature: float = 0.0, top_p: float = 1.0, seed: int = 7,
    pictures: Path | None = None,
) -> None:  # fmt: skip
    """Edit held-out pairs (test split: other photographs, scenes, objects, phrasings) and score them by type."""
    pipeline = load_pipeline(model) if model else build_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    image_tokenizer, rows, strips = pipeline.image_tokenizer, [], []
    ratios = {ratio: round(count * share / sum(ASPECTS.values())) for ratio, share in ASPECTS.items()}
    first_index = 0
    for ratio, number in ratios.items():
        schedule = scale_schedule(SIZE, ratio)
        world = World(objects=objects, photos=photos, split="test", size=SIZE, height_over_width=ratio)
        for first in range(first_index, first_index + number, batch_size):
            last = min(first + batch_size, first_index + number)
            pairs = [world.pair(seed, index) for index in range(first, last)]
            batch = to_batch(pairs, schedule)
            output = pipeline(
                [pair.source for pair in pairs], [pair.instruction for pair in pairs], seed=list(range(len(pairs))),
                guidance_scale=guidance_scale, temperature=temperature, top_p=top_p,
            )  # fmt: skip
            decoded = []
            for image in (batch.source_B3HW, batch.target_B3HW):
                _, canvas = encode_bits(image_tokenizer.encode(image), schedule, TOKENIZER["patch_size"])
                decoded.append(np.stack(to_pil(image_tokenizer.decode(canvas))).astype(np.float32))
            for index, pair in enumerate(pairs):
                result = np.asarray(output.images[index], np.float32)
                scores = edit_scores(pair, decoded[0][index], decoded[1][index], result)
                rows.append({"type": pair.edit_type, "held_out": list(pair.held_out), **scores})
                strips.append((pair, np.concatenate([pair.source, decoded[0][index], result, decoded[1][index]], 1)))
        first_index += number
    report(rows)
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        for index, (pair, strip) in enumerate(strips):
            name = "".join(c if c.isalnum() else "_" for c in pair.instruction)[:60]
            Image.fromarray(strip.astype(np.uint8)).save(pictures / f"{pair.edit_type}_{index:04d}_{name}.png")


def report(rows: list[dict]) -> None:
    """Means by edit type as a Markdown table on standard output; at last those with nothing new but the picture."""
    typer.echo("| type | n | closer | half | median left | outside PSNR |\n|---|---|---|---|---|---|")
    groups = {name: [row for row in rows if row["type"] == name] for name in sorted({row["type"] for row in rows})}
    groups |= {"all": rows, "nothing new": [row for row in rows if not row["held_out"]]}
    for name, part in ((name, part) for name, part in groups.items() if part):
        outside = [row["outside"] for row in part if row["outside"] is not None]
        means = [np.mean([row[key] for row in part]) for key in ("closer", "half")]
        median, psnr = np.median([row["left"] for row in part]), np.mean(outside) if outside else float("nan")
        typer.echo(f"| {name} | {len(part)} | {means[0]:.2f} | {means[1]:.2f} | {median:.2f} | {psnr:.1f} |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    app()
