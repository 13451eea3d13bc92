"""Memory and time of edits of a 24-megapixel picture, and whether what lies outside stays. Linux.

    python benchmarks/large_image.py --output benchmarks/results/large_image.md

`varedit edit` runs as a process of its own; its peak memory is what the kernel counted. The picture is made by code.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from results_page import publish

SIZE = (6000, 4000)
SMALL = (600, 400)
CASES = (
    ("a small picture, for comparison", SMALL, "make it black and white", None),
    ("small box", SIZE, "make it black and white", (2600, 1700, 500, 400)),
    ("large box", SIZE, "make it darker", (1000, 800, 4000, 2400)),
    ("local, no box", SIZE, "add a red ball", None),
    ("the whole picture", SIZE, "make it black and white", None),
)
"""Name, size, instruction, box (left, top, width, height)."""


@dataclass(frozen=True)
class Run:
    """One edit: peak memory in MiB, seconds of wall clock and of processor, what it said, the edited picture."""

    peak: float
    seconds: float
    processor: float
    said: str
    edited: np.ndarray


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Clouds of all sizes and some discs: uint8 (H, W, 3)."""
    generator = np.random.default_rng(seed)
    width, height = size
    values = np.full((height, width, 3), 128, np.float32)
    for octave in range(9):
        cells = generator.normal(0, 48 / (1 + octave), (2 * 2**octave, 3 * 2**octave, 3))
        for channel in range(3):
            layer = Image.fromarray(cells[..., channel].astype(np.float32))
            values[..., channel] += np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
    rows, columns = np.ogrid[:height, :width]
    for _ in range(12):
        x, y, radius = generator.random(3) * (width, height, height / 8)
        values[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = generator.integers(0, 256, 3)
    return np.clip(values, 0, 255).astype(np.uint8)


def run(source: Path, instruction: str, box: tuple | None, model: str | None) -> Run:
    """Edit a file with the command in a process of its own."""
    target = source.with_suffix(".edited.png")
    options = ["--seed=0", "--overwrite", "--device=cpu", "--output", str(target)]
    options += ["--box", ",".join(map(str, box))] if box else []
    options += ["--model", model] if model else []
    code = "import sys; from varedit.cli import main; main(sys.argv[1:])"
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "edit", str(source), instruction, *options], stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the edit ended with {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - started
    with Image.open(target) as edited:
        return Run(usage.ru_maxrss / 1024, seconds, usage.ru_utime + usage.ru_stime, said, np.asarray(edited))


def row(name: str, source: np.ndarray, box: tuple | None, done: Run) -> str:
    """A line of the table; fails where a pixel outside the box changed."""
    changed = (source != done.edited).any(-1)
    inside = np.ones(changed.shape, bool)
    if box:
        left, top, width, height = box
        inside[:] = False
        inside[top : top + height, left : left + width] = True
        if changed[~inside].any():
            raise SystemExit(f"{name}: {changed[~inside].sum()} pixels outside the box changed")
    outside = f"0 of {(~inside).sum():,}" if box else "-"
    kind = next(word for word in ("local", "global", "none") if f"{word} change" in done.said)
    return (
        f"| {name} | {done.peak:.0f} | {done.seconds:.1f} | {done.processor:.1f} | {kind} | "
        f"{changed[inside].mean():.1%} | {outside} |"
    )


def main(
    model: Annotated[str | None, typer.Option(help="A model folder; none is the packaged model.")] = None,
    output: Path | None = None,
) -> None:
    lines = [
        f"# Edits of a picture of {SIZE[0]} x {SIZE[1]} pixels",
        "",
        "Peak resident memory, wall clock and processor time of the whole process: start, reading and writing PNG "
        f"included. The pixels alone are {np.prod(SIZE) * 3 / 2**20:.0f} MiB.",
        "",
        "| edit | peak MiB | seconds | processor seconds | change | pixels changed (in the box) | changed outside |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for name, size, instruction, box in CASES:
            path = Path(folder) / f"{size[0]}.png"
            if size not in sources:
                sources[size] = picture(size)
                Image.fromarray(sources[size]).save(path, compress_level=1)
            lines.append(row(name, sources[size], box, run(path, instruction, box, model)))
            print(lines[-1], flush=True)
    lines += [
        "",
        f"{platform.machine()}, {torch.get_num_threads()} thread(s) on {os.cpu_count()} cores with a load average of "
        f"{os.getloadavg()[2]:.1f}, PyTorch {torch.__version__}. With one thread, processor seconds are about what an "
        "idle machine takes.",
    ]
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
