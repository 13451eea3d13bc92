"""Time and memory of one training step by model size, by the trainer itself.

    python benchmarks/train.py --output benchmarks/results/train_cpu.md
    python benchmarks/train.py --model 7m --repeats 2
    python benchmarks/train.py --size 256 --batch-size 32 --output benchmarks/results/train_cuda.md

A step is all of it but the data: frozen image tokenizer, forward, backward, clipping, AdamW. Each model is measured in
a process of its own, for its peak memory. On a CPU the 2B model is not run: its row is from `training/estimate.py`.
Where the machine does other work meanwhile, samples a CPU-second say what free cores would do.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import yaml
from results_page import publish
from transformers import T5Config, T5EncoderModel

from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.machine import peak_memory_mib
from varedit.pipeline import DEFAULT_MODEL, default_device
from varedit.presets import PRESETS
from varedit.runtime import computes_bfloat16
from varedit.scales import ScaleSchedule, scale_schedule
from varedit.testing import tiny_text_encoder
from varedit.training.config import EditorConfig, load_config
from varedit.training.data import MicroBatches
from varedit.training.estimate import GIB, estimate
from varedit.training.loop import Loop
from varedit.training.processes import joined
from varedit.training.trainer import EditorTraining
from varedit.transformer import VAREditTransformer, attention_mask

NUM_TEXT_TOKENS = 12
_SMALL = {"num_bits": 56, "text_features": 384, "num_text_heads": 4, "max_text_tokens": 64, "num_levels": 13}
MODELS: dict[str, dict] = {
    "7m": {"width": 256, "num_blocks": 6, "num_heads": 4, **_SMALL},
    "30m": {"width": 512, "num_blocks": 6, "num_heads": 8, **_SMALL},
    "125m": {"width": 768, "num_blocks": 12, "num_heads": 12, **_SMALL},
    "2b": dict(PRESETS["infinity-2b"].transformer),
}
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}
"""Dense bfloat16 TFLOP/s on the data sheet, by what the device's name holds."""


@dataclass(frozen=True)
class Row:
    """One model, measured or (`seconds` None) estimated. Memory in GiB, of the whole process; FLOPs of one sample."""

    model: str
    num_parameters: int
    tera_flops: float
    estimated_gib: float
    seconds: float | None = None
    cpu_seconds: float = 0.0
    share: float = 0.0
    peak_gib: float = 0.0


def step_flops(arguments: dict, schedule: ScaleSchedule, num_text: int = NUM_TEXT_TOKENS) -> float:
    """Floating-point operations that one sample needs in forward and backward, without recomputation.

    Only what the masks let through counts as attention, and the frozen models do not count.
    """
    with torch.device("meta"):
        model = VAREditTransformer(**arguments)
    settings = model.config
    num_tokens = schedule.num_tokens[-1] + schedule.offsets[-1]  # source and targets, conditioning "sar" or "finest"
    total = 2.0 * model.input_proj.weight.numel() * num_tokens + 2.0 * model.head.weight.numel() * schedule.offsets[-1]
    for index, block in enumerate(model.blocks):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear):
                total += 2.0 * layer.weight.numel() * (num_text if name.endswith("to_kv") else num_tokens)
        aligned = settings.conditioning == "sar" and index < settings.num_aligned_blocks
        visible = int(attention_mask(schedule, settings.conditioning, aligned, torch.device("cpu")).sum())
        total += 4.0 * settings.width * (visible + num_tokens * num_text)
    return 3 * total


def config_of(model: str, folder: Path, size: int, batch_size: int, precision: str, steps: int) -> EditorConfig:
    """A run of that model on the procedural world; the 2B model gets random companions of its sizes."""
    values = {
        "transformer": MODELS[model], "image_tokenizer": str(DEFAULT_MODEL), "text_encoder": str(DEFAULT_MODEL),
        "steps": steps, "batch_size": batch_size, "micro_batch_size": batch_size, "precision": precision,
        "data": {"sizes": {size: 1}, "aspects": {1.0: 1}, "num_workers": 0, "validation_count": 0},
    }  # fmt: skip
    if model == "2b":
        values |= {"preset": "infinity-2b", "transformer": {}, "gradient_checkpointing": True}
        values |= {"image_tokenizer": str(folder / "tokenizer"), "text_encoder": str(folder / "text")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(EditorConfig, path)


def save_companions(folder: Path) -> None:
    """An image tokenizer of the released size, and a text encoder of the released width but two layers."""
    VAREditImageTokenizer(**PRESETS["infinity-2b"].image_tokenizer).save_pretrained(folder / "tokenizer")
    tokenizer, _ = tiny_text_encoder()
    tokenizer.save_pretrained(folder / "text")
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=2048, d_ff=64, num_layers=2, num_heads=2))
    encoder.save_pretrained(folder / "text")


