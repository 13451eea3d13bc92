"""The procedural world: endless pairs of pictures with an instruction and a known answer."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from varedit.data.synthetic import backgrounds, grammar, tone, vocabulary
from varedit.data.synthetic.edits import LOCAL
from varedit.data.synthetic.scene import Item, Renderer, Scene, conflicts, largest_channel
from varedit.data.synthetic.stage import Edit, Stage
from varedit.data.synthetic.vocabulary import COLOURS
from varedit.scales import scale_schedule

logger = logging.getLogger(__name__)

# What a small model masters and a person tries first comes most often.
WEIGHTS: dict[str, float] = {
    "tone": 27, "style": 5, "weather": 4, "recolour": 13, "remove": 13, "add": 12, "background": 9, "replace": 5,
    "move": 3, "resize": 3, "rotate": 1.5, "material": 2.5, "text": 3, "composition": 4,
}  # fmt: skip
GLOBAL = {"tone": tone.TONES, "style": tone.STYLES, "weather": tone.WEATHERS}
PHOTO_SHARE = 0.45  # of the scenes with objects, where photographs are given
PHOTO_ONLY_SHARE = 0.72  # of the edits of the whole picture
MIN_CHANGE = 18.0  # mean over the mask of the largest channel difference
LEAST = {"rotate": 34.0, "recolour": 40.0}  # a turned doughnut looks the same; pale glass hardly changes its colour
MIN_GLOBAL_CHANGE = 7.0
NOT_COMBINED = ("invert", "tint", "mirror", "upside_down")  # they undo the colour or place just asked for
NUM_PHRASINGS = 3
JOINTS = (" and ", ", then ", " and then ", ", and ")
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "turquoise")
REVISION = 3
"""Of what a seed draws: raised when pairs of a seed come out different, so that no training goes on with others."""
TRIES = 60


@dataclass(frozen=True)
class Pair:
    """One training or test example.

    Attributes:
        source: uint8 (height, width, 3). target: the same shape.
        mask: bool (height, width), True where the edit may change pixels; elsewhere target equals source exactly.
        instruction: The first of `instructions`, several phrasings of the same edit.
        edit_type: A key of `WEIGHTS`.
        scene: The scene graph before (plain JSON values). target_scene: after, with the list "edit" of what was done.
        held_out: Which held-out parts the pair uses: "object", "combination", "phrasing", "composition".
    """

    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    instruction: str
    instructions: tuple[str, ...]
    edit_type: str
    source_caption: str
    target_caption: str
    scene: dict[str, Any]
    target_scene: dict[str, Any]
    held_out: tuple[str, ...]


class World:
    """A generator of pairs with random access: pair (seed, index) is always the same for the same configuration.

    Args:
        objects: Folder of cut-outs with `names.json`; None uses the Noto colour emoji font if the system has it.
        photos: Folder of photographs with `index.jsonl`; None draws procedural backgrounds only.
        split: "train" leaves the held-out objects, combinations, phrasings and compositions out; "test" mixes them in.
        size: Size class of the pictures, one of `scales.SIZES`.
        height_over_width: Aspect template, one of `scales.ASPECT_RATIOS`.
        weights: How often each edit type comes, by its name; None takes `WEIGHTS`.

    Raises:
        ValueError: Unknown split, size, template or edit type, or a folder without its index.
    """

    def __init__(
        self,
        objects: Path | None = None,
        photos: Path | None = None,
        split: Literal["train", "test"] = "train",
        size: int = 128,
        height_over_width: float = 1.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}: use 'train' or 'test'")
        self.height, self.width = scale_schedule(size, height_over_width).image_hw
        self.split = split
        self.weights = dict(WEIGHTS if weights is None else weights)
        if unknown := set(self.weights) - set(WEIGHTS):
            raise ValueError(f"edit type {min(unknown)!r} is unknown: use some of {', '.join(WEIGHTS)}")
        folders = [Path(folder) if folder else None for folder in (objects, photos)]
        self.renderer = Renderer(*folders, split, self.height, self.width)
        if objects and not self.renderer.sprites.usable(split == "test"):
            raise ValueError(
                f"objects folder {objects}: all its names are held out for the test split or left out; give others"
            )

    def pair(self, seed: int, index: int) -> Pair:
        """Make one pair.

        Args:
            seed: Of the whole stream. index: Of the pair in it; any order, any subset.

        Returns:
            The pair; a function of the configuration, the seed and the index alone.
        """
        rng = random.Random(f"varedit {seed} {index}")
        kind = rng.choices(list(self.weights), list(self.weights.values()))[0]
        # In the test split most of the pairs are worded as never in training.
        new_words = self.split == "test" and rng.random() < 0.65
        for attempt in range(TRIES):
            if attempt % 20 == 19:  # a kind that cannot be done with this chance: take another
                kind = rng.choices(list(self.weights), list(self.weights.values()))[0]
            pair = self._attempt(rng, kind, new_words)
            if pair is not None:
                return pair
        raise RuntimeError(f"no possible edit after {TRIES} tries for seed {seed}, index {index}")

    def licences(self, pair: Pair) -> tuple[str, ...]:
        """Licences of the photograph and the cut-outs in a pair; empty if all of it is drawn."""
        found = set()
        for graph in (pair.scene, pair.target_scene):
            back = graph["background"]
            if back["kind"] == "photo" and self.renderer.photos is not None:
                found.add(self.renderer.photos.licences[back["file"]])
            found |= {self.renderer.cutouts[item["file"]].licence for item in graph["objects"] if "file" in item}
        return tuple(sorted(found))

    def _attempt(self, rng: random.Random, kind: str, new_words: bool) -> Pair | None:
        scene, background = self._scene(rng, kind)
        if scene is None:
            return None
        stage = Stage(rng, self.renderer, self.split == "test", background)
        edits = self._edits(stage, scene, kind)
        if not edits:
            return None
        after = edits[-1].target
        source = self.renderer.render(scene, background)
        target = self.renderer.render(after, background if after.background is scene.background else None)
        mask = self._mask(edits, scene)
        change = largest_channel(np.maximum(source, target) - np.minimum(source, target))
        least = MIN_GLOBAL_CHANGE if mask.all() else LEAST.get(kind, MIN_CHANGE)
        if change[mask].mean() < least:
            return None
        phrasings = self._phrasings(rng, scene, edits, new_words)
        flags = {*stage.novelty(*scene.items), *(flag for edit in edits for flag in edit.held_out)}
        graph = {**after.graph(self.height, self.width), "edit": [edit.operation for edit in edits]}
        return Pair(
            source=source,
            target=target,
            mask=mask,
            instruction=phrasings[0],
            instructions=phrasings,
            edit_type=kind,
            source_caption=caption(scene),
            target_caption=caption(after),
            scene=scene.graph(self.height, self.width),
            target_scene=graph,
            held_out=tuple(sorted(flags | ({"phrasing"} if new_words else set()))),
        )

    def _edits(self, stage: Stage, scene: Scene, kind: str) -> list[Edit] | None:
        if kind in GLOBAL:
            return [self._global(stage.rng, scene, kind)]
        if kind == "composition":
            return self._composition(stage, scene)
        edit = LOCAL[kind](stage, scene)
        return [edit] if edit else None

    def _phrasings(self, rng: random.Random, scene: Scene, edits: list[Edit], new_words: bool) -> tuple[str, ...]:
        photo, joined = scene.background["kind"] == "photo", len(edits) > 1
        more = self.split == "train"
        found = []
        for _ in range(NUM_PHRASINGS):
            parts = [
                grammar.clause(rng, edit.key, edit.slots, photo=photo, held_out=new_words, joined=joined, more=more)
                for edit in edits
            ]
            text = rng.choice(JOINTS).join(parts) if joined else parts[0]
            found.append(grammar.dress(rng, text))
        return tuple(dict.fromkeys(found))

    def _mask(self, edits: list[Edit], scene: Scene) -> np.ndarray:
        """Where the edits may change pixels, bool (height, width)."""
        if any(edit.target.filters for edit in edits):
            return np.ones((self.height, self.width), bool)
        mask = np.zeros((self.height, self.width), bool)
        for edit in edits:
            if edit.touched is None:  # the background: all that no object covers fully
                mask |= ~self.renderer.footprint(scene.items, opaque=True)
            else:
                mask |= self.renderer.footprint(edit.touched)
        return mask

    # ---- scenes ------------------------------------------------------------------------------------------------
    def _scene(self, rng: random.Random, kind: str) -> tuple[Scene | None, np.ndarray]:
        photos = self.renderer.photos
        alone = kind in GLOBAL and rng.random() < PHOTO_ONLY_SHARE
        if photos and (alone or rng.random() < PHOTO_SHARE):
            spec = photos.draw(rng)
        else:
            spec, alone = backgrounds.procedural(rng), False
        background = self.renderer.background(spec)
        if alone:
            return Scene(spec), background
        return self._populate(rng, kind, spec, background), background

    def _populate(self, rng: random.Random, kind: str, spec: dict[str, Any], background: np.ndarray) -> Scene | None:
        stage = Stage(rng, self.renderer, self.split == "test", background)
        count = rng.choices((1, 2, 3, 4), (30, 36, 24, 10))[0]
        if kind == "add":
            count = rng.choices((0, 1, 2, 3), (12, 40, 32, 16))[0]
        sprite_share = {"recolour": 0.3, "material": 0.25, "rotate": 0.7}.get(kind, 0.5)
        items: list[Item] = []
        if kind == "text" and rng.random() < 0.7:
            sign = stage.free_place(stage.sign(), ())
            items += [sign] if sign else []
            count = rng.choice((1, 1, 2))
        for _ in range(count * 3):
            if len(items) >= count:
                break
            item = stage.item(sprite_share)
            if kind == "material" and not items:
                while item.kind != "primitive":
                    item = stage.item(0.0)
            if items and rng.random() < 0.16 and items[-1].kind != "sign":
                twin = self._twin(rng, items)
                if twin is None:
                    continue
                item = twin
            elif conflicts(item.name, tuple(items)):
                continue
            placed = stage.free_place(item, tuple(items))
            if placed:
                items.append(placed)
        return Scene(spec, tuple(items)) if items or kind == "add" else None

    def _twin(self, rng: random.Random, items: list[Item]) -> Item | None:
        """A second object of the last one's kind, so that words for size, colour and place are needed."""
        last = items[-1]
        item = replace(last, size=round(rng.choice((last.size, last.size * 1.55, last.size / 1.55)), 3))
        if item.kind != "sprite" and rng.random() < 0.6:
            item = replace(item, colour=rng.choice(list(COLOURS)))
            if self.split == "train" and vocabulary.held_out_combination(item.colour, item.name):
                return None
        return None if sum(other.name == item.name for other in items) > 1 else item

    # ---- edits of the whole picture and compositions -----------------------------------------------------------
    def _global(self, rng: random.Random, scene: Scene, kind: str) -> Edit:
        names = GLOBAL[kind]
        name = rng.choices(list(names), list(names.values()))[0]
        spec: dict[str, Any] = {"name": name}
        slots: dict[str, str] = {}
        if name == "tint":
            spec["colour"] = slots["colour"] = rng.choice(TINTS)
        if name in ("snow", "rain"):
            spec["seed"] = rng.randrange(1 << 30)
        return Edit(replace(scene, filters=(*scene.filters, spec)), name, slots, {"op": kind, **spec}, None)

    def _composition(self, stage: Stage, scene: Scene) -> list[Edit] | None:
        rng = stage.rng
        first_kind = rng.choices(("remove", "recolour", "add", "replace", "move"), (30, 35, 20, 8, 7))[0]
        kinds = ("tone", "recolour", "remove", "add", "background", "move")
        second_kind = rng.choices(kinds, (40, 22, 14, 10, 8, 6))[0]
        if self.split == "train" and (first_kind, second_kind) in vocabulary.HELD_OUT_PAIRS:
            return None
        first = LOCAL[first_kind](stage, scene)
        if first is None or first.key == "remove_all":
            return None
        if second_kind == "tone":
            second: Edit | None = self._global(rng, first.target, "tone")
            if second.key in NOT_COMBINED:
                return None
        else:
            second = LOCAL[second_kind](stage, first.target)
        if second is None or not _independent(first, second, scene):
            return None
        if (first_kind, second_kind) in vocabulary.HELD_OUT_PAIRS:
            second = replace(second, held_out=(*second.held_out, "composition"))
        return [first, second]


