"""`varedit session`: a tree of edits in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from varedit.cli import options

app = typer.Typer(help="A tree of edits in a folder, with undo, branch and replay.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The session's folder.", show_default=False)]


@app.command()
def new(
    folder: _Folder,
    image: Annotated[Path, typer.Argument(help="The picture; it is copied.", show_default=False)],
) -> None:
    """Start a session on a picture."""
    from varedit.editing.session import Session

    session = Session.create(folder, image)
    original = session.image(0)
    typer.echo(f"{folder}: new session on {image.name}, {original.width} x {original.height} pixels")


@app.command()
def edit(  # noqa: PLR0913 - one argument an option
    folder: _Folder,
    instruction: Annotated[str, typer.Argument(help="What to change, in words.", show_default=False)],
    mask: options.Mask = None,
    box: options.Box = None,
    polygon: options.Polygon = None,
    mask_convention: options.MaskConvention = "white",
    model: options.Model = None,
    seed: options.Seed = None,
    guidance_scale: options.GuidanceScale = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    size: options.Size = None,
    fit: options.Fit = None,
    mask_margin: options.MaskMargin = 0,
    lock: options.Lock = "auto",
    crop: options.Crop = "auto",
    preserve: options.Preserve = "exact",
    strength: options.Strength = 1.0,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Edit the picture that the session is at."""
    from varedit.editing.session import Session

    session = Session.open(folder)

    from varedit.cli.edit import kind_of_change, load_model, report_scale
    from varedit.editing.edit import Settings

    options.check_request(instruction, seed)
    source = session.image()
    settings = Settings(
        guidance_scale, temperature, top_p, size, fit, preserve, strength, lock=lock, mask_margin=mask_margin, crop=crop
    )
    area = options.edit_area((source.width, source.height), mask, box, polygon, mask_convention, mask_margin)
    step = session.edit(
        load_model(model, device, dtype),
        instruction,
        seed=seed,
        settings=settings,
        mask=area,
        callback_on_scale=report_scale,
    )
    change = step.manifest.change
    changed = f", {kind_of_change(change['kind'])}" if change else ""
    if change and change["kind"] != "none":
        changed += f" of {change['area']:.0%} of the picture"
    typer.echo(f"{folder}: step {step.number} from {step.parent}, seed {step.seed}{changed}")


@app.command()
def undo(folder: _Folder) -> None:
    """Go back one step. The step stays: session branch returns to it."""
    from varedit.editing.session import Session

    typer.echo(f"{folder}: at step {Session.open(folder).undo()}")


@app.command()
def branch(
    folder: _Folder,
    step: Annotated[int, typer.Argument(help="Where the next edit starts; 0 is the original.", show_default=False)],
) -> None:
    """Go to any step; the next edit branches off there."""
    from varedit.editing.session import Session

    Session.open(folder, any_head=True).branch(step)
    typer.echo(f"{folder}: at step {step}")


@app.command()
def log(folder: _Folder) -> None:
    """The tree of edits; the star marks where the session is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    from varedit.editing.session import Session

    session = Session.open(folder)

    def line(number: int, text: str) -> str:
        return f"{'*' if number == session.head else ' '} {number}  {escape(text)}"

    trees = {0: Tree(line(0, session.original_name))}
    for number, step in sorted(session.steps.items()):
        trees[number] = trees[step.parent].add(line(number, f"{step.instruction}  (seed {step.seed})"))
    Console(soft_wrap=True, highlight=False).print(trees[0])


@app.command()
def show(
    folder: _Folder,
    step: Annotated[int | None, typer.Option(help="Which step.", show_default="where the session is")] = None,
) -> None:
    """Everything recorded about a step, as JSON."""
    import json

    from varedit.editing.session import Session

    session = Session.open(folder)
    number = session.head if step is None else step
    chain = session.path(number)
    found: dict = {"step": number, "head": session.head, "path": [0, *(item.number for item in chain)]}
    if number:
        item = session.steps[number]
        files = [path for path in (item.result, item.change_map, item.mask) if path.exists()]
        found |= {"parent": item.parent, "files": [str(path) for path in files], "manifest": item.record}
    else:
        found |= {"parent": None, "files": [str(session.original)], "manifest": None}
    typer.echo(json.dumps(found, indent=2))


@app.command()
def export(
    folder: _Folder,
    file: Annotated[Path, typer.Argument(help="Picture to write; its suffix decides the format.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Which step.", show_default="where the session is")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a picture of the session, with the original's transparency and EXIF."""
    from varedit.editing.session import Session

    session = Session.open(folder)
    session.export(file, step, overwrite=overwrite)
    typer.echo(f"{file}: step {session.head if step is None else step}")
