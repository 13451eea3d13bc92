"""What preservation keeps and what it cuts off, on procedural pairs with known masks.

    python benchmarks/preservation.py --objects DIR --photos DIR --output benchmarks/results/preservation.md
    python benchmarks/preservation.py --objects DIR --photos DIR --sheets out/preservation

Held-out pairs are drawn at four times the model's size (every fourth at the model's own), and two kinds of edit go
through the change map and preservation: the model's own ("model"), and the true target through the image tokenizer with
as many wrong bits as the model makes in unchanged places ("oracle": a model that does what it is asked). Edits are
cached in --cache by model, so that a second run measures only.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from results_page import publish
from scipy import ndimage
from skimage.metrics import structural_similarity

from varedit import quantizer
from varedit.data.synthetic import World
from varedit.editing.change_map import Calibration, ChangeMap, change_map
from varedit.editing.edit import EditRequest, Settings, apply_edits, result_canvas
from varedit.editing.model_identity import identify
from varedit.editing.preserve import preserve
from varedit.image_processor import load_image, prepare, to_pil
from varedit.pipeline import VAREditPipeline, load_pipeline

MODEL_SIZE, LARGE_SIZE = 128, 512
RATIOS = (1.0, 0.75, 1.333)  # height over width
CODE_REACH = 8  # model pixels: one code's footprint
CUT_OFF = 0.1  # of an edit's energy outside the map: the edit counts as cut off
STEP = 12.0  # levels of unexplained step at the border of the map that can be seen
NUM_BINS = 6  # of the residual's size, for the rate of wrong bits
BATCH = 8


@dataclass(frozen=True, eq=False)
class Case:
    """One pair, the model's edit of it and the oracle's.

    Attributes:
        source, target: uint8 (H, W, 3), the input's size. mask: bool (H, W), where the target may differ.
        kind: edit type; of edits of the whole picture the name of what was done.
        canvases: float32 (d, h, w) of "source", "model", "oracle". decoded: float32 (3, H, W) in [-1, 1] of the same.
    """

    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    kind: str
    instruction: str
    canvases: dict[str, np.ndarray]
    decoded: dict[str, np.ndarray]

    @property
    def whole(self) -> bool:
        """The edit is one of the whole picture."""
        return bool(self.mask.all())


# ---------------------------------------------------------------- making edits


def pairs(count: int, seed: int, objects: Path | None, photos: Path | None) -> Iterator:
    worlds: dict[tuple, World] = {}
    for index in range(count):
        form = (LARGE_SIZE if index % 4 else MODEL_SIZE, RATIOS[index // 4 % len(RATIOS)])
        if form not in worlds:
            worlds[form] = World(objects, photos, split="test", size=form[0], height_over_width=form[1])
        yield worlds[form].pair(seed, index)


def kind_of(pair) -> str:
    operations = pair.target_scene["edit"]
    return operations[0]["name"] if pair.mask.all() and len(operations) == 1 else pair.edit_type


def edit_pairs(pipeline: VAREditPipeline, chosen: list, first: int, folder: Path) -> None:
    """Run the model on pairs and store everything but the oracle."""
    requests = [EditRequest(pair.source, pair.instruction, first + i) for i, pair in enumerate(chosen)]
    results = apply_edits(pipeline, requests, Settings(preserve="off", size=MODEL_SIZE))
    for index, (pair, result) in enumerate(zip(chosen, results)):
        canvas = result_canvas(result.bits, result.schedule, pipeline)
        with torch.no_grad():
            source_bits, source_canvas = encode(pipeline, pair.source)
            decoded = [pipeline.image_tokenizer.decode(c)[0].numpy() for c in (source_canvas, canvas)]
        values = {
            "source": pair.source, "target": pair.target, "mask": pair.mask,
            "text": np.array([kind_of(pair), pair.instruction]),
            "canvas_source": source_canvas[0].numpy(), "canvas_model": canvas[0].numpy(),
            "decoded_source": decoded[0], "decoded_model": decoded[1],
            **{f"bits_{scale}": part.cpu().numpy() for scale, part in enumerate(result.bits)},
        }  # fmt: skip
        write(folder / f"{first + index:05d}.npz", values)


def write(path: Path, values: dict) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        np.savez(file, **values)
    os.replace(partial, path)


def encode(pipeline: VAREditPipeline, image: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
    prepared = prepare(image, MODEL_SIZE)
    features = pipeline.image_tokenizer.encode(prepared.image_B3HW)
    return quantizer.encode_bits(features, prepared.schedule, pipeline.image_tokenizer.config.patch_size)


def walk(pipeline: VAREditPipeline, image: np.ndarray, choose) -> torch.Tensor:
    """The canvas that comes of the bits `choose(scale, residual_BChw, grid)` picks, given what is still missing."""
    prepared, patch = prepare(image, MODEL_SIZE), pipeline.image_tokenizer.config.patch_size
    features = pipeline.image_tokenizer.encode(prepared.image_B3HW)
    canvas = torch.zeros_like(features)
    for scale in range(prepared.schedule.num_scales):
        grid = quantizer.latent_grid(prepared.schedule, scale, patch)
        canvas = quantizer.accumulate(canvas, choose(scale, quantizer.resize_area(features - canvas, grid), grid))
    return canvas


@torch.no_grad()
def wrong_bits(pipeline: VAREditPipeline, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """How often the model errs where nothing was to change: quantile bins of the residual's size, and rates.

    Returns:
        edges (num_scales, NUM_BINS - 1) and rates (num_scales, NUM_BINS): medians over the edits, so that edits that
        strayed in earnest do not count.
    """
    sizes, errors = defaultdict(list), defaultdict(list)
    for path in paths:
        with np.load(path) as stored:
            if stored["mask"].all():
                continue
            mask = Image.fromarray(stored["mask"])

            def choose(scale, residual, grid, stored=stored, mask=mask):
                bits = torch.from_numpy(stored[f"bits_{scale}"]).permute(2, 0, 1)[None].bool()
                near = np.asarray(mask.resize(grid[::-1], Image.Resampling.BOX).convert("L")) > 0
                keep = ~torch.nn.functional.max_pool2d(torch.from_numpy(near)[None, None].float(), 3, 1, 1).bool()[0, 0]
                if keep.any():
                    sizes[scale].append(residual.abs()[0][:, keep].flatten().numpy())
                    errors[scale].append((bits != (residual > 0))[0][:, keep].flatten().numpy())
                return bits

            walk(pipeline, stored["source"], choose)
    edges, rates = [], []
    for scale in sorted(sizes):
        edges.append(np.quantile(np.concatenate(sizes[scale]), np.arange(1, NUM_BINS) / NUM_BINS))
        each = [
            np.bincount(np.digitize(size, edges[-1]), error, NUM_BINS)
            / np.maximum(np.bincount(np.digitize(size, edges[-1]), minlength=NUM_BINS), 1)
            for size, error in zip(sizes[scale], errors[scale])
        ]
        rates.append(np.median(each, axis=0))
    return np.array(edges), np.array(rates)


@torch.no_grad()
def add_oracle(pipeline: VAREditPipeline, path: Path, edges: np.ndarray, rates: np.ndarray) -> None:
    """The target's bits, erring as often as the model does where nothing changes."""
    generator = np.random.default_rng(int(path.stem))
    with np.load(path) as stored:
        values = dict(stored)

    def choose(scale, residual, grid):
        # Coarse grids lie wholly inside masks: there the first scale that has an outside tells the rate.
        row = scale - (num_scales - len(rates))
        rate = rates[max(row, 0)][np.digitize(residual.abs().numpy(), edges[max(row, 0)])]
        return (residual > 0) ^ torch.from_numpy(generator.random(rate.shape) < rate)

    num_scales = sum(name.startswith("bits_") for name in values)
    canvas = walk(pipeline, values["target"], choose)
    decoded = pipeline.image_tokenizer.decode(canvas)[0].numpy()
    write(path, {**values, "canvas_oracle": canvas[0].numpy(), "decoded_oracle": decoded})


