"""The results of ablation_tiny.py as tables and a plot, written into docs/ablation.md."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varedit.durable import write_durably
from varedit.image_writer import encode_image

REFERENCES = ("sar-1", "fixed_offset")
"""What the other variants of the same templates are compared with."""

METRICS = {
    "loss": ("held-out loss", 1, 4), "closer": ("closer, %", 100, 1), "half": ("half, %", 100, 1),
    "success": ("success, %", 100, 1), "balance": ("balance", 1, 2), "outside": ("outside PSNR, dB", 1, 2),
    "stray": ("stray, %", 100, 2),
}  # fmt: skip
"""Key of a row -> title, factor, digits."""

NUM_RESAMPLES = 2000
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Variant:
    """All seeds of one variant: values[metric] is float (seeds, cases), NaN where a case has no such value."""

    name: str
    runs: list[dict]
    values: dict[str, np.ndarray]


def load(paths: Sequence[Path]) -> list[Variant]:
    """Result files by variant, in the order given.

    Raises:
        ValueError: two variants of the same templates were not trained and judged alike.
    """
    runs: dict[str, list[dict]] = {}
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(found["variant"], []).append(found)
    variants = []
    for name, of_variant in runs.items():
        cases = [[row["case"] for row in run["rows"]] for run in of_variant]
        assert all(one == cases[0] for one in cases), f"{name}: its seeds were judged on different cases"
        values = {
            metric: np.array([[np.nan if row[metric] is None else row[metric] for row in run["rows"]]
                              for run in of_variant], float)
            for metric in METRICS
        }  # fmt: skip
        variants.append(Variant(name, of_variant, values))
    for group in groups(variants):
        if len({(run["data"], run["seed"]) for one in group for run in one.runs}) > len(group[0].runs):
            names = ", ".join(one.name for one in group)
            raise ValueError(f"{names} were trained on different data or seeds; run them again with one --run folder")
    return variants


def groups(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Variants of the same templates."""
    found: dict[str, list[Variant]] = {}
    for one in variants:
        found.setdefault(str(one.runs[0]["settings"]["aspects"]), []).append(one)
    return list(found.values())


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of (seeds, cases) values: seeds and cases are both drawn again."""
    values = values[:, ~np.isnan(values).any(axis=0)]
    rng = np.random.default_rng(0)
    num_seeds, num_cases = values.shape
    means = []
    for _ in range(NUM_RESAMPLES):
        drawn = values[rng.integers(0, num_seeds, num_seeds)][:, rng.integers(0, num_cases, num_cases)]
        means.append(drawn.mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def cell(values: np.ndarray, metric: str, sign: bool = False) -> str:
    _, factor, digits = METRICS[metric]
    mean, low, high = (factor * number for number in interval(values))
    plus = "+" if sign else ""
    return f"{mean:{plus}.{digits}f} ({low:{plus}.{digits}f} to {high:{plus}.{digits}f})"


def table(variants: Sequence[Variant]) -> list[str]:
    """Means of one group of variants."""
    titles = [METRICS[metric][0] for metric in METRICS] + ["seconds a step", "seconds an edit"]
    lines = [f"| variant | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|"]
    for one in variants:
        cells = [cell(one.values[metric], metric) for metric in METRICS]
        # Of the seed that other work on the machine disturbed least.
        step = min(run["train"]["seconds_per_step"] for run in one.runs)
        edit = min(run["edit_seconds"] for run in one.runs)
        lines.append(f"| {one.name} | {' | '.join(cells)} | {step:.3f} | {edit:.3f} |")
    return lines


def differences(variants: Sequence[Variant]) -> list[str]:
    """Each variant less the reference, case by case with the same seed."""
    reference = next((one for one in variants if one.name in REFERENCES), variants[0])
    lines = [
        f"| less {reference.name} | {' | '.join(METRICS[metric][0] for metric in METRICS)} |",
        "| --- " * (len(METRICS) + 1) + "|",
    ]
    for one in variants:
        if one is not reference:
            cells = [cell(one.values[m] - reference.values[m], m, sign=True) for m in METRICS]
            lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def by_seed(variants: Sequence[Variant]) -> list[str]:
    """The seeds apart: with few of them, how far they lie from each other says more than an interval."""
    lines = ["| variant | " + " | ".join(METRICS[m][0] + " by seed" for m in ("loss", "half", "success")) + " |"]
    lines.append("| --- " * 4 + "|")
    for one in variants:
        cells = []
        for metric in ("loss", "half", "success"):
            _, factor, digits = METRICS[metric]
            cells.append(", ".join(f"{factor * mean:.{digits}f}" for mean in np.nanmean(one.values[metric], axis=1)))
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return lines


def write_report(paths: Sequence[Path], page: Path) -> None:
    """Put tables and plot between the markers of a page; the plot goes beside it into images/.

    Raises:
        ValueError: the page lacks its markers.
    """
    text = page.read_text(encoding="utf-8")
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"{page} lacks the markers {_BEGIN} and {_END}")
    variants = load(paths)
    lines = [_BEGIN, ""]
    for group in groups(variants):
        first = group[0].runs[0]
        settings = first["settings"]
        templates = ", ".join(f"{ratio:g}" for ratio in settings["aspects"])
        lines += [
            f"Templates (height over width) {templates}: {settings['steps']} steps of {settings['batch_size']} pairs, "
            f"{first['num_parameters'] / 1e6:.1f} M parameters, {len(group[0].runs)} seeds, {len(first['rows'])} "
            f"held-out cases, guidance {settings['guidance_scale']:g}, {first['num_threads']} threads.",
            "",
            *table(group),
            "",
            *differences(group),
            "",
            *by_seed(group),
            "",
        ]
    picture = page.parent / "images" / f"{page.stem}.png"
    picture.parent.mkdir(exist_ok=True)
    write_durably(picture, encode_image(plot(variants), "png"))
    lines += [f"![Means and intervals of every variant](images/{picture.name})", "", _END]
    new = re.sub(f"{_BEGIN}.*{_END}", lambda _: "\n".join(lines), text, flags=re.DOTALL)
    write_durably(page, new.encode())


_LEFT, _ROW, _PANEL, _GAP, _TOP = 130, 30, 210, 26, 44


def plot(variants: Sequence[Variant]) -> Image.Image:
    """A panel a metric, a row a variant: mean (dot), interval (line) and the seeds (ticks)."""
    metrics = ("loss", "half", "success", "balance", "outside")
    order = [one for group in groups(variants) for one in group]
    image = Image.new("RGB", (_LEFT + len(metrics) * (_PANEL + _GAP), _TOP + len(order) * _ROW + 34), "white")
    draw = ImageDraw.Draw(image)
    small, font = ImageFont.load_default(12), ImageFont.load_default(14)
    for row, one in enumerate(order):
        draw.text((12, _TOP + row * _ROW + 6), one.name, (30, 30, 30), font)
    for column, metric in enumerate(metrics):
        title, factor, digits = METRICS[metric]
        left = _LEFT + column * (_PANEL + _GAP)
        found = [[factor * number for number in interval(one.values[metric])] for one in order]
        seeds = [factor * np.nanmean(one.values[metric], axis=1) for one in order]
        low = min(*(value[1] for value in found), *(number.min() for number in seeds))
        high = max(*(value[2] for value in found), *(number.max() for number in seeds))
        span = max(high - low, 1e-9)

        def x(value: float, left: int = left, low: float = low, span: float = span) -> float:
            return left + 8 + (_PANEL - 16) * (value - low) / span

        draw.text((left, 14), title, (30, 30, 30), font)
        bottom = _TOP + len(order) * _ROW
        draw.rectangle((left, _TOP - 4, left + _PANEL, bottom), outline=(200, 200, 200))
        draw.text((left, bottom + 6), f"{low:.{digits}f}", (110, 110, 110), small)
        draw.text((left + _PANEL, bottom + 6), f"{high:.{digits}f}", (110, 110, 110), small, anchor="ra")
        for row, ((mean, first, last), ticks) in enumerate(zip(found, seeds)):
            y = _TOP + row * _ROW + _ROW // 2
            draw.line((x(first), y, x(last), y), (70, 110, 180), 3)
            for tick in ticks:
                draw.line((x(tick), y - 8, x(tick), y + 8), (150, 150, 150), 1)
            draw.ellipse((x(mean) - 5, y - 5, x(mean) + 5, y + 5), (20, 60, 140))
    return image
