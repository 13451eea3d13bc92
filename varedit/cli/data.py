"""`varedit data`: pairs to train on."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from varedit.cli import data_commands

app = typer.Typer(help="Pairs to train on.", no_args_is_help=True)
app.add_typer(data_commands.app)


@app.command()
def synth(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    count: Annotated[int, typer.Option(help="Number of pairs.")] = 100,
    size: Annotated[int, typer.Option(help="Size class: 128, 256, 512, 768 or 1024.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same pairs.")] = 0,
    objects: Annotated[
        Path | None,
        typer.Option(help="Folder of cut-outs with names.json.", show_default="Noto emoji, if installed; else shapes"),
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photographs with index.jsonl.", show_default="drawn backgrounds")
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="test mixes in what train never shows.")] = "train",
) -> None:
    """Make pairs with known answers in the procedural world: pictures, instructions and pairs.jsonl."""
    from rich.console import Console
    from rich.progress import Progress

    from varedit.data.synthetic import write_world

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with data_commands.writing(output), bar as progress:
        task = progress.add_task("pairs", total=count)
        written = write_world(
            output,
            count,
            size=size,
            seed=seed,
            objects=objects,
            photos=photos,
            split=split,
            on_pair=lambda done: progress.update(task, completed=done),
        )
    typer.echo(f"{output}: {written} pairs, seed {seed}")
