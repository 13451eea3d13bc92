r"""Time and memory of one edit, with random weights of a released size or with a model folder.

    python benchmarks/edit.py --preset 2b-512 --size 256 --output benchmarks/results/edit_2b_256.md
    python benchmarks/edit.py --model varedit/models/tiny --size 128 --dtype float32 --repeats 31 \
        --output benchmarks/results/edit_tiny_128.md

Random weights cost what trained ones cost. The text encoder is left out of a preset's run (its states are random):
it adds its own pass over a dozen tokens.
"""

import math
import platform
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from results_page import publish

from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.machine import peak_memory_mib
from varedit.pipeline import ScaleStep, VAREditPipeline, default_device, load_pipeline
from varedit.presets import PRESETS
from varedit.runtime import computes_bfloat16
from varedit.transformer import VAREditTransformer

NUM_TEXT_TOKENS = 12


def random_pipeline(preset: str, dtype: torch.dtype, device: str) -> VAREditPipeline:
    """A pipeline of a released size with small random weights, built directly in `dtype`: never larger than that."""
    chosen = PRESETS[preset]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            transformer = VAREditTransformer(**chosen.transformer)
            image_tokenizer = VAREditImageTokenizer(**chosen.image_tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
    for model in (transformer, image_tokenizer):
        model.to_empty(device=device)
        for name, parameter in model.named_parameters():
            if model is transformer and any(part in name for part in transformer._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
            torch.nn.init.normal_(parameter, std=0.02)
    return VAREditPipeline(transformer.eval(), image_tokenizer.eval(), size=chosen.size, fit=chosen.fit)


def main(
    preset: Annotated[str, typer.Option(help=f"Random weights of a released size: {', '.join(PRESETS)}.")] = "",
    model: Annotated[str, typer.Option(help="A model folder instead.")] = "",
    size: int = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; by default what the device computes well.")] = "",
    guidance_scale: float = 3.0,
    repeats: int = 1,
    output: Path | None = None,
) -> None:
    device = default_device()
    if bool(preset) == bool(model):
        raise typer.BadParameter("give either --preset or --model")
    started = time.monotonic()
    dtype = dtype or ("bfloat16" if computes_bfloat16(device) else "float32")
    chosen = getattr(torch, dtype)
    pipeline = random_pipeline(preset, chosen, device) if preset else load_pipeline(model, device, chosen)
    built = time.monotonic() - started
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    text = torch.randn(NUM_TEXT_TOKENS, pipeline.transformer.config.text_features)
    request = {"prompt": "make it black and white"} if model else {"prompt_embeds": text}
    rows: list[list[float]] = []
    for _ in range(repeats if device == "cpu" else repeats + 1):
        steps: list[ScaleStep] = []
        started = time.monotonic()
        pipeline(image, **request, size=size, seed=0, guidance_scale=guidance_scale, callback_on_scale=steps.append)
        rows.append([*(step.seconds for step in steps), time.monotonic() - started])
    median = np.median(rows[-repeats:], axis=0)  # the first on a GPU loads its libraries as well
    lines = [
        f"# One edit: {preset or model}, {size} pixels, {dtype}, guidance {guidance_scale:g}",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, device {device}. "
        f"Median of {repeats}.",
        "",
        f"- parameters: {sum(p.numel() for p in pipeline.transformer.parameters()) / 1e9:.2f} G transformer, "
        f"{sum(p.numel() for p in pipeline.image_tokenizer.parameters()) / 1e9:.3f} G image tokenizer",
        f"- building the weights: {built:.1f} s",
        f"- **one edit: {median[-1]:.2f} s**, peak memory {(peak_memory_mib() or math.nan) / 1024:.2f} GiB",
        "- seconds until each scale was done: " + ", ".join(f"{value:.2f}" for value in median[:-1]),
    ]
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
