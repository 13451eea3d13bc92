"""The procedural benchmark: held-out scenes, objects and phrasings with exact answers."""

from __future__ import annotations

import threading
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from varedit.data.synthetic import Pair
from varedit.evaluation.cases import Benchmark, Case
from varedit.evaluation.checker import Answer
from varedit.evaluation.held_out import HeldOut

SEED = 2024
NUM_CASES = 300

NOVELTY = {
    "object": "new: objects",
    "combination": "new: colour and shape",
    "composition": "new: compositions",
}
"""Held-out part of a pair -> the group of cases it belongs to."""


class _Reader:
    """Pairs of the test split of the procedural world, drawn again whenever they are read (30 ms each)."""

    def __init__(self, data: Path | None, size: int, seed: int) -> None:
        objects, photos = (
            data / name if data is not None and (data / name).is_dir() else None for name in ("objects", "photos")
        )
        if data is not None and objects is None and photos is None:
            raise ValueError(
                f"data folder {data} has neither objects/ nor photos/; leave --data out to draw everything"
            )
        self.settings = {"objects": objects is not None, "photos": photos is not None, "size": size, "seed": seed}
        self.held_out = HeldOut(objects, photos, size, seed=seed)
        self._lock = threading.Lock()  # a world keeps what it drew: one thread at a time

    def pair(self, index: int) -> Pair:
        with self._lock:
            return self.held_out.pair(index)

    def picture(self, index: int, role: str) -> np.ndarray:
        return getattr(self.pair(index), role)

    def answers(self, index: int) -> list[Answer]:
        pair = self.pair(index)
        with self._lock:
            return self.held_out.answers(pair)


def procedural(
    data: Path | None = None, size: int = 128, limit: int | None = None, seed: str | int = SEED
) -> Benchmark:
    """The procedural benchmark.

    Args:
        data: folder with objects/ (cut-outs) and photos/; None draws everything.
        size: size class of the pictures.
        limit: number of cases; None takes `NUM_CASES`.
        seed: of the cases. Tune on another than the one you report.

    Cases whose change vanishes under the checker's filter are passed over; their number is in the notes.

    Raises:
        ValueError: a folder without objects and photos, an unknown size, a limit below 1, a seed that is no number.
    """
    wanted = NUM_CASES if limit is None else limit
    if wanted < 1:
        raise ValueError(f"limit is {wanted}: use at least 1")
    try:
        number = int(seed)
    except ValueError as error:
        raise ValueError(f"reader option seed is {seed!r}: use a whole number") from error
    reader = _Reader(data, size, number)
    cases, last = [], 0
    for last in islice(reader.held_out.judgeable(), wanted):
        cases.append(_case(reader, last))
    metrics = ("success", "closer", "half", "completeness", "outside_psnr", "preservation", "stray", "balance")
    notes = {"not_visible": last + 1 - wanted}
    return Benchmark("procedural", tuple(cases), metrics, reader.settings, notes=notes)


def _case(reader: _Reader, index: int) -> Case:
    pair = reader.pair(index)
    source, target, mask = (partial(reader.picture, index, role) for role in ("source", "target", "mask"))
    return Case(
        key=f"{index:05d}",
        instruction=pair.instruction,
        source=source,
        edit_type=pair.edit_type,
        groups=_groups(pair),
        target=target,
        mask=mask,
        answers=partial(reader.answers, index),
        source_caption=pair.source_caption,
        target_caption=pair.target_caption,
        extra={"edit": pair.target_scene["edit"], "held_out": list(pair.held_out)},
    )


def _groups(pair: Pair) -> tuple[str, ...]:
    """What is new to an editor that was trained on the world's train split, what the scene stands on, and whether an
    added object's place is named.
    """
    new = [name for part, name in NOVELTY.items() if part in pair.held_out]
    if not new:
        new = ["new: phrasings only" if "phrasing" in pair.held_out else "new: nothing"]
    scene = "scene: photograph" if pair.scene["background"]["kind"] == "photo" else "scene: drawn"
    if pair.edit_type != "add":
        return (*new, scene)
    return (*new, scene, "add: place named" if pair.target_scene["edit"][0]["place_named"] else "add: no place named")