def _independent(first: Edit, second: Edit, scene: Scene) -> bool:
    """True if the second edit does not touch what the first made, and its words also hold before the first."""
    if second.key == "remove_all" or first.touched is None:
        return False
    if second.touched is not None and set(second.touched) & set(first.touched):
        return False
    if "ref" not in second.slots:
        return True
    index = second.operation.get("anchor", second.operation.get("object"))
    if second.key.startswith("text") or not isinstance(index, int):
        return True
    before = scene.items.index(first.target.items[index]) if first.target.items[index] in scene.items else None
    return before is not None and second.slots["ref"] in grammar.references(scene.items, before)


def caption(scene: Scene) -> str:
    """One phrase about a scene."""
    back = backgrounds.describe(scene.background)
    words = {"sea": "the sea", "mountains": "mountains", "photo": "a photo"}
    text = words.get(back) or vocabulary.with_article(back)
    things: list[str] = []
    for item in scene.items:
        thing = vocabulary.with_article(grammar.name_of(item))
        if thing in things:
            thing = (
                f"another {grammar.name_of(item)}" if not thing.startswith("some ") else f"more {grammar.name_of(item)}"
            )
        things.append(f"{thing} that says {item.text}" if item.kind == "sign" else thing)
    if things:
        text = f"{grammar.listing(things)} {'on' if scene.background['kind'] == 'photo' else 'in front of'} {text}"
    for spec in scene.filters:
        text += f", {tone.describe(spec['name'], spec.get('colour', ''))}"
    return text[0].upper() + text[1:]