def load_case(path: Path) -> Case:
    with np.load(path) as stored:
        kind, instruction = stored["text"]
        names = ("source", "model", "oracle")
        return Case(
            stored["source"],
            stored["target"],
            stored["mask"],
            str(kind),
            str(instruction),
            {name: stored[f"canvas_{name}"] for name in names},
            {name: stored[f"decoded_{name}"] for name in names},
        )


def make_cases(
    model: str, count: int, seed: int, objects: Path | None, photos: Path | None, cache: Path
) -> tuple[list[Path], str]:
    """Paths of the cached cases, made where missing, and the model's hash."""
    pipeline = load_pipeline(model or None, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    sha256 = identify(pipeline).sha256
    world = hashlib.sha256(f"{objects} {photos} {LARGE_SIZE} {RATIOS}".encode()).hexdigest()
    folder = cache / f"{sha256[:12]}-{world[:6]}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}.npz" for index in range(count)]
    everything = pairs(count, seed, objects, photos)
    for first in range(0, count, BATCH):
        chosen = list(islice(everything, min(BATCH, count - first)))
        if not all(path.exists() for path in paths[first : first + len(chosen)]):
            edit_pairs(pipeline, chosen, first, folder)
    incomplete = [path for path in paths if "canvas_oracle" not in np.load(path)]
    if incomplete:
        edges, rates = wrong_bits(pipeline, paths)
        (folder / "wrong_bits.json").write_text(json.dumps({"edges": edges.tolist(), "rates": rates.tolist()}))
        for path in incomplete:
            add_oracle(pipeline, path, edges, rates)
    return paths, sha256


