"""What lint found, as a JSON table and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from varedit.data.lint import CHECKS, Finding, LintReport, table

SHOWN = 50  # findings of each check on the page

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }}
tr {{ border-bottom: 1px solid #ddd; }} img {{ max-width: 160px; }} .n {{ text-align: right; }}
</style>
<h1>{title}</h1>
<p>{num_pairs} pairs, {num_flagged} with findings.</p>
<table><tr><th>check<th class="n">pairs<th>meaning</tr>
{counts}
</table>
{sections}
</html>
"""


def write_json(report: LintReport, source: str, path: Path) -> None:
    """Write the table: source, num_pairs, num_flagged, counts by check, and findings, one a line."""
    values = table(report, source)
    findings = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in values.pop("findings"))
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    _write(path, f'{head},\n "findings": [\n{findings}\n ]\n}}\n')


def read_flagged(path: Path) -> dict[int, tuple[str, str | None]]:
    """Origin and instruction of every pair with a finding, by position, from the table that `write_json` wrote.

    Raises:
        ValueError: Not such a table.
    """
    try:
        findings = json.loads(path.read_text("utf-8"))["findings"]
        return {int(found["position"]): (str(found["origin"]), found.get("instruction")) for found in findings}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no lint report ({error}): write one with varedit data lint --report") from error


def write_html(report: LintReport, source: str, path: Path) -> None:
    """Write the page: counts, and for each check the first findings with their pictures."""
    counts = "\n".join(
        f'<tr><td><a href="#{_anchor(check)}">{check}</a><td class="n">{count}<td>{CHECKS[check]}</tr>'
        for check, count in report.counts.items()
    )
    sections = "\n".join(_section(report, check) for check in report.counts)
    page = _PAGE.format(
        title=html.escape(f"varedit data lint {source}"),
        num_pairs=report.num_pairs,
        num_flagged=report.num_flagged,
        counts=counts,
        sections=sections,
    )
    _write(path, page)


def _section(report: LintReport, check: str) -> str:
    findings = [finding for finding in report.findings if finding.check == check]
    shown = sorted(findings, key=lambda finding: finding.position not in report.pictures)[:SHOWN]  # pictures first
    rows = "\n".join(_row(report, finding) for finding in shown)
    more = f"<p>and {len(findings) - len(shown)} more, in the JSON table</p>" if len(findings) > len(shown) else ""
    return (
        f'<h2 id="{_anchor(check)}">{check} ({len(findings)})</h2>\n'
        f"<table><tr><th>source<th>target<th>instruction<th>finding<th>origin</tr>\n{rows}\n</table>{more}"
    )


def _row(report: LintReport, finding: Finding) -> str:
    pictures = report.pictures.get(finding.position)
    images = "".join(f"<td>{_image(pixels)}" for pixels in pictures) if pictures else "<td>-<td>-"
    words = (html.escape(text) for text in (finding.instruction, finding.detail, finding.origin))
    return f"<tr>{images}" + "".join(f"<td>{text}" for text in words) + "</tr>"


def _image(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _anchor(check: str) -> str:
    return check.replace(" ", "-")


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)
