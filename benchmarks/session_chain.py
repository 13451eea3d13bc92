"""Twenty edits in a row on a photograph: what no edit touched stays the original, bit for bit.

    python benchmarks/session_chain.py --output benchmarks/results/session_chain.md --pictures out/session_chain

The same instructions and seeds run through three sessions: with boxes, without, and without and with preservation off
(what the model draws). Outside the union of all change maps (with boxes: of their parts in the boxes), pixels of the
first two must be the original's; the command fails otherwise. PSNR and SSIM to the original after each edit are
measured outside the boxes' union for all three. Writes a table, a plot and a strip of pictures.

The photograph (a cup of coffee, Rachel Michetti, CC0) comes with scikit-image.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import typer
from PIL import Image, ImageDraw
from results_page import publish
from scipy import ndimage
from skimage.metrics import structural_similarity

from varedit.editing.change_map import ChangeMap
from varedit.editing.edit import Settings, apply_edit
from varedit.editing.manifest import make_manifest
from varedit.editing.mask import box_mask
from varedit.editing.model_identity import identify
from varedit.editing.preserve import reach
from varedit.editing.session import Session
from varedit.pipeline import VAREditPipeline, load_pipeline

STEPS = (
    ("make the spoon blue", (380, 210, 200, 150)), ("add a red ball", (20, 20, 110, 110)),
    ("add a small green box", (0, 290, 160, 110)), ("make the coffee green", (180, 60, 200, 120)),
    ("add a yellow star", (470, 20, 110, 110)), ("remove the spoon", (380, 210, 200, 150)),
    ("make the ball blue", (20, 20, 110, 110)), ("remove the box", (0, 290, 160, 110)),
    ("make the star white", (470, 20, 110, 110)), ("make the cup red", (180, 60, 200, 120)),
    ("add a purple ring", (380, 210, 200, 150)), ("remove the ball", (20, 20, 110, 110)),
    ("add an orange triangle", (0, 290, 160, 110)), ("make the cup white", (180, 60, 200, 120)),
    ("remove the star", (470, 20, 110, 110)), ("make the ring yellow", (380, 210, 200, 150)),
    ("add a black cat", (20, 20, 110, 110)), ("make the triangle green", (0, 290, 160, 110)),
    ("add a red heart", (470, 20, 110, 110)), ("make the coffee blue", (180, 60, 200, 120)),
)  # fmt: skip
"""Instruction and box (left, top, width, height) of each edit."""

CHAINS = ("boxes", "no boxes", "preservation off")
SHOWN = (0, 1, 5, 10, 15, 20)  # steps in the strip
COLOURS = {"boxes": (0, 120, 60), "no boxes": (30, 90, 200), "preservation off": (210, 50, 40)}


@dataclass(frozen=True)
class Chain:
    """The pictures of a session, the original first, and what their change maps said.

    Attributes:
        touched: bool (H, W), the union of all maps.
        covered: share of the picture that the union covers after each edit.
        kinds: of each change.
    """

    pictures: list[np.ndarray]
    touched: np.ndarray
    covered: list[float]
    kinds: list[str]


def run(pipeline: VAREditPipeline, photo: Path, folder: Path, name: str, num_steps: int) -> Chain:
    """One session; what lies outside its change maps is compared with the original at every step."""
    session = Session.create(folder, photo)
    model = identify(pipeline)
    original = np.asarray(session.image(0).rgb)
    settings = Settings(preserve="off") if name == "preservation off" else Settings()
    chain = Chain([original], np.zeros(original.shape[:2], bool), [], [])
    for number, (instruction, box) in enumerate(STEPS[:num_steps]):
        mask = box_mask(box, original.shape[1::-1]) if name == "boxes" else None
        result = apply_edit(pipeline, session.image(), instruction, seed=number, settings=settings, mask=mask)
        step = session.add(result, make_manifest(result, pipeline, input_name=photo.name, model=model))
        picture = np.asarray(session.image().rgb)
        chain.pictures.append(picture)
        if name != "preservation off":
            chain.touched[:] |= touched(result.change_map, mask, original.shape[:2])
            if (picture != original).any(-1)[~chain.touched].any():
                raise SystemExit(f"{name}, step {step.number}: a pixel outside the change maps is not the original's")
            chain.kinds.append(result.change_map.kind)
            chain.covered.append(float(chain.touched.mean()))
        print(f"{name}, step {step.number}", flush=True)
    return chain


def touched(change: ChangeMap, mask: Image.Image | None, shape: tuple[int, int]) -> np.ndarray:
    """Where an edit may have changed the picture: its map with the feather around it, in the mask; bool (H, W)."""
    reached = reach(change, shape[::-1])
    return reached if mask is None else reached & (np.asarray(mask) > 0)


def quality(original: np.ndarray, picture: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    """PSNR in dB (infinite where equal) and SSIM to the original, of the pixels `where`."""
    error = np.square(picture[where].astype(np.float64) - original[where]).mean()
    _, similarity = structural_similarity(original, picture, channel_axis=-1, full=True)
    inner = ndimage.binary_erosion(where, np.ones((7, 7)), border_value=1)  # SSIM looks at 7 x 7 pixels
    return float(10 * np.log10(255**2 / error)) if error else np.inf, float(similarity[inner].mean())


def plot(curves: dict[str, list[float]], title: str, low: float, high: float) -> Image.Image:
    """Lines over the steps; what is infinite lies on the upper edge."""
    width, height, left, top = 560, 300, 52, 30
    drawing = Image.new("RGB", (width + left + 150, height + top + 40), "white")
    pen = ImageDraw.Draw(drawing)
    count = max(map(len, curves.values())) - 1

    def point(step: float, value: float) -> tuple[float, float]:
        share = (min(value, high) - low) / (high - low)
        return left + width * step / count, top + height * (1 - share)

    pen.text((left, 8), title, "black")
    for tick in np.linspace(low, high, 6):
        pen.line([point(0, tick), point(count, tick)], (225, 225, 225))
        pen.text((8, point(0, tick)[1] - 6), f"{tick:.4g}", "black")
    for step in range(0, count + 1, max(1, count // 10)):
        pen.text((point(step, low)[0] - 4, top + height + 6), str(step), "black")
    pen.text((left + width / 2, top + height + 22), "edits", "black")
    for index, (name, values) in enumerate(curves.items()):
        pen.line([point(step, value) for step, value in enumerate(values)], COLOURS[name], 3)
        pen.text((left + width + 10, top + 20 * index), name, COLOURS[name])
    return drawing


def stacked(images: list[Image.Image], axis: int) -> Image.Image:
    size = [max(image.size[0] for image in images), max(image.size[1] for image in images)]
    size[axis] = sum(image.size[axis] for image in images)
    sheet, at = Image.new("RGB", tuple(size), "white"), [0, 0]
    for image in images:
        sheet.paste(image, tuple(at))
        at[axis] += image.size[axis]
    return sheet


def strip(chains: dict[str, Chain]) -> Image.Image:
    """A row a chain, a column a step."""
    rows = []
    for name, chain in chains.items():
        row = []
        for step in (step for step in SHOWN if step < len(chain.pictures)):
            thumbnail = Image.fromarray(chain.pictures[step]).resize((360, 240), Image.Resampling.LANCZOS)
            ImageDraw.Draw(thumbnail).text((6, 4), f"{name}: {step}", "white", stroke_width=2, stroke_fill="black")
            row.append(thumbnail)
        rows.append(stacked(row, 0))
    return stacked(rows, 1)


def table(curves: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    def cell(psnr: float, ssim: float) -> str:
        return "identical" if np.isinf(psnr) else f"{psnr:.1f} dB, {ssim:.3f}"

    yield "| edits | " + " | ".join(curves) + " |"
    yield "|---" * (len(curves) + 1) + "|"
    for step, cells in enumerate(zip(*curves.values(), strict=True)):
        if step:
            yield f"| {step} | " + " | ".join(cell(*values) for values in cells) + " |"


def report(chains: dict[str, Chain], curves: dict, model: str) -> list[str]:
    """The Markdown page, its lines."""
    boxes, free = chains["boxes"], chains["no boxes"]
    num_local = (*free.kinds, "global").index("global")  # edits before the first that has no outside
    return [
        f"# {len(boxes.kinds)} edits in a row",
        "",
        f"A photograph of {boxes.touched.shape[1]} x {boxes.touched.shape[0]} pixels, edited again and again in a "
        f"session, by the model {model}.",
        "",
        f"- With boxes: the change maps cover {boxes.covered[-1]:.1%} of the picture in the end. After every edit, all "
        f"pixels outside their union are the original's, in the end {(~boxes.touched).sum():,}.",
        f"- Without boxes: {free.kinds.count('global')} of {len(free.kinds)} edits were taken for edits of the whole "
        f"picture, which have no outside. After the first {num_local}, none of them such, the maps cover "
        f"{free.covered[num_local - 1] if num_local else 0:.1%}. After every edit, all pixels outside their union are "
        "the original's.",
        "- With preservation off every pixel is drawn anew each time.",
        "",
        "PSNR and SSIM to the original, outside the union of the change maps of the chain with boxes:",
        "",
        *table(curves),
    ]


def main(
    steps: Annotated[int, typer.Option(min=1, max=len(STEPS))] = len(STEPS),
    model: Annotated[str | None, typer.Option(help="A model folder; none is the packaged model.")] = None,
    pictures: Annotated[Path, typer.Option(help="Folder for the plot and the strip.")] = Path("out/session_chain"),
    output: Path | None = None,
) -> None:
    pipeline = load_pipeline(model, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "coffee.png"
        Image.fromarray(skimage.data.coffee()).save(photo)
        chains = {name: run(pipeline, photo, Path(folder) / name, name, steps) for name in CHAINS}
    original, outside = chains["boxes"].pictures[0], ~chains["boxes"].touched
    curves = {
        name: [quality(original, picture, outside) for picture in chain.pictures] for name, chain in chains.items()
    }
    pictures.mkdir(parents=True, exist_ok=True)
    plots = [
        plot({name: [pair[part] for pair in pairs] for name, pairs in curves.items()}, title, low, high)
        for part, title, low, high in (
            (0, "PSNR to the original in dB (upper edge: identical)", 5, 55), (1, "SSIM to the original", 0, 1)
        )
    ]  # fmt: skip
    stacked(plots, 1).save(pictures / "curve.png")
    strip(chains).save(pictures / "strip.jpg", quality=90)
    publish(report(chains, curves, identify(pipeline).sha256[:12]), output)


if __name__ == "__main__":
    typer.run(main)
