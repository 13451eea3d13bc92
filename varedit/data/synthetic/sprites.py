"""Where the pictured objects come from: a folder of cut-outs, or the colour emoji font of the system."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varedit.data.synthetic import vocabulary

logger = logging.getLogger(__name__)

FONT_FILE = "NotoColorEmoji.ttf"  # looked for in the font folders of the system
FONT_PIXELS = 109  # the only bitmap size in the font
# Emoji of the everyday names, for the font source.
EMOJI = {
    "dog": "🐕", "cat": "🐈", "horse": "🐎", "cow": "🐄", "pig": "🐖", "sheep": "🐑", "rabbit": "🐇",
    "elephant": "🐘", "lion": "🦁", "monkey": "🐒", "bear": "🐻", "panda": "🐼", "bird": "🐦", "duck": "🦆",
    "penguin": "🐧", "owl": "🦉", "fish": "🐟", "turtle": "🐢", "butterfly": "🦋", "ladybug": "🐞",
    "honeybee": "🐝", "frog": "🐸", "tree": "🌳", "palm tree": "🌴", "rose": "🌹", "sunflower": "🌻",
    "mushroom": "🍄", "cactus": "🌵", "apple": "🍎", "banana": "🍌", "lemon": "🍋", "strawberry": "🍓",
    "grapes": "🍇", "watermelon": "🍉", "orange": "🍊", "carrot": "🥕", "pizza": "🍕", "hamburger": "🍔",
    "doughnut": "🍩", "birthday cake": "🎂", "ice cream": "🍨", "car": "🚗", "bus": "🚌", "truck": "🚚",
    "bicycle": "🚲", "train": "🚆", "plane": "✈", "rocket": "🚀", "sailboat": "⛵", "house": "🏠",
    "snowman": "⛄", "sun": "🌞", "moon": "🌙", "cloud": "☁", "umbrella": "☂", "balloon": "🎈",
    "gift box": "🎁", "soccer ball": "⚽", "basketball": "🏀", "guitar": "🎸", "chair": "🪑", "crown": "👑",
    "lightbulb": "💡", "teddy bear": "🧸", "robot": "🤖", "camera": "📷", "book": "📕", "cup of coffee": "☕",
    "glasses": "👓", "top hat": "🎩",
}  # fmt: skip


@dataclass(frozen=True)
class Cutout:
    """One named picture with alpha: a file of the folder, or an emoji of the font."""

    key: str
    name: str
    licence: str


class SpriteSource:
    """Named cut-outs, decoded once and kept at a bounded size.

    Args:
        folder: Folder with `names.json` (file -> {names, category, licence}) and the pictures; None takes the Noto
            colour emoji font of the system where there is one, else no sprites at all (drawn shapes remain).
        pixels: Longest side kept in memory.

    Raises:
        ValueError: The folder has no readable `names.json`.
    """

    def __init__(self, folder: Path | None, pixels: int) -> None:
        self.pixels = pixels
        self.folder = folder
        self.font = None if folder else emoji_font()
        self.by_name: dict[str, list[Cutout]] = {}
        self._masters: dict[str, Image.Image] = {}
        self._saturated: dict[str, float] = {}
        if folder is not None:
            self._index_folder(folder)
        elif self.font is not None:
            self.by_name = {name: [Cutout(emoji, name, "Noto Emoji, SIL OFL 1.1")] for name, emoji in EMOJI.items()}
        self.core = [name for name in vocabulary.CORE_NAMES if name in self.by_name]
        core = set(self.core)
        self.tail = sorted(name for name in self.by_name if name not in core)
        # (everyday?, held out?) -> names
        self.pools = {
            (everyday, held_out): [name for name in names if vocabulary.held_out_name(name) == held_out]
            for everyday, names in ((True, self.core), (False, self.tail))
            for held_out in (True, False)
        }

    def usable(self, test: bool) -> bool:
        """Whether a split may draw any: the held-out names are for the test split only."""
        return any(names for (_, held_out), names in self.pools.items() if test or not held_out)

    def _index_folder(self, folder: Path) -> None:
        try:
            entries: dict[str, dict[str, Any]] = json.loads((folder / "names.json").read_text(encoding="utf-8"))
            names = {file: str(entries[file]["names"][0]) for file in sorted(entries)}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"objects folder {folder} needs a names.json (file -> names): {error!r}") from error
        if not names:
            raise ValueError(f"objects folder {folder}: names.json names no cut-outs; leave the folder out, or fill it")
        for file, name in names.items():
            entry = entries[file]
            if name in vocabulary.EXCLUDED or entry.get("category") in vocabulary.EXCLUDED_CATEGORIES:
                continue
            name = vocabulary.RENAMED.get(name, name)
            self.by_name.setdefault(name, []).append(Cutout(file, name, entry.get("licence", "unknown")))

    def master(self, cutout: Cutout) -> Image.Image:
        """The cut-out as RGBA, cropped to its opaque area, longest side at most `pixels`."""
        image = self._masters.get(cutout.key)
        if image is None:
            image = self._decode(cutout)
            box = image.getchannel("A").point(lambda a: 255 if a > 12 else 0).getbbox()
            image = image.crop(box) if box else image
            scale = min(1.0, self.pixels / max(image.size))
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # Premultiplied resampling keeps the hidden colour of transparent pixels out of the rim.
            image = image.convert("RGBa").resize(
                size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC
            )
            image = image.convert("RGBA")
            self._masters[cutout.key] = image
        return image

    def _decode(self, cutout: Cutout) -> Image.Image:
        if self.folder is not None:
            with Image.open(self.folder / cutout.key) as image:
                return image.convert("RGBA")
        canvas = Image.new("RGBA", (FONT_PIXELS + 40, FONT_PIXELS + 40))
        ImageDraw.Draw(canvas).text((8, 8), cutout.key, font=self.font, embedded_color=True)
        return canvas

    def saturated_share(self, cutout: Cutout) -> float:
        """Share of the opaque area whose colour is strong enough for a hue shift to show."""
        share = self._saturated.get(cutout.key)
        if share is None:
            master = self.master(cutout)
            hsv = np.asarray(master.convert("RGB").convert("HSV"))
            opaque = np.asarray(master.getchannel("A")) > 128
            strong = opaque & (hsv[..., 1] > 90) & (hsv[..., 2] > 70)
            share = float(strong.sum() / max(1, opaque.sum()))
            self._saturated[cutout.key] = share
        return share


@lru_cache(maxsize=1)  # and one warning
def emoji_font() -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(FONT_FILE, FONT_PIXELS)
    except OSError:
        logger.warning("no %s found: the procedural world draws shapes only", FONT_FILE)
        return None
