"""Edits of the whole picture: tone, style and weather. Each is a function of the pixels alone (and of a seed)."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from varedit.data.synthetic.vocabulary import COLOURS


def _gains(red: float, green: float, blue: float, offset: tuple[int, int, int] = (0, 0, 0)) -> Callable:
    table = [
        min(255, max(0, round(value * gain + shift)))
        for gain, shift in zip((red, green, blue), offset, strict=True)
        for value in range(256)
    ]
    return lambda image: image.point(table)


def _sepia(image: Image.Image) -> Image.Image:
    return _gains(1.1, 0.92, 0.64, (18, 6, 0))(image.convert("L").convert("RGB"))


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(image.size) * 0.022))


def _sharpen(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.UnsharpMask(radius=max(1.5, max(image.size) * 0.014), percent=150, threshold=0))


def _pixelate(image: Image.Image) -> Image.Image:
    block = max(2, round(min(image.size) / 16))
    small = image.resize((max(1, image.width // block), max(1, image.height // block)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _vignette(image: Image.Image) -> Image.Image:
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j].astype(np.float32)
    fall = np.clip(1.25 - 0.72 * (x * x + y * y), 0.08, 1.0)[..., None]
    return Image.fromarray((np.asarray(image) * fall).astype(np.uint8))


def _tint(image: Image.Image, colour: str) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, COLOURS[colour]), 0.45)


def _median(image: Image.Image, kernel: int) -> Image.Image:
    """Median filter at about 128 pixels, so that a style looks alike at every size (and takes no longer)."""
    scale = 128 / min(image.size)
    if scale > 0.8:
        return image.filter(ImageFilter.MedianFilter(kernel))
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    return small.filter(ImageFilter.MedianFilter(kernel)).resize(image.size, Image.Resampling.BICUBIC)


def _oil(image: Image.Image) -> Image.Image:
    smooth = _median(image, 5).filter(ImageFilter.UnsharpMask(3, 140, 0))
    return ImageEnhance.Color(smooth).enhance(1.7)


def _cartoon(image: Image.Image) -> Image.Image:
    smooth = _median(image, 5).filter(ImageFilter.GaussianBlur(1))
    flat = ImageOps.posterize(smooth, 3)
    flat = ImageEnhance.Color(ImageEnhance.Brightness(flat).enhance(1.12)).enhance(1.7)
    edges = smooth.convert("L").filter(ImageFilter.FIND_EDGES)
    # FIND_EDGES marks the outermost pixels of every picture: leave them white.
    ink = Image.new("L", image.size, 255)
    ink.paste(edges.point(lambda v: 0 if v > 40 else 255).crop((2, 2, image.width - 2, image.height - 2)), (2, 2))
    return ImageChops.multiply(flat, ink.filter(ImageFilter.SMOOTH).convert("RGB"))


def _sketch(image: Image.Image) -> Image.Image:
    grey = image.convert("L").filter(ImageFilter.GaussianBlur(min(image.size) / 160))
    blurred = grey.filter(ImageFilter.GaussianBlur(max(image.size) * 0.03))
    ratio = np.asarray(grey, np.float32) * 250.0 / (np.asarray(blurred, np.float32) + 6.0)
    drawn = np.clip(255 - (255 - np.minimum(ratio, 255)) * 1.5, 0, 255).astype(np.uint8)
    return Image.fromarray(drawn).convert("RGB")


def _watercolour(image: Image.Image) -> Image.Image:
    soft = _median(image, 7).filter(ImageFilter.SMOOTH_MORE)
    return Image.blend(ImageEnhance.Color(soft).enhance(1.3), Image.new("RGB", image.size, (255, 252, 244)), 0.32)


def _snow(image: Image.Image, seed: int) -> Image.Image:
    rng = random.Random(seed)
    pale = Image.blend(_gains(0.95, 1.0, 1.08)(image), Image.new("RGB", image.size, (226, 232, 242)), 0.3)
    draw = ImageDraw.Draw(pale)
    unit = min(image.size)
    for _ in range(110):
        x, y, r = rng.random() * image.width, rng.random() * image.height, unit * rng.uniform(0.007, 0.017)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))
    return pale


def _rain(image: Image.Image, seed: int) -> Image.Image:
    rng = random.Random(seed)
    dull = _gains(0.62, 0.68, 0.78)(ImageEnhance.Color(image).enhance(0.5))
    draw = ImageDraw.Draw(dull)
    unit = min(image.size)
    for _ in range(75):
        x, y, length = rng.random() * image.width, rng.random() * image.height, unit * rng.uniform(0.06, 0.13)
        draw.line((x, y, x - 0.3 * length, y + length), fill=(200, 212, 228), width=max(1, unit // 110))
    return dull


def _fog(image: Image.Image) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, (214, 217, 222)), 0.62)


def _night(image: Image.Image) -> Image.Image:
    return _gains(0.24, 0.3, 0.5, (0, 2, 14))(ImageEnhance.Color(image).enhance(0.6))


def _sunset(image: Image.Image) -> Image.Image:
    warm = _gains(1.12, 0.76, 0.52, (22, 8, 6))(image)
    glow = np.linspace(0.42, 0.05, image.height, dtype=np.float32)[:, None, None]
    mixed = np.asarray(warm) * (1 - glow) + np.array((255, 138, 60), np.float32) * glow
    return Image.fromarray(mixed.astype(np.uint8))


_PLAIN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grayscale": lambda image: image.convert("L").convert("RGB"),
    "sepia": _sepia,
    "invert": ImageOps.invert,
    "brighter": _gains(1.45, 1.45, 1.45, (14, 14, 14)),
    "slightly_brighter": _gains(1.2, 1.2, 1.2, (6, 6, 6)),
    "darker": _gains(0.48, 0.48, 0.48),
    "slightly_darker": _gains(0.74, 0.74, 0.74),
    "warmer": _gains(1.16, 1.02, 0.68, (12, 2, 0)),
    "colder": _gains(0.7, 0.96, 1.18, (0, 2, 14)),
    "more_contrast": _gains(1.75, 1.75, 1.75, (-96, -96, -96)),
    "less_contrast": _gains(0.45, 0.45, 0.45, (70, 70, 70)),
    "more_saturation": lambda image: ImageEnhance.Color(image).enhance(2.2),
    "less_saturation": lambda image: ImageEnhance.Color(image).enhance(0.35),
    "blur": _blur,
    "sharpen": _sharpen,
    "pixelate": _pixelate,
    "posterize": lambda image: image.filter(ImageFilter.GaussianBlur(1)).point(
        [round(v / 85) * 85 for v in range(256)] * 3
    ),
    "mirror": ImageOps.mirror,
    "upside_down": ImageOps.flip,
    "vignette": _vignette,
    "oil_painting": _oil,
    "cartoon": _cartoon,
    "sketch": _sketch,
    "watercolour": _watercolour,
    "fog": _fog,
    "night": _night,
    "sunset": _sunset,
}
_SEEDED: dict[str, Callable[[Image.Image, int], Image.Image]] = {"snow": _snow, "rain": _rain}

# name -> sampling weight
TONES: dict[str, float] = {
    "grayscale": 3, "sepia": 2, "invert": 2, "brighter": 2, "slightly_brighter": 1, "darker": 2, "slightly_darker": 1,
    "warmer": 2, "colder": 2, "more_contrast": 1.2, "less_contrast": 1.2, "more_saturation": 1.5,
    "less_saturation": 1, "tint": 2.5, "blur": 2, "sharpen": 0.8, "mirror": 1.6, "upside_down": 1.4, "vignette": 1,
}  # fmt: skip
STYLES: dict[str, float] = {
    "pixelate": 2, "posterize": 1.5, "oil_painting": 1, "cartoon": 1.5, "sketch": 0.8, "watercolour": 1
}  # fmt: skip
WEATHERS: dict[str, float] = {"snow": 1, "rain": 1, "fog": 1, "night": 1.6, "sunset": 1.2}


def apply(name: str, image: Image.Image, colour: str = "", seed: int = 0) -> Image.Image:
    """Apply one edit of the whole picture.

    Args:
        name: A key of `TONES`, `STYLES` or `WEATHERS`.
        image: RGB picture.
        colour: Colour name, for "tint" only.
        seed: Places the flakes and drops of "snow" and "rain".

    Returns:
        An RGB picture of the same size.
    """
    if name == "tint":
        return _tint(image, colour)
    if name in _SEEDED:
        return _SEEDED[name](image, seed)
    return _PLAIN[name](image)


_DESCRIPTIONS = {
    "grayscale": "in black and white", "sepia": "in sepia", "invert": "as a negative", "brighter": "brightened",
    "slightly_brighter": "slightly brightened", "darker": "darkened", "slightly_darker": "slightly darkened",
    "warmer": "in warm colours", "colder": "in cold colours", "more_contrast": "with strong contrast",
    "less_contrast": "with weak contrast", "more_saturation": "in vivid colours", "less_saturation": "in muted colours",
    "blur": "blurred", "sharpen": "sharpened", "pixelate": "pixelated", "posterize": "as a poster",
    "mirror": "mirrored", "upside_down": "upside down", "vignette": "with a vignette",
    "oil_painting": "as an oil painting", "cartoon": "as a cartoon", "sketch": "as a pencil sketch",
    "watercolour": "as a watercolour", "fog": "in fog", "night": "at night", "sunset": "at sunset",
    "snow": "in falling snow", "rain": "in the rain",
}  # fmt: skip


def describe(name: str, colour: str = "") -> str:
    """Words for a caption of the edited picture."""
    return f"tinted {colour}" if name == "tint" else _DESCRIPTIONS[name]
