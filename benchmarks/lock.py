"""Edits in an area, by how the model is held to the source outside it (`varedit edit --lock`).

    python benchmarks/lock.py --objects DIR --photos DIR --output benchmarks/results/lock.md

Held-out cases as a user gets them, each with its index as seed. An edit of the whole picture is asked for in a
rectangle of an eighth to a half of it: the known answer inside, the source outside. An edit of objects is asked for in
the box around what it may change. The exact checker judges both; outside the area the pixels are the source's anyway.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from PIL import Image
from results_page import publish

from varedit.editing.edit import EditRequest, Lock, Settings, apply_edits
from varedit.editing.mask import box_mask
from varedit.evaluation.checker import Answer, Verdict, check_any, visible_change
from varedit.evaluation.held_out import HeldOut
from varedit.evaluation.scores import bootstrap
from varedit.pipeline import VAREditPipeline, load_pipeline

SEED = 61
"""Of the stream of held-out pairs."""

MARGIN = 6 / 128
"""Between what an edit of objects may change and the box asked for, as a share of the picture."""

LOCKS = get_args(Lock)
TURNS = ("mirror", "upside_down")
METRICS = ("success", "closer", "half")
BATCH_SIZE = 25


@dataclass(frozen=True, eq=False)
class AreaCase:
    """An edit asked for in an area.

    Attributes:
        request: the source, the instruction, the mask of the area, and the seed.
        answers: what is right.
    """

    request: EditRequest
    answers: list[Answer]

    def check(self, result: Image.Image) -> Verdict:
        return check_any(np.asarray(self.request.image), np.asarray(result), self.answers)


def whole_picture_cases(held_out: HeldOut) -> Iterator[AreaCase]:
    """Tone, weather and style, each in a rectangle of its own; endless. No mirrored or turned pictures."""
    for index in count():
        pair = held_out.pair(index)
        height, width = pair.mask.shape
        if not pair.mask.all() or any(operation.get("name") in TURNS for operation in pair.target_scene["edit"]):
            continue
        rng = np.random.default_rng((SEED, index))
        share, stretch = rng.uniform(1 / 8, 1 / 2), np.exp(rng.uniform(-0.5, 0.5))
        high, wide = (
            min(round(side * (share * s) ** 0.5), side) for side, s in ((height, 1 / stretch), (width, stretch))
        )
        top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
        area = box_mask((left, top, wide, high), (width, height))
        inside = np.asarray(area) > 0
        target = np.where(inside[..., None], pair.target, pair.source)
        if visible_change(pair.source, target, [inside]):
            request = EditRequest(Image.fromarray(pair.source), pair.instruction, index, area)
            yield AreaCase(request, [Answer(target, inside, [inside])])


def object_cases(held_out: HeldOut) -> Iterator[AreaCase]:
    """Edits that may change less than half of the picture, each in the box around it; endless."""
    for index in held_out.judgeable():
        pair = held_out.pair(index)
        if pair.mask.mean() > 0.5:
            continue
        rows, columns = (np.flatnonzero(pair.mask.any(axis)) for axis in (1, 0))
        margin = round(MARGIN * min(pair.mask.shape))
        left, top = max(columns[0] - margin, 0), max(rows[0] - margin, 0)
        box = (left, top, columns[-1] + 1 + margin - left, rows[-1] + 1 + margin - top)
        area = box_mask(box, pair.mask.shape[::-1])
        answers = [a for a in held_out.answers(pair) if not (a.mask & (np.asarray(area) == 0)).any()]
        yield AreaCase(EditRequest(Image.fromarray(pair.source), pair.instruction, index, area), answers)


def judge(pipeline: VAREditPipeline, cases: list[AreaCase], lock: Lock) -> list[Verdict]:
    verdicts = []
    for first in range(0, len(cases), BATCH_SIZE):
        batch = cases[first : first + BATCH_SIZE]
        results = apply_edits(pipeline, [case.request for case in batch], Settings(lock=lock))
        verdicts += [case.check(result.image) for case, result in zip(batch, results)]
    return verdicts


def main(
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    number: Annotated[int, typer.Option("--count", min=2, help="Cases of either kind.")] = 120,
    output: Path | None = None,
) -> None:
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    held_out = HeldOut(objects, photos, pipeline.config.size, seed=SEED)
    lines = [
        "# Edits in an area, by lock", "",
        f"{number} held-out cases of either kind (stream {SEED}), by {model or 'the default model'}, as a user gets "
        "them. Percent, with 95 % bootstrap intervals; of every lock after the first what is added, case by case.", "",
        f"| edits | lock | {' | '.join(METRICS)} |", f"| --- | --- |{' --- |' * len(METRICS)}",
    ]  # fmt: skip
    for name, cases in (("whole picture", whole_picture_cases(held_out)), ("objects", object_cases(held_out))):
        chosen, found = list(islice(cases, number)), dict[str, list[Verdict]]()
        for lock in LOCKS:
            found[lock] = judge(pipeline, chosen, lock)
            cells = []
            for metric in METRICS:
                values, first = (
                    np.array([getattr(verdict, metric) for verdict in found[key]], float) for key in (lock, LOCKS[0])
                )
                cell = f"{100 * values.mean():.1f}"
                if lock != LOCKS[0]:
                    added = bootstrap((100 * (values - first)).tolist(), f"{name} {metric}")
                    cell += f" ({added.mean:+.1f}; {added.low:+.1f} to {added.high:+.1f})"
                cells.append(cell)
            lines.append(f"| {name} | {lock} | {' | '.join(cells)} |")
            typer.echo(lines[-1], err=True)
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
