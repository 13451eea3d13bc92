"""The loss on the bits of fixed pairs: of one model against another, or of one training on its way.

    python benchmarks/bit_loss.py MODEL [MODEL ...] --objects DIR --photos DIR

Teacher-forced, without flipped bits. All models see the same pairs and are compared pair by pair, which tells apart
what edits of as many pictures do not. `default` is the default model. With the seed of a training, `--split train`
makes pairs that it has seen.
"""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from results_page import publish
from torch import Tensor

from varedit.data.synthetic import Pair, World
from varedit.evaluation.scores import bootstrap
from varedit.image_processor import prepare
from varedit.pipeline import VAREditPipeline, load_pipeline
from varedit.quantizer import TeacherForcing, patchify, teacher_forcing
from varedit.scales import ScaleSchedule
from varedit.text import encode_prompts, pad_text
from varedit.training.objective import edit_weights, objective

ASPECTS = {1.0: 0.5, 0.75: 0.25, 1.5: 0.25}
"""Height over width -> share of the pairs."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Part:
    """What a transformer is asked about some pairs of one shape, and what weighs how much in its answer."""

    schedule: ScaleSchedule
    source_BChw: Tensor
    text: tuple[Tensor, Tensor]
    forced: TeacherForcing
    weights_BL: Tensor


def encode(pipeline: VAREditPipeline, pairs: list[Pair], edit_weight: float) -> Part:
    """Pairs of one shape as the transformer takes them."""
    size, patch_size = pipeline.config.size, pipeline.image_tokenizer.config.patch_size
    sources = [prepare(pair.source, size, "native") for pair in pairs]
    targets = [prepare(pair.target, size, "native") for pair in pairs]
    schedule = sources[0].schedule
    source, target = (
        pipeline.image_tokenizer.encode(torch.cat([one.image_B3HW for one in part])) for part in (sources, targets)
    )
    text = encode_prompts(
        [pair.instruction for pair in pairs], pipeline.tokenizer, pipeline.text_encoder,
        pipeline.transformer.config.max_text_tokens, BATCH_SIZE,
    )  # fmt: skip
    return Part(
        schedule,
        patchify(source, patch_size).transpose(1, 2).unflatten(2, schedule.finest),
        pad_text(text),
        teacher_forcing(target, schedule, patch_size),
        edit_weights(torch.from_numpy(np.stack([pair.mask for pair in pairs])), schedule, edit_weight),
    )


@torch.no_grad()
def losses(pipeline: VAREditPipeline, groups: list[list[Pair]], edit_weight: float) -> list[float]:
    """Loss of every pair, in order."""
    found = []
    for pairs in groups:
        part = encode(pipeline, pairs, edit_weight)
        logits = pipeline.transformer(
            part.schedule, part.forced.inputs_BLC, source_BChw=part.source_BChw,
            text_BTF=part.text[0], text_mask_BT=part.text[1],
        )  # fmt: skip
        found += [
            objective(logits[[row]], part.forced.bits_BLC[[row]], part.schedule, part.weights_BL[[row]]).item()
            for row in range(len(pairs))
        ]
    return found


def main(
    models: Annotated[list[str], typer.Argument(help="Model folders; `default` is the default model.")],
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    split: Annotated[str, typer.Option(help="train: new pairs of what is trained on. test: held-out.")] = "train",
    number: Annotated[int, typer.Option("--count", min=4, help="Pairs.")] = 768,
    edit_weight: Annotated[float, typer.Option(help="How much tokens of the change count, as in training.")] = 4.0,
    seed: int = 999,
    output: Path | None = None,
) -> None:
    pipelines = [load_pipeline(None if model == "default" else model, "cpu", torch.float32) for model in models]
    first = pipelines[0]
    ours = first.image_tokenizer.state_dict()
    for model, pipeline in zip(models, pipelines):
        theirs = pipeline.image_tokenizer.state_dict()
        if theirs.keys() != ours.keys() or not all(torch.equal(theirs[name], ours[name]) for name in ours):
            raise typer.BadParameter(f"{model} has other bits than {models[0]}: give models of one image tokenizer")
    groups, index = [], count()
    for ratio, share in ASPECTS.items():
        world = World(objects, photos, split, first.config.size, ratio)
        pairs = [world.pair(seed, next(index)) for _ in range(round(number * share))]
        groups += [pairs[begin : begin + BATCH_SIZE] for begin in range(0, len(pairs), BATCH_SIZE)]
    types = np.array([pair.edit_type for pairs in groups for pair in pairs])
    found = [np.array(losses(pipeline, groups, edit_weight)) for pipeline in pipelines]
    lines = [
        f"# The loss on the bits of {len(types)} fixed pairs", "",
        f"Pairs of the procedural world, split {split}, seed {seed}; teacher-forced; tokens of the change count "
        f"{edit_weight:g} times. In brackets what is added to {models[0]}, case by case, with a 95 % interval.", "",
        f"| type | n | {' | '.join(models)} |", f"| --- | --- |{' --- |' * len(models)}",
    ]  # fmt: skip
    for name in [*sorted(set(types)), "all"]:
        chosen = np.full(len(types), True) if name == "all" else types == name
        cells = [f"{found[0][chosen].mean():.4f}"]
        for values in found[1:]:
            added = bootstrap((values - found[0])[chosen].tolist(), name)
            cells.append(f"{values[chosen].mean():.4f} ({added.mean:+.4f}; {added.low:+.4f} to {added.high:+.4f})")
        lines.append(f"| {name} | {chosen.sum()} | {' | '.join(cells)} |")
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
