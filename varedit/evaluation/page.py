"""The report as one self-contained HTML page: no script, font or picture from elsewhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from varedit.evaluation.generate import result_path
from varedit.evaluation.judge import ABOUT
from varedit.evaluation.page_style import SCRIPT, STYLE
from varedit.evaluation.plots import NUM_COLOURS, dots, number, spread, strip
from varedit.evaluation.report import Paired, Run, protocol_differences, score_names, sections
from varedit.evaluation.scores import JUDGED, METRICS, THUMBNAILS

SIDE = 224
"""Longest side of a picture on the page, in pixels."""


def page(runs: Sequence[Run], pairs: Sequence[tuple[Run, Run, list[Paired]]], max_strips: int) -> str:
    """The whole page."""
    benchmark = escape(runs[0].scores["protocol"]["benchmark"])
    parts = [
        f"<header><h1>{benchmark} benchmark</h1>{_subtitle(runs)}</header>",
        _warnings(runs),
        _legend(runs),
        f"<section><h2>Overall</h2>{_overall(runs)}</section>",
        _comparisons(pairs),
        f"<section><h2>By type</h2>{_plots(runs)}{_tables(runs)}</section>",
        _strips(runs, max_strips),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{benchmark}: {escape(', '.join(run.label for run in runs))}</title><style>{STYLE}</style>\n"
        f"<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )


# ---- who and what


def _subtitle(runs: Sequence[Run]) -> str:
    """What was measured: the settings of the first run's protocol, in words."""
    first = runs[0].scores
    protocol = first["protocol"]
    texts = [f"{first['cases']['total']} cases", *_words(protocol["settings"]), *_words(first["notes"])]
    judge = protocol["judge"]
    if judge is not None:
        texts.append(f"judged by {judge['model']} ({judge['rules']} rules)")
    texts.append(f"protocol {first['protocol_sha256'][:12]}")
    return f'<p class="quiet">{" · ".join(map(escape, texts))}</p>'


def _words(values: dict[str, Any]) -> list[str]:
    """Settings as words: "size 128"; "with photos" for what is switched on."""
    shown = []
    for name, value in values.items():
        words = name.replace("_", " ")
        if value is True:
            shown.append(f"with {words}")
        elif value is not False and not isinstance(value, dict):
            shown.append(f"{words} {value}")
    return shown


def _warnings(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs[1:]:
        differing = protocol_differences(runs[0], run)
        if differing:
            lines.append(
                f"<b>{escape(run.label)}</b> was scored by another protocol than {escape(runs[0].label)} "
                f"(they differ in {escape(', '.join(differing))}). Their numbers do not compare."
            )
    for run in runs:
        failed = run.scores["cases"]["failed"]
        if failed:
            rows = "".join(f"<li>{escape(str(one['key']))}: {escape(one['reason'])}</li>" for one in failed[:200])
            lines.append(
                f"<b>{escape(run.label)}</b>: {len(failed)} of {run.scores['cases']['total']} cases have no score and "
                f"are left out of every mean.<details><summary>which and why</summary><ul>{rows}</ul></details>"
            )
    return "".join(f'<div class="warn">{line}</div>' for line in lines)


def _legend(runs: Sequence[Run]) -> str:
    cards = []
    for index, run in enumerate(runs):
        cases, editor = run.scores["cases"], run.scores["run"]["editor"]
        settings = " · ".join(_words({name: value for name, value in editor.items() if name != "editor"}))
        count = f"{cases['scored']} of {cases['total']} cases scored"
        count += f", {cases['resized']} results resized" if cases["resized"] else ""
        details = f"<details><summary>settings</summary>{escape(settings)}</details>" if settings else ""
        cards.append(
            f"<div class=card>{_key(index)}<b>{escape(run.label)}</b> "
            f'<span class=quiet>{escape(editor["editor"])}</span><div class="quiet small">{count}{details}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _key(index: int) -> str:
    return f'<span class="key" style="background:var(--run{index % NUM_COLOURS})"></span>'


# ---- numbers


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in score_names(run.scores)))


def _title(runs: Sequence[Run], name: str) -> str:
    better = next(run.scores["better"][name] for run in runs if name in run.scores["better"])
    arrow = "↑" if better == "higher" else "↓"
    return f'{escape(name.replace("_", " "))}&nbsp;<span class="quiet" title="{better} is better">{arrow}</span>'


