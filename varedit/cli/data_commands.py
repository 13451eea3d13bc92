"""`varedit data lint | filter | pack`: looking at pairs, judging them, packing them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from varedit.data.filter import Estimate

app = typer.Typer(no_args_is_help=True)

MAX_CALLS_UNASKED = 1000

Source = Annotated[
    str,
    typer.Argument(help="Folder, file or address (hf://datasets/...) of pairs; see varedit.data.readers.read."),
]
Format = Annotated[
    str | None, typer.Option("--format", help="Layout of the source.", show_default="found by looking at it")
]
MaxSkipped = Annotated[float, typer.Option(help="Largest fraction of pairs that may be unreadable.", min=0.0, max=1.0)]


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Say in one line what the disk refuses: a file in the way, no permission, no room."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or output} cannot be read or written ({error.strerror or error}): "
            "make room, or name another place"
        ) from error


def _check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse before the work is done, not after, what cannot be written as a file, or must not be replaced."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: name a new file in a folder that can be written to")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; pass --overwrite, or another name")


@app.command()
def lint(
    source: Source,
    report: Annotated[Path, typer.Option(help="JSON table to write.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Page with thumbnails to write.", show_default=False)] = None,
    format: Format = None,
    min_side: Annotated[int, typer.Option(help="Shortest side that is not tiny.")] = 64,
    language: Annotated[
        str, typer.Option(help="Of the instructions: en, de, fr, es, it, pt or nl; any turns the check off.")
    ] = "en",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Find bad pairs: unreadable, misaligned, unchanged, duplicate, or with instructions that cannot be right."""
    from varedit.data.lint import LintOptions, lint
    from varedit.data.lint_report import write_html, write_json
    from varedit.data.readers import read
    from varedit.data.wording import LANGUAGES

    if language not in (*LANGUAGES, "any"):
        raise ValueError(f"language {language!r} is unknown: use one of {', '.join(LANGUAGES)}, or any")
    for path in (report, html):
        if path is not None:
            _check_file(path, overwrite=overwrite)
    options = LintOptions(min_side=min_side, language=None if language == "any" else language)
    with writing(report):
        found = lint(read(source, format), options)
        write_json(found, source, report)
        if html is not None:
            write_html(found, source, html)
    counts = ", ".join(f"{check} {count}" for check, count in found.counts.items())
    typer.echo(
        f"{report}: {found.num_pairs} pairs, {found.num_flagged} with findings{f' ({counts})' if counts else ''}"
    )


@app.command()
def pack(  # noqa: PLR0913 - one argument an option
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    format: Format = None,
    size: Annotated[int, typer.Option(help="Size class whose aspect templates are the buckets.")] = 512,
    records_per_shard: Annotated[int, typer.Option(help="Pairs in a full shard.")] = 1000,
    only: Annotated[
        Path | None, typer.Option(help="Verdicts of varedit data filter: pack what it kept.", show_default=False)
    ] = None,
    without: Annotated[
        Path | None, typer.Option(help="Report of varedit data lint: leave out what it flags.", show_default=False)
    ] = None,
    max_skipped: MaxSkipped = 0.1,
    features: Annotated[
        str | None,
        typer.Option(
            help="Model or image tokenizer folder: store what it and its text encoder make of each pair, so that a "
            "training with them need not run them.",
            show_default=False,
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="For --features: another folder or Hugging Face name.", show_default="the model's"),
    ] = None,
    feature_size: Annotated[
        list[int] | None, typer.Option(help="For --features: size classes to train at.", show_default="--size")
    ] = None,
    feature_fit: Annotated[
        Literal["native", "square"] | None,
        typer.Option(help="For --features: native or square, as in training.", show_default="native"),
    ] = None,
    feature_dtype: Annotated[
        Literal["float16", "float32"] | None,
        typer.Option(help="For --features: float32 gives the very bits.", show_default="float16"),
    ] = None,
) -> None:
    """Pack pairs into WebDataset shards by aspect ratio, with checksums. Run it again to continue or to verify."""
    from varedit.data.filter import read_verdicts, selected
    from varedit.data.lint_report import read_flagged
    from varedit.data.packing import pack, verify
    from varedit.data.readers import read
    from varedit.data.shards import is_packed

    if only is not None and not only.exists():
        raise ValueError(f"verdicts {only} do not exist: write them with varedit data filter --output")
    complete = is_packed(output)
    verdicts = read_verdicts(only) if only is not None else None
    flagged = read_flagged(without) if without is not None else None
    name = " ".join(
        [source, *(f"only {only}" for _ in [only] if only), *(f"without {without}" for _ in [without] if without)]
    )
    encoder = None
    given = {
        "--text-encoder": text_encoder,
        "--feature-size": feature_size,
        "--feature-fit": feature_fit,
        "--feature-dtype": feature_dtype,
    }
    if features is None and any(given.values()):
        names = ", ".join(name for name, value in given.items() if value)
        raise ValueError(f"{names} without --features does nothing: name a model there, or leave it out")
    if features is not None:
        from varedit.data.features import FeatureEncoder

        encoder = FeatureEncoder(
            features,
            text_encoder,
            sizes=feature_size or [size],
            fit=feature_fit or "native",
            dtype=feature_dtype or "float16",
        )
    with writing(output):
        items = selected(read(source, format), verdicts, flagged)
        found = pack(
            items, output, source=name, size=size, records_per_shard=records_per_shard, max_skipped=max_skipped,
            features=encoder,
        )  # fmt: skip
        wrong = verify(output) if complete else []
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: pack into an empty folder")
    again = f", {found.reused} of them there before" if found.reused else ""
    checked = ", checksums hold" if complete else ""
    typer.echo(f"{output}: {found.num_pairs} pairs in {len(found.shards)} shards{again}{checked}")


