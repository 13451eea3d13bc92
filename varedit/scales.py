"""The ladder of token grids for a size class and an aspect ratio: the only such table in the project.

Next-scale prediction (paper section 3.1) generates an image as K grids of tokens, coarse to fine. Every aspect
template has one ladder of 13 grids; a size class uses its first few. One token always covers 16 x 16 pixels of the
finest grid, whatever the image tokenizer's stride.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

PIXELS_PER_TOKEN = 16

NUM_SCALES = {128: 5, 256: 7, 512: 10, 768: 12, 1024: 13}
"""Size class (side in pixels when square) -> number of scales."""

SIZES = tuple(NUM_SCALES)

# Portrait ladders, height over width >= 1; landscape ladders are their mirror images.
_PORTRAIT_LADDERS: dict[float, str] = {
    1.000: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.250: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.500: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.750: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.000: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.500: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.000: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
_LANDSCAPE_KEYS = {1.250: 0.800, 1.333: 0.750, 1.500: 0.666, 1.750: 0.571, 2.000: 0.500, 2.500: 0.400, 3.000: 0.333}

Grid = tuple[int, int]


def _ladders() -> dict[float, tuple[Grid, ...]]:
    ladders: dict[float, tuple[Grid, ...]] = {}
    for ratio, text in _PORTRAIT_LADDERS.items():
        grids = [(int(h), int(w)) for h, w in (cell.split("x") for cell in text.split())]
        ladders[ratio] = tuple(grids)
        if ratio in _LANDSCAPE_KEYS:
            ladders[_LANDSCAPE_KEYS[ratio]] = tuple((w, h) for h, w in grids)
    return dict(sorted(ladders.items()))


_LADDERS = _ladders()

ASPECT_RATIOS = tuple(_LADDERS)
"""The 15 templates as height over width, ascending."""


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids of one generation, coarse to fine.

    Attributes:
        size: size class, side in pixels when square: one of `SIZES`.
        height_over_width: aspect template: one of `ASPECT_RATIOS`.
    """

    size: int
    height_over_width: float

    def __post_init__(self) -> None:
        if self.size not in NUM_SCALES:
            raise ValueError(f"size {self.size} is not a size class; use one of {', '.join(map(str, SIZES))}")
        if self.height_over_width not in _LADDERS:
            raise ValueError(
                f"height_over_width {self.height_over_width} is not a template; use one of "
                + ", ".join(f"{ratio:.3f}" for ratio in ASPECT_RATIOS)
            )

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Token grids (h, w), coarse to fine."""
        return _LADDERS[self.height_over_width][: NUM_SCALES[self.size]]

    @cached_property
    def reference_grids(self) -> tuple[Grid, ...]:
        """The full ladder of the 1024 class: rotary positions are counted on its finest grid at every size."""
        return _LADDERS[self.height_over_width]

    @property
    def num_scales(self) -> int:
        return len(self.grids)

    @property
    def finest(self) -> Grid:
        return self.grids[-1]

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.finest[0] * PIXELS_PER_TOKEN, self.finest[1] * PIXELS_PER_TOKEN

    @cached_property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each scale in the flattened ladder, and its total length last (num_scales + 1 numbers)."""
        starts = [0]
        for count in self.num_tokens:
            starts.append(starts[-1] + count)
        return tuple(starts)


@cache
def scale_schedule(size: int, height_over_width: float = 1.0) -> ScaleSchedule:
    """The schedule of one size class and template. Raises ValueError if either does not exist."""
    return ScaleSchedule(size, height_over_width)


def nearest_schedule(size: int, height: int, width: int) -> ScaleSchedule:
    """The schedule whose real pixel shape is nearest in log aspect ratio to an image of `height` x `width` pixels.

    Raises:
        ValueError: unknown size class, or a side that is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no aspect ratio; both sides must be at least 1")
    wanted = math.log(height / width)

    def distance(schedule: ScaleSchedule) -> float:
        h, w = schedule.finest
        return abs(math.log(h / w) - wanted)

    return min((scale_schedule(size, ratio) for ratio in ASPECT_RATIOS), key=distance)
