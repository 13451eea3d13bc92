"""Scenes: named objects on a background, how they are drawn, and the rules that keep an edit possible."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varedit.data.synthetic import backgrounds, drawing, tone, vocabulary
from varedit.data.synthetic.sprites import Cutout, SpriteSource
from varedit.data.synthetic.vocabulary import COLOURS

MIN_SIZE = 0.19  # of the short side: smaller things cannot be told apart at 128 pixels
MIN_CONTRAST = 46.0  # mean difference (largest channel) between an object and what it covers
MAX_OVERLAP = 0.06  # share of the smaller bounding box


@dataclass(frozen=True)
class Item:
    """One object. Places and sizes are shares of the canvas, so that a scene can be drawn at any size.

    Attributes:
        kind: "shape", "primitive", "sprite" or "sign".
        name: What it is called ("circle", "ball", "dog", "sign").
        x: Centre, share of the width. y: centre, share of the height.
        size: Longest side before turning, share of the short side of the canvas.
        colour: Colour name of shapes, primitives and boards; of a sprite after a hue shift; else None.
        shade: Small offset of the colour, so that not every red is the same.
        material: Of primitives. angle: degrees anticlockwise. file: key of the cut-out. text: word on a sign.
    """

    kind: str
    name: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.3
    colour: str | None = None
    shade: int = 0
    material: str | None = None
    angle: int = 0
    flip: bool = False
    file: str | None = None
    text: str | None = None

    @cached_property
    def look(self) -> tuple[Any, ...]:
        """All that shapes the patch (everything but the place): a key for caches."""
        return (self.kind, self.name, self.size, self.colour, self.shade, self.material, self.angle % 360, self.flip,
                self.file, self.text)  # fmt: skip

    def rgb(self) -> tuple[int, int, int]:
        """The jittered colour of a shape or primitive."""
        assert self.colour is not None
        red, green, blue = COLOURS[self.colour]
        return tuple(min(255, max(0, value + self.shade)) for value in (red, green, blue))  # type: ignore[return-value]


ITEM_FIELDS = tuple(entry.name for entry in fields(Item))


@dataclass(frozen=True)
class Scene:
    """A background, objects drawn in order, and filters of the whole picture applied last."""

    background: dict[str, Any]
    items: tuple[Item, ...] = ()
    filters: tuple[dict[str, Any], ...] = field(default=())

    def graph(self, height: int, width: int) -> dict[str, Any]:
        """The scene as plain JSON values."""
        items = [
            {key: value for key in ITEM_FIELDS if (value := getattr(item, key)) is not None} for item in self.items
        ]
        return {"height": height, "width": width, "background": self.background, "objects": items,
                "filters": list(self.filters)}  # fmt: skip

    def swap(self, index: int, item: Item) -> Scene:
        """The scene with one object exchanged."""
        return replace(self, items=(*self.items[:index], item, *self.items[index + 1 :]))

    def without(self, index: int) -> Scene:
        """The scene with one object taken away."""
        return replace(self, items=(*self.items[:index], *self.items[index + 1 :]))


NUM_SPRITES = 1024  # drawn cut-outs kept
NUM_RECENT = 256  # patches of the scenes at hand
Patch = tuple[np.ndarray, np.ndarray]  # colour, opacity
Box = tuple[int, int, int, int]  # top, left, height, width


class Renderer:
    """Draws scenes at one canvas size, keeping patches and photographs in memory."""

    def __init__(self, objects: Path | None, photos: Path | None, split: str, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.short = min(height, width)
        self.sprites = SpriteSource(objects, pixels=max(64, round(self.short * 0.8)))
        self.photos = backgrounds.Photos(photos, split, min(384, round(self.short * 1.35))) if photos else None
        self.cutouts: dict[str, Cutout] = {c.key: c for group in self.sprites.by_name.values() for c in group}
        # Plain dictionaries, not lru_cache: a world travels to worker processes by pickling.
        self._sprite_patches: dict[tuple[Any, ...], Patch] = {}
        self._recent: dict[tuple[Any, ...], Patch] = {}

    def _sprite_patch(self, item: Item, pixels: int) -> Patch:
        key = (item.file, pixels, item.flip, item.angle % 360, item.colour)
        found = self._sprite_patches.get(key)
        if found is None:
            if len(self._sprite_patches) >= NUM_SPRITES:
                self._sprite_patches.pop(next(iter(self._sprite_patches)))
            master = self.sprites.master(self.cutouts[item.file or ""])
            found = drawing.sprite_patch(master, pixels, item.flip, item.angle % 360, item.colour)
            self._sprite_patches[key] = found
        return found

    def patch(self, item: Item) -> Patch:
        """Colour float32 (h, w, 3) in 0..255 and opacity float32 (h, w) in 0..1 of an object."""
        found = self._recent.get(item.look)
        if found is None:
            if len(self._recent) >= NUM_RECENT:
                self._recent.clear()
            found = self._recent[item.look] = self._draw_patch(item)
        return found

    def _draw_patch(self, item: Item) -> Patch:
        pixels = max(6, round(item.size * self.short))
        if item.kind == "shape":
            alpha = drawing.shape_alpha(item.name, pixels, item.angle % 360)
            return np.broadcast_to(np.array(item.rgb(), np.float32), (*alpha.shape, 3)), alpha
        if item.kind == "primitive":
            return drawing.primitive_patch(item.name, pixels, item.rgb(), item.material or "matte")
        if item.kind == "sign":
            assert item.text is not None and item.colour is not None
            ink = "black" if item.colour in ("white", "yellow", "pink", "turquoise", "orange") else "white"
            return drawing.sign_patch(item.text, pixels, item.colour, ink)
        assert item.file is not None
        return self._sprite_patch(item, pixels)

    def box(self, item: Item) -> Box:
        """Top, left, height, width in pixels (may leave the canvas)."""
        height, width = self.patch(item)[1].shape
        return round(item.y * self.height - height / 2), round(item.x * self.width - width / 2), height, width

    def background(self, spec: dict[str, Any]) -> np.ndarray:
        """uint8 (height, width, 3), writable."""
        if spec["kind"] == "photo":
            assert self.photos is not None
            return self.photos.render(spec, self.height, self.width)
        return np.array(backgrounds.render(spec, self.height, self.width))

    def paste(self, canvas: np.ndarray, item: Item) -> None:
        """Blend an object over a uint8 canvas in place."""
        colour, alpha = self.patch(item)
        top, left, height, width = self.box(item)
        region = canvas[top : top + height, left : left + width]
        opacity = alpha[..., None]
        region[...] = region * (1.0 - opacity) + colour * opacity + 0.5

    def render(self, scene: Scene, background: np.ndarray | None = None) -> np.ndarray:
        """Draw a scene; uint8 (height, width, 3). `background` saves drawing it again."""
        canvas = self.background(scene.background) if background is None else background.copy()
        for item in scene.items:
            self.paste(canvas, item)
        for spec in scene.filters:
            filtered = tone.apply(spec["name"], Image.fromarray(canvas), spec.get("colour", ""), spec.get("seed", 0))
            canvas = np.array(filtered)
        return canvas

    def footprint(self, items: tuple[Item, ...], *, opaque: bool = False) -> np.ndarray:
        """bool (height, width): where one of the objects leaves any trace, or hides what is behind it (`opaque`)."""
        mask = np.zeros((self.height, self.width), bool)
        for item in items:
            alpha = self.patch(item)[1]
            top, left, height, width = self.box(item)
            mask[top : top + height, left : left + width] |= (alpha >= 1) if opaque else (alpha > 0)
        return mask

    def inside(self, item: Item) -> bool:
        """True if the whole object lies on the canvas with a small margin."""
        top, left, height, width = self.box(item)
        return top >= 1 and left >= 1 and top + height <= self.height - 1 and left + width <= self.width - 1

    def apart(self, item: Item, others: tuple[Item, ...]) -> bool:
        """True if the object hides next to nothing of the others and is not hidden by them."""
        return _apart(self.box(item), [self.box(other) for other in others])

    def visible(self, item: Item, background: np.ndarray) -> bool:
        """True if the object differs enough from the background that it covers."""
        colour, alpha = self.patch(item)
        top, left, height, width = self.box(item)
        covered = background[top : top + height, left : left + width]
        difference = largest_channel(np.abs(covered - colour)) * alpha
        # The rim matters too: a white object on white with a coloured middle has no outline.
        return (
            float(difference.sum() / max(1.0, alpha.sum())) > MIN_CONTRAST
            and float((difference > 30).sum() / max(1.0, (alpha > 0.5).sum())) > 0.75
        )

    def fits(self, item: Item, others: tuple[Item, ...], background: np.ndarray) -> bool:
        """True if the object may stand there: on the canvas, large enough, apart from the others, visible."""
        _, _, height, width = self.box(item)
        large = max(height, width) >= MIN_SIZE * self.short - 1 and min(height, width) >= 0.07 * self.short
        return large and self.inside(item) and self.apart(item, others) and self.visible(item, background)


def largest_channel(values: np.ndarray) -> np.ndarray:
    """Maximum over the last axis of three (several times faster than `max(-1)`)."""
    return np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2])


def place(
    rng: random.Random,
    renderer: Renderer,
    item: Item,
    others: tuple[Item, ...],
    background: np.ndarray,
    tries: int = 12,
) -> Item | None:
    """Find a free and visible place for an object, or None."""
    _, _, height, width = renderer.box(item)
    room_y, room_x = height / renderer.height / 2 + 0.012, width / renderer.width / 2 + 0.012
    if room_y > 0.5 or room_x > 0.5:
        return None
    boxes = [renderer.box(other) for other in others]
    for _ in range(tries):
        x = round(rng.uniform(room_x, 1 - room_x), 4)
        y = round(rng.uniform(room_y, 1 - room_y), 4)
        box = (round(y * renderer.height - height / 2), round(x * renderer.width - width / 2), height, width)
        if not _apart(box, boxes):  # cheaper than the whole test
            continue
        moved = replace(item, x=x, y=y)
        if renderer.fits(moved, others, background):
            return moved
    return None


def _apart(box: Box, others: list[Box]) -> bool:
    top, left, height, width = box
    for other_top, other_left, other_height, other_width in others:
        down = min(top + height, other_top + other_height) - max(top, other_top)
        across = min(left + width, other_left + other_width) - max(left, other_left)
        if down > 0 and across > 0 and down * across > MAX_OVERLAP * min(height * width, other_height * other_width):
            return False
    return True


def conflicts(name: str, others: tuple[Item, ...]) -> bool:
    """True if an object of that name could be confused with one already there."""
    return any(vocabulary.same_kind(name, other.name) for other in others)
