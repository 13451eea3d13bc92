"""`varedit evaluate`: run a benchmark on an editor, compare runs, show where the paper stands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from varedit.evaluation.cases import Benchmark
    from varedit.evaluation.chat import Budget

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
        Path | None,
        typer.Option(help="The benchmark's files; procedural: objects/ and photos/.", show_default="download, or draw"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first so many cases.", show_default="all; of procedural 300")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Size class of the procedural pictures.", show_default="128")] = None,
    seed: Annotated[int, typer.Option(help="Every case gets its own from it.")] = 0,
    metrics: Annotated[
        str | None, typer.Option(help="Comma list; 'none' leaves all out.", show_default="the benchmark's")
    ] = None,
    reader: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the benchmark's reader, such as bad_captions=drop.")
    ] = None,
    preprocessing: Annotated[
        str | None,
        typer.Option(help="For CLIP: pie-bench, magicbrush or ip2p.", show_default="the benchmark's"),
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="ROLE=NAME: another network or folder as clip, dino or structure.")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="OpenAI-style endpoint of a judge, up to /v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's model.", show_default="gpt-4o")] = None,
    judge_rules: Annotated[
        str | None, typer.Option(help="paper, viescore or imgedit.", show_default="the benchmark's")
    ] = None,
    judge_temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest answer.", show_default="0")
    ] = None,
    judge_repeats: Annotated[int | None, typer.Option(help="How often each case is judged.", show_default="1")] = None,
    judge_prices: Annotated[
        str | None, typer.Option(help="IN,OUT for a million tokens; says what judging costs.", show_default="none")
    ] = None,
    judge_limit: Annotated[
        float | None, typer.Option(help="The most that judging may cost at these prices.", show_default="none")
    ] = None,
    workers: Annotated[int, typer.Option(help="Cases at once, for endpoints, commands and the judge.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Cases in one call of our own pipeline.")] = 8,
    shard: Annotated[str, typer.Option(help="I/N: generate only this part; score when all parts are done.")] = "0/1",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps.", show_default="the best at hand; for scores the CPU")
    ] = None,
) -> None:
    """Generate what is missing, then score: writes OUTPUT/scores.json."""
    from varedit.data.judge_client import JudgeClient
    from varedit.evaluation import scores
    from varedit.evaluation.benchmarks import load
    from varedit.evaluation.chat import Chat
    from varedit.evaluation.editors import make_editor
    from varedit.evaluation.features import backbones_of
    from varedit.evaluation.generate import generate
    from varedit.evaluation.judge import Judge, default_rules

    part, budget = _shard(shard), _budget(judge_prices, judge_limit)
    for name, value in (("workers", workers), ("batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: use at least 1")
    for name, given in (
        ("model", judge_model), ("rules", judge_rules), ("prices", judge_prices),
        ("temperature", judge_temperature), ("repeats", judge_repeats),
    ):  # fmt: skip
        if given is not None and judge_url is None:
            raise ValueError(f"--judge-{name} {given} means nothing without a judge; add --judge-url")
    cases = load(benchmark, data, size=size, limit=limit, options=_pairs("reader", reader))
    names = cases.metrics if metrics is None else _names(metrics)
    models = backbones_of(cases.name, device or "cpu", preprocessing, _pairs("network", network))
    scores.check_metrics(names, models)
    judge = None
    if judge_url is not None:
        rules = judge_rules or default_rules(cases.name)
        client = JudgeClient(judge_url, "gpt-4o" if judge_model is None else judge_model, judge_temperature or 0.0)
        repeats = 1 if judge_repeats is None else judge_repeats
        judge = Judge(Chat(client, output / "judge", budget=budget), rules, repeats)
    if not names and judge is None:
        raise ValueError(f"{benchmark} is scored by a judge: give --judge-url, or choose --metrics")
    if editor.startswith(("varedit", "diffusers:")):
        _quiet()
    with _progress("generate", cases) as step:
        done = generate(
            cases, make_editor(editor, device), output, seed=seed, workers=workers, batch_size=batch_size, shard=part,
            on_case=step,
        )  # fmt: skip
    typer.echo(f"{output}: {done.done} edited, {done.skipped} found done, {len(done.failed)} failed")
    if part[1] > 1:
        typer.echo(f"part {shard} is done; run once more without --shard to score")
        return
    if judge is not None:
        typer.echo(judge.estimate(cases, output), err=True)
        with _progress("judge", cases) as step:
            judge.prepare(cases, output, workers, on_case=step)
        typer.echo(judge.chat.account(), err=True)
    with _progress("score", cases) as step:
        result = scores.score(cases, output, names, models, judge, on_case=step)
    _show(result, output)


def _names(metrics: str) -> tuple[str, ...]:
    found = (name.strip() for name in metrics.split(","))
    return tuple(name for name in found if name not in ("", "none"))


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard {text!r} is no part; use I/N with I below N, such as 0/4")
    return int(index), int(count)


def _pairs(option: str, pairs: list[str] | None) -> dict[str, str]:
    for pair in pairs or []:
        if "=" not in pair:
            raise ValueError(f"--{option} {pair!r} lacks a value; use NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs or [])


def _budget(prices: str | None, limit: float | None) -> "Budget | None":
    from varedit.evaluation.chat import Budget

    if prices is None:
        if limit is not None:
            raise ValueError(f"judge limit {limit:g} means nothing without prices; add --judge-prices IN,OUT")
        return None
    try:
        first, second = (float(part) for part in prices.split(","))
    except ValueError as error:
        raise ValueError(f"judge prices {prices!r} are not two numbers; use IN,OUT such as 2.5,10") from error
    if not (first >= 0 and second >= 0 and (limit is None or limit >= 0)):
        raise ValueError(f"judge prices {prices!r} with the limit {limit} are no costs; use numbers of at least 0")
    return Budget((first, second), limit)


def _quiet() -> None:
    """No bars of other libraries beside our own."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


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

    table = summary_table(result)
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)  # rather a long line than cut numbers
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """One page about one run, or several side by side with paired tests."""
    from varedit.evaluation.report import load_runs, write_report

    runs = load_runs(folders, allow_different=allow_different)
    for path in write_report(runs, html, overwrite=overwrite):
        typer.echo(str(path))


@app.command(name="paper-table")
def paper_table(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Own runs to put into the table.", show_default=False)
    ] = None,
) -> None:
    """The paper's Table 1, and where one's own runs would stand."""
    from rich.console import Console

    from varedit.evaluation.paper import table

    Console(width=160).print(table(folders or []))
