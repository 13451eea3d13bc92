"""How fast the procedural world draws, and one picture of every kind of edit.

    python benchmarks/synth.py --objects DIR --photos DIR --output benchmarks/results/synth.md --sheet out/synth.png

One process and one thread. Where the machine does other work meanwhile, pairs a CPU-second say what a free core would
do; the wall clock says what this one did.
"""

import os
import platform
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from results_page import publish

from varedit.data.synthetic import World
from varedit.data.synthetic.world import WEIGHTS
from varedit.training.pictures import contact_sheet

WARM_UP = 8000  # pairs that fill the caches of cut-outs and photographs
BEGINNING = 500  # of these, timed as well: files are read and decoded
SIZES = (128, 256)


def cpu_seconds() -> float:
    """Processor time of this process so far."""
    times = os.times()
    return times.user + times.system


def measure(world: World, count: int, repeats: int) -> tuple[float, float, float, float]:
    """Pairs a CPU-second at the beginning; then, as medians over repeats, pairs a CPU-second, pairs a second of the
    clock, and the share of a core that this process got.
    """
    cpu = cpu_seconds()
    for index in range(BEGINNING):
        world.pair(1, index)
    beginning = BEGINNING / (cpu_seconds() - cpu)
    for index in range(BEGINNING, WARM_UP):
        world.pair(1, index)
    rows = []
    for repeat in range(repeats):
        wall, cpu = time.perf_counter(), cpu_seconds()
        for index in range(count):
            world.pair(2 + repeat, index)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        rows.append((count / cpu, count / wall, cpu / wall))
    per_cpu_second, per_second, share = np.median(rows, axis=0)
    return beginning, float(per_cpu_second), float(per_second), float(share)


def sheet(world: World, per_kind: int = 4) -> Image.Image:
    """Pairs of every kind of edit, one pair a row, side by side in columns of one kind each."""
    found: dict[str, list] = {kind: [] for kind in WEIGHTS}
    index = 0
    while any(len(pairs) < per_kind for pairs in found.values()):
        pair = world.pair(0, index)
        if len(found[pair.edit_type]) < per_kind:
            found[pair.edit_type].append(pair)
        index += 1
    columns = [
        contact_sheet(
            [(pair.instruction, [Image.fromarray(pair.source), Image.fromarray(pair.target)]) for pair in pairs],
            (kind, "target"),
        )
        for kind, pairs in found.items()
    ]
    whole = Image.new("RGB", (sum(c.width for c in columns), max(c.height for c in columns)), "white")
    left = 0
    for column in columns:
        whole.paste(column, (left, 0))
        left += column.width
    return whole


def main(
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    count: Annotated[int, typer.Option(help="Pairs a repeat.")] = 300,
    repeats: int = 5,
    output: Path | None = None,
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Picture to write: every kind of edit.")] = None,
) -> None:
    sources = " and ".join(
        [f"{'a folder of' if objects else 'no'} cut-outs", f"{'a folder of' if photos else 'no'} photographs"]
    )
    lines = [
        "# The procedural world: pairs a second on one core",
        "",
        f"{platform.machine()}, one thread, with {sources}. Medians of {repeats} times {count} pairs after "
        f"{WARM_UP:,}, which fill the caches; and the first {BEGINNING}, when files are read. "
        "*Share* is the part of a core that the process got: other work may share the machine, and its caches.",
        "",
        f"| pixels | pairs a CPU-second | pairs a second | share | first {BEGINNING} pairs, a CPU-second |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        world = World(objects, photos, "train", size)
        beginning, per_cpu_second, per_second, share = measure(world, count, repeats)
        lines.append(f"| {size} | {per_cpu_second:.0f} | {per_second:.0f} | {share:.0%} | {beginning:.0f} |")
    publish(lines, output)
    if sheet_file:
        sheet_file.parent.mkdir(parents=True, exist_ok=True)
        sheet(World(objects, photos, "test", 128)).save(sheet_file)


if __name__ == "__main__":
    typer.run(main)
