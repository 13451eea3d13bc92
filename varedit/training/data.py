"""What each step trains on: a function of (seed, step) alone, so that a resume skips and repeats nothing and the number
of processes does not matter.

A step has one bucket, a size class and an aspect template: all processes then compute sequences of one length.
"""

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varedit.data.synthetic import World
from varedit.image_processor import load_image, prepare
from varedit.scales import ScaleSchedule, nearest_schedule, scale_schedule
from varedit.training.config import DataConfig
from varedit.training.pair_index import read_entry

logger = logging.getLogger(__name__)

_TRIES = 20


def stream_seed(*parts: object) -> int:
    """A seed below 2**63 from anything: independent streams for each purpose, step and sample."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Example:
    """One prepared pair: images float32 (3, H, W) in [-1, 1]."""

    source_3HW: Tensor
    target_3HW: Tensor
    instructions: tuple[str, ...]


@dataclass
class MicroBatch:
    """What one process computes in one pass.

    Attributes:
        step: the step it belongs to; schedule: of all its pairs.
        positions: number of each pair in its step's batch; with seed and step it gives the pair's random numbers.
        source_B3HW, target_B3HW: float32 in [-1, 1].
        instructions: the phrasings of each pair.
        skipped: pairs that could not be used and were replaced, by name.
        error: why there are no pairs at all; everything else is then empty.
    """

    step: int
    schedule: ScaleSchedule
    positions: list[int]
    source_B3HW: Tensor
    target_B3HW: Tensor
    instructions: list[tuple[str, ...]]
    skipped: list[str] = field(default_factory=list)
    error: str = ""


class WorldPairs:
    """The procedural world: endless, pair number n of a seed is always the same."""

    def __init__(self, config: DataConfig, seed: int, split: Literal["train", "test"]) -> None:
        self.config, self.seed, self.split = config, seed, split
        ratios = {1.0: 1.0} if config.fit == "square" else config.aspects
        self.weights = {
            scale_schedule(size, ratio): share * part
            for size, share in config.sizes.items()
            for ratio, part in ratios.items()
        }
        self._worlds: dict[ScaleSchedule, World] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worlds": {}}  # a worker opens its own

    def number(self, schedule: ScaleSchedule, visit: int, place: int, batch_size: int) -> int:
        """Number of the pair at `place` in the bucket's batch number `visit`."""
        return visit * batch_size + place

    def load(self, schedule: ScaleSchedule, number: int) -> Example:
        if schedule not in self._worlds:
            folders = [Path(folder) if folder else None for folder in (self.config.objects, self.config.photos)]
            self._worlds[schedule] = World(*folders, self.split, schedule.size, schedule.height_over_width)
        pair = self._worlds[schedule].pair(self.seed, number)
        images = (torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in (pair.source, pair.target))
        return Example(*images, pair.instructions)

    def neighbour(self, schedule: ScaleSchedule, number: int) -> int:
        return number + 1_000_000_007


class IndexedPairs:
    """Pairs on disk, shuffled anew every time a bucket has been gone through.

    Args:
        entries: of `pair_index.scan`, all of one folder.
    """

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]], config: DataConfig, seed: int) -> None:
        self.folder, self.entries, self.config, self.seed = folder, list(entries), config, seed
        self.members: dict[ScaleSchedule, list[int]] = {}
        for size in config.sizes:
            for index, entry in enumerate(self.entries):
                schedule = scale_schedule(size) if config.fit == "square" else nearest_schedule(size, *entry["hw"])
                self.members.setdefault(schedule, []).append(index)
        self.weights = {s: config.sizes[s.size] * len(indices) for s, indices in sorted_buckets(self.members)}

    def number(self, schedule: ScaleSchedule, visit: int, place: int, batch_size: int) -> int:
        members = self.members[schedule]
        turn, index = divmod(visit * batch_size + place, len(members))
        return members[_permutation(len(members), (self.seed, str(schedule), turn))[index]]

    def load(self, schedule: ScaleSchedule, number: int) -> Example:
        record = read_entry(self.folder, self.entries[number])
        # Only Pillow's own errors are turned into words by load_image; what it gets must be a path or bytes.
        images = [load_image(p if isinstance(p, Path) else p.getvalue()) for p in (record.source, record.target)]
        if (images[0].width, images[0].height) != (images[1].width, images[1].height):
            raise ValueError("source and target differ in size")
        prepared = [prepare(image.rgb, schedule.size, self.config.fit) for image in images]
        if prepared[0].schedule != schedule:
            raise ValueError("the picture has changed since the folder was scanned")
        return Example(*(item.image_B3HW[0] for item in prepared), record.instructions)

    def neighbour(self, schedule: ScaleSchedule, number: int) -> int:
        members = self.members[schedule]
        return members[(members.index(number) + 1) % len(members)]


Pairs = WorldPairs | IndexedPairs


def sorted_buckets(buckets: dict[ScaleSchedule, Any]) -> list[tuple[ScaleSchedule, Any]]:
    """In an order that does not depend on how they were found."""
    return sorted(buckets.items(), key=lambda item: (item[0].size, item[0].height_over_width))


@lru_cache(maxsize=64)
def _permutation(count: int, key: tuple) -> np.ndarray:
    return np.random.default_rng(stream_seed("order", *key)).permutation(count)


