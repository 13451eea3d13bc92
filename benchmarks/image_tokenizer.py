"""What the image tokenizer alone loses: PSNR and SSIM of held-out pictures that went through its bits.

    python benchmarks/image_tokenizer.py --objects DIR --photos DIR --output benchmarks/results/image_tokenizer.md

Half of the pictures are photographs without objects, half drawn scenes of objects before drawn backgrounds, all of the
procedural world's test split. No edit of a model keeps a picture better than this before preservation.
"""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from results_page import publish

from varedit.data.synthetic import World
from varedit.evaluation.metrics import background_psnr, background_ssim
from varedit.image_processor import prepare, to_pil
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.pipeline import load_pipeline
from varedit.quantizer import encode_bits


def pictures(world: World, photographs: bool, seed: int) -> Iterator[np.ndarray]:
    """Sources of the world's pairs, uint8 (H, W, 3), endless: photographs alone, or scenes without any."""
    for index in count():
        pair = world.pair(seed, index)
        on_photograph = pair.scene["background"]["kind"] == "photo"
        if on_photograph == photographs and bool(pair.scene["objects"]) != photographs:
            yield pair.source


@torch.no_grad()
def reconstruct(tokenizer: VAREditImageTokenizer, picture: np.ndarray, size: int) -> np.ndarray:
    """A picture from the bits of all its scales, uint8 of the same shape."""
    prepared = prepare(picture, size, "native")
    features_BChw = tokenizer.encode(prepared.image_B3HW)
    _, canvas_BChw = encode_bits(features_BChw, prepared.schedule, tokenizer.config.patch_size)
    return np.asarray(to_pil(tokenizer.decode(canvas_BChw))[0])


def main(
    model: Annotated[str, typer.Option(help="A model folder; the default model if none is given.")] = "",
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs; without it drawn scenes only.")] = None,
    number: Annotated[int, typer.Option("--count", help="Pictures of each kind.")] = 96,
    seed: int = 11,
    output: Path | None = None,
) -> None:
    pipeline = load_pipeline(model or None, "cpu", torch.float32)
    size = pipeline.config.size
    world = World(objects, photos, "test", size)
    lines = [
        f"# The image tokenizer alone: {model or 'the default model'}, {size} pixels", "",
        f"Held-out square pictures, seed {seed}. PSNR at data range 1; SSIM with an 11 x 11 Gaussian.", "",
        "| pictures | number | PSNR, mean (dB) | lowest tenth below | SSIM, mean |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, photographs in (("photographs", True), ("drawn scenes", False)):
        if photographs and photos is None:
            continue
        psnr, ssim = [], []
        for picture in islice(pictures(world, photographs, seed), number):
            result, nothing = reconstruct(pipeline.image_tokenizer, picture, size), np.zeros(picture.shape[:2], bool)
            psnr.append(background_psnr(picture, result, nothing))
            ssim.append(background_ssim(picture, result, nothing))
        lines.append(
            f"| {name} | {number} | {np.mean(psnr):.1f} | {np.percentile(psnr, 10):.1f} | {np.mean(ssim):.3f} |"
        )
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
