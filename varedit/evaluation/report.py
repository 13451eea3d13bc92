"""Runs side by side: tables with intervals, paired tests, Markdown, JSON, and the page of `page.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from varedit.evaluation.judge import ABOUT
from varedit.evaluation.scores import DIGITS, JUDGED, SCORES, digest, write_json, write_text

NUM_FLIPS = 10_000


@dataclass(frozen=True)
class Run:
    """A folder of results with its scores; `label` tells it from the others."""

    label: str
    folder: Path
    scores: dict[str, Any]


def score_names(scores: dict[str, Any]) -> list[str]:
    """Names of a run's scores, in the order of its protocol; the judge's come last, its main one first."""
    order = [*scores["protocol"]["metrics"], *(JUDGED + name for name in ABOUT)]
    return sorted(scores["overall"], key=lambda name: (order.index(name) if name in order else len(order), name))


def load_runs(folders: Sequence[Path], *, allow_different: bool = False) -> list[Run]:
    """The score files of some folders.

    Raises:
        ValueError: a folder without a sound score file, or protocols that differ and are not allowed to.
    """
    runs: list[Run] = []
    for folder in folders:
        path = folder / SCORES
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))
            body = {name: value for name, value in scores.items() if name != "scores_sha256"}
            whole = digest(body) == scores["scores_sha256"]
            found = whole and digest(scores["protocol"]) == scores["protocol_sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no score file ({error}); run `varedit evaluate run` first") from error
        if not found:
            raise ValueError(
                f"{path} was changed by hand or is damaged: it does not have its hash; score the folder again"
            )
        label = folder.resolve().name
        taken = sum(run.label.split(" #")[0] == label for run in runs)
        runs.append(Run(f"{label} #{taken + 1}" if taken else label, folder, scores))
    for run in runs[1:]:
        differing = protocol_differences(runs[0], run)
        if differing and not allow_different:
            raise ValueError(
                f"{runs[0].folder} and {run.folder} were scored by different protocols (they differ in "
                f"{', '.join(differing)}); their numbers do not compare. Pass --allow-different to see them anyway"
            )
    return runs


def protocol_differences(first: Run, second: Run) -> list[str]:
    """Names of the parts of the protocol in which two runs differ."""
    one, two = first.scores["protocol"], second.scores["protocol"]
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


@dataclass(frozen=True)
class Paired:
    """A score of two runs on their common cases.

    Attributes:
        difference: mean of second - first, with its 95 % bootstrap interval low..high.
        p: two-sided, by flipping the signs of the differences at random (with equal differences it is 1).
        wins: cases in which the second is better; losses: in which the first is; n: common cases.
    """

    metric: str
    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    n: int


def paired(first: Run, second: Run, metric: str) -> Paired | None:
    """Compare two runs case by case; None without common cases. The same input gives the same numbers."""
    values = [
        {row["key"]: row["scores"][metric] for row in run.scores["rows"] if row["scores"].get(metric) is not None}
        for run in (first, second)
    ]
    keys = sorted(values[0].keys() & values[1].keys())
    if not keys:
        return None
    gaps = np.array([values[1][key] - values[0][key] for key in keys])
    rng = np.random.default_rng(len(keys))
    drawn = np.array([gaps[rng.integers(0, len(gaps), len(gaps))].mean() for _ in range(2000)])
    low, high = np.percentile(drawn, (2.5, 97.5))
    flipped = np.array([(rng.choice((-1.0, 1.0), len(gaps)) * gaps).mean() for _ in range(NUM_FLIPS)])
    extreme = np.abs(flipped) >= abs(gaps.mean()) - 1e-12
    sign = 1 if first.scores["better"].get(metric, "higher") == "higher" else -1
    return Paired(
        metric,
        difference=round(float(gaps.mean()), DIGITS),
        low=round(float(low), DIGITS),
        high=round(float(high), DIGITS),
        p=round(float((extreme.sum() + 1) / (NUM_FLIPS + 1)), DIGITS),
        wins=int((sign * gaps > 0).sum()),
        losses=int((sign * gaps < 0).sum()),
        n=len(keys),
    )


def comparisons(runs: Sequence[Run]) -> list[tuple[Run, Run, list[Paired]]]:
    """The first run against each of the others."""
    found = []
    for run in runs[1:]:
        names = [name for name in score_names(runs[0].scores) if name in run.scores["overall"]]
        found.append((runs[0], run, [pair for name in names if (pair := paired(runs[0], run, name)) is not None]))
    return found


def write_report(runs: Sequence[Run], html: Path, max_strips: int = 400, *, overwrite: bool = False) -> list[Path]:
    """Write the page, and the same numbers as Markdown and JSON beside it; the paths.

    Args:
        max_strips: cases shown with pictures.
        overwrite: replace existing files.

    Raises:
        ValueError: a path that exists, that cannot be written or that the other two files would overwrite, or a damaged
            picture.
    """
    from varedit.evaluation.page import page

    if html.suffix in (".md", ".json"):
        raise ValueError(f"page {html} would be overwritten by its own {html.suffix} file: name it {html.stem}.html")
    markdown_path, json_path = html.with_suffix(".md"), html.with_suffix(".json")
    for path in (html, markdown_path, json_path):
        if path.is_file() and not overwrite:
            raise ValueError(f"{path} exists already; allow overwriting (--overwrite), or name another")
    pairs = comparisons(runs)
    write_text(html, page(runs, pairs, max_strips))
    write_text(markdown_path, markdown(runs, pairs))
    write_json(
        json_path,
        {
            "runs": [
                {"label": run.label} | {key: value for key, value in run.scores.items() if key != "rows"}
                for run in runs
            ],
            "paired": [
                {"first": one.label, "second": two.label, "scores": [asdict(pair) for pair in found]}
                for one, two, found in pairs
            ],
        },
    )
    return [html, markdown_path, json_path]


def markdown(runs: Sequence[Run], pairs: Sequence[tuple[Run, Run, list[Paired]]]) -> str:
    """The tables as Markdown."""
    lines = [f"# {runs[0].scores['protocol']['benchmark']}", ""]
    for run in runs:
        cases, protocol = run.scores["cases"], run.scores["protocol_sha256"][:12]
        lines.append(f"- {run.label}: {cases['scored']} of {cases['total']} cases scored, protocol `{protocol}`")
    for run in runs:
        names = score_names(run.scores)
        lines += ["", f"## {run.label}"]
        for title, rows in sections(run.scores):
            lines += ["", f"| {title} | n | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
            for label, count, means in rows:
                cells = [interval(means[name], count) if name in means else "-" for name in names]
                lines.append(f"| {label} | {count} | {' | '.join(cells)} |")
    for one, two, found in pairs:
        lines += ["", f"## {two.label} against {one.label}, case by case", ""]
        lines += ["| score | difference | p | better | worse | n |", "|---|---|---|---|---|---|"]
        for pair in found:
            gap = f"{pair.difference:+.3f} ({pair.low:+.3f} to {pair.high:+.3f})"
            lines.append(f"| {pair.metric} | {gap} | {pair.p:.4f} | {pair.wins} | {pair.losses} | {pair.n} |")
    return "\n".join(lines) + "\n"


Section = tuple[str, list[tuple[str, int, dict[str, Any]]]]


def sections(scores: dict[str, Any]) -> list[Section]:
    """The tables of a run: by type, closed by all cases, and by further groups if there are any.

    Returns:
        Title and rows of each: (label, number of cases, means by score).
    """
    types = [*scores["types"].items(), ("all", scores["overall"])]
    parts = [("type", types), ("cases", list(scores["groups"].items()))]
    return [
        (title, [(label or "(none)", max((mean["n"] for mean in means.values()), default=0), means)
                 for label, means in rows])
        for title, rows in parts if rows
    ]  # fmt: skip


def interval(mean: dict[str, Any], count: int) -> str:
    """0.512 (0.470 to 0.553), and over how many cases if these are not all of `count`."""
    fewer = f", n {mean['n']}" if mean["n"] < count else ""
    return f"{mean['mean']:.3f} ({mean['low']:.3f} to {mean['high']:.3f}){fewer}"


def summary_table(result: dict[str, Any]) -> Any:
    """Means by type and group as a table for a terminal."""
    from rich import box
    from rich.table import Table

    names = score_names(result)
    table = Table(
        title=f"{result['protocol']['benchmark']}, protocol {result['protocol_sha256'][:12]}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right")
    for name in names:
        words = [f"{word[:6]}-\n{word[6:]}" if len(word) > 9 else word for word in name.split("_")]
        table.add_column("\n".join(words), justify="right", no_wrap=True)
    for _, rows in sections(result):
        for label, count, means in rows:
            cells = [_short(means[name]["mean"]) if name in means else "-" for name in names]
            fewer = [name in means and means[name]["n"] < count for name in names]
            cells = [f"{cell} *" if less else cell for cell, less in zip(cells, fewer)]
            if any(fewer):
                table.caption = "* over those of the n cases to which the score applies"
            table.add_row(label, str(count), *cells, end_section=label == "all", style="bold" if label == "all" else "")
    return table


def _short(value: float) -> str:
    """Four digits: 0.512, 24.31."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
