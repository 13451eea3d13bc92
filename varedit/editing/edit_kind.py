"""Local or global: one change of the whole picture has no outside that could be kept, a change in places has.

A change of tone, of detail or of style may leave most pixels almost as they were: gray stays gray in black and white,
flat areas stay flat in a blur. So the extent of the change alone decides little; what is asked is whether the pixels
that seem unchanged follow the others.
"""

from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from PIL import Image
from scipy import ndimage

from varedit.editing.difference import SMOOTHING, Calibration, Difference, local_contrast, rms, smoothed
from varedit.editing.fields import blur, pixels, planes
from varedit.image_reader import LoadedImage

Kind = Literal["none", "local", "global"]
Orientation = Literal["same", "mirrored", "upside_down", "rotated"]

ORIENTATIONS: dict[str, tuple[slice, slice]] = {
    "same": (slice(None), slice(None)),
    "mirrored": (slice(None), slice(None, None, -1)),
    "upside_down": (slice(None, None, -1), slice(None)),
    "rotated": (slice(None, None, -1), slice(None, None, -1)),
}
"""Orientation -> index of rows and columns that turns the source that way."""


def turn_alpha(source: LoadedImage, orientation: Orientation) -> LoadedImage:
    """The source with its transparency turned as an edit turned its colours."""
    if source.alpha is None or orientation == "same":
        return source
    turn = ORIENTATIONS[orientation]
    alpha = Image.fromarray(np.ascontiguousarray(np.asarray(source.alpha)[turn]))
    return replace(source, alpha=alpha, alpha16_HW=None if source.alpha16_HW is None else source.alpha16_HW[turn])


NUM_SAMPLES = 20_000
"""Pixels that a colour transform is fitted to."""

RIDGE = 1e-3
"""Pull of its coefficients to no change, a pixel; colours run from 0 to 1."""

OUTLIER = 0.05
"""Beyond this error (12 levels) a pixel is taken for changed otherwise."""

NUM_ROUNDS = 6
"""How often it is fitted anew with outliers weighing less."""


@dataclass(frozen=True)
class Evidence:
    """What tells one change of the whole picture from changes in places. Shares from 0 to 1.

    Attributes:
        area: of the picture that changed.
        spread: of the 16 tiles of the picture in which something changed.
        consistent: of the picture that one colour transform explains.
        consistent_outside: the same, of the unchanged part: a tone edit leaves alone only what it maps to itself,
            a new background leaves objects alone that it would have mapped to something else.
        inside: of the changed part that the transform explains.
        shift: how far the transform moves the unchanged part, in noises of flat areas.
        follows: correlation of the unchanged part's faint differences with that shift. Noise follows a transform that
            was fitted to it up to about 0.5.
        structure_lost: error of the transform over the smallest error for the picture turned or mirrored. Near 1
            nothing of the source's layout is left; above 2 the picture was turned.
        fine: of the difference's energy that is gone after a wide blur: blur, sharpen, pixelate change detail only.
        weaker, stronger: of the 16 tiles whose contrast is a quarter weaker, a third stronger than the source's.
        island: of the source's contrast that lies in the largest unchanged area.
    """

    area: float
    spread: float
    consistent: float
    consistent_outside: float
    inside: float
    shift: float
    follows: float
    structure_lost: float
    fine: float
    weaker: float
    stronger: float
    island: float

    @property
    def is_tone(self) -> bool:
        """One colour transform of the whole picture."""
        if self.structure_lost < 0.75 and self.shift >= 2.3 and self.follows >= 0.78:
            return True
        if self.structure_lost < 0.6 and self.shift >= 1.25 and self.follows >= 0.55:
            # One coloured object that is gone or recoloured is a transform as well, of one place: kept local.
            if self.spread >= 0.2 if self.inside >= 0.5 else self.area < 0.04:
                return True
        if self.consistent < 0.7 or self.inside < 0.4 or self.spread < 0.6:
            return False
        if self.area >= 0.97:  # no outside to ask, and flat pictures have little layout to lose
            return self.structure_lost < 0.9
        return self.structure_lost < 0.6 and (self.area >= 0.85 or self.consistent_outside >= 0.8)

    @property
    def is_filter(self) -> bool:
        """A change of detail everywhere: blur, sharpen, pixelate."""
        redrawn = max(self.weaker, self.stronger)
        in_places = self.fine >= 0.78 and self.spread >= 0.2 and redrawn >= 0.2
        return in_places or (self.fine >= 0.65 and redrawn >= 0.5) or (self.fine >= 0.55 and redrawn >= 0.7)

    @property
    def is_style(self) -> bool:
        """Nearly everything changed, the layout is still the source's, and nothing in one piece was spared."""
        return self.area >= 0.85 and self.structure_lost < 0.75 and self.island < 0.03


