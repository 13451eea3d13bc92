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
from varedit.evaluation.report import Paired, Run, interval, protocol_differences, score_names
from varedit.evaluation.scores import THUMBNAILS

COLOURS = ("#2f6f9f", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#3d8b8b")
SIDE = 192
"""Longest side of a picture on the page, in pixels."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:24px;color:#222;background:#fff}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 8px}p{margin:6px 0}
.quiet{color:#666}.warn{background:#fdecc8;border-left:4px solid #b08900;padding:8px 12px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.all td{font-weight:600;border-top:2px solid #888}
small{color:#777;font-weight:400}.plots{display:flex;flex-wrap:wrap;gap:16px}
.case{display:flex;flex-wrap:wrap;gap:10px;padding:12px 0;border-bottom:1px solid #ddd;align-items:flex-start}
.case p{flex-basis:100%}figure{margin:0;width:192px}img{width:100%;display:block;background:#eee}
figcaption{font-size:12px;color:#555;overflow-wrap:anywhere}.key{display:inline-block;width:10px;height:10px}
.controls{position:sticky;top:0;background:#fff;padding:8px 0;display:flex;gap:14px;flex-wrap:wrap}
@media(prefers-color-scheme:dark){body,.controls{background:#16181b;color:#ddd}.quiet,small,figcaption{color:#999}
.warn{background:#4a3b10}th,td,.case{border-color:#3a3d41}svg text{fill:#bbb}}
"""

SCRIPT = """
const list=document.getElementById('cases'),by=id=>document.getElementById(id);
function show(){const [run,name]=by('by').value.split('|'),kind=by('kind').value,up=by('order').value==='up';
const cases=[...list.children];
const value=c=>{if(!name)return Number(c.dataset.place);const v=(DATA[c.dataset.key][run]||{})[name];
return v===undefined||v===null?(up?Infinity:-Infinity):v};
cases.sort((a,b)=>(up?1:-1)*(value(a)-value(b))||a.dataset.place-b.dataset.place);
let n=0;for(const c of cases){const on=!kind||c.dataset.kind===kind;c.style.display=on?'':'none';n+=on;list.append(c)}
by('count').textContent=n+' cases'}
for(const id of ['by','kind','order'])by(id).addEventListener('change',show);show();
"""


def page(runs: Sequence[Run], pairs: Sequence[tuple[Run, Run, list[Paired]]], max_strips: int) -> str:
    """The whole page."""
    benchmark = escape(runs[0].scores["protocol"]["benchmark"])
    parts = [f"<h1>{benchmark}: {escape(', '.join(run.label for run in runs))}</h1>", _head(runs)]
    parts.append("<h2>Overall</h2>" + _overall(runs))
    parts += [f"<h2>{escape(two.label)} against {escape(one.label)}, case by case</h2>" + _paired(found)
              for one, two, found in pairs]  # fmt: skip
    parts.append("<h2>By type</h2>" + _plots(runs))
    parts += [f"<h3>{_key(index)} {escape(run.label)}</h3>" + _types(run) for index, run in enumerate(runs)]
    parts += [_failures(run) for run in runs]
    parts.append(_strips(runs, max_strips))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{benchmark}: evaluation</title><style>{STYLE}</style><body>\n{body}\n</body></html>\n"
    )


def _head(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs[1:]:
        differing = protocol_differences(runs[0], run)
        if differing:
            lines.append(
                f'<p class="warn">{escape(run.label)} was scored by another protocol than {escape(runs[0].label)} '
                f"(they differ in {escape(', '.join(differing))}). Their numbers do not compare.</p>"
            )
    for index, run in enumerate(runs):
        cases, editor = run.scores["cases"], run.scores["run"]["editor"]
        text = f"{cases['scored']} of {cases['total']} cases scored, {cases['resized']} results resized"
        text += "".join(f", {escape(name)}: {escape(str(value))}" for name, value in run.scores["notes"].items())
        lines.append(
            f"<p>{_key(index)} <b>{escape(run.label)}</b>: {escape(json.dumps(editor, ensure_ascii=False))}<br>"
            f'<span class="quiet">{text}; protocol {run.scores["protocol_sha256"][:12]}</span></p>'
        )
    lines.append('<p class="quiet">Intervals: 95 %, bootstrap over cases. ↑ higher is better, ↓ lower.</p>')
    return "\n".join(lines)


def _key(index: int) -> str:
    return f'<span class="key" style="background:{COLOURS[index % len(COLOURS)]}"></span>'


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in score_names(run.scores)))


