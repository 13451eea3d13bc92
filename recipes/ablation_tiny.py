"""The paper's central claim at a size that anyone can afford: how the source is shown to the target, and where it sits.

    python recipes/ablation_tiny.py --run RUN          # all runs that are not finished yet, then docs/ablation.md
    python recipes/ablation_tiny.py --run RUN --only finest,sar-1 --seeds 0,1,2

Every run has the same pairs in the same order, the same first weights, flips and dropouts (all functions of seed and
step), and the same number of steps; only the arguments of `VARIANTS` differ. Pairs are drawn scenes of shapes and
solids, encoded once by the default model's frozen tokenizer. A run writes RUN/VARIANT-SEED.json when it is finished;
the report is made from these files.
"""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from ablation_report import write_report
from PIL import Image
from tiny_two_core_cpu import DEFAULTS, EDITOR, SIZE, edit_scores, encode_batch, to_batch
from torch import Tensor

from varedit.data.synthetic import Pair, World
from varedit.evaluation.held_out import HeldOut
from varedit.evaluation.scores import write_json
from varedit.image_processor import to_pil
from varedit.pipeline import VAREditPipeline, load_pipeline
from varedit.quantizer import encode_bits, teacher_forcing
from varedit.runtime import computes_bfloat16
from varedit.scales import ScaleSchedule, scale_schedule
from varedit.text import encode_prompts, pad_text
from varedit.training.objective import bit_losses, edit_weights, objective, token_weights
from varedit.training.optimizer import muon_and_adamw
from varedit.transformer import VAREditTransformer

logger = logging.getLogger("recipe")

SQUARE, MIXED = (1.0,), (1.0, 0.666, 1.5)
ALL = -1
VARIANTS: dict[str, tuple[tuple[float, ...], dict]] = {
    "finest": (SQUARE, {"conditioning": "finest"}),
    "sar-1": (SQUARE, {"conditioning": "sar", "num_aligned_blocks": 1}),
    "sar-2": (SQUARE, {"conditioning": "sar", "num_aligned_blocks": 2}),
    "sar-all": (SQUARE, {"conditioning": "sar", "num_aligned_blocks": ALL}),
    "full": (SQUARE, {"conditioning": "full"}),
    "fixed_offset": (MIXED, {"position_layout": "fixed_offset"}),
    "offset": (MIXED, {"position_layout": "offset"}),
    "released": (MIXED, {"position_layout": "released"}),
}
"""Name -> aspect templates and arguments of the transformer. SAR in no block is "finest". For square pictures "offset"
and "fixed_offset" are the same, so positions are compared on three templates."""

KINDS = ("tone", "recolour", "remove", "add", "background", "move")
DATA_SEED, HELD_OUT_SEED = 3, 17
DRAWN_FOLDERS = (None, None)  # neither cut-outs nor photographs


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    steps: int
    pairs: int
    cases: int
    width: int
    depth: int
    batch_size: int
    guidance_scale: float
    edit_weight: float = 4.0


# -- data --


def wanted(pair: Pair) -> bool:
    """Kinds that a small model learns; no emoji, whose pictures are the system's."""
    items = [*pair.scene["objects"], *pair.target_scene["objects"]]
    return pair.edit_type in KINDS and all(item["kind"] in ("shape", "primitive") for item in items)


@dataclass
class Latents:
    """Encoded training pairs of one template: sources (N, C, h, w) and target features (N, d, h', w') in float16, loss
    weights (N, L), and the number of each pair's instruction.
    """

    schedule: ScaleSchedule
    source_NChw: Tensor
    target_Ndhw: Tensor
    weights_NL: Tensor
    prompt_N: Tensor


@dataclass
class Data:
    """Training pairs by template, and the states of their instructions, (T, F) float16 each."""

    latents: list[Latents]
    text: list[Tensor]
    digest: str

    def batch(self, seed: int, step: int, size: int) -> tuple[Latents, Tensor, Tensor, Tensor]:
        """Latents of one template, row numbers, instructions and their mask; a function of seed and step."""
        latents = self.latents[step % len(self.latents)]
        rows = torch.from_numpy(np.random.default_rng((seed, step)).choice(len(latents.prompt_N), size, replace=False))
        text_BTF, mask_BT = pad_text([self.text[number].float() for number in latents.prompt_N[rows]])
        return latents, rows, text_BTF, mask_BT


