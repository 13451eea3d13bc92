"""What lies behind the objects: plain colours, patterns, simple landscapes and crops of photographs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from varedit.data.synthetic.vocabulary import COLOURS

LANDSCAPES = ("beach", "meadow", "night sky", "snowy landscape", "desert", "sea", "mountains", "sunset", "forest")
PATTERNS = ("vertical stripes", "horizontal stripes", "checks", "dots")
COUNTS = (4, 5, 6, 8)
"""Periods of a pattern over the short side."""
TYPICAL_COUNT = 5
"""Of a background that the training split puts in: no instruction says how many."""
MAX_BYTES = 768 * 2**20  # decoded photographs kept by one process
# Pictures of these folders are monotonous (shelves, shirts on a bed): drawn less often.
MONOTONOUS = {"grocery": 0.2, "clothing": 0.15}


def procedural(rng: random.Random, *, nameable: bool = False) -> dict[str, Any]:
    """Draw the description of a background; `nameable` leaves out those without a short name (gradients)."""
    kind = rng.choices(("plain", "gradient", "pattern", "landscape"), (38, 0 if nameable else 12, 20, 34))[0]
    names = list(COLOURS)
    first = rng.choice(names)
    second = rng.choice([name for name in names if distance(COLOURS[name], COLOURS[first]) > 110])
    if kind == "plain":
        return {"kind": "plain", "colours": [first], "jitter": rng.randrange(1 << 30)}
    if kind == "gradient":
        return {"kind": "gradient", "colours": [first, second], "angle": rng.randrange(0, 360, 30)}
    if kind == "pattern":
        name = rng.choice(PATTERNS)
        return {"kind": "pattern", "name": name, "colours": [first, second], "count": rng.choice(COUNTS)}
    return {"kind": "landscape", "name": rng.choice(LANDSCAPES), "seed": rng.randrange(1 << 30)}


def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    """Largest difference over the three channels, 0..255."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]), abs(a[2] - b[2]))


def describe(spec: dict[str, Any]) -> str:
    """A noun phrase without article, such as "plain blue background" or "beach"."""
    kind = spec["kind"]
    if kind == "plain":
        return f"plain {spec['colours'][0]} background"
    if kind == "gradient":
        return f"{spec['colours'][0]} and {spec['colours'][1]} gradient"
    if kind == "pattern":
        return f"{spec['colours'][0]} and {spec['colours'][1]} background with {spec['name']}"
    return str(spec["name"]) if kind == "landscape" else "photo"