def _title(runs: Sequence[Run], name: str) -> str:
    better = next(run.scores["better"][name] for run in runs if name in run.scores["better"])
    return f"{escape(name)} {'↑' if better == 'higher' else '↓'}"


def _cell(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return "<td>-</td>"
    value, _, rest = interval(mean).partition(" ")
    return f"<td>{value} <small>{rest}</small></td>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{text}</th>" for text in head)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _overall(runs: Sequence[Run]) -> str:
    names = _names(runs)
    rows = []
    for run in runs:
        cells = "".join(_cell(run.scores["overall"].get(name)) for name in names)
        rows.append(f"<tr><td>{escape(run.label)}</td>{cells}</tr>")
    agreement = [
        f"<p>{escape(run.label)}: repeated judgements of a case lie within one point in "
        f"{value['within_one']:.0%} of {value['pairs']} pairs for {escape(name)} (mean distance "
        f"{value['mean_distance']:.2f}).</p>"
        for run in runs
        for name, value in (run.scores.get("agreement") or {}).items()
    ]
    return _table(["run", *(_title(runs, name) for name in names)], rows) + "".join(agreement)


def _types(run: Run) -> str:
    names = score_names(run.scores)
    rows = []
    for label, means in [*run.scores["types"].items(), ("all", run.scores["overall"])]:
        count = max((mean["n"] for mean in means.values()), default=0)
        cells = "".join(_cell(means.get(name)) for name in names)
        kind = ' class="all"' if means is run.scores["overall"] else ""
        rows.append(f"<tr{kind}><td>{escape(label or '(none)')}</td><td>{count}</td>{cells}</tr>")
    return _table(["type", "n", *(_title([run], name) for name in names)], rows)


def _paired(found: Sequence[Paired]) -> str:
    rows = [
        f"<tr><td>{escape(pair.metric)}</td><td>{pair.difference:+.3f} "
        f"<small>({pair.low:+.3f} to {pair.high:+.3f})</small></td><td>{pair.p:.4f}</td>"
        f"<td>{pair.wins}</td><td>{pair.losses}</td><td>{pair.n}</td></tr>"
        for pair in found
    ]
    return _table(["score", "difference", "p (sign flips)", "better", "worse", "cases"], rows)


def _plots(runs: Sequence[Run]) -> str:
    """One bar chart a score: types across, a bar for each run, whiskers for the interval."""
    return f'<div class="plots">{"".join(_plot(runs, name) for name in _names(runs))}</div>'


def _plot(runs: Sequence[Run], name: str) -> str:
    types = sorted({kind for run in runs for kind, means in run.scores["types"].items() if name in means})
    if not types:
        return ""
    means = [run.scores["types"].get(kind, {}).get(name) for kind in types for run in runs]
    top = max([mean["high"] for mean in means if mean] + [1e-9])
    bottom = min([mean["low"] for mean in means if mean] + [0.0])
    height, bar, left = 120, 24 // (len(runs) + 1) + 2, 44
    step = bar * len(runs) + 8
    width = left + step * len(types) + 8

    def y(value: float) -> float:
        return 28 + height * (top - value) / (top - bottom)

    shapes = [f'<text x="4" y="12" font-size="13">{_title(runs, name)}</text>']
    for value in (top, bottom):
        shapes.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" font-size="10" text-anchor="end">{value:.3g}</text>'
        )
    shapes.append(f'<line x1="{left}" x2="{width}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#999"/>')
    for place, kind in enumerate(types):
        for index, run in enumerate(runs):
            mean = run.scores["types"].get(kind, {}).get(name)
            if mean is not None:
                shapes.append(_bar(left + place * step + index * bar, bar, index, mean, y, f"{run.label}, {kind}"))
        x = left + place * step + bar * len(runs) / 2
        shapes.append(
            f'<text font-size="10" text-anchor="end" transform="translate({x:.0f} {height + 40}) rotate(-40)">'
            f"{escape(kind or '(none)')}</text>"
        )
    return f'<svg width="{width}" height="{height + 105}" role="img">{"".join(shapes)}</svg>'


