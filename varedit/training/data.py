"""What each step trains on: a function of (seed, step) alone, so that a resume skips and repeats nothing and the number
of processes does not matter.

A step has one bucket, a size class and an aspect template: all processes then compute sequences of one length.
"""

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varedit.data.features import picture_input
from varedit.data.synthetic import World
from varedit.image_processor import Prepared, prepare
from varedit.image_reader import load_image
from varedit.scales import ScaleSchedule, nearest_schedule, scale_schedule
from varedit.training.config import DataConfig
from varedit.training.pair_index import read_entry, read_entry_features

logger = logging.getLogger(__name__)

_TRIES = 20


def stream_seed(*parts: object) -> int:
    """A seed below 2**63 from anything: independent streams for each purpose, step and sample."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class StoredFeatures:
    """What the frozen models make of a pair, out of its shard; all float32.

    Attributes:
        source_dhw, target_dhw: of the image tokenizer, on its own grid.
        text_TF: states of each phrasing.
    """

    source_dhw: Tensor
    target_dhw: Tensor
    text_TF: tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """One prepared pair.

    Attributes:
        source_3HW, target_3HW: float32 in [-1, 1].
        mask_HW: bool, True where the edit may change pixels; None where nobody says.
        features: where they are stored and used.
    """

    source_3HW: Tensor
    target_3HW: Tensor
    instructions: tuple[str, ...]
    mask_HW: Tensor | None = None
    features: StoredFeatures | None = None


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
        mask_BHW: change masks, bool, all True for a pair without one.
        features: of each pair where they are stored, else empty: the frozen models need not run.
    """

    step: int
    schedule: ScaleSchedule
    positions: list[int]
    source_B3HW: Tensor
    target_B3HW: Tensor
    instructions: list[tuple[str, ...]]
    skipped: list[str] = field(default_factory=list)
    error: str = ""
    mask_BHW: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    features: list[StoredFeatures] = field(default_factory=list)


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

    def world(self, schedule: ScaleSchedule) -> World:
        """The world of one bucket, opened when it is first asked for. Raises ValueError: a folder cannot be used."""
        if schedule not in self._worlds:
            folders = [Path(folder) if folder else None for folder in (self.config.objects, self.config.photos)]
            self._worlds[schedule] = World(*folders, self.split, schedule.size, schedule.height_over_width)
        return self._worlds[schedule]

    def load(self, schedule: ScaleSchedule, number: int) -> Example:
        pair = self.world(schedule).pair(self.seed, number)
        images = (torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in (pair.source, pair.target))
        return Example(*images, pair.instructions, torch.from_numpy(pair.mask))

    def neighbour(self, schedule: ScaleSchedule, number: int) -> int:
        return number + 1_000_000_007


class IndexedPairs:
    """Pairs on disk, shuffled anew every time a bucket has been gone through.

    Args:
        entries: of `pair_index.scan`, all of one folder.
        use_features: read the features stored beside the pairs.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[dict[str, Any]],
        config: DataConfig,
        seed: int,
        use_features: bool = False,
    ) -> None:
        self.folder, self.entries, self.config, self.seed = folder, list(entries), config, seed
        self.use_features = use_features
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
        images = [load_image(picture_input(picture)) for picture in (record.source, record.target)]
        if (images[0].width, images[0].height) != (images[1].width, images[1].height):
            raise ValueError("source and target differ in size")
        prepared = [prepare(image.rgb, schedule.size, self.config.fit) for image in images]
        if prepared[0].schedule != schedule:
            raise ValueError("the picture has changed since the folder was scanned")
        return Example(
            *(item.image_B3HW[0] for item in prepared),
            record.instructions,
            _fit_mask(record.mask_array(), prepared[0]),
            self._features(schedule, number) if self.use_features else None,
        )

    def _features(self, schedule: ScaleSchedule, number: int) -> StoredFeatures:
        entry = self.entries[number]
        stored = read_entry_features(self.folder, entry)
        text = tuple(stored[f"text.{index}"] for index in range(len(entry["instructions"])))
        return StoredFeatures(stored[f"source.{schedule.size}"], stored[f"target.{schedule.size}"], text)

    def neighbour(self, schedule: ScaleSchedule, number: int) -> int:
        members = self.members[schedule]
        return members[(members.index(number) + 1) % len(members)]


def _fit_mask(mask_HW: np.ndarray | None, prepared: Prepared) -> Tensor | None:
    """A mask of the source's size through the same fit as the source: bool, True where it touches a model pixel.

    What the fit made up around the picture follows the mask as it follows the picture; beside a square fit it is False.
    """
    if mask_HW is None:
        return None
    if mask_HW.shape != (prepared.source.height, prepared.source.width):
        raise ValueError("mask and source differ in size")
    left, top, right, bottom = (round(edge) for edge in prepared.content_box)
    size = max(right - left, 1), max(bottom - top, 1)
    covered = np.asarray(Image.fromarray(mask_HW.astype(np.float32)).resize(size, Image.Resampling.BOX)) > 0
    height, width = prepared.schedule.image_hw
    around = (top, height - top - size[1]), (left, width - left - size[0])
    return torch.from_numpy(np.pad(covered, around, mode="symmetric" if prepared.fit == "native" else "constant"))


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
    everywhere = torch.ones(schedule.image_hw, dtype=torch.bool)
    masks_BHW = torch.stack([everywhere if e.mask_HW is None else e.mask_HW for e in examples])
    features = [e.features for e in examples if e.features is not None]
    instructions = [e.instructions for e in examples]
    return MicroBatch(step, schedule, positions, *images, instructions, skipped, mask_BHW=masks_BHW, features=features)


class HeldOut:
    """Held-out pairs in micro-batches, the same at every validation.

    Args:
        pairs: of the test split, or of entries that are not trained on.
        count: how many of the world's pairs; all of a folder's are taken, once for each size.
    """

    def __init__(self, pairs: Pairs, count: int, micro_batch_size: int, seed: int) -> None:
        self.pairs = pairs
        if isinstance(pairs, WorldPairs):  # each drawn by itself: the same pairs whatever the micro-batch
            plan, members = Plan(pairs, count, 1, seed), defaultdict(list)
            for index in range(count):
                members[plan.schedule(index)] += plan.numbers(index, [0])
        else:
            members = pairs.members
        self._parts = [
            (schedule, numbers[first : first + micro_batch_size])
            for schedule, numbers in sorted_buckets(members)
            for first in range(0, len(numbers), micro_batch_size)
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


def choose_phrasings(batch: MicroBatch, seed: int) -> list[int]:
    """Number of one phrasing of each pair, a function of (seed, step, position)."""
    return [
        random.Random(stream_seed("phrasing", seed, batch.step, position)).choice(range(len(texts)))
        for position, texts in zip(batch.positions, batch.instructions)
    ]
