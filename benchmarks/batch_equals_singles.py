"""Mixed batches against single edits: how many bits and pixels differ.

    python benchmarks/batch_equals_singles.py --output benchmarks/results/batch_equals_singles.md

Every batch mixes pictures of several aspect ratios, instructions, seeds and masks. In float32 on a CPU with as many
threads as alone not one pixel may differ (the command fails otherwise); with other numbers of threads (--threads), on
other devices and in other precisions the rate is what is measured.
"""

import platform
import random
from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import torch
import typer
from PIL import Image
from results_page import publish

from varedit.editing.edit import EditRequest, EditResult, apply_edit, apply_edits
from varedit.editing.mask import box_mask
from varedit.editing.model_identity import identify
from varedit.pipeline import default_device, load_pipeline

SHAPES = ((400, 400), (400, 300), (300, 400), (400, 267), (267, 400), (400, 200), (200, 400), (390, 150))
INSTRUCTIONS = (
    "make it black and white", "make it sepia", "make it brighter", "make it darker", "blur the picture",
    "add a red ball", "remove the cup", "make it a cold winter evening, with snow on the ground and lights in windows",
)  # fmt: skip


def requests(count: int, seed: int) -> list[EditRequest]:
    """Edits that differ in everything; every third has a mask."""
    generator = random.Random(seed)
    photos = [Image.fromarray(photo()) for photo in (skimage.data.coffee, skimage.data.astronaut, skimage.data.chelsea)]
    made = []
    for index in range(count):
        photo, (width, height) = photos[index % len(photos)], SHAPES[index % len(SHAPES)]
        left, top = generator.randint(0, photo.width - width), generator.randint(0, max(photo.height - height, 0))
        picture = photo.crop((left, top, left + width, min(top + height, photo.height)))
        mask = box_mask((20, 20, width // 2, height // 3), picture.size) if index % 3 == 2 else None
        made.append(EditRequest(picture, generator.choice(INSTRUCTIONS), generator.randrange(2**31), mask))
    return made


class Count:
    """Bits and pixels compared so far, and how many differ.

    Attributes:
        bits, pixels: compared, different.
        largest: difference of two pixels, levels of 255.
    """

    def __init__(self) -> None:
        self.bits, self.pixels, self.largest = [0, 0], [0, 0], 0

    def add(self, batched: EditResult, single: EditResult) -> None:
        for ours, theirs in zip(batched.bits, single.bits, strict=True):
            self.bits[0] += ours.numel()
            self.bits[1] += int((ours != theirs).sum())
        difference = np.abs(np.asarray(batched.image).astype(int) - np.asarray(single.image)).max(-1)
        self.pixels[0] += difference.size
        self.pixels[1] += int((difference > 0).sum())
        self.largest = max(self.largest, int(difference.max()))

    def row(self, name: str) -> str:
        (bits, wrong_bits), (pixels, wrong_pixels) = self.bits, self.pixels
        return f"| {name} | {wrong_bits:,} of {bits:,} | {wrong_pixels:,} of {pixels:,} | {self.largest} |"


def main(
    batches: int = 40,
    pool: Annotated[int, typer.Option(help="How many different edits the batches are drawn from.")] = 48,
    model: Annotated[str | None, typer.Option(help="A model folder; none is the packaged model.")] = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: Annotated[list[int], typer.Option(help="Run the batches with so many threads as well.")] = [],  # noqa: B006
    seed: int = 0,
    output: Path | None = None,
) -> None:
    device = device or default_device()
    pipeline = load_pipeline(model, device, getattr(torch, dtype) if dtype else None)
    alone = torch.get_num_threads()
    counts = {number: Count() for number in (alone, *threads)}
    generator = random.Random(seed + 1)
    edits, singles, sizes, num_shapes = requests(pool, seed), {}, [], []
    for number in range(batches):
        chosen = generator.sample(range(pool), generator.randint(2, 6))
        for index in chosen:
            if index not in singles:
                edit = edits[index]
                singles[index] = apply_edit(pipeline, edit.image, edit.prompt, seed=edit.seed, mask=edit.mask)
        for num_threads, count in counts.items():
            torch.set_num_threads(num_threads)
            for result, index in zip(apply_edits(pipeline, [edits[index] for index in chosen]), chosen, strict=True):
                count.add(result, singles[index])
        torch.set_num_threads(alone)
        sizes.append(len(chosen))
        num_shapes.append(len({singles[index].schedule for index in chosen}))
        print(f"batch {number + 1} of {batches}", *(count.bits[1] + count.pixels[1] for count in counts.values()))
    precision = str(pipeline.transformer.dtype).removeprefix("torch.")
    lines = [
        "# Mixed batches against single edits",
        "",
        f"{batches} batches of {min(sizes)} to {max(sizes)} edits ({sum(sizes)} in all, of {len(singles)} different "
        f"ones), each batch of {min(num_shapes)} to {max(num_shapes)} aspect templates; instructions, seeds and masks "
        "mixed. Every edit of a batch was compared with the same edit made alone.",
        "",
        "| threads in batches | bits that differ | pixels that differ | by at most (of 255) |",
        "|---|---|---|---|",
        *(count.row(str(number)) for number, count in counts.items()),
        "",
        f"Model {identify(pipeline).sha256[:12]}, {precision}, device {device}, {platform.machine()}, PyTorch "
        f"{torch.__version__}; {alone} thread(s) alone.",
    ]
    publish(lines, output)
    if (counts[alone].bits[1] or counts[alone].pixels[1]) and device == "cpu" and precision == "float32":
        raise SystemExit("batches differ from single edits")


if __name__ == "__main__":
    typer.run(main)