def _cell(mean: dict[str, Any] | None, count: int) -> str:
    """A mean with its interval, and over how many cases if these are not all of `count`."""
    if mean is None:
        return '<td class="quiet">–</td>'
    fewer = f"<small>{mean['n']} of {count} cases</small>" if mean["n"] < count else ""
    return f"<td>{number(mean['mean'])}<small>{spread(mean)}</small>{fewer}</td>"


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    cells = "".join(f"<th>{text}</th>" for text in head)
    body = "".join(rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _overall(runs: Sequence[Run]) -> str:
    labels = [run.label for run in runs]
    rows = []
    for name in _names(runs):
        means = [run.scores["overall"].get(name) for run in runs]
        about = escape(METRICS[name].about if name in METRICS else ABOUT.get(name.removeprefix(JUDGED), ""))
        cells = "".join(_cell(mean, run.scores["cases"]["scored"]) for mean, run in zip(means, runs))
        rows.append(
            f'<tr><td>{_title(runs, name)}<small class="about">{about}</small></td>{cells}'
            f'<td class="plot">{strip(means, labels)}</td></tr>'
        )
    head = ["", *(f"{_key(index)}{escape(label)}" for index, label in enumerate(labels)), ""]
    note = "Small numbers: 95 % interval, bootstrap over cases. ↑ higher is better, ↓ lower."
    return _table(head, rows, "overall") + f'<p class="quiet small">{note}</p>' + _agreement(runs)


def _agreement(runs: Sequence[Run]) -> str:
    """How far repeated judgements of a case agree."""
    rows = [
        f"<tr><td>{_key(index)}{escape(run.label)}</td><td>{escape(name)}</td><td>{value['within_one']:.0%}</td>"
        f"<td>{value['mean_distance']:.2f}</td><td class=quiet>{value['pairs']}</td></tr>"
        for index, run in enumerate(runs)
        for name, value in (run.scores["agreement"] or {}).items()
    ]
    if not rows:
        return ""
    head = ["judged again", "score", "within one point", "mean distance", "pairs"]
    return f"<details><summary>How far repeated judgements agree</summary>{_table(head, rows)}</details>"


def _comparisons(pairs: Sequence[tuple[Run, Run, list[Paired]]]) -> str:
    if not pairs:
        return ""
    blocks = []
    for number_of, (one, two, found) in enumerate(pairs, 1):
        rows = [
            f"<tr><td>{_title([one, two], pair.metric)}</td>"
            f"<td>{_signed(pair.difference)}<small>{_signed(pair.low)} to {_signed(pair.high)}</small></td>"
            f"<td>{'&lt; 0.001' if pair.p < 0.001 else f'{pair.p:.3f}'}</td>"
            f'<td>{pair.wins}</td><td>{pair.losses}</td><td class="quiet">{pair.n}</td></tr>'
            for pair in found
        ]
        title = f"{_key(number_of)}{escape(two.label)} <span class=quiet>against</span> {_key(0)}{escape(one.label)}"
        blocks.append(f"<div><h3>{title}</h3>{_table(['', 'difference', 'p', 'better', 'worse', 'cases'], rows)}</div>")
    note = (
        "The same cases in both runs. p: two-sided, by flipping the signs of the differences at random. "
        "Better and worse: in how many cases."
    )
    return (
        f'<section><h2>Case by case</h2><div class="pairs">{"".join(blocks)}</div>'
        f'<p class="quiet small">{note}</p></section>'
    )


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def _plots(runs: Sequence[Run]) -> str:
    """One plot a score: types and further groups down, a dot for each run."""
    figures = []
    for name in _names(runs):
        parts: list[dict[str, list[Any]]] = []
        for part in ("types", "groups"):
            rows = {
                label or "(none)": [run.scores[part].get(label, {}).get(name) for run in runs]
                for label in sorted({label for run in runs for label in run.scores[part]})
            }
            parts.append({label: means for label, means in rows.items() if any(means)})
        plot = dots(parts, [run.label for run in runs])
        figures.append(f"<figure><figcaption>{_title(runs, name)}</figcaption>{plot}</figure>")
    return f'<div class="plots">{"".join(figures)}</div>'


def _tables(runs: Sequence[Run]) -> str:
    blocks = []
    for index, run in enumerate(runs):
        names = score_names(run.scores)
        rows = []
        for title, part in sections(run.scores):
            for label, count, means in part:
                cells = "".join(_cell(means.get(name), count) for name in names)
                kind = "all" if title == "type" and label == "all" else ""
                rows.append(f'<tr class="{kind}"><td>{escape(label)}</td><td class="quiet">{count}</td>{cells}</tr>')
        table = _table(["", "cases", *(_title([run], name) for name in names)], rows, "types")
        summary = f"<summary>{_key(index)}{escape(run.label)} in numbers</summary>"
        blocks.append(f"<details{' open' if len(runs) < 3 else ''}>{summary}{table}</details>")
    return "".join(blocks)


# ---- pictures


def _strips(runs: Sequence[Run], max_strips: int) -> str:
    """Pictures case by case, sortable by any score of any run."""
    rows = [{row["key"]: row for row in run.scores["rows"]} for run in runs]
    keys = list(dict.fromkeys(key for found in rows for key in found))
    shown = keys[:max_strips]
    first = [next(found[key] for found in rows if key in found) for key in shown]
    data = [[found[key]["scores"] if key in found else None for found in rows] for key in shown]
    names = _names(runs)
    sorts = "".join(
        f'<optgroup label="{escape(run.label)}">'
        + "".join(
            f'<option value="{index}|{escape(name)}">{escape(name.replace("_", " "))}, {escape(run.label)}</option>'
            for name in names
        )
        + "</optgroup>"
        for index, run in enumerate(runs)
    )
    kinds = "".join(_option(kind) for kind in sorted({row["type"] for row in first}))
    groups = "".join(_option(group) for group in sorted({group for row in first for group in row["groups"]}))
    cases = "".join(_case(runs, rows, row, place) for place, row in enumerate(first))
    note = f"the first {len(shown)} of {len(keys)}" if len(shown) < len(keys) else ""
    group_filter = f'<label>group <select id="group"><option value="">all</option>{groups}</select></label>'
    return (
        f'<section><h2>Cases <span class="quiet small">{note}</span></h2><div class="controls">'
        f'<label>sort by <select id="by"><option value="">order of the benchmark</option>{sorts}</select></label>'
        '<label><select id="order" aria-label="order"><option value="up">lowest first</option>'
        '<option value="down">highest first</option></select></label>'
        f'<label>type <select id="kind"><option value="">all</option>{kinds}</select></label>'
        f'{group_filter if groups else ""}<span id="count" class="quiet"></span>'
        '<span class="quiet hint">Point at a result to see its source in its place.</span></div>'
        f'<div id="cases">{cases}</div></section>'
        f"<script>const DATA={_json(data)},NAMES={_json(names)};{SCRIPT}</script>"
    )


def _option(value: str) -> str:
    return f'<option value="{escape(value)}">{escape(value or "(none)")}</option>'


def _json(data: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _case(runs: Sequence[Run], rows: Sequence[dict[str, Any]], row: dict[str, Any], place: int) -> str:
    key, instruction = row["key"], row["instruction"]
    folder = next(run.folder for run, found in zip(runs, rows) if key in found)
    figures = [_figure(folder / THUMBNAILS / f"{key}.source.webp", "source", "source")]
    for index, (run, found) in enumerate(zip(runs, rows)):
        label = f'{_key(index)}{escape(run.label)}<span class="value" data-run="{index}"></span>'
        picture = result_path(run.folder, key)
        if key in found and picture.is_file():
            figures.append(_figure(picture, label, f"result of {run.label}", "result"))
        else:
            reason = "no picture" if key in found else "no score"
            figures.append(f'<figure class="missing"><div>{reason}</div><figcaption>{label}</figcaption></figure>')
    figures.append(_figure(folder / THUMBNAILS / f"{key}.target.webp", "known answer", "known answer"))
    groups = escape(json.dumps(row["groups"]))
    about = " · ".join(escape(text) for text in (row["type"], *row["groups"], key) if text)
    return (
        f'<article data-place="{place}" data-kind="{escape(row["type"])}" data-groups="{groups}">'
        f'<h3>{escape(instruction)}</h3><p class="quiet small">{about}</p>'
        f'<div class="strip">{"".join(figures)}</div>'
        '<details class="all"><summary class="small">all scores</summary></details></article>'
    )


def _figure(path: Path, label: str, alt: str, kind: str = "") -> str:
    if not path.is_file():
        return ""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"picture {path} is damaged ({error}); run `varedit evaluate run` again") from error
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    tag = f'<img alt="{escape(alt)}" width="{image.width}" height="{image.height}" decoding="async"'
    return f'<figure class="{kind}">{tag} src="data:image/webp;base64,{data}"><figcaption>{label}</figcaption></figure>'
