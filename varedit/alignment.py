"""How far a target is shifted and zoomed against its source, measured on what the edit left unchanged.

Both pictures are cut into overlapping tiles. Phase correlation gives each tile's own displacement; tiles that the edit
touched give no clear answer or their own. One shift and zoom that most of the clear tiles agree on is the motion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

WORKING_SIDE = 256  # longer side in pixels at which tiles are compared
MIN_PEAK = 0.12  # of the phase correlation of a tile: identical tiles give 1, unrelated ones about 0.05
MIN_CONTRAST = 4.0  # standard deviation of a tile in grey levels: flat tiles show no motion
TOLERANCE = 0.6  # pixels at working size between a tile and the motion it agrees with
MIN_MOTION = 0.7  # pixels at working size; below that it is resampling
MIN_TILES = 5
MIN_SHARE = 0.5  # of the clear tiles that agree with the motion
STILL = 0.3  # pixels at working size: a tile that moved less has stayed
ENOUGH_STILL = 0.6  # of the tiles: most pairs are well aligned, and done with early
MAX_NOISE = 1.5  # mean difference of a tile in grey levels that compression alone makes
MAX_STILL = 0.25  # of the clear tiles that have stayed where the motion would have moved them
MIN_SPAN = 0.45  # of width and height that agreeing tiles cover: one moved object is no misalignment
MAX_LEFT = 0.75  # of the difference that may be left once the motion is undone
NUM_HYPOTHESES = 150


@dataclass(frozen=True)
class Motion:
    """Target against source: a point at p from the centre of the source is at p * zoom + (shift_x, shift_y).

    Attributes:
        shift_x, shift_y: Pixels of the picture as given, positive to the right and down.
        zoom: Above 1 if the target is magnified.
        share: Fraction of the clear tiles that agree.
    """

    shift_x: float
    shift_y: float
    zoom: float
    share: float


def find_motion(source: np.ndarray, target: np.ndarray) -> Motion | None:
    """The shift and zoom between two pictures, or None if what is unchanged lies where it was (or nothing is clear).

    Args:
        source: uint8 (height, width, 3). target: the same shape.
    """
    before, scale = _grey(source)
    after, _ = _grey(target)
    if min(before.shape) < 32:
        return None
    centres, tiles = _tiles(before)
    contrast = np.minimum(_contrast(before, tiles), _contrast(after, tiles))
    chosen = np.flatnonzero(contrast > MIN_CONTRAST)
    if len(chosen) < MIN_TILES:
        return None
    same = np.abs(_cut(before, tiles[chosen]) - _cut(after, tiles[chosen])).mean(axis=(1, 2)) < MAX_NOISE
    if same.mean() > ENOUGH_STILL:
        return None
    motion = np.zeros(3)  # zoom - 1, shift x, shift y at working size
    for round_number in range(3):
        moved, peaks = _displacements(before, _undo(after, motion), tiles[chosen])
        clear = peaks > MIN_PEAK
        if clear.sum() < MIN_TILES:
            return None
        points, steps = centres[chosen][clear], moved[clear]
        still = np.hypot(*steps.T) < STILL
        if round_number == 0 and still.mean() > ENOUGH_STILL:
            return None
        update, agree = _consensus(points, steps)
        if (
            round_number == 0
            and (still & (np.hypot(*(update[0] * points + update[1:]).T) > 2 * STILL)).mean() > MAX_STILL
        ):
            return None
        # The second motion happens on top of the first.
        motion = np.array(
            [
                (1 + motion[0]) * (1 + update[0]) - 1,
                *(motion[1:] + (1 + motion[0]) * update[1:]),
            ]
        )
    share = float(agree.mean())
    height, width = before.shape
    far = abs(motion[0]) * np.hypot(height, width) / 2 + np.hypot(*motion[1:])
    span = np.ptp(points[agree], axis=0) / (width, height) if agree.any() else np.zeros(2)
    if far < MIN_MOTION or agree.sum() < MIN_TILES or share < MIN_SHARE or span.min() < MIN_SPAN:
        return None
    if not _explains(before, after, _undo(after, motion), tiles[chosen][clear][agree]):
        return None
    return Motion(float(motion[1] * scale), float(motion[2] * scale), float(1 + motion[0]), share)


def _grey(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """float32 (height, width) with the longer side at most WORKING_SIDE, and the factor back."""
    image = Image.fromarray(pixels).convert("L")
    scale = max(1.0, max(image.size) / WORKING_SIDE)
    if scale > 1:
        size = max(1, round(image.width / scale)), max(1, round(image.height / scale))
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, np.float32), scale


def _tiles(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres (num_tiles, 2) as x, y from the middle of the picture, and tiles as index arrays (num_tiles, 2, side)."""
    height, width = grey.shape
    side = 48 if min(height, width) >= 192 else min(32, 2 * (min(height, width) // 4))
    rows, columns = (np.unique(np.linspace(0, size - side, 2 * size // side - 1).astype(int)) for size in grey.shape)
    corners = np.array([(y, x) for y in rows for x in columns])
    centres = corners[:, ::-1] + (side - 1) / 2 - ((width - 1) / 2, (height - 1) / 2)
    return centres, corners[:, :, None] + np.arange(side)


def _cut(grey: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    return grey[tiles[:, 0, :, None], tiles[:, 1, None, :]]


def _contrast(grey: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    return _cut(grey, tiles).std(axis=(1, 2))


def _displacements(before: np.ndarray, after: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phase correlation of each tile: displacement (num_tiles, 2) as x, y, and the height of its peak."""
    side = tiles.shape[-1]
    window = np.hanning(side)[:, None] * np.hanning(side)[None, :]
    spectra = []
    for grey in (before, after):
        cut = _cut(grey, tiles)
        spectra.append(np.fft.rfft2((cut - cut.mean(axis=(1, 2), keepdims=True)) * window))
    cross = spectra[1] * spectra[0].conj()
    # Frequencies without energy carry noise only: they are weighted down, and the highest ones left out.
    weight = np.exp(-(np.fft.fftfreq(side)[:, None] ** 2 + np.fft.rfftfreq(side)[None, :] ** 2) / (2 * 0.2**2))
    size = np.abs(cross)
    cross = weight * cross / (size + 0.02 * size.mean(axis=(1, 2), keepdims=True) + 1e-9)
    surface = np.fft.fftshift(np.fft.irfft2(cross, (side, side)), axes=(1, 2))
    surface /= np.fft.irfft2(weight, (side, side))[0, 0]
    flat = surface.reshape(len(surface), -1)
    best = flat.argmax(axis=1)
    # Repeating patterns match at many displacements: if a far one is hardly better than staying, the tile has stayed.
    middle = side // 2
    far = np.hypot(best // side - middle, best % side - middle) > 1.5
    best[far & (flat[:, middle * side + middle] > 0.8 * flat.max(axis=1))] = middle * side + middle
    y, x = np.divmod(best, side)
    inner = (x > 0) & (x < side - 1) & (y > 0) & (y < side - 1)
    x, y = np.clip(x, 1, side - 2), np.clip(y, 1, side - 2)
    rows = np.arange(len(surface))
    parts = []
    for left, right in (((y, x - 1), (y, x + 1)), ((y - 1, x), (y + 1, x))):
        a, b, c = surface[rows, *left], surface[rows, y, x], surface[rows, *right]
        curve = a - 2 * b + c
        parts.append(np.clip(np.where(curve < 0, (a - c) / (2 * np.where(curve < 0, curve, 1)), 0), -0.5, 0.5))
    moved = np.stack([x + parts[0], y + parts[1]], axis=1) - middle
    return moved, np.where(inner, flat.max(axis=1), 0)


def _consensus(points: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The zoom - 1 and shift that most tiles agree with, and which agree. The same tiles give the same answer."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(points), (NUM_HYPOTHESES, 2))
    first, second = pairs.T
    apart = points[second] - points[first]
    square = (apart**2).sum(axis=1)
    zoom = (apart * (steps[second] - steps[first])).sum(axis=1) / np.where(square > 0, square, 1)
    shift = steps[first] - zoom[:, None] * points[first]
    left = steps - zoom[:, None, None] * points - shift[:, None, :]
    agree = np.hypot(left[..., 0], left[..., 1]) < TOLERANCE
    best = agree[agree.sum(axis=1).argmax()]
    motion = _fit(points[best], steps[best])
    return motion, np.hypot(*(steps - motion[0] * points - motion[1:]).T) < TOLERANCE


def _fit(points: np.ndarray, steps: np.ndarray) -> np.ndarray:
    ones, zeros = np.ones(len(points)), np.zeros(len(points))
    rows = np.concatenate(
        [np.stack([points[:, 0], ones, zeros], axis=1), np.stack([points[:, 1], zeros, ones], axis=1)]
    )
    return np.linalg.lstsq(rows, steps.T.ravel(), rcond=None)[0]


def _undo(after: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """The target as it would be without the motion."""
    if not motion.any():
        return after
    height, width = after.shape
    zoom, (shift_x, shift_y) = 1 + motion[0], motion[1:]
    # Pillow samples at the centres of pixels, half a pixel from where they are counted.
    x, y = width / 2, height / 2
    matrix = (zoom, 0, x - zoom * x + shift_x, 0, zoom, y - zoom * y + shift_y)
    image = Image.fromarray(after).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(image)


def _explains(before: np.ndarray, after: np.ndarray, undone: np.ndarray, tiles: np.ndarray) -> bool:
    """True if undoing the motion takes away a good part of what the tiles differ by, brightness and contrast apart."""
    height, width = before.shape
    inside = (
        (tiles[:, 0, 0] > 4) & (tiles[:, 0, -1] < height - 5) & (tiles[:, 1, 0] > 4) & (tiles[:, 1, -1] < width - 5)
    )
    tiles = tiles[inside] if inside.sum() >= MIN_TILES else tiles
    left = _unlikeness(before, undone, tiles)
    return bool(left < MAX_LEFT * _unlikeness(before, after, tiles))


def _unlikeness(first: np.ndarray, second: np.ndarray, tiles: np.ndarray) -> float:
    cuts = [_cut(grey, tiles).reshape(len(tiles), -1).astype(np.float64) for grey in (first, second)]
    cuts = [cut - cut.mean(axis=1, keepdims=True) for cut in cuts]
    norms = np.sqrt((cuts[0] ** 2).sum(axis=1) * (cuts[1] ** 2).sum(axis=1)) + 1e-9
    correlation = (cuts[0] * cuts[1]).sum(axis=1) / norms
    return float(np.mean(1 - correlation.clip(0, 1) ** 2))