def measure(model: str, size: int, batch_size: int, precision: str, repeats: int) -> Row:
    """One step of the trainer, the median of several after one to warm up. Without a GPU, 2b is only estimated."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_of(model, folder, size, batch_size, precision, repeats + 1)
        found = estimate(config)
        arguments = {**MODELS[model], "conditioning": "sar"}
        tera_flops = step_flops(arguments, scale_schedule(size)) / 1e12
        estimated = found.num_parameters, tera_flops, found.total / GIB
        if model == "2b" and not torch.cuda.is_available():
            return Row(model, *estimated)
        if model == "2b":
            save_companions(folder)
        with joined(config.device) as processes:
            training = EditorTraining(config, processes, folder / "run")
            loop = Loop(config, training, processes, folder / "run", resume=False)
            batches = MicroBatches(training.plan, batch_size)
            times = [timed_step(loop, batches[number]) for number in range(repeats + 1)]
        wall, cpu = np.median(times[1:], axis=0)
        peak_gib = (peak_memory_mib() or math.nan) / 1024
        return Row(model, *estimated, wall, cpu, cpu / wall / torch.get_num_threads(), peak_gib)


def timed_step(loop: Loop, batch) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    times, started = os.times(), time.perf_counter()
    loop.train_step(iter([batch]))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.user + after.system - times.user - times.system


def table(rows: list[Row], batch_size: int, peak_tflops: float | None) -> list[str]:
    """Markdown. On a GPU with the utilisation, on a CPU with the rate a CPU-second."""
    on_gpu = torch.cuda.is_available()
    last = "TFLOP/s | utilisation" if on_gpu else "samples a CPU-second | GFLOP a CPU-second | share of the cores"
    titles = f"| model | parameters | TFLOP a sample | samples/s | peak GiB | estimated GiB | {last} |"
    lines = [titles, "| --- " * (titles.count("|") - 1) + "|"]
    for row in rows:
        cells = [row.model, f"{row.num_parameters / 1e6:.1f} M", f"{row.tera_flops:.3g}"]
        if row.seconds is None:
            cells += ["not run", "not run", f"{row.estimated_gib:.1f}", *["not run"] * (2 if on_gpu else 3)]
        else:
            rate = batch_size / row.seconds
            cells += [f"{rate:.3g}", f"{row.peak_gib:.2f}", f"{row.estimated_gib:.2f}"]
            if on_gpu:
                tflops = rate * row.tera_flops
                cells += [f"{tflops:.0f}", f"{tflops / peak_tflops:.0%}" if peak_tflops else "unknown device"]
            else:
                per_cpu = batch_size / row.cpu_seconds
                cells += [f"{per_cpu:.3g}", f"{per_cpu * row.tera_flops * 1000:.0f}", f"{row.share:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all of them if none.")] = None,
    size: Annotated[int, typer.Option(help="Size class, square.")] = 128,
    batch_size: int = 4,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16; by default what the device computes well.")] = "",
    repeats: int = 5,
    output: Path | None = None,
    row: Annotated[bool, typer.Option(help="Measure the one model here and print its numbers as JSON.")] = False,
) -> None:
    models = model or list(MODELS)
    if not precision:
        precision = "bfloat16" if computes_bfloat16(default_device()) else "float32"
    if row:
        typer.echo(json.dumps(asdict(measure(models[0], size, batch_size, precision, repeats))))
        return
    rows = []
    for name in models:
        command = [sys.executable, __file__, "--row", "--model", name, "--size", str(size), "--precision", precision]
        command += ["--batch-size", str(batch_size), "--repeats", str(repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} threads"
    shared = (
        "" if torch.cuda.is_available() else " Other work may share the machine: a CPU-second is what this had of it."
    )
    against = f" Utilisation is against {peak} TFLOP/s." if peak else ""
    lines = [
        f"# One training step: {size} pixels, batch {batch_size}, {precision}",
        "",
        f"{device}{threads}, PyTorch {torch.__version__}. Median of {repeats}, without the data. FLOPs are those that "
        f"forward and backward need, attention only where the masks let it through.{against} Estimated GiB are of "
        f"`varedit train --dry-run`: without Python and its libraries, and without the image tokenizer's pass.{shared}",
        "",
        *table(rows, batch_size, peak),
    ]
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
