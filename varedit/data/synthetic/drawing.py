"""How one object looks: a small patch of colour and opacity, cached by everything that shapes it."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varedit.data.synthetic.vocabulary import COLOURS, HUES

FINE = 4  # supersampling of outlines


def _polygon_points(name: str) -> list[tuple[float, float]]:
    """Outline in the unit square, for the shapes that are polygons."""

    def regular(count: int, start: float = -90.0, inner: float | None = None) -> list[tuple[float, float]]:
        points = []
        for step in range(count * (2 if inner else 1)):
            radius = 0.5 * (inner if inner and step % 2 else 1.0)
            angle = math.radians(start + 360.0 * step / (count * (2 if inner else 1)))
            points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
        return points

    table = {
        "square": [(0.07, 0.07), (0.93, 0.07), (0.93, 0.93), (0.07, 0.93)],
        "rectangle": [(0.0, 0.22), (1.0, 0.22), (1.0, 0.78), (0.0, 0.78)],
        "triangle": [(0.5, 0.05), (1.0, 0.95), (0.0, 0.95)],
        "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
        "hexagon": regular(6, 0.0),
        "pentagon": regular(5),
        "star": regular(5, inner=0.42),
        "arrow": [(0, 0.34), (0.55, 0.34), (0.55, 0.08), (1, 0.5), (0.55, 0.92), (0.55, 0.66), (0, 0.66)],
        "cross": [(0.34, 0.02), (0.66, 0.02), (0.66, 0.34), (0.98, 0.34), (0.98, 0.66), (0.66, 0.66), (0.66, 0.98),
                  (0.34, 0.98), (0.34, 0.66), (0.02, 0.66), (0.02, 0.34), (0.34, 0.34)],
    }  # fmt: skip
    return table[name]


def _outline(draw: ImageDraw.ImageDraw, name: str, side: int) -> None:
    if name == "circle":
        draw.ellipse((1, 1, side - 2, side - 2), fill=255)
    elif name == "oval":
        draw.ellipse((1, side * 0.2, side - 2, side * 0.8), fill=255)
    elif name == "ring":
        draw.ellipse((1, 1, side - 2, side - 2), fill=255)
        draw.ellipse((side * 0.26, side * 0.26, side * 0.74, side * 0.74), fill=0)
    elif name == "crescent":
        draw.ellipse((1, 1, side - 2, side - 2), fill=255)
        draw.ellipse((side * 0.32, -side * 0.04, side * 1.16, side * 0.8), fill=0)
    elif name == "heart":
        angle = np.linspace(0, 2 * np.pi, 72)
        x = 16 * np.sin(angle) ** 3
        y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
        points = [((px / 34 + 0.5) * side, (py / 34 + 0.55 - 0.06) * side) for px, py in zip(x, y, strict=True)]
        draw.polygon(points, fill=255)
    else:
        draw.polygon([(x * side, y * side) for x, y in _polygon_points(name)], fill=255)


def _trim(image: Image.Image) -> Image.Image:
    box = image.getbbox()
    return image.crop(box) if box else image


@lru_cache(maxsize=8192)
def shape_alpha(name: str, pixels: int, angle: int) -> np.ndarray:
    """Opacity of a flat shape, float32 (height, width) in 0..1."""
    side = pixels * FINE
    image = Image.new("L", (side, side))
    _outline(ImageDraw.Draw(image), name, side)
    if angle:
        image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    image = _trim(image)
    # At least as many pixels as needed so that the reduced patch is never empty.
    size = (max(1, round(image.width / FINE)), max(1, round(image.height / FINE)))
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / 255.0


@lru_cache(maxsize=2048)
def primitive_maps(name: str, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Opacity, shade (about 0.4..1.15) and highlight (0..1) of a lit solid, each float32 (height, width)."""
    side = pixels * 3
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    y, x = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side
    gloss = np.zeros_like(x)
    if name == "ball":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        nx, ny = 2 * x - 1, 2 * y - 1
        nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0, 1))
        light = np.clip(-0.45 * nx - 0.6 * ny + 0.66 * nz, 0, 1)
        shade, gloss = 0.34 + 0.82 * light, np.clip(light, 0, 1) ** 22
    elif name == "cylinder":
        draw.rectangle((side * 0.14, side * 0.13, side * 0.86, side * 0.87), fill=255)
        draw.ellipse((side * 0.14, side * 0.74, side * 0.86, side * 0.995), fill=255)
        draw.ellipse((side * 0.14, side * 0.005, side * 0.86, side * 0.26), fill=255)
        u = (x - 0.14) / 0.72
        shade = 0.42 + 0.68 * np.clip(np.sin(np.pi * np.clip(u * 0.8 + 0.12, 0, 1)), 0, 1) ** 1.4
        top = ((x - 0.5) / 0.36) ** 2 + ((y - 0.1325) / 0.1275) ** 2 < 1
        gloss = np.where(top, 0, np.exp(-(((u - 0.34) / 0.07) ** 2)))
        shade = np.where(top, 1.18, shade)
    elif name == "cone":
        draw.polygon(((side * 0.5, 0), (side * 0.08, side * 0.87), (side * 0.92, side * 0.87)), fill=255)
        draw.ellipse((side * 0.08, side * 0.75, side * 0.92, side * 0.995), fill=255)
        half = np.maximum(0.42 * y / 0.87, 1e-3)
        u = np.clip((x - 0.5) / (2 * half) + 0.5, 0, 1)
        shade = 0.38 + 0.76 * np.clip(np.sin(np.pi * np.clip(u * 0.8 + 0.12, 0, 1)), 0, 1) ** 1.4
        gloss = np.exp(-(((u - 0.34) / 0.06) ** 2))
    else:
        assert name == "cube", name
        corners = ((0.5, 0), (0.97, 0.24), (0.97, 0.74), (0.5, 0.995), (0.03, 0.74), (0.03, 0.24))
        draw.polygon([(side * a, side * b) for a, b in corners], fill=255)
        top = y < 0.49 - 0.25 * np.abs(x - 0.5) / 0.47
        shade = np.where(top, 1.18, np.where(x < 0.5, 0.82, 0.5)).astype(np.float32)
    size = (pixels, pixels)
    maps = (np.asarray(image, np.float32) / 255.0, shade.astype(np.float32), gloss.astype(np.float32))
    return tuple(np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BOX)) for layer in maps)  # type: ignore


