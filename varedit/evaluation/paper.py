"""The paper's Table 1 (arXiv 2508.15772v2), and one's own runs in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = (
    "EMU CLIP-Out", "EMU CLIP-Dir", "EMU Suc", "EMU Over", "EMU Bal",
    "PIE Whole", "PIE Edit", "PIE Suc", "PIE Over", "PIE Bal", "time",
)  # fmt: skip

TABLE: tuple[tuple[str, str, tuple[float | None, ...]], ...] = (
    ("InstructPix2Pix", "1.1B", (0.268, 0.083, 3.358, 6.299, 2.923, 0.236, 0.217, 4.794, 6.534, 4.034, 3.5)),
    ("UltraEdit", "7.7B", (0.278, 0.095, 4.881, 7.704, 4.541, 0.247, 0.220, 5.831, 8.350, 5.580, 2.6)),
    ("OmniGen", "3.8B", (0.274, 0.082, 4.738, 8.709, 4.666, 0.240, 0.212, 3.459, 8.939, 3.498, 16.5)),
    ("AnySD", "2.9B", (0.268, 0.059, 3.098, 8.590, 3.129, 0.227, 0.206, 3.456, 7.806, 3.326, 3.4)),
    ("EditAR", "0.8B", (0.273, 0.064, 3.582, 7.260, 3.305, 0.242, 0.216, 5.070, 8.116, 4.707, 45.5)),
    ("ACE++", "17B", (0.258, 0.058, 2.375, 5.979, 2.076, 0.234, 0.205, 2.743, 8.093, 2.574, 5.7)),
    ("ICEdit", "17B", (0.271, 0.095, 5.027, 7.591, 4.785, 0.234, 0.215, 5.321, 7.593, 4.933, 8.4)),
    ("VAREdit 256 px", "2.2B", (0.268, 0.091, 6.072, 7.058, 5.565, 0.256, 0.224, 7.234, 7.804, 6.684, 0.5)),
    ("VAREdit 512 px", "2.2B", (0.271, 0.099, 6.210, 7.055, 5.662, 0.260, 0.225, 7.530, 8.083, 6.996, 0.7)),
    ("VAREdit 512 px", "8.4B", (0.282, 0.125, 8.284, 8.461, 7.892, 0.266, 0.233, 8.621, 8.536, 8.105, 1.2)),
    ("Step1X-Edit", "21B", (0.280, 0.126, 7.799, 7.843, 7.081, 0.254, 0.226, 7.919, 8.069, 7.351, 12.8)),
    ("FLUX.1 Kontext dev", "12B", (0.284, 0.125, 7.419, 8.800, 7.210, 0.256, 0.225, 7.236, 8.923, 6.998, 28.5)),
    ("Qwen-Image-Edit", "20B", (0.286, 0.133, 9.113, 8.598, 8.550, 0.263, 0.232, 9.111, 8.789, 8.567, 66.4)),
    ("GPT-4o-Image", "n/a", (0.286, 0.117, 9.517, 9.048, 9.142, 0.266, 0.237, 9.440, 8.866, 8.902, None)),
)
"""Method, parameters, values in the order of `COLUMNS`; time is seconds an edit, on an A800 by the table's head."""

OWN = {
    "emu-edit": ("clip_out", "clip_dir", "judge_success", "judge_overedit", "judge_balance"),
    "pie-bench": ("clip_whole", "clip_edit", "judge_success", "judge_overedit", "judge_balance"),
}
"""Benchmark -> the scores of a run that stand in the table's columns."""


def own_row(scores: dict[str, Any]) -> tuple[float | None, ...]:
    """The columns that a run on EMU-Edit or PIE-Bench fills; all others None.

    Raises:
        ValueError: a run on another benchmark.
    """
    benchmark = scores["protocol"]["benchmark"]
    if benchmark not in OWN:
        raise ValueError(f"the table has no column for a run on {benchmark!r}; it has EMU-Edit and PIE-Bench")
    values = [scores["overall"].get(name, {}).get("mean") for name in OWN[benchmark]]
    empty = [None] * len(values)
    return tuple([*values, *empty] if benchmark == "emu-edit" else [*empty, *values]) + (None,)


def standing(values: tuple[float | None, ...]) -> tuple[int | None, ...]:
    """The place that each value would have among the paper's methods, from 1; None where there is none."""
    columns = list(zip(*(row for _, _, row in TABLE)))
    return tuple(
        None if value is None else 1 + sum(other is not None and other > value for other in column)
        for value, column in zip(values, columns)
    )


def table(folders: list[Path]) -> Any:
    """A rich table: the paper's rows, then one for each folder of results, with the place it would have.

    Raises:
        ValueError: a folder without scores, or of another benchmark.
    """
    from rich.table import Table

    from varedit.evaluation.report import load_runs

    own = [(run.label, own_row(run.scores)) for run in load_runs(folders, allow_different=True)] if folders else []
    places = f" Own runs: their place among the {len(TABLE)} methods and themselves." if own else ""
    shown = Table(
        title="VAREdit, Table 1 (arXiv 2508.15772v2)",
        caption="Only VAREdit-2B was trained on public pairs alone. Judge: GPT-4o, snapshot not stated. Own runs "
        f"compare only if their judge and CLIP are the paper's.{places}",
    )
    shown.add_column("method", no_wrap=True)
    shown.add_column("size")
    for name in COLUMNS:
        shown.add_column(name, justify="right")
    for method, size, values in TABLE:
        shown.add_row(method, size, *map(_cell, values, COLUMNS), end_section=method == TABLE[-1][0])
    for label, values in own:
        cells = [_cell(value, name) for value, name in zip(values, COLUMNS)]
        placed = [
            cell if place is None else f"{cell}\n{_ordinal(place)}" for cell, place in zip(cells, standing(values))
        ]
        shown.add_row(label, "-", *placed, style="bold")
    return shown


def _cell(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}s" if column == "time" else f"{value:.3f}"


def _ordinal(place: int) -> str:
    ending = "th" if 10 < place % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"
