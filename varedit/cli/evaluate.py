"""`varedit evaluate`: run a benchmark on an editor, compare runs, show where the paper stands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from varedit.evaluation.cases import Benchmark

app = typer.Typer(help="Benchmarks, scores and reports that anyone can repeat.", no_args_is_help=True)


@app.command()
def run(  # noqa: PLR0913 - one argument an option
    benchmark: Annotated[
        str,
        typer.Option(
            help="procedural, emu-edit, pie-bench, magicbrush, magicbrush-multi, imgedit, gedit, or a folder "
            "or .jsonl of your own.",
            show_default=False,
        ),
    ],
    editor: Annotated[
        str,
        typer.Option(
            help="varedit[:MODEL], identity, oracle, diffusers:ID, openai:URL, command:TEMPLATE or folder:DIR."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results; resumed if it exists.")],
    data: Annotated[
        Path | None, typer.Option(help="The benchmark's files; procedural: objects/ and photos/.", show_default="none")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many cases.", show_default="all")] = None,
    size: Annotated[int, typer.Option(help="Size class of the procedural pictures.")] = 128,
    seed: Annotated[int, typer.Option(help="Every case gets its own from it.")] = 0,
    metrics: Annotated[
        str | None, typer.Option(help="Comma list; 'none' leaves all out.", show_default="the benchmark's")
    ] = None,
    reader: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the benchmark's reader, such as bad_captions=drop.")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="OpenAI-style endpoint of a judge, up to /v1.")] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's model.")] = "gpt-4o",
    judge_rules: Annotated[
        str | None, typer.Option(help="paper, viescore or imgedit.", show_default="the benchmark's")
    ] = None,
    judge_prices: Annotated[
        str | None, typer.Option(help="IN,OUT for a million tokens; says what judging cost.", show_default="none")
    ] = None,
    judge_repeats: Annotated[int, typer.Option(help="How often each case is judged.")] = 1,
    workers: Annotated[int, typer.Option(help="Cases at once, for endpoints, commands and the judge.")] = 1,
    shard: Annotated[str, typer.Option(help="I/N: generate only this part; score when all parts are done.")] = "0/1",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.", show_default="the best at hand")] = None,
) -> None:
    """Generate what is missing, then score: writes OUTPUT/scores.json."""
    from varedit.evaluation import scores
    from varedit.evaluation.benchmarks import backbones_of, load
    from varedit.evaluation.editors import make_editor
    from varedit.evaluation.generate import generate
    from varedit.evaluation.judge import make_judge

    part = _shard(shard)
    cases = load(benchmark, data, size=size, limit=limit, options=_reader_options(reader or []))
    names = cases.metrics if metrics is None else tuple(name for name in metrics.split(",") if name not in ("", "none"))
    models = backbones_of(cases.name, device or "cpu")
    scores.check_metrics(names, models)
    prices = _prices(judge_prices)
    judge = None
    if judge_url is not None:
        judge = make_judge(
            cases.name, judge_url, judge_model, output / "judge", rules=judge_rules, repeats=judge_repeats
        )
    if not names and judge is None:
        raise ValueError(f"{benchmark} is scored by a judge: give --judge-url, or choose --metrics")
    if workers < 1:
        raise ValueError(f"workers is {workers}: use at least 1")
    with _progress("generate", cases) as step:
        done = generate(
            cases, make_editor(editor, device), output, seed=seed, workers=workers, shard=part, on_case=step
        )
    typer.echo(f"{output}: {done.done} edited, {done.skipped} found done, {len(done.failed)} failed")
    if part[1] > 1:
        typer.echo(f"part {shard} is done; run once more without --shard to score")
        return
    if judge is not None:
        judge.prepare(cases, output, workers)
        typer.echo(judge.chat.account(prices), err=True)
    with _progress("score", cases) as step:
        result = scores.score(cases, output, names, models, judge, on_case=step)
    _show(result, output)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard {text!r} is no part; use I/N with I below N, such as 0/4")
    return int(index), int(count)


def _reader_options(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"reader option {pair!r} lacks a value; use NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"judge prices {text!r} are not two numbers; use IN,OUT such as 2.5,10") from error
    return first, second


def _progress(label: str, cases: "Benchmark") -> Any:
    """A context that gives a function to call with the number of cases done."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def show():
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(label, total=len(cases.cases))
            yield lambda done: progress.update(task, completed=done)

    return show()


def _show(result: dict[str, Any], output: Path) -> None:
    from rich.console import Console

    from varedit.evaluation.report import summary_table

    Console().print(summary_table(result))
    failed = result["cases"]["failed"]
    typer.echo(f"{result['cases']['scored']} of {result['cases']['total']} cases scored: {output / 'scores.json'}")
    if failed:
        typer.echo(
            f"{len(failed)} without a score, left out of every mean; the first is {failed[0]['key']}: "
            f"{failed[0]['reason']}"
        )


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of results with a scores.json.", show_default=False)],
    html: Annotated[Path, typer.Option(help="The page to write; a .md and a .json file are put beside it.")] = Path(
        "report.html"
    ),
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare runs of different protocols all the same.")
    ] = False,
) -> None:
    """One page about one run, or several side by side with paired tests."""
    from varedit.evaluation.report import load_runs, write_report

    runs = load_runs(folders, allow_different=allow_different)
    for path in write_report(runs, html):
        typer.echo(str(path))


@app.command(name="paper-table")
def paper_table(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Own runs to put into the table.", show_default=False)
    ] = None,
) -> None:
    """The paper's Table 1, and where one's own runs stand."""
    from rich.console import Console

    from varedit.evaluation.paper import table

    Console(width=160).print(table(folders or []))
