"""`varedit batch`: many pictures, many instructions, one record."""

from pathlib import Path
from typing import Annotated, Any

import typer

from varedit.cli import options

SOME_FAILED = 3
"""Exit code of a batch in which some or all pictures failed; results.jsonl says which and why."""


def batch(  # noqa: PLR0913 - one argument an option
    jobs: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures, or a .csv or .jsonl with image, instruction[, seed, mask, output].",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    instruction: Annotated[
        str | None, typer.Option(help="What to change where a job does not say.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Where a job names none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a batch that was interrupted.")] = False,
    workers: Annotated[int, typer.Option(help="Processes (with --ray: actors), each with its own model.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on the Ray cluster of RAY_ADDRESS, else a local one.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Pictures of one shape edited together; more is faster on a GPU.")
    ] = 1,
    model: options.Model = None,
    guidance_scale: options.GuidanceScale = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    size: options.Size = None,
    fit: options.Fit = None,
    preserve: options.Preserve = "exact",
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew; replace existing outputs.")] = False,
) -> None:
    """Edit many pictures: varedit batch jobs.csv --output edited.

    Writes the pictures and results.jsonl, a line a picture. Exit code 0: all done; 3: some failed, the rest is done.
    """
    from varedit.editing.jobs import read_jobs

    listed = read_jobs(jobs, instruction=instruction, seed=seed)
    if resume and overwrite:
        raise ValueError("--resume goes on and --overwrite starts anew; pass one of them")

    from varedit.editing.batch import BatchOptions, prepare_output, run_here
    from varedit.editing.edit import Settings

    settings = Settings(guidance_scale, temperature, top_p, size, fit, preserve)
    options = BatchOptions(model, device, dtype, settings, batch_size, workers, overwrite=overwrite)
    run = run_here
    if ray:
        from varedit.editing.ray_batch import require_ray, run_on_ray

        require_ray()
        run = run_on_ray
    todo = prepare_output(output, listed, options, resume=resume)
    failed = _run(todo, output, options, run) if todo else 0
    skipped = f", {len(listed) - len(todo)} were done before" if len(todo) < len(listed) else ""
    typer.echo(f"{output}: {len(todo) - failed} edited, {failed} failed{skipped}")
    if failed:
        raise typer.Exit(SOME_FAILED)


def _run(todo: list, output: Path, options: Any, run: Any) -> int:
    """Run with a progress bar on stderr; returns how many failed, each of which has been named there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from varedit.editing.batch import run_batch

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = [TextColumn("edits"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    failed = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("edits", total=len(todo))

        def report(record: dict[str, Any]) -> None:
            nonlocal failed
            progress.advance(task)
            if record["status"] != "ok":
                failed += 1
                console.print(f"failed: line {record['line']}, {escape(record['output'])}: {escape(record['error'])}")

        run_batch(todo, output, options, on_result=report, run=run)
    return failed
