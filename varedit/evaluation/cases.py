"""What is evaluated: cases, benchmarks, and a folder or JSON lines of one's own.

A case is read when it is used: pictures are paths or functions until then.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from varedit.evaluation.checker import Answer

Picture = Path | np.ndarray | Callable[[], np.ndarray]
"""A file, uint8 (height, width, 3), or a function that returns such an array."""

Fit = Literal["resize", "bicubic", "corner"]
"""What happens to a result of the wrong size: Lanczos or bicubic (MagicBrush, GEdit-Bench) to the size it is compared
at, or the bottom right corner of a collage (PIE-Bench) and else as "resize"."""


@dataclass(frozen=True)
class Case:
    """One edit to be done and judged.

    Attributes:
        key: unique in the benchmark and usable as a file name.
        source: what is edited; for a later turn of a chain the recorded source, see `previous`.
        edit_type: the benchmark's own name of the kind of edit.
        target: the known answer, if there is one. mask: True (white) where pixels may change, if known.
        groups: further sets of cases that it belongs to and that get a row of their own beside the types.
        answers: all right answers, `target` with `mask` the first of them; only where they are exact.
        source_caption, target_caption: captions before and after; empty if unknown.
        previous: key of the case whose result is edited here (chained turns); None edits `source`.
        scored: False for turns that are only there to be followed.
        extra: what else the benchmark knows, as plain JSON values.
    """

    key: str
    instruction: str
    source: Picture
    edit_type: str = ""
    groups: tuple[str, ...] = ()
    target: Picture | None = None
    mask: Picture | None = None
    answers: Callable[[], list[Answer]] | None = None
    source_caption: str = ""
    target_caption: str = ""
    previous: str | None = None
    scored: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.instruction, str) or not self.instruction.strip():
            raise ValueError("no instruction")


@dataclass(frozen=True)
class Benchmark:
    """Cases with the way they are scored.

    Attributes:
        name: as in `varedit evaluate run --benchmark`.
        cases: in the order in which they are generated.
        metrics: names of the scores that the benchmark's reference reports, see `scores.METRICS`.
        settings: how the cases were read, and of a download its commit; part of the protocol.
        fit: what happens to results of the wrong size.
        mean_over: "cases", or "types" where the reference averages the means of its types (GEdit-Bench).
        problems: rows that could not be read: (key or row, reason).
        notes: what a reader wants to be known, such as how many rows were left out; not part of the protocol.
    """

    name: str
    cases: tuple[Case, ...]
    metrics: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    fit: Fit = "resize"
    mean_over: Literal["cases", "types"] = "cases"
    problems: tuple[tuple[str, str], ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for case in self.cases:
            key = case.key.casefold()  # of results' file names, and some file systems do not tell case apart
            if key in seen:
                raise ValueError(f"benchmark {self.name} has two cases {case.key!r}, in any case: make keys unique")
            seen.add(key)

    def first(self, limit: int | None) -> Benchmark:
        """The first `limit` cases and, where that cuts a chain of turns, the rest of it; None keeps all.

        Raises:
            ValueError: a limit below 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(f"limit is {limit}: use at least 1")
        kept = list(self.cases[:limit])
        keys = {case.key for case in kept}
        for case in self.cases[limit:]:
            if case.previous in keys:
                kept.append(case)
                keys.add(case.key)
        return replace(self, cases=tuple(kept))


def read_picture(picture: Picture) -> np.ndarray:
    """The pixels, uint8 (height, width, 3).

    Raises:
        ValueError: a file that is missing or no picture, by name.
    """
    if isinstance(picture, Path):
        from varedit.image_processor import load_image

        return np.asarray(load_image(picture).rgb)
    pixels = picture() if callable(picture) else picture
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"picture is {pixels.dtype} {pixels.shape}: use uint8 (height, width, 3)")
    return pixels


def read_mask(mask: Picture, size: tuple[int, int]) -> np.ndarray:
    """bool (height, width), True where pixels may change; a file is white there.

    Raises:
        ValueError: unreadable, or of another size than `size` (height, width).
    """
    pixels = mask_pixels(mask)
    if pixels.shape != size or pixels.dtype != bool:
        raise ValueError(f"mask is {pixels.dtype} {pixels.shape}, its picture {size}: they must have one size")
    return pixels


