"""`varedit edit`: one image, one instruction, one file."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from varedit.cli import options

if TYPE_CHECKING:
    from PIL import Image

    from varedit.editing.edit import EditResult, Settings
    from varedit.image_processor import LoadedImage
    from varedit.pipeline import ScaleStep, VAREditPipeline

NOTICEABLE = 24
"""A pixel counts as noticeably changed when a channel differs by at least this many of 255 levels."""


def edit(  # noqa: PLR0913 - one argument an option
    image: Annotated[Path, typer.Argument(help="The picture.", show_default=False)],
    instruction: Annotated[str, typer.Argument(help="What to change, in words.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output file.", show_default="IMAGE.edited.SUFFIX")
    ] = None,
    model: options.Model = None,
    seed: options.Seed = None,
    guidance_scale: options.GuidanceScale = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    size: options.Size = None,
    fit: options.Fit = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    mask: options.Mask = None,
    box: options.Box = None,
    polygon: options.Polygon = None,
    mask_convention: options.MaskConvention = "white",
    mask_margin: options.MaskMargin = 0,
    lock: options.Lock = "auto",
    crop: options.Crop = "auto",
    preserve: options.Preserve = "exact",
    strength: options.Strength = 1.0,
    change_map: Annotated[
        Path | None, typer.Option(help="Write a picture of where the edit changed something.", show_default=False)
    ] = None,
    best_of: Annotated[int, typer.Option(help="Try so many seeds and keep the best; not at temperature 0.")] = 1,
    no_manifest: Annotated[
        bool, typer.Option("--no-manifest", help="Leave out how the edit was made; it cannot be replayed then.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")] = False,
) -> None:
    """Edit IMAGE by an INSTRUCTION: varedit edit photo.jpg "make it black and white"."""
    from varedit.editing.best_of import check_num_candidates
    from varedit.editing.edit import Settings
    from varedit.image_processor import load_image

    # Everything that can be refused is refused before the model is loaded.
    options.check_request(instruction, seed)
    check_num_candidates(best_of)
    source = load_image(image)
    target = output or default_output(image)
    check_outputs(target, change_map, overwrite=overwrite, manifest=not no_manifest)
    if change_map is not None and os.path.realpath(change_map) in {
        os.path.realpath(path) for path in (image, mask) if path
    }:
        raise ValueError(f"--change-map {str(change_map)!r} is an input of the edit; name another file")
    if preserve == "off" and change_map is not None:
        raise ValueError("--change-map needs a change map, which --preserve off does not make; drop one of them")
    settings = Settings(
        guidance_scale, temperature, top_p, size, fit, preserve, strength, lock=lock, mask_margin=mask_margin, crop=crop
    )
    area = options.edit_area((source.width, source.height), mask, box, polygon, mask_convention, mask_margin)

    started = time.monotonic()
    pipeline = load_model(model, device, dtype)
    loaded = time.monotonic()
    result = _edit(pipeline, source, instruction, seed, settings, area, best_of)
    edited = time.monotonic()

    from varedit.editing.manifest import make_manifest, save_with_manifest, save_without_manifest
    from varedit.editing.mask import parse_polygon
    from varedit.image_writer import save_image

    if no_manifest:
        save_without_manifest(result.pixels, target, result.like, overwrite=overwrite)
    else:
        manifest = make_manifest(
            result,
            pipeline,
            input_name=image.name,
            mask_name=mask.name if mask else None,
            mask_polygon=parse_polygon(polygon) if polygon else None,
        )
        save_with_manifest(result.pixels, target, manifest, result.like, overwrite=overwrite)
    if change_map is not None and result.change_map is not None:
        save_image(result.change_map.draw(source.rgb), change_map, overwrite=overwrite)
    typer.echo(f"{target}: {source.width} x {source.height} pixels, seed {result.seed}")
    typer.echo(f"edited in {edited - loaded:.2f} s (model loaded in {loaded - started:.1f} s)")
    for line in describe(result):
        typer.echo(line)


def check_outputs(target: Path, change_map: Path | None, *, overwrite: bool, manifest: bool) -> None:
    """Refuse output files that could not be written, or that exist and must not be replaced."""
    from varedit.image_writer import check_output

    paths = [path for path in (target, change_map) if path is not None]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError(f"the edit and its change map would both be written to {str(target)!r}; name two files")
    for path in paths:
        check_output(path, overwrite=overwrite)
    from varedit.editing.manifest import EMBEDDING_SUFFIXES, check_side_file

    # Without a manifest one that lies there would be taken for that of the new picture.
    if not manifest or target.suffix.lower() not in EMBEDDING_SUFFIXES:
        check_side_file(target, overwrite=overwrite)


def describe(result: "EditResult") -> list[str]:
    """What became of the picture, in lines for people."""
    lines = []
    if result.box is not None:
        left, top, right, bottom = result.box
        lines.append(f"edited by itself: the {right - left} x {bottom - top} pixels at {left},{top}")
    if result.released:
        lines.append("an edit of the whole picture: drawn freely, and put into the area alone")
    if result.motion is not None:
        motion = result.motion
        what = "put back" if result.aligned else "left so, since the edit is one of the whole picture"
        lines.append(
            f"the model moved the picture by {motion.shift_x:.1f}, {motion.shift_y:.1f} pixels and zoomed it by "
            f"{motion.zoom:.3f}; {what}"
        )
    mean, share = amount_changed(result.source.rgb, result.image)
    kind = f"{kind_of_change(result.change_map.kind)}; " if result.change_map else ""
    lines.append(f"{kind}changed by {mean:.1f} of 255 levels on average; {share:.0%} of the pixels noticeably")
    return lines


def kind_of_change(kind: str) -> str:
    """Of a change map, in words: "no change", "local change" or "global change"."""
    return f"{'no' if kind == 'none' else kind} change"


def _edit(
    pipeline: "VAREditPipeline",
    source: "LoadedImage",
    instruction: str,
    seed: int | None,
    settings: "Settings",
    area: "Image.Image | None",
    num_candidates: int,
) -> "EditResult":
    """One edit, or the best of several with a line for each on stderr."""
    from varedit.editing.best_of import best_of
    from varedit.editing.edit import apply_edit

    if num_candidates == 1:
        return apply_edit(
            pipeline, source, instruction, seed=seed, settings=settings, mask=area, callback_on_scale=report_scale
        )
    candidates = best_of(pipeline, source, instruction, num_candidates, seed=seed, settings=settings, mask=area)
    for rank, candidate in enumerate(candidates, start=1):
        scores = f"evidence {candidate.instruction_score:.3f} nats a token, {candidate.stray:.1%} changed astray"
        typer.echo(f"best {rank}: seed {candidate.result.seed}, {scores}", err=True)
    return candidates[0].result


def default_output(image: Path) -> Path:
    """photo.jpg -> photo.edited.jpg; a suffix that cannot be written (photo.gif, photo) -> photo.edited.png."""
    from PIL import Image

    from varedit.image_processor import ImageError
    from varedit.image_writer import encode_image

    try:
        encode_image(Image.new("RGB", (1, 1)), image.suffix)
    except ImageError:
        return image.with_name(f"{image.stem}.edited.png")
    return image.with_name(f"{image.stem}.edited{image.suffix}")


def amount_changed(before: "Image.Image", after: "Image.Image") -> tuple[float, float]:
    """How much two RGB images of one size differ.

    Returns:
        The mean absolute difference in levels of 255, and the share of pixels in which a channel differs by at least
        `NOTICEABLE` levels, 0 to 1.
    """
    import numpy as np

    total, noticeable = 0, 0
    for top in range(0, before.height, 256):  # in bands: the largest image allowed would take gigabytes at once
        box = (0, top, before.width, min(top + 256, before.height))
        first, second = (np.asarray(picture.crop(box), dtype=np.int16) for picture in (before, after))
        difference = np.abs(first - second)
        total += int(difference.sum())
        noticeable += int((difference.max(axis=-1) >= NOTICEABLE).sum())
    num_pixels = before.width * before.height
    return total / (3 * num_pixels), noticeable / num_pixels


def load_model(model: str | None, device: str | None, dtype: str | None) -> "VAREditPipeline":
    import diffusers
    import torch
    import transformers

    from varedit.pipeline import load_pipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return load_pipeline(model, device, getattr(torch, dtype) if dtype else None)


def report_scale(step: "ScaleStep") -> None:
    """One line a scale, on stderr."""
    height, width = step.grid
    number = f"{step.scale + 1}/{step.num_scales}".rjust(5)
    again = ", held to the source" if step.second_pass else ""
    typer.echo(f"scale {number}  {f'{width} x {height}':>9} tokens  {step.seconds:7.2f} s{again}", err=True)