class Plan:
    """Which bucket each step has, and how often the bucket has come before: drawn once for all steps."""

    def __init__(self, pairs: Pairs, steps: int, batch_size: int, seed: int) -> None:
        self.pairs, self.batch_size = pairs, batch_size
        buckets = sorted_buckets(pairs.weights)
        self.schedules = [schedule for schedule, _ in buckets]
        edges = np.cumsum([weight for _, weight in buckets])
        # A stream of numbers has the same beginning however many are drawn: more steps change no earlier one.
        numbers = np.random.default_rng(stream_seed("buckets", seed)).random(steps)
        self._bucket = np.minimum(np.searchsorted(edges / edges[-1], numbers, side="right"), len(buckets) - 1)
        self._visit = np.zeros(steps, np.int64)
        for index in range(len(buckets)):
            found = self._bucket == index
            self._visit[found] = np.arange(found.sum())

    def schedule(self, step: int) -> ScaleSchedule:
        return self.schedules[self._bucket[step]]

    def numbers(self, step: int, positions: Sequence[int]) -> list[int]:
        """Numbers of the pairs at these positions of the step's batch."""
        visit, schedule = int(self._visit[step]), self.schedule(step)
        if isinstance(self.pairs, WorldPairs):  # no pair twice, in whatever shape
            visit = step
        return [self.pairs.number(schedule, visit, position, self.batch_size) for position in positions]


class MicroBatches(Dataset):
    """Micro-batch number n of the whole run: step n // (micro-batches a step), part n % (micro-batches a step)."""

    def __init__(self, plan: Plan, micro_batch_size: int) -> None:
        self.plan, self.micro_batch_size = plan, micro_batch_size
        self.parts = plan.batch_size // micro_batch_size

    def __getitem__(self, number: int) -> MicroBatch:
        step, part = divmod(number, self.parts)
        schedule = self.plan.schedule(step)
        positions = list(range(part * self.micro_batch_size, (part + 1) * self.micro_batch_size))
        return load_batch(self.plan.pairs, schedule, self.plan.numbers(step, positions), step, positions)


def load_batch(pairs: Pairs, schedule: ScaleSchedule, numbers: list[int], step: int, positions: list[int]):
    """Load pairs; each that cannot be used is replaced by its neighbour, always the same one."""
    examples, skipped = [], []
    for number in numbers:
        for _ in range(_TRIES):
            try:
                examples.append(pairs.load(schedule, number))
                break
            except (ValueError, OSError) as error:
                name = pairs.entries[number]["origin"] if isinstance(pairs, IndexedPairs) else f"pair {number}"
                skipped.append(f"{name}: {' '.join(str(error).split())}")
                number = pairs.neighbour(schedule, number)
        else:
            error_text = f"{_TRIES} pairs in a row cannot be used, the last being {skipped[-1]}; repair the data"
            return MicroBatch(step, schedule, [], torch.empty(0), torch.empty(0), [], skipped, error_text)
    images = (torch.stack([getattr(e, name) for e in examples]) for name in ("source_3HW", "target_3HW"))
    return MicroBatch(step, schedule, positions, *images, [e.instructions for e in examples], skipped)


class HeldOut:
    """Held-out pairs in micro-batches, the same at every validation.

    Args:
        pairs: of the test split, or of entries that are not trained on.
        count: how many of the world's pairs; all of a folder's are taken, once for each size.
    """

    def __init__(self, pairs: Pairs, count: int, micro_batch_size: int, seed: int) -> None:
        self.pairs = pairs
        if isinstance(pairs, WorldPairs):
            size = min(micro_batch_size, count)
            plan = Plan(pairs, -(-count // size), size, seed)
            self._parts = [(plan.schedule(i), plan.numbers(i, range(size))) for i in range(-(-count // size))]
        else:
            self._parts = [
                (schedule, members[first : first + micro_batch_size])
                for schedule, members in sorted_buckets(pairs.members)
                for first in range(0, len(members), micro_batch_size)
            ]

    def __len__(self) -> int:
        return len(self._parts)

    def batch(self, index: int) -> MicroBatch:
        """Raises ValueError if there are no usable pairs."""
        schedule, numbers = self._parts[index]
        batch = load_batch(self.pairs, schedule, numbers, index, list(range(len(numbers))))
        if batch.error:
            raise ValueError(batch.error)
        return batch


class _Numbers:
    """The micro-batches of one process from `first_step` on, in order."""

    def __init__(self, first_step: int, steps: int, parts: int, rank: int, num_processes: int) -> None:
        self.steps, self.parts = range(first_step, steps), range(rank, parts, num_processes)
        self.num_parts = parts

    def __iter__(self) -> Iterator[int]:
        return (step * self.num_parts + part for step in self.steps for part in self.parts)

    def __len__(self) -> int:
        return len(self.steps) * len(self.parts)


def batches(
    plan: Plan, micro_batch_size: int, first_step: int, steps: int, process: tuple[int, int], num_workers: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one process (its rank, how many there are) from `first_step` on, read ahead by workers.

    Raises:
        ValueError: while iterating, no usable pairs.
    """
    dataset = MicroBatches(plan, micro_batch_size)
    numbers = _Numbers(first_step, steps, dataset.parts, *process)
    loader = DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=num_workers,  # type: ignore[arg-type]
        worker_init_fn=_one_thread, prefetch_factor=4 if num_workers else None,
    )  # fmt: skip
    for batch in loader:
        if batch.error:
            raise ValueError(batch.error)
        yield batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def choose_instructions(batch: MicroBatch, seed: int) -> list[str]:
    """One phrasing of each pair, a function of (seed, step, position)."""
    return [
        random.Random(stream_seed("phrasing", seed, batch.step, position)).choice(texts)
        for position, texts in zip(batch.positions, batch.instructions)
    ]