def _bar(x: float, width: float, index: int, mean: dict[str, Any], y: Any, label: str) -> str:
    ends = sorted((y(mean["mean"]), y(0)))
    middle = x + width / 2
    return (
        f'<g><title>{escape(label)}: {interval(mean)}, n {mean["n"]}</title><rect x="{x + 1:.1f}" y="{ends[0]:.1f}" '
        f'width="{width - 2}" height="{max(0.5, ends[1] - ends[0]):.1f}" fill="{COLOURS[index % len(COLOURS)]}"/>'
        f'<line x1="{middle}" x2="{middle}" y1="{y(mean["low"]):.1f}" y2="{y(mean["high"]):.1f}" stroke="#555"/></g>'
    )


def _failures(run: Run) -> str:
    failed = run.scores["cases"]["failed"]
    if not failed:
        return ""
    rows = "".join(f"<li>{escape(str(one['key']))}: {escape(one['reason'])}</li>" for one in failed[:200])
    return (
        f'<p class="warn">{escape(run.label)}: {len(failed)} cases without a score, left out of every mean.</p>'
        f"<details><summary>which and why</summary><ul>{rows}</ul></details>"
    )


def _strips(runs: Sequence[Run], max_strips: int) -> str:
    """Pictures case by case, sortable by any score of any run."""
    rows = [{row["key"]: row for row in run.scores["rows"]} for run in runs]
    keys = list(dict.fromkeys(key for found in rows for key in found))
    shown = keys[:max_strips]
    data = {key: {str(i): found[key]["scores"] for i, found in enumerate(rows) if key in found} for key in shown}
    sorts = [
        f'<option value="{index}|{escape(name)}">{escape(run.label)}: {escape(name)}</option>'
        for index, run in enumerate(runs)
        for name in score_names(run.scores)
    ]
    kinds = sorted({found[key]["type"] for found in rows for key in shown if key in found})
    options = "".join(f'<option value="{escape(kind)}">{escape(kind or "(none)")}</option>' for kind in kinds)
    cases = "".join(_case(runs, rows, key, place) for place, key in enumerate(shown))
    note = f' <span class="quiet">(the first {len(shown)} of {len(keys)})</span>' if len(shown) < len(keys) else ""
    return (
        f'<h2>Cases{note}</h2><div class="controls"><label>sort by <select id="by"><option value="">order</option>'
        f'{"".join(sorts)}</select></label><label><select id="order"><option value="up">lowest first</option>'
        f'<option value="down">highest first</option></select></label><label>type <select id="kind">'
        f'<option value="">all</option>{options}</select></label><span id="count" class="quiet"></span></div>'
        f'<div id="cases">{cases}</div><script>const DATA={_json(data)};{SCRIPT}</script>'
    )


def _json(data: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _case(runs: Sequence[Run], rows: Sequence[dict[str, Any]], key: str, place: int) -> str:
    row = next(found[key] for found in rows if key in found)
    folder = next(run.folder for run, found in zip(runs, rows) if key in found)
    figures = [_figure(folder / THUMBNAILS / f"{key}.source.webp", "source")]
    for index, (run, found) in enumerate(zip(runs, rows)):
        if key in found:
            scores = ", ".join(
                f"{name} {found[key]['scores'][name]:.3g}"
                for name in score_names(run.scores)
                if found[key]["scores"].get(name) is not None
            )
            label = f"{_key(index)} {escape(run.label)}<br>{escape(scores)}"
            figures.append(_figure(result_path(run.folder, key), label))
        else:
            figures.append(f"<figure><figcaption>{escape(run.label)}: no score</figcaption></figure>")
    figures.append(_figure(folder / THUMBNAILS / f"{key}.target.webp", "known answer"))
    text = f'<b>{escape(row["instruction"])}</b> <span class="quiet">{escape(row["type"])}, {escape(key)}</span>'
    return (
        f'<div class="case" data-key="{escape(key)}" data-kind="{escape(row["type"])}" data-place="{place}">'
        f"<p>{text}</p>{''.join(figures)}</div>"
    )


def _figure(path: Path, label: str) -> str:
    if not path.is_file():
        return ""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    image_tag = f'<img loading="lazy" alt="" src="data:image/webp;base64,{data}">'
    return f"<figure>{image_tag}<figcaption>{label}</figcaption></figure>"
