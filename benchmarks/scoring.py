"""How many cases a second are scored, and edited by our own pipeline in batches.

    python benchmarks/scoring.py --data PICTURES --output benchmarks/results/scoring.md

Networks have their real sizes and random weights: those cost what trained ones cost. PICTURES holds objects/ and
photos/ for the procedural benchmark; without it everything is drawn.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from results_page import publish

from varedit.evaluation.benchmarks import load
from varedit.evaluation.cases import Benchmark, Case, read_picture
from varedit.evaluation.editors import make_editor
from varedit.evaluation.features import Backbones, Clip
from varedit.evaluation.generate import generate
from varedit.evaluation.scores import score
from varedit.machine import num_cores
from varedit.testing import tiny_text_encoder


def clip(width: int, num_layers: int, patch_size: int, text_width: int, preprocessing: Any) -> Clip:
    """A CLIP of random weights; the text tower of both released sizes has 12 layers."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": num_layers,
        "num_attention_heads": width // 64, "patch_size": patch_size, "image_size": 224,
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": 12,
        "num_attention_heads": text_width // 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=text_width)
    return Clip(CLIPModel(config).eval(), tiny_text_encoder()[0], preprocessing)


def dino(width: int, patch_size: int) -> Any:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=width // 64,
        patch_size=patch_size, image_size=224,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).eval()


def pictures(count: int, side: int = 512) -> Benchmark:
    """Smooth random pictures with captions and a mask, a target of their own each."""
    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    cases = []
    for number in range(count):
        source, target = (
            np.asarray(Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).resize((side, side)))
            for _ in range(2)
        )
        texts = {"source_caption": "a picture of a thing", "target_caption": "a picture of another thing"}
        cases.append(Case(f"{number:04d}", "go", source, target=target, mask=mask, **texts))
    return Benchmark("own", tuple(cases), ())


@dataclass(frozen=True)
class Row:
    """A measurement: what, of how many cases, wall seconds and CPU seconds (of all threads) in all."""

    title: str
    num_pixels: int
    num_cases: int
    wall: float
    cpu: float

    def __str__(self) -> str:
        rate, cost = self.num_cases / self.wall, self.cpu / self.num_cases
        return f"| {self.title} | {self.num_pixels} | {self.num_cases} | {rate:.2f} | {cost:.3f} |"


def measure(title: str, num_pixels: int, num_cases: int, work: Callable[[], object]) -> Row:
    wall, cpu = time.monotonic(), time.process_time()
    work()
    row = Row(title, num_pixels, num_cases, time.monotonic() - wall, time.process_time() - cpu)
    typer.echo(str(row), err=True)
    return row


def scoring(title: str, benchmark: Benchmark, metrics: Sequence[str], models: Backbones) -> Row:
    """Score the known answers."""
    with tempfile.TemporaryDirectory() as folder:
        generate(benchmark, make_editor("oracle"), Path(folder))
        pixels = read_picture(benchmark.cases[0].source).shape[0]
        return measure(title, pixels, len(benchmark.cases), lambda: score(benchmark, Path(folder), metrics, models))


def editing(benchmark: Benchmark, batch_size: int) -> Row:
    editor = make_editor("varedit", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        return measure(
            f"edit: default model, batches of {batch_size}", 128, len(benchmark.cases),
            lambda: generate(benchmark, editor, Path(folder), batch_size=batch_size),
        )  # fmt: skip


def main(data: Path | None = None, output: Path | None = None, threads: int = os.cpu_count() or 1) -> None:
    torch.set_num_threads(threads)
    before = os.getloadavg()[0]
    drawn = load("procedural", data, limit=60)
    emu = Backbones(given={"clip": clip(768, 12, 32, 512, "magicbrush"), "dino": dino(384, 16)})
    names = ("clip_out", "clip_dir", "clip_i_source", "dino_source", "l1_source")
    rows = [
        scoring("score: the exact checker", drawn, drawn.metrics, Backbones()),
        scoring("score: pixels", pictures(8), ("psnr", "mse", "ssim", "l1_source", "stray"), Backbones()),
        scoring("score: EMU-Edit (CLIP ViT-B/32, DINO ViT-S/16)", pictures(8), names, emu),
    ]
    del emu
    pie = Backbones(given={"clip": clip(1024, 24, 14, 768, "pie-bench"), "structure": dino(768, 8)})
    names = ("structure", "psnr", "mse", "ssim", "clip_whole", "clip_edit")
    rows.append(scoring("score: PIE-Bench but LPIPS (CLIP ViT-L/14, DINO ViT-B/8)", pictures(4), names, pie))
    del pie
    rows += [editing(drawn.first(16), batch_size) for batch_size in (1, 8, 16)]
    cores = num_cores()
    load_average = f"{before:.1f} before and {os.getloadavg()[0]:.1f} after"
    lines = [
        "# Evaluation: cases a second",
        "",
        f"{platform.machine()}, {cores} of {os.cpu_count()} cores, {threads} thread(s), PyTorch {torch.__version__}.",
        f"Load average {load_average} the measurement. Other work makes cases a second smaller;",
        "CPU seconds, of all threads together, depend less on it.",
        "",
        "| what | pixels | cases | cases a second | CPU seconds a case |",
        "|---|---|---|---|---|",
        *map(str, rows),
        "",
        "Networks are of random weights. Command: `python benchmarks/scoring.py`.",
    ]
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
