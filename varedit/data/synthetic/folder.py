"""The procedural world on disk: what `varedit data synth` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from varedit.data.record import Record, write_folder
from varedit.data.synthetic.world import Pair, World


def to_record(pair: Pair, origin: str, licence: str = "") -> Record:
    """A pair of the world as a record, with captions, scene graphs and held-out parts as extras."""
    extra = {
        "source_caption": pair.source_caption,
        "target_caption": pair.target_caption,
        "scene": pair.scene,
        "target_scene": pair.target_scene,
        "held_out": list(pair.held_out),
    }
    return Record(pair.source, pair.target, pair.instructions, pair.mask, pair.edit_type, origin, licence, extra)


def write_world(
    output: Path,
    count: int,
    *,
    size: int = 256,
    seed: int = 0,
    objects: Path | None = None,
    photos: Path | None = None,
    split: Literal["train", "test"] = "train",
    on_pair: Callable[[int], None] | None = None,
) -> int:
    """Write `count` pairs of the procedural world to a folder (`pairs.jsonl` and pictures).

    Args:
        output: Folder, made if absent; must hold no `pairs.jsonl` yet.
        count: Number of pairs, indices 0 to count - 1 of the stream `seed`.
        size: Side of the square pictures. objects, photos, split: As in `World`.
        on_pair: Called with the number of pairs done, for a progress bar.

    Returns:
        The number of pairs written.

    Raises:
        ValueError: A count below 1, or what `World` and `write_folder` refuse.
    """
    if count < 1:
        raise ValueError(f"count is {count}: use at least 1")
    world = World(objects=objects, photos=photos, split=split, size=size)

    def records() -> Iterator[Record]:
        for index in range(count):
            pair = world.pair(seed, index)
            # What is only drawn is free; photographs and cut-outs keep their licences.
            licence = "; ".join(world.licences(pair)) or "CC0 1.0"
            yield to_record(pair, f"varedit synthetic {split} seed {seed} index {index}", licence)
            if on_pair is not None:
                on_pair(index + 1)

    return write_folder(records(), output)
