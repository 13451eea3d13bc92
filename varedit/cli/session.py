"""`varedit session`: a tree of edits in a folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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
    mask: Annotated[Path | None, typer.Option(help="White where the edit may go.", show_default=False)] = None,
    box: Annotated[str | None, typer.Option(help="X,Y,W,H: where the edit may go.", show_default=False)] = None,
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
    preserve: Annotated[
        Literal["exact", "blend", "off"], typer.Option(help="What becomes of pixels that the edit did not change.")
    ] = "exact",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best at hand")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Precision.", show_default="by device")
    ] = None,
) -> None:
    """Edit the picture that the session is at."""
    from varedit.editing.session import Session
    from varedit.pipeline import check_prompt, check_seed

    session = Session.open(folder)
    check_prompt(instruction)
    if seed is not None:
        check_seed(seed)
    source = session.image()

    from varedit.cli.edit import _load, _report_scale
    from varedit.editing.edit import Settings
    from varedit.editing.mask import box_mask, image_mask, parse_box

    settings = Settings(guidance_scale, temperature, top_p, size, fit, preserve)
    if mask is not None and box is not None:
        raise ValueError("--mask and --box both say where to edit; pass one of them")
    area = None
    if mask is not None:
        area = image_mask(mask, (source.width, source.height))
    elif box is not None:
        area = box_mask(parse_box(box), (source.width, source.height))
    step = session.edit(
        _load(model, device, dtype),
        instruction,
        seed=seed,
        settings=settings,
        mask=area,
        callback_on_scale=_report_scale,
    )
    change = step.manifest.change
    changed = f", {change['kind']} change of {change['area']:.0%} of the picture" if change else ""
    typer.echo(f"{folder}: step {step.number} from {step.parent}, seed {step.manifest.seed}{changed}")


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

    Session.open(folder).branch(step)
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
        text = f"{step.manifest.instruction}  (seed {step.manifest.seed})"
        trees[number] = trees[step.parent].add(line(number, text))
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
        found |= {"parent": item.parent, "files": [str(path) for path in files], "manifest": item.manifest.to_json()}
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
