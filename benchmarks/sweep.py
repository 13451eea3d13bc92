"""Which guidance, temperature and top-p edit best: a table over held-out cases, judged by the exact checker.

    python benchmarks/sweep.py --objects DIR --photos DIR --output benchmarks/results/sweep.md
    python benchmarks/sweep.py --guidance-scales 2,3,4 --temperatures 0,0.5 --top-ps 1 --count 50

Every combination edits the same cases with the same seeds. The cases are of another stream than those of the
benchmark and of the gallery, so that what is reported elsewhere was not tuned on.
"""

import itertools
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from varedit.durable import write_durably
from varedit.editing.edit import EditRequest, Settings, apply_edits
from varedit.evaluation.checker import Verdict
from varedit.evaluation.held_out import HeldOut
from varedit.evaluation.scores import bootstrap
from varedit.pipeline import VAREditPipeline, load_pipeline

SEED = 53
"""Of the stream of held-out pairs."""

COLUMNS = ("success", "completeness", "balance", "stray", "outside_psnr")
DIGITS = {"success": 1, "completeness": 3, "balance": 2, "stray": 1, "outside_psnr": 1}
PERCENT = ("success", "stray")


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no comma list of numbers") from error


def judge(
    pipeline: VAREditPipeline, held_out: HeldOut, indices: list[int], settings: Settings, batch_size: int
) -> list[Verdict]:
    """Edit the cases with some settings, each with its index as seed."""
    verdicts = []
    for first in range(0, len(indices), batch_size):
        batch = indices[first : first + batch_size]
        pairs = [held_out.pair(index) for index in batch]
        requests = [
            EditRequest(Image.fromarray(pair.source), pair.instruction, seed=index)
            for pair, index in zip(pairs, batch)
        ]  # fmt: skip
        for pair, result in zip(pairs, apply_edits(pipeline, requests, settings)):
            verdicts.append(held_out.check(pair, np.asarray(result.image)))
    return verdicts


def row(verdicts: list[Verdict], label: str) -> str:
    """The cells of one setting; success and balance with 95 % bootstrap intervals."""
    cells = []
    for name in COLUMNS:
        factor = 100 if name in PERCENT else 1
        values = [factor * float(value) for v in verdicts if (value := getattr(v, name)) is not None]
        mean, digits = bootstrap(values, f"{label} {name}"), DIGITS[name]
        text = f"{mean.mean:.{digits}f}"
        if name in ("success", "balance"):
            text += f" ({mean.low:.{digits}f} to {mean.high:.{digits}f})"
        cells.append(text)
    return " | ".join(cells)


def main(
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    guidance_scales: str = "1,2,3,4",
    temperatures: str = "0,0.5,1",
    top_ps: str = "1,0.9",
    count: int = 150,
    batch_size: int = 25,
    preserve: Annotated[str, typer.Option(help="exact: as a user gets it; off: as the model draws it.")] = "exact",
    output: Annotated[Path | None, typer.Option(help="Markdown file.")] = None,
) -> None:
    # At temperature 0 top-p changes nothing.
    grid = [
        (g, t, p)
        for g, t, p in itertools.product(numbers(guidance_scales), numbers(temperatures), numbers(top_ps))
        if t > 0 or p == numbers(top_ps)[0]
    ]
    chosen = [Settings(g, t, p, preserve=preserve) for g, t, p in grid]  # refused before the model is loaded
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    held_out = HeldOut(objects, photos, pipeline.config.size, seed=SEED)
    indices = list(itertools.islice(held_out.judgeable(), count))
    lines = [
        f"# Sampling of {model or 'the default model'}",
        "",
        f"{count} held-out cases (stream {SEED}), preserve {preserve}. Success and stray in percent, outside PSNR in "
        "dB, seconds an edit; 95 % bootstrap intervals over the cases.",
        "",
        "| guidance | temperature | top-p | success | completeness | balance | stray | outside PSNR | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (g, t, p), settings in zip(grid, chosen):
        started = time.monotonic()
        verdicts = judge(pipeline, held_out, indices, settings, batch_size)
        seconds = (time.monotonic() - started) / count
        lines.append(f"| {g:g} | {t:g} | {p:g} | {row(verdicts, 'sweep')} | {seconds:.2f} |")
        typer.echo(lines[-1], err=True)
    text = "\n".join(lines) + "\n"
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_durably(output, text.encode())


if __name__ == "__main__":
    typer.run(main)
