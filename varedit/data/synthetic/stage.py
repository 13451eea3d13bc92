"""What edits work with: the result of one, the stage they act on, and the named spots of a canvas."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from varedit.data.synthetic import grammar, vocabulary
from varedit.data.synthetic.scene import Item, Renderer, Scene, place
from varedit.data.synthetic.vocabulary import COLOURS, MATERIALS, PRIMITIVES, SHAPES, SIGN_WORDS

# name -> (x, y) centre as shares
SPOTS: dict[str, tuple[float, float]] = {
    "top left": (0.2, 0.2), "top": (0.5, 0.2), "top right": (0.8, 0.2), "left": (0.2, 0.5), "center": (0.5, 0.5),
    "right": (0.8, 0.5), "bottom left": (0.2, 0.8), "bottom": (0.5, 0.8), "bottom right": (0.8, 0.8),
}  # fmt: skip
OPEN_ORDER = ("center", "right", "left", "bottom", "top", "bottom right", "bottom left", "top right", "top left")
"""Spots in the order in which an object without a named place takes them, if they are free."""
TYPICAL_SIZE = 0.36
"""Of an object that the training split adds, share of the short side: about the middle of what the test split draws."""
# name -> words for "where"
SPOT_WORDS: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left corner", "at the top left", "in the upper left corner", "in the top left"),
    "top": ("at the top", "at the top in the middle", "at the top center"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner", "in the top right"),
    "left": ("on the left", "on the left side", "at the left"),
    "center": ("in the center", "in the middle", "in the centre", "in the middle of the picture"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": (
        "in the bottom left corner",
        "at the bottom left",
        "in the lower left corner",
        "in the bottom left",
    ),
    "bottom": ("at the bottom", "at the bottom in the middle", "at the bottom center"),
    "bottom right": (
        "in the bottom right corner",
        "at the bottom right",
        "in the lower right corner",
        "in the bottom right",
    ),
}


def at_spot(renderer: Renderer, item: Item, spot: str) -> Item:
    """The object at a named spot, pulled inside the canvas."""
    _, _, height, width = renderer.box(item)
    half_x = width / renderer.width / 2 + 0.03
    half_y = height / renderer.height / 2 + 0.03
    x, y = SPOTS[spot]
    if x != 0.5:
        x = min(max(x, half_x), 1 - half_x)
    if y != 0.5:
        y = min(max(y, half_y), 1 - half_y)
    return replace(item, x=round(x, 4), y=round(y, 4))


@dataclass(frozen=True)
class Edit:
    """What an edit did: the scene after it, the template key with its slots, and a record for checks.

    `touched` are the objects before and after whose pixels may change; None means the whole canvas.
    """

    target: Scene
    key: str
    slots: dict[str, str]
    operation: dict[str, Any]
    touched: tuple[Item, ...] | None = ()
    held_out: tuple[str, ...] = field(default=())


@dataclass
class Stage:
    """Everything an edit needs: chance, the renderer, the split and the background as pixels."""

    rng: random.Random
    renderer: Renderer
    test: bool
    background: np.ndarray

    # ---- new objects -------------------------------------------------------------------------------------------
    def name(self) -> str:
        """A sprite name: mostly an everyday one; held-out ones in the test split only."""
        sprites = self.renderer.sprites
        want_held_out = self.test and self.rng.random() < 0.15
        everyday = not (sprites.tail and self.rng.random() < (0.5 if want_held_out else 0.22))
        wanted = (everyday, want_held_out)
        pools = (sprites.pools[pool] for pool in (wanted, (True, False), (False, False), *sprites.pools))
        return self.rng.choice(next(pool for pool in pools if pool))

    def item(self, sprite_share: float) -> Item:
        """A new object without a place."""
        rng = self.rng
        size = round(rng.uniform(0.24, 0.46), 3)
        if self.renderer.sprites.usable(self.test) and rng.random() < sprite_share:
            name = self.name()
            cutout = rng.choice(self.renderer.sprites.by_name[name])
            return Item("sprite", name, size=max(0.28, size), file=cutout.key, flip=rng.random() < 0.3)
        for _ in range(20):
            kind = "primitive" if rng.random() < 0.3 else "shape"
            name = rng.choice(PRIMITIVES if kind == "primitive" else SHAPES)
            colour = rng.choice(list(COLOURS))
            if self.test or not vocabulary.held_out_combination(colour, name):
                break
        material = None
        if kind == "primitive":
            material = rng.choices(MATERIALS, (60, 8, 8, 8, 10, 8))[0]
        return Item(kind, name, size=size, colour=colour, shade=rng.randint(-9, 9), material=material)

    def typical(self, item: Item) -> Item:
        """The object as the training split adds it: what an instruction leaves open is decided once and for all.

        A size drawn by lot, one of five pictures of a dog, or a flip cannot be foreseen from "add a dog". An editor
        that predicts many bits at once, each by itself, then draws a mixture of all of them: a blur.
        """
        file = self.renderer.sprites.by_name[item.name][-1].key if item.kind == "sprite" else None
        colour = "grey" if item.material == "metal" else item.colour  # "a metal ball" names no tint
        return replace(item, size=TYPICAL_SIZE, shade=0, flip=False, file=file, colour=colour)

    def sign(self) -> Item:
        """A board with a word, without a place."""
        return Item("sign", "sign", size=round(self.rng.uniform(0.46, 0.66), 3), text=self.rng.choice(SIGN_WORDS),
                    colour=self.rng.choice(("white", "yellow", "black", "blue", "red", "green", "orange")))  # fmt: skip

    def free_place(self, item: Item, others: tuple[Item, ...], tries: int = 12) -> Item | None:
        """A free and visible place for the object."""
        return place(self.rng, self.renderer, item, others, self.background, tries)

    def fits(self, scene: Scene, index: int) -> bool:
        """True if the object can stand where the scene puts it."""
        others = (*scene.items[:index], *scene.items[index + 1 :])
        return self.renderer.fits(scene.items[index], others, self.background)

    def pick(self, scene: Scene, test: Callable[[Item], bool]) -> tuple[int, str] | None:
        """An object that passes `test` and a phrase that names it and no other."""
        order = [index for index, item in enumerate(scene.items) if test(item)]
        self.rng.shuffle(order)
        for index in order:
            names = grammar.references(scene.items, index)
            if names:
                return index, self.rng.choice(names)
        return None

    def novelty(self, *items: Item) -> tuple[str, ...]:
        """Which held-out parts the objects use."""
        flags = set()
        for item in items:
            if item.kind == "sprite" and vocabulary.held_out_name(item.name):
                flags.add("object")
            elif item.kind in ("shape", "primitive") and vocabulary.held_out_combination(item.colour, item.name):
                flags.add("combination")
        return tuple(sorted(flags))