# ---------------------------------------------------------------- measuring


def parts(case: Case, editor: str) -> tuple[list[torch.Tensor], tuple]:
    prepared = prepare(case.source, MODEL_SIZE)
    fields = [case.canvases["source"], case.canvases[editor], case.decoded["source"], case.decoded[editor]]
    return [torch.from_numpy(field) for field in fields], prepared.content_box


def measure(case: Case, editor: str, calibration: Calibration) -> tuple[dict, ChangeMap, np.ndarray]:
    """Scores of one edit, its map, and the preserved picture."""
    fields, content_box = parts(case, editor)
    change = change_map(*fields, content_box=content_box, calibration=calibration)
    edited = prepare(case.source, MODEL_SIZE).restore(to_pil(fields[3][None])[0])
    output = np.asarray(preserve(load_image(case.source), edited, change))
    row = {"kind": case.kind, "whole": case.whole, "found": change.kind, "area": change.area}
    if case.whole:
        row |= global_scores(case, np.asarray(edited), output)
    else:
        row |= local_scores(case, np.asarray(edited), output, change)
    return row, change, output


def local_scores(case: Case, edited: np.ndarray, output: np.ndarray, change: ChangeMap) -> dict:
    """Of one local edit.

    Returns:
        iou: of the map with the true mask, model pixels. outside, same: pixels outside the true mask, and how many of
        them are the input's own. far, same_far: outside the mask grown by the footprint of one code. border: outside it
        by at most one model pixel. lost: share of the edit's energy |target - source| that lies outside the map. seam,
        step: see `seam`.
    """
    height, width = case.mask.shape
    small = change.hard_HW.shape
    found = np.ones(small, bool) if change.kind == "global" else change.hard_HW
    truth = resize_mask(case.mask, small)
    around = ndimage.distance_transform_edt(~case.mask)
    far = ~resize_mask(grow(truth | resize_mask(case.mask, small, any_pixel=True), CODE_REACH), (height, width))
    same = (output == case.source).all(-1)
    energy = np.abs(case.target.astype(float) - case.source).sum(-1)
    inside = resize_mask(found, (height, width))
    return {
        "iou": float((found & truth).sum() / max((found | truth).sum(), 1)),
        "outside": int((~case.mask).sum()),
        "same": int(same[~case.mask].sum()),
        "far": int(far.sum()),
        "same_far": int(same[far].sum()),
        "border": int(((around > 0) & (around <= height / small[0])).sum()),
        "lost": float(energy[~inside].sum() / energy.sum()),
        **seam(case.source, edited, output, inside, height / small[0]),
    }