def primitive_patch(
    name: str, pixels: int, colour: tuple[int, int, int], material: str
) -> tuple[np.ndarray, np.ndarray]:
    """A lit solid of one colour and material: colour float32 (h, w, 3) in 0..255, opacity float32 (h, w)."""
    alpha, shade, gloss = primitive_maps(name, pixels)
    base = np.array(colour, np.float32)
    y, x = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]].astype(np.float32) / pixels
    body = np.broadcast_to(base, (*alpha.shape, 3))
    if material == "metal":
        bands = 0.5 + 0.5 * np.sin(9.0 * (y + 0.35 * x) + 2.2 * shade)
        body = (0.45 * base + 0.55 * 190.0) * (0.28 + 1.05 * bands**2)[..., None]
        gloss = np.maximum(gloss, np.clip(bands - 0.86, 0, 1) * 5)
    elif material == "glass":
        rim = np.clip(1.35 - shade, 0, 1)
        alpha = alpha * np.clip(0.3 + 0.5 * rim + 0.6 * gloss, 0, 0.92)
        body = np.broadcast_to(0.75 * base + 0.25 * 235.0, (*alpha.shape, 3))
        shade = 0.35 * shade + 0.65
    elif material == "wood":
        grain = 0.5 + 0.5 * np.sin(46 * (x + 0.1 * np.sin(5 * y)) + 3 * np.sin(7 * y))
        body = np.array((196, 138, 78), np.float32) * (0.68 + 0.42 * grain)[..., None]
    elif material == "striped":
        body = np.where(((y * 5.0 + 0.15) % 1 < 0.5)[..., None], base, np.float32(248 if min(colour) < 200 else 40))
    elif material == "spotted":
        spots = ((x * 4.2) % 1 - 0.5) ** 2 + ((y * 4.2) % 1 - 0.5) ** 2 < 0.085
        body = np.where(spots[..., None], np.float32(248 if min(colour) < 200 else 40), base)
    strength = 0.35 if material == "matte" else 0.75
    lit = body * shade[..., None]
    lit = lit + (255.0 - lit) * np.clip(gloss * strength, 0, 1)[..., None]
    return np.clip(lit, 0, 255).astype(np.float32), alpha


@lru_cache(maxsize=512)
def sign_patch(text: str, width: int, board: str, ink: str) -> tuple[np.ndarray, np.ndarray]:
    """A board with one word: colour float32 (h, w, 3), opacity float32 (h, w)."""
    side = width * 2
    size = 64
    font = _font(size)
    box = font.getbbox(text)
    size = int(size * 0.82 * side / max(1, box[2] - box[0]))
    size = min(size, int(side * 0.42))
    font = _font(size)
    box = font.getbbox(text)
    height = int(side * 0.42)
    image = Image.new("RGBA", (side, height))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, side - 1, height - 1), side * 0.04, fill=(*COLOURS[board], 255))
    edge = max(2, side // 44)
    draw.rounded_rectangle((0, 0, side - 1, height - 1), side * 0.04, outline=(*COLOURS[ink], 255), width=edge)
    place = ((side - box[0] - box[2]) / 2, (height - box[1] - box[3]) / 2)
    draw.text(
        place, text, font=font, fill=(*COLOURS[ink], 255), stroke_width=max(0, size // 26), stroke_fill=COLOURS[ink]
    )
    return split(image.resize((width, max(1, height // 2)), Image.Resampling.BOX))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]


def split(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """An RGBA picture as colour float32 (h, w, 3) and opacity float32 (h, w) in 0..1."""
    pixels = np.asarray(image, np.float32)
    return np.ascontiguousarray(pixels[..., :3]), pixels[..., 3] / 255.0


def sprite_patch(
    master: Image.Image, pixels: int, flip: bool, angle: int, hue: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out whose longest side is `pixels` before turning: colour float32 (h, w, 3), opacity float32 (h, w)."""
    scale = pixels / max(master.size)
    size = (max(2, round(master.width * scale)), max(2, round(master.height * scale)))
    image = master.convert("RGBa").resize(size, Image.Resampling.BOX if scale < 0.4 else Image.Resampling.BICUBIC)
    image = image.convert("RGBA")
    if hue is not None:
        image = shift_hue(image, hue)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle % 90 == 0 and angle:
        turn = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
        image = image.transpose(turn[angle % 360])
    elif angle:
        image = _trim(image.rotate(angle, Image.Resampling.BICUBIC, expand=True))
    return split(image)


def shift_hue(image: Image.Image, colour: str) -> Image.Image:
    """Give the saturated area of an RGBA picture the hue of a named colour; grey parts stay."""
    hsv = np.array(image.convert("RGB").convert("HSV"))
    strong = (hsv[..., 1] > 70) & (hsv[..., 2] > 50)
    hsv[..., 0][strong] = round(HUES[colour] / 360 * 255)
    hsv[..., 1][strong] = np.maximum(hsv[..., 1][strong], 170)
    turned = Image.fromarray(hsv, "HSV").convert("RGB")
    turned.putalpha(image.getchannel("A"))
    return turned
