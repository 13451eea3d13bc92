"""Held-out pairs of the procedural world, with all that the exact checker needs to judge an edit of one."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from varedit.data.synthetic import Pair, World
from varedit.data.synthetic.backgrounds import COUNTS
from varedit.data.synthetic.scene import Item, Scene
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
        self._renderer = self.world.renderer
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

    def regions(self, pair: Pair) -> list[np.ndarray]:
        """The parts that have to be done, read off the two scene graphs: bool (H, W) each.

        Old and new place of every object that differs; then the background and, under a change of the whole picture,
        everything else.
        """
        return self._regions(*scenes_of(pair))

    def answers(self, pair: Pair) -> list[Answer]:
        """All right answers, the pair's own first. Where the words leave something open, each way to do it is right:

        - an added object without a named place stands wherever it fits, on a grid of `STEP`;
        - an object moved to a side may keep its place along that side;
        - striped, checkered and dotted backgrounds have any of `COUNTS` periods and begin with either colour;
        - text that is taken away may leave an empty sign, if nobody speaks of the sign.

        Of two edits that leave something open, one at a time is varied.
        """
        before, after = scenes_of(pair)
        found = [Answer(pair.target, pair.mask, self._regions(before, after), *self._kept(before, after))]
        background = self._renderer.background(after.background)
        for other in self._other_ends(pair, before, after):
            target = self._renderer.render(other, background if other.background is after.background else None)
            regions = self._regions(before, other)
            if visible_change(pair.source, target, regions):
                found.append(Answer(target, self._mask(before, other), regions, *self._kept(before, other)))
        return found

    def _other_ends(self, pair: Pair, before: Scene, after: Scene) -> Iterator[Scene]:
        """Scenes that are no less right than `after`."""
        operations = pair.target_scene["edit"]
        for number, operation in enumerate(operations):
            index = operation.get("object")
            if isinstance(index, int):  # a later removal moves the others up
                removed = [later["object"] for later in operations[number + 1 :] if later["op"] == "remove"]
                index -= sum(other < index for other in removed)
            if operation["op"] == "add" and not operation["place_named"]:
                shares = np.arange(STEP, 1, STEP).tolist()
                yield from self._elsewhere(after, index, list(product(shares, shares)))
            elif operation["op"] == "move" and operation.get("spot") in ("left", "right", "top", "bottom"):
                new = after.items[index]
                gone = (item for item in before.items if item not in after.items)
                old = next(item for item in gone if replace(item, x=new.x, y=new.y) == new)
                place = (new.x, old.y) if operation["spot"] in ("left", "right") else (old.x, new.y)
                yield from self._elsewhere(after, index, [place])
            elif operation["op"] == "background" and after.background["kind"] == "pattern":
                one, two = after.background["colours"]
                for count, colours in product(COUNTS, ([one, two], [two, one])):
                    spec = {**after.background, "count": count, "colours": colours}
                    if spec != after.background:
                        yield replace(after, background=spec)
            elif operation["op"] == "text" and operation["to"] is None:
                if not re.search(r"\b(sign|board)", pair.instruction, re.IGNORECASE):
                    items = list(after.items)
                    items.insert(index, replace(before.items[index], text=""))
                    yield replace(after, items=tuple(items))

    def _elsewhere(self, scene: Scene, index: int, places: list[tuple[float, float]]) -> Iterator[Scene]:
        """The scene with one object at each of these places (x, y), where it fits."""
        item, rest = scene.items[index], scene.without(index)
        background = self._renderer.background(scene.background)
        for x, y in places:
            moved = replace(item, x=x, y=y)
            if moved != item and self._renderer.fits(moved, rest.items, background):
                yield scene.swap(index, moved)

    def _mask(self, before: Scene, after: Scene) -> np.ndarray:
        """Where pixels may change, as `Pair.mask`."""
        footprint = self._renderer.footprint
        if before.filters != after.filters:
            return np.ones((self._renderer.height, self._renderer.width), bool)
        mask = footprint(tuple({*before.items} ^ {*after.items}))
        return mask if before.background == after.background else mask | ~footprint(before.items, opaque=True)

    def _regions(self, before: Scene, after: Scene) -> list[np.ndarray]:
        footprint = self._renderer.footprint
        regions = [footprint((item,)) for item in before.items if item not in after.items]
        for item in after.items:
            place = footprint((item,))
            # A recoloured object has one footprint, not two.
            if item not in before.items and not any(np.array_equal(place, other) for other in regions):
                regions.append(place)
        rest = ~np.any([np.zeros((self._renderer.height, self._renderer.width), bool), *regions], axis=0)
        if before.filters != after.filters:
            regions.append(rest)
        elif before.background != after.background:
            regions.append(rest & ~footprint(after.items, opaque=True))
        return regions

    def _kept(self, before: Scene, after: Scene) -> tuple[np.ndarray | None, list[np.ndarray]]:
        """Of a new background: it alone, and where objects have to be left standing on it."""
        if before.background == after.background:
            return None, []
        kept = [self._renderer.footprint((item,)) for item in after.items if item in before.items]
        return self._renderer.background(after.background), kept


def scenes_of(pair: Pair) -> tuple[Scene, Scene]:
    """The scene before and after the edit."""

    def scene(graph: dict[str, Any]) -> Scene:
        return Scene(graph["background"], tuple(Item(**item) for item in graph["objects"]), tuple(graph["filters"]))

    return scene(pair.scene), scene(pair.target_scene)


def objects_of(pair: Pair) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The objects of the scene before and after the edit."""
    before, after = scenes_of(pair)
    return before.items, after.items
