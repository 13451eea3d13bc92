"""Means with their intervals as pictures: one row a label, one dot a run, as SVG that takes the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

NUM_COLOURS = 6
"""Runs are drawn in the page's colours --run0 to --run5, and then from the first again."""

LEFT, RIGHT, TOP, BOTTOM = 146, 14, 8, 20  # margins in pixels
WIDTH = 360
GAP = 7  # between the dots of a row


def number(value: float) -> str:
    """Three or four digits: 0.512, 4.77, 24.3."""
    size = abs(value)
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size > 1 else f"{value:.3f}"


def spread(mean: dict[str, Any]) -> str:
    """The interval of a mean: 0.470–0.553; one case has none."""
    if mean["n"] == 1:
        return "one case"
    return f"{number(mean['low'])}–{number(mean['high'])}"


def axis(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and ticks that hold all values: round numbers, from 0 where that does not waste most of the width."""
    low, high = min(lows), max(highs)
    if 0 <= low < 0.6 * high or high <= 0:
        low = min(low, 0.0)
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if high else (0.0, 1.0)
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [index * step for index in range(first, last + 1)]


Means = Sequence[dict[str, Any] | None]
"""One a run; None where a run has none."""


def dots(parts: Sequence[Mapping[str, Means]], runs: Sequence[str]) -> str:
    """A plot of means by label, in parts that a line separates."""
    parts = [part for part in parts if part]
    known = [mean for part in parts for row in part.values() for mean in row if mean]
    if not known:
        return ""
    low, high, ticks = axis([mean["low"] for mean in known], [mean["high"] for mean in known])
    pitch = max(18, 8 + GAP * len(runs))
    bottom = TOP + pitch * sum(map(len, parts))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    shapes = []
    for tick in ticks:
        shapes.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        shapes.append(f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 13}">{tick:.4g}</text>')
    top = float(TOP)
    for part in parts:
        if top > TOP:
            shapes.append(f'<line class="grid" x1="0" x2="{WIDTH}" y1="{top:.1f}" y2="{top:.1f}"/>')
        for label, row in part.items():
            middle = top + pitch / 2
            shapes.append(f'<text class="label" x="{LEFT - 10}" y="{middle + 4:.1f}">{escape(_cut(label))}</text>')
            for index, mean in enumerate(row):
                if mean:
                    y = middle + GAP * (index - (len(row) - 1) / 2)
                    shapes.append(_dot(index, mean, x, y, f"{runs[index]}, {label}"))
            top += pitch
    height = bottom + BOTTOM
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">{"".join(shapes)}</svg>'


def strip(means: Means, runs: Sequence[str]) -> str:
    """One row of a plot without labels, for a cell of a table."""
    known = [mean for mean in means if mean]
    low, high, _ = axis([mean["low"] for mean in known], [mean["high"] for mean in known])
    width, pitch = 340, 9
    height = max(20, pitch * len(means) + 2)

    def x(value: float) -> float:
        return 40 + (width - 80) * (value - low) / (high - low)

    shapes = []
    for end, anchor, gap in ((low, "end", -6), (high, "start", 6)):
        shapes.append(f'<line class="grid" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="0" y2="{height}"/>')
        place = f'x="{x(end) + gap:.1f}" y="{height / 2 + 4:.1f}" style="text-anchor:{anchor}"'
        shapes.append(f"<text {place}>{end:.4g}</text>")
    for index, mean in enumerate(means):
        if mean:
            y = height / 2 + pitch * (index - (len(means) - 1) / 2)
            shapes.append(_dot(index, mean, x, y, runs[index]))
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(shapes)}</svg>'


def _dot(index: int, mean: dict[str, Any], x: Any, y: float, label: str) -> str:
    colour = f"var(--run{index % NUM_COLOURS})"
    title = f"{label}: {number(mean['mean'])} ({spread(mean)}), {mean['n']} cases"
    return (
        f'<g style="stroke:{colour};fill:{colour}"><title>{escape(title)}</title>'
        f'<line class="whisker" x1="{x(mean["low"]):.1f}" x2="{x(mean["high"]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle cx="{x(mean["mean"]):.1f}" cy="{y:.1f}" r="3.2"/></g>'
    )


def _cut(label: str) -> str:
    return label if len(label) <= 23 else label[:22] + "…"