def seam(source: np.ndarray, edited: np.ndarray, output: np.ndarray, inside: np.ndarray, scale: float) -> dict:
    """Steps at the border of the map, a model pixel wide, that neither the source nor the unpreserved edit has.

    Returns:
        seam: their mean in levels. step: share of the border where they exceed STEP.
    """
    reach = 2.5 * scale
    distance = ndimage.distance_transform_edt(inside) + ndimage.distance_transform_edt(~inside)
    border = distance <= reach if inside.any() and not inside.all() else np.zeros_like(inside)
    if not border.any():
        return {"seam": None, "step": None}
    width = max(1, round(scale))
    steps = [np.maximum(*(_slope(image, axis, width) for axis in (0, 1))) for image in (source, edited, output)]
    excess = np.maximum(steps[2] - np.maximum(steps[0], steps[1]), 0)[border]
    return {"seam": float(excess.mean()), "step": float((excess > STEP).mean())}


def _slope(image: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Largest change of a channel over `width` pixels along an axis, (H, W)."""
    moved = np.roll(image, -width, axis).astype(np.int16)
    change = np.abs(moved - image).max(-1)
    change[(slice(-width, None), slice(None)) if axis == 0 else (slice(None), slice(-width, None))] = 0
    return change


def global_scores(case: Case, edited: np.ndarray, output: np.ndarray) -> dict:
    """PSNR and SSIM against the true target: of the plain enlargement, and preserved. grey: colour in, none out."""
    scores: dict = {"grey": bool((output == output[..., :1]).all() and (case.source != case.source[..., :1]).any())}
    for name, image in (("plain", edited), ("kept", output)):
        error = np.square(image.astype(float) - case.target).mean()
        scores[f"{name}_psnr"] = float(min(10 * np.log10(255**2 / max(error, 1e-9)), 60))
        scores[f"{name}_ssim"] = float(structural_similarity(image, case.target, channel_axis=2))
    return scores


def resize_mask(mask: np.ndarray, shape: tuple[int, int], any_pixel: bool = False) -> np.ndarray:
    """A bool mask at another size: half of the pixels decide, or any one."""
    share = Image.fromarray(mask.astype(np.float32)).resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(share) > (0 if any_pixel else 0.5)


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    return ndimage.distance_transform_edt(~mask) <= pixels if mask.any() else mask


# ---------------------------------------------------------------- reporting


def table(header: str, rows: list[list]) -> list[str]:
    columns = header.count("|") + 1
    cells = ["| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in row) + " |" for row in rows]
    return [f"| {header} |", "|" + " --- |" * columns, *cells, ""]


def mean(rows: list[dict], name: str) -> float:
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else float("nan")


def local_table(rows: dict[str, list[dict]]) -> list[str]:
    body = []
    for editor, all_rows in rows.items():
        local = [row for row in all_rows if not row["whole"]]
        groups = {"all": local, "all but background": [row for row in local if row["kind"] != "background"]}
        for kind in sorted({row["kind"] for row in local}):
            groups[kind] = [row for row in local if row["kind"] == kind]
        for kind, part in groups.items():
            total = {name: sum(row[name] for row in part) for name in ("outside", "same", "far", "same_far")}
            shares = [
                100 * total[same] / max(total[base], 1) for same, base in (("same", "outside"), ("same_far", "far"))
            ]
            cut = 100 * np.mean([row["lost"] > CUT_OFF for row in part])
            missed = sum(row["found"] == "none" for row in part)
            body.append([
                editor, kind, len(part), f"{mean(part, 'iou'):.3f}", *(f"{share:.2f}" for share in shares),
                f"{cut:.1f}", f"{100 * mean(part, 'lost'):.2f}", missed, f"{mean(part, 'seam'):.2f}",
                f"{100 * mean(part, 'step'):.2f}",
            ])  # fmt: skip
    return table(
        "edits | type | n | IoU | kept outside % | kept far outside % | cut off % | energy lost % | nothing found"
        " | seam, levels | steps %",
        body,
    )


def border_line(rows: list[dict]) -> list[str]:
    """What a map that is one model pixel too wide all round would cost."""
    part = [row for row in rows if not row["whole"] and row["kind"] != "background"]
    share = sum(row["border"] for row in part) / max(sum(row["outside"] for row in part), 1)
    return [
        f"One model pixel around the true masks is {100 * share:.2f} % of what lies outside them (without new "
        f"backgrounds). *Far outside*: more than {CODE_REACH} model pixels, one code's reach, away. *Cut off*: more "
        f"than {100 * CUT_OFF:.0f} % of the edit's energy lies outside the map.",
        "",
    ]


def confusion_table(rows: dict[str, list[dict]]) -> list[str]:
    body = []
    for editor, all_rows in rows.items():
        for truth, whole in (("local", False), ("global", True)):
            found = [row["found"] for row in all_rows if row["whole"] == whole]
            body.append([editor, truth, *(found.count(kind) for kind in ("none", "local", "global"))])
    return table("edits | truth | found: none | local | global", body)


def global_table(rows: dict[str, list[dict]]) -> list[str]:
    body = []
    for editor, all_rows in rows.items():
        part = [row for row in all_rows if row["whole"]]
        for kind in ["all", *sorted({row["kind"] for row in part})]:
            some = [row for row in part if kind in ("all", row["kind"])]
            scores = [mean(some, name) for name in ("plain_psnr", "kept_psnr", "plain_ssim", "kept_ssim")]
            gain = scores[1] - scores[0]
            found = sum(row["found"] == "global" for row in some)
            numbers = [f"{scores[0]:.2f}", f"{scores[1]:.2f}", f"{gain:+.2f}", f"{scores[2]:.3f}", f"{scores[3]:.3f}"]
            numbers.append(str(sum(row["grey"] for row in some)))
            body.append([editor, kind, len(some), found, *numbers])
    return table(
        "edits | type | n | found global | plain PSNR | preserved PSNR | gain | plain SSIM | SSIM | made grey", body
    )


def sheet(paths: list[Path], calibration: Calibration, output: Path, editor: str) -> None:
    """A row a case: source, edit, map, preserved, true target."""
    side, columns = 192, 2
    rows = []
    for path in paths:
        case = load_case(path)
        row, change, preserved = measure(case, editor, calibration)
        fields, _ = parts(case, editor)
        edited = prepare(case.source, MODEL_SIZE).restore(to_pil(fields[3][None])[0])
        images = [case.source, edited, change.draw(Image.fromarray(case.source)), preserved, case.target]
        strip = Image.new("RGB", (5 * side, side + 14), "white")
        for column, image in enumerate(images):
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            strip.paste(image, (column * side, 14))
        lost = f" lost {row['lost']:.2f}" if "lost" in row else f" {row['kept_psnr'] - row['plain_psnr']:+.1f} dB"
        ImageDraw.Draw(strip).text(
            (2, 1), f"{path.stem} {case.kind}: {case.instruction} [{change.kind}{lost}]", "black"
        )
        rows.append(strip)
    height = -(-len(rows) // columns)
    whole = Image.new("RGB", (columns * 5 * side, height * (side + 14)), "white")
    for index, strip in enumerate(rows):
        whole.paste(strip, (index // height * 5 * side, index % height * (side + 14)))
    output.mkdir(parents=True, exist_ok=True)
    whole.save(output / f"{editor}.png")


def main(
    model: Annotated[str, typer.Option(help="Model folder; empty: the default model.")] = "",
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    cases: int = 300,
    seed: int = 21,
    cache: Annotated[Path, typer.Option(help="Folder of edits made before.")] = Path("out/preservation_cache"),
    output: Annotated[Path | None, typer.Option(help="Markdown file.")] = None,
    sheets: Annotated[Path | None, typer.Option(help="Folder for sheets of 24 cases.")] = None,
) -> None:
    paths, sha256 = make_cases(model, cases, seed, objects, photos, cache)
    calibration = Calibration()
    if sheets:
        for editor in ("oracle", "model"):
            sheet(paths[:24], calibration, sheets, editor)
        return
    rows: dict[str, list[dict]] = {"oracle": [], "model": []}
    for path in paths:
        case = load_case(path)
        for editor in rows:
            rows[editor].append(measure(case, editor, calibration)[0])
    lines = [
        f"# Preservation: {cases} held-out pairs, seed {seed}, model {sha256[:12]}",
        "",
        *local_table(rows),
        *border_line(rows["oracle"]),
        *confusion_table(rows),
        *global_table(rows),
    ]
    publish(lines, output)


if __name__ == "__main__":
    typer.run(main)
