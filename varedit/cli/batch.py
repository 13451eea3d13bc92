"""`varedit batch`: many pictures, many instructions, one record."""

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varedit.cli import options

if TYPE_CHECKING:
    from varedit.editing.batch import BatchOptions, Runner
    from varedit.editing.jobs import Job

SOME_FAILED = 3
"""Exit code of a batch in which some or all pictures failed; results.jsonl says which and why."""

NEWS_SECONDS = 60
"""How often, where stderr is no terminal but a log, a line says how far the batch is."""


def batch(  # noqa: PLR0913 - one argument an option
    jobs: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures, or a .csv or .jsonl with image, instruction"
            "[, seed, mask, mask_convention, output].",
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
    threads: Annotated[
        int | None, typer.Option(help="Of each process, on a CPU.", show_default="the cores divided among the workers")
    ] = None,
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
    mask_convention: options.MaskConvention = "white",
    mask_margin: options.MaskMargin = 0,
    lock: options.Lock = "auto",
    crop: options.Crop = "auto",
    preserve: options.Preserve = "exact",
    strength: options.Strength = 1.0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing outputs; without --resume, start anew.")
    ] = False,
) -> None:
    """Edit many pictures: varedit batch jobs.csv --output edited.

    Writes the pictures and results.jsonl, a line a picture. Exit code 0: all done; 3: some failed, the rest is done.
    """
    from varedit.editing.batch import RESULTS, BatchOptions, prepare_output, run_here
    from varedit.editing.edit import Settings
    from varedit.editing.jobs import read_jobs

    if jobs.resolve() == (output / RESULTS).resolve():
        raise ValueError(f"--output {str(output)!r} would replace the list {str(jobs)!r} itself; name another")
    listed = read_jobs(jobs, instruction=instruction, seed=seed, mask_convention=mask_convention)
    if mask_convention != "white" and not any(job.mask for job in listed):
        raise ValueError(f"--mask-convention {mask_convention} is about masks, and no job in {jobs.name} has one")
    if mask_margin and not any(job.mask for job in listed):
        raise ValueError(f"--mask-margin {mask_margin} grows masks, and no job in {jobs.name} has one")
    if jobs.is_dir() and output.resolve() == jobs.resolve():
        raise ValueError(f"--output {str(output)!r} is the folder of the pictures itself; name another")

    settings = Settings(
        guidance_scale, temperature, top_p, size, fit, preserve, strength, lock=lock, mask_margin=mask_margin, crop=crop
    )
    how = BatchOptions(model, device, dtype, settings, batch_size, workers, threads, overwrite=overwrite)
    run = run_here
    if ray:
        from varedit.editing.ray_batch import require_ray, run_on_ray

        require_ray()
        run = run_on_ray
    todo = prepare_output(output, listed, how, resume=resume)
    failed = _run(todo, output, how, run, anew=not resume) if todo else 0
    skipped = f", {len(listed) - len(todo)} were done before" if len(todo) < len(listed) else ""
    typer.echo(f"{output}: {len(todo) - failed} edited, {failed} failed{skipped}")
    if failed:
        raise typer.Exit(SOME_FAILED)


def _run(todo: "list[Job]", output: Path, how: "BatchOptions", run: "Runner", *, anew: bool) -> int:
    """Run with progress on stderr; returns how many failed, each of which has been named there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from varedit.editing.batch import run_batch

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = [TextColumn("edits"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")]
    started = told = time.monotonic()
    done = failed = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("edits", total=len(todo), left="")

        def report(record: dict[str, Any]) -> None:
            nonlocal done, failed, told
            now = time.monotonic()
            done += 1
            left = _time_left(now - started, done, len(todo))
            progress.update(task, advance=1, left=left)
            if record["status"] != "ok":
                failed += 1
                console.print(f"failed: line {record['line']}, {escape(record['output'])}: {escape(record['error'])}")
            if not console.is_terminal and now - told >= NEWS_SECONDS:
                console.print(f"{done} of {len(todo)}, {left}")
                told = now

        run_batch(todo, output, how, anew=anew, on_result=report, run=run)
    return failed


def _time_left(seconds: float, done: int, total: int) -> str:
    """From the mean so far, the loading of the model included: rich's own estimate looks at the last seconds only."""
    return f"{timedelta(seconds=round(seconds / done * (total - done)))} left"