def mask_pixels(mask: Picture) -> np.ndarray:
    """The pixels of a mask as they are given; of a file, where it is white.

    Raises:
        ValueError: a file that is missing or no picture.
    """
    if isinstance(mask, Path):
        try:
            with Image.open(mask) as image:
                return np.asarray(image.convert("L")) > 127
        except OSError as error:
            raise ValueError(f"mask {mask} cannot be read: {error}") from error
    return mask() if callable(mask) else mask


def file_key(*parts: object) -> str:
    """A key usable as a file name, from anything printable; a digest keeps apart what only differs in other signs."""
    text = "_".join(str(part) for part in parts)
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80]
    return clean if clean == text else f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def picture_digest(pixels: np.ndarray) -> str:
    """Hash of the pixels and their shape."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


# ---- one's own

_OWN_FIELDS = ("source", "instruction", "target", "mask", "key", "type", "source_caption", "target_caption", "previous")


def own(path: Path) -> Benchmark:
    """A folder that `varedit data synth` or `write_folder` wrote, or a JSON lines file of one's own.

    A line of the file: {"source": "a.png", "instruction": "make it red"} and, if known, "target", "mask" (white where
    pixels may change), "type", "key", "source_caption", "target_caption", "previous" (key of the case whose result is
    edited). Paths are relative to the file.

    Raises:
        ValueError: no such file or no readable line.
    """
    if path.is_dir():
        return _records(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"benchmark {str(path)!r} cannot be read; use a known name, a folder or a .jsonl file ({error})"
        ) from error
    cases, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            cases.append(_own_case(json.loads(line), path.parent, number))
        except (ValueError, KeyError, TypeError) as error:
            problems.append((f"line {number}", f"{type(error).__name__}: {error}"))
    if not cases:
        raise ValueError(f"{path} has no usable line: {': '.join(problems[0]) if problems else 'it is empty'}")
    return Benchmark("own", tuple(cases), own_metrics(cases), problems=tuple(problems))


def _own_case(row: dict[str, Any], folder: Path, number: int) -> Case:
    if not isinstance(row, dict) or not row.get("source") or not row.get("instruction"):
        raise ValueError("a line needs source and instruction")
    unknown = set(row) - set(_OWN_FIELDS)
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}; use {', '.join(_OWN_FIELDS)}")
    return Case(
        key=file_key(row.get("key", f"{number:05d}")),
        instruction=str(row["instruction"]),
        source=folder / row["source"],
        edit_type=str(row.get("type", "")),
        target=folder / row["target"] if row.get("target") else None,
        mask=folder / row["mask"] if row.get("mask") else None,
        source_caption=str(row.get("source_caption", "")),
        target_caption=str(row.get("target_caption", "")),
        previous=file_key(row["previous"]) if row.get("previous") else None,
    )


def _records(folder: Path) -> Benchmark:
    from varedit.data.record import read_folder

    cases = [
        Case(
            key=f"{number:05d}",
            instruction=record.instruction,
            source=cast(Path, record.source),  # pictures of a folder stay paths
            edit_type=record.edit_type,
            target=cast(Path, record.target),
            mask=cast(Path | None, record.mask),
            source_caption=str(record.extra.get("source_caption", "")),
            target_caption=str(record.extra.get("target_caption", "")),
        )
        for number, record in enumerate(read_folder(folder))
    ]
    if not cases:
        raise ValueError(f"{folder} has no pairs")
    return Benchmark("own", tuple(cases), own_metrics(cases))


def own_metrics(cases: Iterable[Case]) -> tuple[str, ...]:
    """The scores that need no model and that every case has the pictures for."""
    cases = list(cases)
    metrics = ["l1_source"]
    if all(case.target is not None for case in cases):
        metrics += ["l1", "l2"]
    if all(case.mask is not None for case in cases):
        metrics += ["psnr", "mse", "stray"]
    return tuple(metrics)