@torch.no_grad()
def prepare(run: Path, aspects: tuple[float, ...], settings: Settings, pipeline: VAREditPipeline) -> Data:
    """Draw and encode the training pairs of some templates, or read what an earlier call left."""
    path = run / f"latents-{len(aspects)}-{settings.pairs}.pt"
    if not path.exists():
        per_template, prompts, parts = settings.pairs // len(aspects), dict[str, int](), []
        for ratio in aspects:
            schedule, world = scale_schedule(SIZE, ratio), World(*DRAWN_FOLDERS, "train", SIZE, ratio)
            found, index = [], 0
            while len(found) < per_template:
                chunk: list[Pair] = []
                while len(chunk) < min(32, per_template - len(found)):
                    pair = world.pair(DATA_SEED, index)
                    index += 1
                    if wanted(pair):
                        chunk.append(pair)
                batch = to_batch(chunk, schedule)
                source, target = encode_batch(pipeline.image_tokenizer, batch)
                weights = edit_weights(batch.mask_BHW, schedule, settings.edit_weight)
                numbers = [prompts.setdefault(pair.instruction, len(prompts)) for pair in chunk]
                found += list(zip(source.half(), target.half(), weights, torch.tensor(numbers)))
            parts.append([torch.stack(column) for column in zip(*found)])
            logger.info("template %s: %d pairs of %d drawn", ratio, len(found), index)
        states = encode_prompts(
            list(prompts), pipeline.tokenizer, pipeline.text_encoder, EDITOR["max_text_tokens"], batch_size=32
        )
        torch.save({"parts": parts, "text": [state.half() for state in states]}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    state = torch.load(path, weights_only=True)
    digest = hashlib.sha256(b"".join(part[0].numpy().tobytes() for part in state["parts"])).hexdigest()[:16]
    latents = [Latents(scale_schedule(SIZE, ratio), *part) for ratio, part in zip(aspects, state["parts"])]
    return Data(latents, state["text"], digest)


# -- one run --


def new_transformer(arguments: dict, settings: Settings, seed: int) -> VAREditTransformer:
    """The same first weights for every variant of a seed: none of the arguments changes a shape."""
    arguments = dict(arguments)
    if arguments.get("num_aligned_blocks") == ALL:
        arguments["num_aligned_blocks"] = settings.depth
    sizes = {"width": settings.width, "num_blocks": settings.depth, "num_heads": settings.width // 64}
    torch.manual_seed(seed)
    model = VAREditTransformer(**EDITOR | sizes | {"num_text_heads": sizes["num_heads"]} | arguments)
    model.initialize()
    return model


def train(model: VAREditTransformer, data: Data, settings: Settings, seed: int, patch_size: int) -> dict:
    """Train in place; returns times and losses."""
    optimizers = muon_and_adamw(model, muon_lr=0.015, adamw_lr=1.5e-3, prefix="blocks.")
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses, seconds, window = [], [], []
    for step in range(settings.steps):
        started = time.monotonic()
        factor = min(1.0, (step + 1) / 60) * min(1.0, 0.02 + 0.98 * (1 - step / settings.steps) / 0.4)
        latents, rows, text_BTF, mask_BT = data.batch(seed, step, settings.batch_size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = latents.target_Ndhw[rows].float()
        forced = teacher_forcing(target, latents.schedule, patch_size, max_flip=0.3, generator=generator)
        drop_B = torch.rand(len(rows), generator=generator) < 0.1
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            logits = model(
                latents.schedule, forced.inputs_BLC, source_BChw=latents.source_NChw[rows].float(),
                text_BTF=text_BTF, text_mask_BT=mask_BT, drop_text_B=drop_B,
            )  # fmt: skip
        loss = objective(logits, forced.bits_BLC, latents.schedule, latents.weights_NL[rows])
        for optimizer, rates in zip(optimizers, peaks):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        for optimizer in optimizers:
            optimizer.step()
        window.append(loss.item())
        seconds.append(time.monotonic() - started)
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            losses.append([step + 1, round(float(np.mean(window)), 5)])
            logger.info("step %d: loss %.4f, %.2f s a step", step + 1, np.mean(window), np.median(seconds))
            window.clear()
    return {"seconds_per_step": round(float(np.median(seconds)), 4), "losses": losses}


@torch.no_grad()
def judge(pipeline: VAREditPipeline, aspects: tuple[float, ...], settings: Settings) -> list[dict]:
    """Scores of every held-out case: teacher-forced, and of a real edit without temperature."""
    rows: list[dict] = []
    for ratio in aspects:
        held_out = HeldOut(*DRAWN_FOLDERS, SIZE, ratio, seed=HELD_OUT_SEED)
        indices = (index for index in held_out.judgeable() if wanted(held_out.pair(index)))
        chosen = list(islice(indices, settings.cases // len(aspects)))
        for first in range(0, len(chosen), 50):
            rows += _judge_batch(pipeline, held_out, chosen[first : first + 50], ratio, settings)
    return rows


def _judge_batch(
    pipeline: VAREditPipeline, held_out: HeldOut, indices: list[int], ratio: float, settings: Settings
) -> list[dict]:
    schedule, image_tokenizer = scale_schedule(SIZE, ratio), pipeline.image_tokenizer
    patch_size = image_tokenizer.config.patch_size
    pairs = [held_out.pair(index) for index in indices]
    batch, prompts = to_batch(pairs, schedule), [pair.instruction for pair in pairs]
    source, target = encode_batch(image_tokenizer, batch)
    forced = teacher_forcing(target, schedule, patch_size)
    states = encode_prompts(prompts, pipeline.tokenizer, pipeline.text_encoder, EDITOR["max_text_tokens"])
    text_BTF, mask_BT = pad_text(states)
    logits = pipeline.transformer(
        schedule, forced.inputs_BLC, source_BChw=source, text_BTF=text_BTF, text_mask_BT=mask_BT
    )
    losses_B = (bit_losses(logits, forced.bits_BLC).mean(-1) * token_weights(schedule, logits.device)).sum(1)
    edited = pipeline(
        [Image.fromarray(pair.source) for pair in pairs], prompts, seed=indices,
        guidance_scale=settings.guidance_scale, temperature=0.0,
    ).images  # fmt: skip
    decoded = []
    for image in (batch.source_B3HW, batch.target_B3HW):
        _, canvas = encode_bits(image_tokenizer.encode(image), schedule, patch_size)
        decoded.append([np.asarray(picture, np.float32) for picture in to_pil(image_tokenizer.decode(canvas))])
    rows = []
    for number, (index, pair) in enumerate(zip(indices, pairs)):
        result = np.asarray(edited[number])
        rough = edit_scores(pair, decoded[0][number], decoded[1][number], result.astype(np.float32))
        verdict = held_out.check(pair, result)
        rows.append({
            "case": f"{ratio} {index}", "type": pair.edit_type, "loss": losses_B[number].item(),
            "closer": rough["closer"], "half": rough["half"],
            "outside": None if rough["outside"] is None else float(rough["outside"]),
            "success": verdict.success, "completeness": verdict.completeness, "balance": verdict.balance,
            "stray": verdict.stray,
        })  # fmt: skip
    return rows


def edit_seconds(pipeline: VAREditPipeline, guidance_scale: float, repeats: int = 12) -> float:
    """Median time of one square edit, everything included."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        pipeline(image, "make the circle red", seed=0, guidance_scale=guidance_scale)
        seconds.append(time.monotonic() - started)
    return round(float(np.median(seconds)), 4)


def do_run(run: Path, variant: str, seed: int, settings: Settings, companions: VAREditPipeline) -> Path:
    """Train and judge one variant with one seed, unless its file is there. Raises ValueError for another setting's."""
    aspects, arguments = VARIANTS[variant]
    path, asked = run / f"{variant}-{seed}.json", vars(settings) | {"arguments": arguments, "aspects": list(aspects)}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if found != json.loads(json.dumps(asked)):
            raise ValueError(f"{path} was made with other settings; choose another --run, or delete it")
        return path
    data = prepare(run, aspects, settings, companions)
    logger.info("%s, seed %d", variant, seed)
    model = new_transformer(arguments, settings, seed).train()
    started = time.monotonic()
    trained = train(model, data, settings, seed, companions.image_tokenizer.config.patch_size)
    trained["minutes"] = round((time.monotonic() - started) / 60, 2)
    pipeline = VAREditPipeline(
        model.eval(), companions.image_tokenizer, companions.text_encoder, companions.tokenizer, size=SIZE, **DEFAULTS
    )
    pipeline.set_progress_bar_config(disable=True)
    write_json(path, {
        "variant": variant, "seed": seed, "settings": asked, "data": data.digest,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_threads": torch.get_num_threads(), "train": trained,
        "edit_seconds": edit_seconds(pipeline, settings.guidance_scale), "rows": judge(pipeline, aspects, settings),
    })  # fmt: skip
    return path


def main(
    run: Annotated[Path, typer.Option(help="Folder of the results; finished runs in it are skipped.")],
    only: Annotated[str | None, typer.Option(help=f"Comma list of {', '.join(VARIANTS)}.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma list; a run is a seed of a variant.")] = "0,1",
    steps: int = 1000,
    pairs: int = 12_000,
    cases: int = 200,
    width: int = 128,
    depth: int = 6,
    batch_size: int = 16,
    guidance_scale: float = 2.0,
    report: Annotated[Path | None, typer.Option(help="Page whose results are rewritten.")] = Path("docs/ablation.md"),
) -> None:
    variants = list(VARIANTS) if only is None else only.split(",")
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"variant {unknown[0]!r} is unknown; use {', '.join(VARIANTS)}")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise typer.BadParameter(f"seeds {seeds!r} is not a comma list of numbers such as 0,1")
    numbers = [int(seed) for seed in seeds.split(",")]
    settings = Settings(steps, pairs, cases, width, depth, batch_size, guidance_scale)
    run.mkdir(parents=True, exist_ok=True)
    companions = load_pipeline(device="cpu")
    # Seed by seed, so that what is done at any moment compares.
    paths = [do_run(run, variant, seed, settings, companions) for seed in numbers for variant in variants]
    if report is not None:
        write_report(paths, report)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    typer.run(main)