def render(spec: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Draw a procedural background; uint8 (height, width, 3)."""
    kind = spec["kind"]
    if kind == "plain":
        rng = random.Random(spec["jitter"])
        light = rng.randint(-10, 10)
        colour = [min(255, max(0, value + light + rng.randint(-3, 3))) for value in COLOURS[spec["colours"][0]]]
        return np.full((height, width, 3), colour, np.uint8)
    if kind == "gradient":
        return _gradient(spec, height, width)
    if kind == "pattern":
        return _pattern(spec, height, width)
    assert kind == "landscape", kind
    return _LANDSCAPE[spec["name"]](random.Random(spec["seed"]), height, width)


def _gradient(spec: dict[str, Any], height: int, width: int) -> np.ndarray:
    angle = np.deg2rad(spec["angle"])
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None] * np.float32(np.cos(angle))
    share = (y + x)[..., None]
    share = (share - share.min()) / max(1e-6, float(share.max() - share.min()))
    first, second = (np.array(COLOURS[name], np.float32) for name in spec["colours"])
    return (first + (second - first) * share).astype(np.uint8)


def _pattern(spec: dict[str, Any], height: int, width: int) -> np.ndarray:
    period = min(height, width) / spec["count"]
    y = np.arange(height, dtype=np.float32)[:, None] / period
    x = np.arange(width, dtype=np.float32)[None] / period
    name = spec["name"]
    if name == "vertical stripes":
        second = np.broadcast_to(x % 1 < 0.5, (height, width))
    elif name == "horizontal stripes":
        second = np.broadcast_to(y % 1 < 0.5, (height, width))
    elif name == "checks":
        second = (x % 1 < 0.5) ^ (y % 1 < 0.5)
    else:
        second = (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.075
    colours = np.array([COLOURS[name] for name in spec["colours"]], np.uint8)
    return colours[second.astype(np.uint8)]


def _vertical(stops: list[tuple[float, tuple[int, int, int]]], height: int, width: int) -> np.ndarray:
    places = np.linspace(0, 1, height)
    at = [stop[0] for stop in stops]
    columns = [np.interp(places, at, [stop[1][channel] for stop in stops]) for channel in range(3)]
    return np.repeat(np.stack(columns, -1)[:, None].astype(np.uint8), width, 1)


def _draw_on(base: np.ndarray) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.fromarray(base)
    return image, ImageDraw.Draw(image)


def _grain(base: np.ndarray, rng: random.Random, top: int, strength: int) -> np.ndarray:
    """Soft texture below row `top`, so that ground is not a flat colour."""
    height, width = base.shape[:2]
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-strength, strength, (16, 16), np.int16)
    noise = np.asarray(
        Image.fromarray((noise + 128).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    )
    out = base.astype(np.int16)
    out[top:] += noise[top:, :, None].astype(np.int16) - 128
    return np.clip(out, 0, 255).astype(np.uint8)


def _clouds(draw: ImageDraw.ImageDraw, rng: random.Random, height: int, width: int, count: int) -> None:
    for _ in range(count):
        x, y, r = rng.random() * width, rng.uniform(0.06, 0.3) * height, rng.uniform(0.03, 0.055) * width
        for shift in (-1.1, 0.0, 1.1):
            grow = 1.25 if shift == 0 else 0.9
            draw.ellipse(
                (x + shift * r - r * grow, y - r * grow * 0.8, x + shift * r + r * grow, y + r * grow * 0.8),
                fill=(244, 248, 252),
            )


def _beach(rng: random.Random, height: int, width: int) -> np.ndarray:
    horizon, shore = rng.uniform(0.3, 0.4), rng.uniform(0.52, 0.62)
    base = _vertical(
        [(0, (110, 185, 240)), (horizon, (190, 226, 248)), (horizon + 0.01, (28, 128, 190)), (shore, (90, 205, 212)),
         (shore + 0.015, (240, 222, 172)), (1, (226, 194, 134))], height, width,
    )  # fmt: skip
    image, draw = _draw_on(base)
    _clouds(draw, rng, height, width, 2)
    return _grain(np.asarray(image), rng, int(height * (shore + 0.02)), 12)


def _meadow(rng: random.Random, height: int, width: int) -> np.ndarray:
    horizon = rng.uniform(0.38, 0.5)
    base = _vertical([(0, (96, 174, 240)), (horizon, (200, 230, 250)), (horizon + 0.01, (120, 190, 80)),
                      (1, (62, 140, 48))], height, width)  # fmt: skip
    image, draw = _draw_on(base)
    _clouds(draw, rng, height, width, 2)
    for _ in range(18):
        x, y, r = rng.random() * width, rng.uniform(horizon + 0.06, 1) * height, max(1.0, width * 0.008)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rng.choice(((255, 255, 255), (252, 226, 80), (240, 130, 160))))
    return _grain(np.asarray(image), rng, int(height * (horizon + 0.02)), 14)


def _night_sky(rng: random.Random, height: int, width: int) -> np.ndarray:
    image, draw = _draw_on(_vertical([(0, (8, 10, 40)), (1, (38, 44, 104))], height, width))
    for _ in range(55):
        x, y, r = rng.random() * width, rng.random() * height, width * rng.uniform(0.003, 0.008)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 214))
    return np.asarray(image)


def _snowy(rng: random.Random, height: int, width: int) -> np.ndarray:
    horizon = rng.uniform(0.42, 0.54)
    image, draw = _draw_on(
        _vertical(
            [(0, (150, 182, 214)), (horizon, (208, 222, 236)), (horizon + 0.01, (246, 249, 252)), (1, (222, 232, 244))],
            height,
            width,
        )  # fmt: skip
    )
    for _ in range(7):
        x, size = rng.random() * width, height * rng.uniform(0.07, 0.13)
        y = horizon * height + 0.02 * height
        draw.polygon(((x, y - size), (x - size * 0.4, y), (x + size * 0.4, y)), fill=(52, 92, 76))
    return np.asarray(image)


def _desert(rng: random.Random, height: int, width: int) -> np.ndarray:
    horizon = rng.uniform(0.4, 0.52)
    image, draw = _draw_on(_vertical([(0, (120, 184, 232)), (horizon, (240, 226, 190)), (1, (214, 160, 84))],
                                     height, width))  # fmt: skip
    for step in range(3):
        y = height * (horizon + 0.16 * step)
        x = rng.uniform(0, width)
        draw.ellipse((x - width, y, x + width, y + height), fill=(236 - 14 * step, 186 - 18 * step, 108 - 18 * step))
    return np.asarray(image)


def _sea(rng: random.Random, height: int, width: int) -> np.ndarray:
    horizon = rng.uniform(0.34, 0.46)
    stops = [(0, (110, 184, 240)), (horizon, (206, 232, 248)), (horizon + 0.01, (34, 116, 180)), (1, (14, 62, 122))]
    image, draw = _draw_on(_vertical(stops, height, width))
    for _ in range(26):
        x, y = rng.random() * width, rng.uniform(horizon + 0.04, 1) * height
        draw.line((x, y, x + width * rng.uniform(0.05, 0.12), y), fill=(108, 176, 220), width=max(1, height // 110))
    return np.asarray(image)


def _mountains(rng: random.Random, height: int, width: int) -> np.ndarray:
    image, draw = _draw_on(_vertical([(0, (118, 178, 236)), (0.6, (222, 236, 248)), (0.61, (96, 150, 74)),
                                      (1, (66, 116, 52))], height, width))  # fmt: skip
    for _ in range(4):
        x, top, half = rng.random() * width, height * rng.uniform(0.18, 0.38), width * rng.uniform(0.22, 0.34)
        grey = rng.randint(92, 128)
        foot = height * 0.66
        draw.polygon(((x, top), (x - half, foot), (x + half, foot)), fill=(grey, grey + 4, grey + 18))
        cap = 0.28
        draw.polygon(((x, top), (x - half * cap, top + (foot - top) * cap), (x + half * cap, top + (foot - top) * cap)),
                     fill=(248, 250, 252))  # fmt: skip
    draw.rectangle((0, height * 0.66, width, height), fill=(92, 146, 70))
    return _grain(np.asarray(image), rng, int(height * 0.67), 12)


def _sunset(rng: random.Random, height: int, width: int) -> np.ndarray:
    horizon = rng.uniform(0.58, 0.7)
    image, draw = _draw_on(_vertical([(0, (92, 52, 122)), (horizon * 0.6, (238, 108, 82)), (horizon, (255, 206, 112)),
                                      (horizon + 0.01, (104, 56, 88)), (1, (44, 26, 62))], height, width))  # fmt: skip
    x, r = rng.uniform(0.25, 0.75) * width, width * 0.09
    draw.chord((x - r, horizon * height - r, x + r, horizon * height + r), 180, 360, fill=(255, 240, 170))
    return np.asarray(image)


def _forest(rng: random.Random, height: int, width: int) -> np.ndarray:
    image, draw = _draw_on(_vertical([(0, (178, 214, 190)), (0.6, (112, 164, 118)), (0.72, (70, 104, 58)),
                                      (1, (52, 76, 40))], height, width))  # fmt: skip
    for _ in range(9):
        x, size, foot = rng.random() * width, rng.uniform(0.4, 0.62) * height, rng.uniform(0.68, 0.8) * height
        shade = rng.randint(0, 34)
        draw.rectangle((x - width * 0.012, foot - size * 0.3, x + width * 0.012, foot), fill=(82, 58, 38))
        for level in range(3):
            low, half = foot - size * (0.12 + 0.26 * level), size * (0.24 - 0.05 * level)
            draw.polygon(((x, low - size * 0.4), (x - half, low), (x + half, low)),
                         fill=(26 + shade, 88 + shade, 52 + shade))  # fmt: skip
    return np.asarray(image)


_LANDSCAPE = {
    "beach": _beach, "meadow": _meadow, "night sky": _night_sky, "snowy landscape": _snowy, "desert": _desert,
    "sea": _sea, "mountains": _mountains, "sunset": _sunset, "forest": _forest,
}  # fmt: skip


class Photos:
    """Photographs of one split, decoded once at a bounded size.

    Args:
        folder: Folder with `index.jsonl` (file, split, ...) and the pictures.
        split: "train" or "test": only photographs of that split are read.
        pixels: Short side kept in memory.

    Raises:
        ValueError: No index, or no photograph of the split.
    """

    def __init__(self, folder: Path, split: str, pixels: int) -> None:
        self.folder, self.pixels = folder, pixels
        try:
            lines = (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.strip()]
            self.licences = {entry["file"]: entry.get("licence", "unknown") for entry in entries}
            self.files = sorted(entry["file"] for entry in entries if entry.get("split", "train") == split)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"photos folder {folder} needs an index.jsonl (file, split): {error!r}") from error
        if not self.files:
            raise ValueError(f"photos folder {folder} has no photograph of split {split!r} in index.jsonl")
        weights = np.cumsum([MONOTONOUS.get(file.split("-")[0], 1.0) for file in self.files])
        self._cumulative = weights.tolist()
        self._kept: dict[str, np.ndarray] = {}
        self._room = MAX_BYTES

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Draw the description of a crop (shares of the free room, so that it fits every canvas)."""
        file = rng.choices(self.files, cum_weights=self._cumulative)[0]
        return {
            "kind": "photo",
            "file": file,
            "zoom": round(rng.uniform(0.72, 1.0), 3),
            "left": round(rng.random(), 3),
            "top": round(rng.random(), 3),
            "flip": rng.random() < 0.5,
        }

    def render(self, spec: dict[str, Any], height: int, width: int) -> np.ndarray:
        """Cut the described crop; uint8 (height, width, 3)."""
        kept = self._load(spec["file"])
        full_height, full_width = kept.shape[:2]
        scale = min(full_height / height, full_width / width) * spec["zoom"]
        crop_height, crop_width = int(height * scale), int(width * scale)
        top = int((full_height - crop_height) * spec["top"])
        left = int((full_width - crop_width) * spec["left"])
        crop = Image.fromarray(kept[top : top + crop_height, left : left + crop_width])
        crop = crop.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(ImageOps.mirror(crop) if spec["flip"] else crop)

    def _load(self, file: str) -> np.ndarray:
        kept = self._kept.get(file)
        if kept is None:
            with Image.open(self.folder / file) as image:
                image.draft("RGB", (self.pixels, self.pixels))
                scale = min(1.0, self.pixels / min(image.size))
                size = (round(image.width * scale), round(image.height * scale))
                sampling = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC
                kept = np.asarray(image.convert("RGB").resize(size, sampling))
            self._room -= kept.nbytes
            while self._room < 0 and self._kept:
                self._room += self._kept.pop(next(iter(self._kept))).nbytes
            self._kept[file] = kept
        return kept