def measure(diff: Difference, hard_HW: np.ndarray, calibration: Calibration) -> tuple[Evidence, Orientation]:
    """Measures what `Evidence` holds, and the orientation whose source explains the result best."""
    source, result = diff.source_HW3, diff.result_HW3
    errors, explained = {}, source
    for name, turn in ORIENTATIONS.items():
        colours = source[turn].reshape(-1, 3)
        transformed = apply_tone(fit_tone(colours, result.reshape(-1, 3)), colours).reshape(result.shape)
        errors[name] = float(np.abs(transformed - result).mean()) + 0.5
        explained = transformed if name == "same" else explained
    best = min(errors, key=lambda name: errors[name])
    untouched = replace(calibration, token=0)
    residual = replace(diff, pixel_HW=smoothed(result - explained, SMOOTHING * diff.cell))
    consistent = residual.evidence(untouched) < np.log(calibration.low)
    # Faint differences show once the noise of single pixels is gone.
    change, tone = (pixels(blur(planes(x - source), diff.cell / 4)) for x in (result, explained))
    outside = ~ndimage.binary_dilation(hard_HW, iterations=3)
    inside = rms(change - tone) < np.maximum(0.4 * rms(change), 2 * calibration.floor)
    shift, follows = _follow(change[outside], tone[outside])
    energy, coarse = (smoothed(result - source, share * diff.cell) for share in (SMOOTHING, 0.5))
    ratios = _contrast_ratios(source, result, calibration.floor)
    labels, count = ndimage.label(ndimage.binary_opening(~hard_HW, iterations=3))
    islands = np.bincount(labels.ravel(), diff.contrast_HW.ravel(), minlength=count + 1)[1:]
    found = Evidence(
        area=float(hard_HW.mean()),
        spread=float(np.mean(_tiles(hard_HW) > 0.1)),
        consistent=float(consistent.mean()),
        consistent_outside=float(consistent[~hard_HW].mean()) if not hard_HW.all() else 1.0,
        inside=float(inside[hard_HW].mean()) if hard_HW.any() else 0.0,
        shift=shift / calibration.floor,
        follows=follows,
        structure_lost=errors["same"] / min(errors[name] for name in errors if name != "same"),
        fine=float(1 - np.square(coarse).sum() / max(np.square(energy).sum(), 1e-6)),
        weaker=float(np.mean(ratios < 0.75)),
        stronger=float(np.mean(ratios > 1.33)),
        island=float(islands.max(initial=0) / max(diff.contrast_HW.sum(), 1e-6)),
    )
    return found, cast(Orientation, best)


def classify(diff: Difference, hard_HW: np.ndarray, calibration: Calibration) -> tuple[Kind, Orientation]:
    """The kind of a change, and the orientation of the result. `hard_HW` is the changed area, bool (H, W)."""
    if calibration.token and not diff.token_HW.any():
        return "none", "same"  # the same bits
    found, best = measure(diff, hard_HW, calibration)
    if best != "same" and found.structure_lost > 2 and hard_HW.any():
        return "global", best
    if found.is_filter or found.is_tone or (hard_HW.any() and found.is_style):
        return "global", "same"
    return ("local" if hard_HW.any() else "none"), "same"


def _follow(change_n3: np.ndarray, tone_n3: np.ndarray) -> tuple[float, float]:
    """Size of a tone's change in levels, and the correlation of the true change with it."""
    if len(tone_n3) < 2:
        return 0.0, 0.0
    size, real = (float(np.sqrt(np.square(x).mean())) for x in (tone_n3, change_n3))
    return size, float((change_n3 * tone_n3).mean()) / max(size * real, 1e-6)


def _contrast_ratios(source: np.ndarray, result: np.ndarray, floor: float) -> np.ndarray:
    """Contrast of the result over that of the source, of 16 tiles. The noise makes flat tiles alike."""
    before, after = (_tiles(local_contrast(x)) + floor / 2 for x in (source, result))
    return after / before


def _tiles(values_HW: np.ndarray) -> np.ndarray:
    """Means of 4 x 4 tiles (fewer where a side has fewer pixels)."""
    bands = (band for band in np.array_split(values_HW, 4) if band.size)
    return np.array([tile.mean() for band in bands for tile in np.array_split(band, 4, axis=1) if tile.size])


def fit_tone(source_n3: np.ndarray, result_n3: np.ndarray) -> np.ndarray:
    """The one quadratic colour transform that explains most of a result. Robust: outliers fade out.

    Args:
        source_n3, result_n3: float32, levels.

    Returns:
        Coefficients of the change by `_quadratic`, float32 (10, 3). Without contrast, no change.
    """
    step = max(1, len(source_n3) // NUM_SAMPLES)
    colours_n3, results_n3 = (x[::step] / np.float32(255) for x in (source_n3, result_n3))
    inputs = _quadratic(colours_n3).astype(np.float64)
    change = (results_n3 - colours_n3).astype(np.float64)
    weights = np.ones((len(inputs), 1))
    ridge = RIDGE * len(inputs) * np.eye(inputs.shape[1])
    for _ in range(NUM_ROUNDS):
        weighted = (inputs * weights).T
        transform = np.linalg.solve(weighted @ inputs + ridge, weighted @ change)
        error = np.sqrt(np.square(inputs @ transform - change).mean(1, keepdims=True))
        weights = 1 / (1 + np.square(error / OUTLIER))
    return transform.astype(np.float32)


def apply_tone(transform: np.ndarray, source_n3: np.ndarray) -> np.ndarray:
    """Colours under a transform of `fit_tone`, (n, 3)."""
    return source_n3 + 255 * (_quadratic(source_n3 / np.float32(255)) @ transform)


def tone_gain(transform: np.ndarray, source_n3: np.ndarray) -> np.ndarray:
    """Its derivative at each colour, float32 (3, 3, n): [i, j] is d result_i / d source_j."""
    red, green, blue = (source_n3 / np.float32(255)).T
    return np.stack([
        np.stack([
            np.float32(i == 0) + c[1] + 2 * c[4] * red + c[7] * green + c[9] * blue,
            np.float32(i == 1) + c[2] + 2 * c[5] * green + c[7] * red + c[8] * blue,
            np.float32(i == 2) + c[3] + 2 * c[6] * blue + c[8] * green + c[9] * red,
        ])
        for i, c in enumerate(transform.T)
    ])  # fmt: skip


def _quadratic(colours_n3: np.ndarray) -> np.ndarray:
    """1, the channels and their products: (n, 10)."""
    red, green, blue = colours_n3.T
    products = [red * red, green * green, blue * blue, red * green, green * blue, blue * red]
    return np.stack([np.ones_like(red), red, green, blue, *products], 1)