@app.command()
def filter(
    source: Source,
    judge_url: Annotated[
        str, typer.Option(help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.", show_default=False)
    ],
    judge_model: Annotated[str, typer.Option(help="Model it serves; it must see pictures.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Verdicts to write, JSON lines.", show_default=False)],
    format: Format = None,
    cache: Annotated[
        Path | None, typer.Option(help="File of answers already paid for.", show_default="OUTPUT.cache")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Requests under way at once.")] = 8,
    price_in: Annotated[
        float | None, typer.Option(help="Price of a million prompt tokens.", show_default=False)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(help="Price of a million answer tokens.", show_default=False)
    ] = None,
    max_cost: Annotated[float, typer.Option(help="Estimated cost above which --yes is needed.")] = 1.0,
    yes: Annotated[bool, typer.Option("--yes", help="Go ahead whatever the estimate says.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate.")] = False,
) -> None:
    """Ask a vision-language model whether each instruction is exactly the difference and both pictures are sharp.

    The key is taken from VAREDIT_JUDGE_API_KEY or OPENAI_API_KEY. Run it again to continue: no answer is paid twice.
    """
    from rich.console import Console
    from rich.progress import Progress

    from varedit.data.filter import estimate, judge_pairs
    from varedit.data.judge_client import JudgeClient
    from varedit.data.readers import read

    client = JudgeClient(judge_url, judge_model)
    _check_file(output, overwrite=True)  # verdicts that are there are taken up again
    with writing(output):
        expected = estimate(read(source, format), output, price_in=price_in, price_out=price_out)
    typer.echo(f"estimate: {expected}", err=True)
    if dry_run:
        return
    _refuse_surprises(expected, max_cost, yes)
    console = Console(stderr=True)
    with writing(output), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("pairs", total=expected.num_calls)
        report = judge_pairs(
            read(source, format),
            client,
            output,
            cache=cache,
            num_workers=num_workers,
            on_verdict=lambda _: progress.advance(task),
        )
    typer.echo(f"{output}: {report.summary()}; {report.num_calls} requests")


def _refuse_surprises(expected: Estimate, max_cost: float, yes: bool) -> None:
    if yes:
        return
    if expected.cost is not None and expected.cost > max_cost:
        raise ValueError(f"estimated cost {expected.cost:.2f} is above {max_cost:.2f}: add --yes, or raise --max-cost")
    if expected.cost is None and expected.num_calls > MAX_CALLS_UNASKED:
        raise ValueError(
            f"{expected.num_calls} requests at no known price: give --price-in and --price-out, or add --yes"
        )
