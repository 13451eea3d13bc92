"""Held-out pairs of the procedural world, with all that the exact checker needs to judge an edit of one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from varedit.data.synthetic import Pair, World
from varedit.data.synthetic.scene import Item, Renderer
from varedit.evaluation.checker import Answer, Verdict, check_any, visible_change

STEP = 1 / 16
"""Distance of the places where an object may be added if none is named, as a share of the width and of the height."""


class HeldOut:
    """The test split of the world at one size and aspect template. Pairs are drawn again when they are asked for.

    Args:
        objects, photos: folders, as in `World`.
        size, height_over_width: of the pictures.
        seed: of the stream of pairs.

    Raises:
        ValueError: what `World` refuses.
    """

    def __init__(
        self,
        objects: Path | None = None,
        photos: Path | None = None,
        size: int = 128,
        height_over_width: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.world = World(objects, photos, "test", size, height_over_width)
        self.seed = seed
        self._renderer = Renderer(objects, None, "test", self.world.height, self.world.width)
        self._pair = lru_cache(maxsize=16)(self.world.pair)

    def pair(self, index: int) -> Pair:
        return self._pair(self.seed, index)

    def judgeable(self, first: int = 0) -> Iterator[int]:
        """Indices from `first` on of the pairs whose change survives the checker's filter; endless."""
        while True:
            pair = self.pair(first)
            if visible_change(pair.source, pair.target, self.regions(pair)):
                yield first
            first += 1

    def check(self, pair: Pair, result: np.ndarray) -> Verdict:
        """Judge a result, uint8 (H, W, 3) of the pair's size."""
        return check_any(pair.source, result, self.answers(pair))

    def answers(self, pair: Pair) -> list[Answer]:
        """All right answers, the pair's own first.

        Where an object is to be added and no place is named, it may stand wherever it fits: on a grid of `STEP`.
        """
        found = [Answer(pair.target, pair.mask, self.regions(pair))]
        if pair.edit_type != "add" or pair.target_scene["edit"][0]["place_named"]:
            return found
        before, (*_, new) = objects_of(pair)
        shares = np.arange(STEP, 1, STEP).tolist()
        for x, y in product(shares, shares):
            item = replace(new, x=x, y=y)
            if item == new or not self._renderer.fits(item, before, pair.source):
                continue
            target, place = pair.source.copy(), self._renderer.footprint((item,))
            self._renderer.paste(target, item)
            answer = Answer(target, place, [place])
            if visible_change(pair.source, target, answer.regions):
                found.append(answer)
        return found

    def regions(self, pair: Pair) -> list[np.ndarray]:
        """The parts that have to be done, read off the two scene graphs: bool (H, W) each.

        Old and new place of every object that differs; then the background and, under a change of the whole picture,
        everything else.
        """
        footprint = self._renderer.footprint
        before, after = objects_of(pair)
        regions = [footprint((item,)) for item in before if item not in after]
        for item in after:
            place = footprint((item,))
            # A recoloured object has one footprint, not two.
            if item not in before and not any(np.array_equal(place, other) for other in regions):
                regions.append(place)
        rest = ~np.any([np.zeros_like(pair.mask), *regions], axis=0)
        if pair.scene["filters"] != pair.target_scene["filters"]:
            regions.append(rest)
        elif pair.scene["background"] != pair.target_scene["background"]:
            regions.append(rest & ~footprint(after, opaque=True))
        return regions


def objects_of(pair: Pair) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The objects of the scene before and after the edit."""
    before, after = (tuple(Item(**item) for item in graph["objects"]) for graph in (pair.scene, pair.target_scene))
    return before, after
