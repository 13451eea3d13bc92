"""`varedit inspect`: look into a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varedit.cli import options

if TYPE_CHECKING:
    from varedit.inspection import AttentionMap, Inspection
    from varedit.pipeline import VAREditPipeline

HELD_OUT_SEED = 11
"""Of the stream of held-out pairs that --average edits."""

app = typer.Typer(help="Look into a model.", no_args_is_help=True)


@app.callback()
def _group() -> None:  # keeps `attention` a command of its own while it is the only one
    pass


@app.command()
def attention(  # noqa: PLR0913 - one argument an option
    image: Annotated[Path | None, typer.Argument(help="The picture.", show_default=False)] = None,
    instruction: Annotated[str | None, typer.Argument(help="What to change, in words.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The figure.", show_default=False)] = None,
    average: Annotated[
        int | None,
        typer.Option(help="No picture: the mean over so many held-out drawn cases.", show_default=False),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help="Comma list, counted from 0.", show_default="the first and one at 3/4 of the depth"),
    ] = None,
    model: options.Model = None,
    seed: options.Seed = None,
    guidance_scale: options.GuidanceScale = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    size: options.Size = None,
    fit: options.Fit = None,
    objects: Annotated[
        Path | None, typer.Option(help="Folder of cut-outs, for --average.", show_default="drawn shapes")
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photographs, for --average.", show_default="drawn backgrounds")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Draw where each scale looks, in the source and in the target so far, in the first block and a deep one.

    varedit inspect attention photo.jpg "make it black and white" --output attention.png
    """
    from varedit.cli.edit import load_model
    from varedit.data.synthetic import World
    from varedit.image_processor import load_image
    from varedit.image_writer import check_output, save_image
    from varedit.inspection import check_blocks, default_blocks, draw_attention, format_distance, inspect_attention
    from varedit.pipeline import check_prompt, check_seed
    from varedit.sampling import Sampling
    from varedit.scales import scale_schedule

    # Everything that can be refused is refused before the model is loaded.
    if output is None:
        raise ValueError("no --output; name the figure to write, such as --output attention.png")
    check_output(output, overwrite=overwrite)
    _check_cases(image, instruction, average, objects, photos)
    wanted = _numbers(blocks)
    if seed is not None:
        check_seed(seed)
    if size is not None:
        scale_schedule(size)
    sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "top_p": top_p}
    Sampling(**{name: 1.0 if value is None else value for name, value in sampling.items()})
    if image is not None and instruction is not None:
        source = load_image(image)
        check_prompt(instruction)
    if average is not None:
        World(objects, photos, split="test")

    pipeline = load_model(model, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    chosen = default_blocks(transformer) if wanted is None else check_blocks(wanted, transformer)
    call: dict[str, Any] = {"size": size, "fit": fit, "seed": seed, **sampling}
    name = f"{model or 'the default model'}, {transformer.config.conditioning} conditioning"
    if average is not None:
        maps, inspection = _average(pipeline, average, chosen, call, objects, photos), None
        title = f"Attention, mean over {average} held-out edits by {name}"
    else:
        inspection = inspect_attention(pipeline, source, instruction or "", chosen, **call)
        maps, title = inspection.maps, f'Attention in "{instruction}" by {name}'
    save_image(draw_attention(maps, title, inspection), output, overwrite=overwrite)
    for of_block in maps:
        far = ", ".join(map(format_distance, of_block))
        typer.echo(f"block {of_block[0].block}: distance in the source by scale {far}")
    typer.echo(str(output))


def _check_cases(
    image: Path | None, instruction: str | None, average: int | None, objects: Path | None, photos: Path | None
) -> None:
    if average is None:
        if image is None or instruction is None:
            raise ValueError('give IMAGE and an instruction, as in photo.jpg "make it darker", or --average 50')
        if objects is not None or photos is not None:
            raise ValueError("--objects and --photos go with --average; leave them out")
    elif image is not None or instruction is not None:
        raise ValueError("--average draws its own pictures; leave out IMAGE and the instruction, or --average")
    elif average < 1:
        raise ValueError(f"--average {average} must be at least 1")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--blocks {text!r} is no comma list of numbers; use it as in --blocks 0,4") from error


def _average(
    pipeline: "VAREditPipeline",
    count: int,
    blocks: tuple[int, ...],
    call: dict[str, Any],
    objects: Path | None,
    photos: Path | None,
) -> "list[list[AttentionMap]]":
    """The mean maps over pairs of the test split of the procedural world, each with a seed of its own."""
    from varedit.data.synthetic import World
    from varedit.inspection import inspect_attention, mean_maps

    size = pipeline.config.size if call["size"] is None else call["size"]
    world = World(objects, photos, split="test", size=size)
    first = 0 if call["seed"] is None else call["seed"]

    def inspections() -> Iterator["Inspection"]:
        for index in range(count):
            pair = world.pair(HELD_OUT_SEED, index)
            yield inspect_attention(
                pipeline, pair.source, pair.instruction, blocks, **call | {"seed": first + index}
            )  # fmt: skip
            if (index + 1) % 10 == 0:
                typer.echo(f"{index + 1} of {count} cases", err=True)

    return mean_maps(inspections())
