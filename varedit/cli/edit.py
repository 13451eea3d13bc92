"""`varedit edit`: one image, one instruction, one file."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from PIL import Image

    from varedit.pipeline import ScaleStep, VAREditPipeline

NOTICEABLE = 24
"""A pixel counts as noticeably changed when a channel differs by at least this many of 255 levels."""


def edit(  # noqa: PLR0913 - one argument an option
    image: Annotated[Path, typer.Argument(help="The picture.", show_default=False)],
    instruction: Annotated[str, typer.Argument(help="What to change, in words.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output file.", show_default="IMAGE.edited.SUFFIX")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name.", show_default="the model in the package")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same edit.", show_default="drawn")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly to follow the instruction; 1 is off.", show_default="the model's")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likelier bit.", show_default="the model's")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Drop choices less likely than 1 - p.", show_default="the model's")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Size class: 128, 256, 512, 768 or 1024.", show_default="the model's")
    ] = None,
    fit: Annotated[
        Literal["native", "square"] | None,
        typer.Option(help="Nearest aspect ratio, or a white square.", show_default="the model's"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best at hand")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Precision.", show_default="by device")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
) -> None:
    """Edit IMAGE by an INSTRUCTION: varedit edit photo.jpg "make it black and white"."""
    from varedit.image_processor import check_output, load_image, save_image

    # Everything that can be refused is refused before the model is loaded.
    source = load_image(image)
    target = output or default_output(image)
    if target.exists() and not overwrite:
        raise ValueError(f"output {str(target)!r} exists already; pass --overwrite, or --output with another name")
    check_output(target, overwrite=overwrite)
    _check_settings(instruction, seed, size, guidance_scale, temperature, top_p)

    started = time.monotonic()
    pipeline = _load(model, device, dtype)
    loaded = time.monotonic()
    result = pipeline(
        source.rgb,
        instruction,
        seed=seed,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_p=top_p,
        size=size,
        fit=fit,
        callback_on_scale=_report_scale,
    )
    edited = time.monotonic()
    save_image(result.images[0], target, like=source, overwrite=overwrite)

    mean, share = amount_changed(source.rgb, result.images[0])
    typer.echo(f"{target}: {source.width} x {source.height} pixels, seed {result.seeds[0]}")
    typer.echo(f"edited in {edited - loaded:.2f} s (model loaded in {loaded - started:.1f} s)")
    typer.echo(f"changed by {mean:.1f} of 255 levels on average; {share:.0%} of the pixels noticeably")


def default_output(image: Path) -> Path:
    """photo.jpg -> photo.edited.jpg; a suffix that cannot be written (photo.gif, photo) -> photo.edited.png."""
    from PIL import Image

    from varedit.image_processor import ImageError, encode_image

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


def _check_settings(
    instruction: str,
    seed: int | None,
    size: int | None,
    guidance_scale: float | None,
    temperature: float | None,
    top_p: float | None,
) -> None:
    """What can be checked without the model; the pipeline checks again."""
    from varedit.pipeline import Sampling, check_prompt, check_seed
    from varedit.scales import scale_schedule

    check_prompt(instruction)
    if seed is not None:
        check_seed(seed)
    if size is not None:
        scale_schedule(size)
    given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_p": top_p}
    harmless = {"guidance_scale": 1.0, "temperature": 1.0, "top_p": 1.0}
    Sampling(**{name: harmless[name] if value is None else value for name, value in given.items()})


def _load(model: str | None, device: str | None, dtype: str | None) -> "VAREditPipeline":
    import diffusers
    import torch
    import transformers

    from varedit.pipeline import load_pipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return load_pipeline(model, device, getattr(torch, dtype) if dtype else None)


def _report_scale(step: "ScaleStep") -> None:
    """One line a scale, on stderr."""
    height, width = step.grid
    number = f"{step.scale + 1}/{step.num_scales}".rjust(5)
    typer.echo(f"scale {number}  {f'{width} x {height}':>9} tokens  {step.seconds:7.2f} s", err=True)
