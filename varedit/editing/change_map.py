"""The change map: where an edit changed the picture, measured against the noise of a do-nothing edit.

Source and result are compared in two ways. In decoded pixels, both through the same decoder, so that most of the image
tokenizer's own error cancels; and in token space, canvas against canvas, which tells the cells whose bits are the
same: what differs there is the decoder's spill, not an edit. Everything is in the model's pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

Kind = Literal["none", "local", "global"]
Orientation = Literal["same", "mirrored", "upside_down", "rotated"]

SMOOTHING = 0.8
"""Standard deviation in pixels of the filter over the signed difference: single-pixel noise cancels, edges stay."""

GUIDE_RADIUS = 4
"""Pixels, about the side of one code's footprint: evidence is averaged over this much on its own side of an edge."""

GUIDE_CONTRAST = 10.0
"""Levels: an edge of the source or the result of more contrast than this stops the averaging."""

MAX_EVIDENCE = 9.0
"""Scores beyond this count as this much, so that one strong pixel does not carry its neighbours."""

LOW_SHARE = 0.65
"""`Calibration.low` as a share of `high`. Lower keeps more of an edit's faint border and more noise beside it."""

MIN_AREA = 0.0006
"""Smallest change kept, as a share of the frame: about 10 pixels of 128 x 128, less than any object drawn there."""

MAX_HOLE = 0.02
"""Unchanged islands inside a change are filled up to this share of the frame; larger ones are real (a ring)."""

ORIENTATIONS: dict[str, tuple[slice, slice]] = {
    "same": (slice(None), slice(None)),
    "mirrored": (slice(None), slice(None, None, -1)),
    "upside_down": (slice(None, None, -1), slice(None)),
    "rotated": (slice(None, None, -1), slice(None, None, -1)),
}
"""Orientation -> index of rows and columns that turns the source that way."""


@dataclass(frozen=True)
class Calibration:
    """What a do-nothing edit looks like, and how far a change must stand out from it. Made by `calibrate`.

    A pixel's score is its difference divided by the noise expected there, sqrt(floor**2 + slope * contrast), averaged
    (root mean square) over its neighbours within the same edges.

    Attributes:
        floor: noise in flat areas, levels of 255 (root mean square over the channels).
        slope: growth of the noise's variance with local contrast, levels: bit errors show at edges and in texture.
        token: a small difference of two canvases in a cell (Euclidean); a tenth of the cells of a do-nothing edit
            differ by less. Cells that do count less; 0 ignores the canvases.
        high: score that starts a change (a seed).
        low: score down to which a change grows from its seed.
    """

    floor: float = 3.0
    slope: float = 4.0
    token: float = 0.5
    high: float = 6.0
    low: float = 3.9

    def __post_init__(self) -> None:
        if not (self.floor > 0 <= min(self.slope, self.token) and 0 < self.low <= self.high):
            raise ValueError(f"{self} is impossible; floor must be positive and low between 0 and high")

    def noise(self, contrast_HW: np.ndarray) -> np.ndarray:
        """Standard deviation of a do-nothing edit in levels, float32 (H, W)."""
        return np.sqrt(np.float32(self.floor**2) + np.float32(self.slope) * contrast_HW)


@dataclass(frozen=True, eq=False)
class Difference:
    """Two decodings and canvases compared, before any threshold. Model pixels of the content only.

    Attributes:
        source_HW3, result_HW3: float32, levels of 255.
        pixel_HW: float32, smoothed difference in levels (root mean square over the channels).
        contrast_HW: float32, local standard deviation of the source in levels.
        token_HW: float32, Euclidean difference of the canvases, the largest of the cells around a pixel.
    """

    source_HW3: np.ndarray
    result_HW3: np.ndarray
    pixel_HW: np.ndarray
    contrast_HW: np.ndarray
    token_HW: np.ndarray

    def score(self, calibration: Calibration) -> np.ndarray:
        """float32 (H, W): how many times the expected noise a pixel differs by."""
        score_HW = self.pixel_HW / calibration.noise(self.contrast_HW)
        if calibration.token:
            score_HW = score_HW * np.minimum(self.token_HW / calibration.token, 1)
        evidence_HW = np.square(np.minimum(score_HW, MAX_EVIDENCE))
        guided = [_guided_mean(evidence_HW, image.mean(-1)) for image in (self.source_HW3, self.result_HW3)]
        return np.sqrt(np.maximum(sum(guided) / 2, 0)).astype(np.float32)


def _guided_mean(values_HW: np.ndarray, guide_HW: np.ndarray) -> np.ndarray:
    """Mean over a window that does not cross the guide's edges (guided filter): float32 (H, W)."""

    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(x, 2 * GUIDE_RADIUS + 1, mode="reflect")

    guide_mean, values_mean = mean(guide_HW), mean(values_HW)
    variance = mean(np.square(guide_HW - guide_mean))
    slope = (mean(guide_HW * values_HW) - guide_mean * values_mean) / (variance + GUIDE_CONTRAST**2)
    return mean(slope) * guide_HW + mean(values_mean - slope * guide_mean)


@dataclass(frozen=True, eq=False)
class ChangeMap:
    """Where an edit changed the picture.

    Attributes:
        soft_HW: float32 in [0, 1], how surely a pixel changed; 0 outside `hard_HW`'s neighbourhood.
        hard_HW: bool, the changed area: what a local edit may touch.
        kind: "none", "local", or "global": one change of the whole picture, which has no outside.
        orientation: of the result against the source; not "same" for a mirrored or turned picture.
        area: share of the picture that changed, 0 to 1.
        magnitude: mean difference inside the changed area, levels of 255.
        stray: share of the picture outside the given mask that changed; None without a mask.
        remainder_HW: bool; for a turned picture, where it also differs from the turned source; else `hard_HW`.
        difference: the decodings behind it.
        calibration: the thresholds behind it.
    """

    soft_HW: np.ndarray
    hard_HW: np.ndarray
    kind: Kind
    orientation: Orientation
    area: float
    magnitude: float
    stray: float | None
    remainder_HW: np.ndarray
    difference: Difference
    calibration: Calibration

    def to_json(self) -> dict[str, Any]:
        """Plain values: kind, orientation, area, magnitude, stray, box (left, top, right, bottom, shares of the sides).

        The map itself travels as a picture, see `to_image`.
        """
        rows, columns = np.flatnonzero(self.hard_HW.any(1)), np.flatnonzero(self.hard_HW.any(0))
        height, width = self.hard_HW.shape
        box = None
        if len(rows):
            edges = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
            box = [round(float(edge), 4) for edge in edges]
        return {
            "kind": self.kind,
            "orientation": self.orientation,
            "area": round(self.area, 6),
            "magnitude": round(self.magnitude, 3),
            "stray": None if self.stray is None else round(self.stray, 6),
            "box": box,
        }

    def to_image(self) -> Image.Image:
        """The soft map as a picture of mode L, in model pixels."""
        return Image.fromarray(np.rint(self.soft_HW * 255).astype(np.uint8))

    def draw(self, image: Image.Image, colour: tuple[int, int, int] = (255, 0, 90)) -> Image.Image:
        """The map over a picture: changed areas in colour with a bright outline, the rest dimmed to gray.

        Args:
            image: any size of the same aspect ratio; the overlay has its size.
        """
        soft = self.to_image().resize(image.size, Image.Resampling.BILINEAR)
        hard = Image.fromarray(self.hard_HW).convert("L").resize(image.size, Image.Resampling.BILINEAR)
        inside = np.asarray(hard) >= 128
        reach = max(1, min(image.size) // 200)
        outline = inside & ~ndimage.binary_erosion(inside, iterations=reach, border_value=1)
        quiet = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.25)
        tinted = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, colour), 0.35)
        drawn = Image.composite(tinted, quiet, soft)
        drawn.paste(colour, mask=Image.fromarray(outline))
        return drawn


# ---------------------------------------------------------------- comparing


def difference(
    source_canvas: Tensor,
    result_canvas: Tensor,
    source_decoded: Tensor,
    result_decoded: Tensor,
    content_box: tuple[float, float, float, float] | None = None,
) -> Difference:
    """Compare the source and the result of one edit.

    Args:
        source_canvas, result_canvas: (1, d, h, w) or (d, h, w). The source's is the second value of
            `quantizer.encode_bits` of its features.
        source_decoded, result_decoded: (1, 3, H, W) or (3, H, W) in [-1, 1], both canvases through the decoder.
        content_box: of `Prepared`; what the fit invented around the picture is left out. None: there is nothing.

    Raises:
        ValueError: shapes that do not belong together.
    """
    canvases = [_single(canvas, "canvas") for canvas in (source_canvas, result_canvas)]
    decodings = [_single(decoded, "decoding") for decoded in (source_decoded, result_decoded)]
    for first, second in (canvases, decodings):
        if first.shape != second.shape:
            raise ValueError(f"source {tuple(first.shape)} and result {tuple(second.shape)} differ in shape")
    height, width = decodings[0].shape[-2:]
    left, top, right, bottom = (round(edge) for edge in content_box or (0, 0, width, height))
    inside = (slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1)))
    source, result = ((d.permute(1, 2, 0).numpy()[inside] + 1) * np.float32(127.5) for d in decodings)
    cells_hw = (canvases[1] - canvases[0]).square().sum(0).sqrt()
    # A code reaches about one cell beyond its own in the decoding.
    cells_hw = torch.nn.functional.max_pool2d(cells_hw[None, None], 3, 1, 1)
    token = torch.nn.functional.interpolate(cells_hw, size=(height, width), mode="bilinear")[0, 0].numpy()[inside]
    return Difference(source, result, _smoothed(result - source), local_contrast(source), token)


def _smoothed(change_HW3: np.ndarray) -> np.ndarray:
    """`Difference.pixel_HW` of a signed difference."""
    return _rms(ndimage.gaussian_filter(change_HW3, (SMOOTHING, SMOOTHING, 0)))


def local_contrast(image_HW3: np.ndarray, size: int = 5) -> np.ndarray:
    """Standard deviation in a square window, root mean square over the channels: float32 (H, W)."""
    mean = ndimage.uniform_filter(image_HW3, (size, size, 1))
    variance = ndimage.uniform_filter(np.square(image_HW3 - mean), (size, size, 1))
    return np.sqrt(variance.mean(-1))


def _single(tensor: Tensor, name: str) -> Tensor:
    tensor = tensor.detach().float().cpu()
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 3:
        raise ValueError(f"a {name} of shape {tuple(tensor.shape)} is not one image; pass (1, C, H, W) or (C, H, W)")
    return tensor


def _rms(values_HWC: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(values_HWC).mean(-1))


# ---------------------------------------------------------------- thresholds


def calibrate(
    differences: Sequence[Difference],
    ignore: Sequence[np.ndarray | None] | None = None,
    false_alarm: float = 0.02,
) -> Calibration:
    """Thresholds from edits that should have changed nothing.

    Args:
        differences: of do-nothing edits; or of local edits with known masks.
        ignore: bool (H, W) each, pixels to leave out: the known mask, grown by the reach of the decoder.
        false_alarm: share of do-nothing edits in which a seed may be found all the same. Edits with masks also stray
            in earnest: give about the share that does, or the threshold rises until none is seen.

    Raises:
        ValueError: no differences, or all pixels ignored.
    """
    kept = [np.ones(d.pixel_HW.shape, bool) if skip is None else ~skip
            for d, skip in zip(differences, ignore or [None] * len(differences), strict=True)]  # fmt: skip
    if not any(keep.any() for keep in kept):
        raise ValueError("there is nothing to calibrate on; give the differences of at least one do-nothing edit")
    pixels, contrasts, tokens = (
        np.concatenate([getattr(d, name)[keep] for d, keep in zip(differences, kept)]).astype(np.float64)
        for name in ("pixel_HW", "contrast_HW", "token_HW")
    )
    # Medians of groups of equal size and of one contrast: edits that strayed far do not rule the fit. The median of a
    # squared error of two to three independent channels is about 0.7 of its mean.
    groups = np.array_split(np.argsort(contrasts), min(20, len(contrasts)))
    mean_square = np.array([np.median(pixels[group] ** 2) / 0.7 for group in groups])
    contrast = np.array([np.mean(contrasts[group]) for group in groups])
    slope, floor_square = np.polyfit(contrast, mean_square, 1) if np.ptp(contrast) > 0.1 else (0.0, mean_square.mean())
    base = Calibration(
        floor=float(np.sqrt(max(floor_square, mean_square.min(), 0.25))),  # never below half a level: rounding
        slope=float(max(slope, 0)),
        token=float(np.quantile(tokens, 0.1)),
    )
    scores = [d.score(base)[keep] for d, keep in zip(differences, kept)]
    # The level at which each edit still has enough pixels for a seed.
    peaks = [np.sort(s)[-min(len(s), _seed_pixels(d.pixel_HW.size))] for s, d in zip(scores, differences) if len(s)]
    high = float(np.clip(np.quantile(peaks, 1 - false_alarm), 1.5, 0.75 * MAX_EVIDENCE))
    return replace(base, high=high, low=LOW_SHARE * high)


# ---------------------------------------------------------------- the map


def change_map(
    source_canvas: Tensor,
    result_canvas: Tensor,
    source_decoded: Tensor,
    result_decoded: Tensor,
    *,
    content_box: tuple[float, float, float, float] | None = None,
    mask_HW: np.ndarray | None = None,
    calibration: Calibration = Calibration(),  # noqa: B008 - frozen
) -> ChangeMap:
    """Where an edit changed the picture. See `difference` for the first five arguments.

    Args:
        mask_HW: float or bool (H, W) in model pixels, where a change was asked for; gives `stray`.
        calibration: of the model that made the edit.
    """
    diff = difference(source_canvas, result_canvas, source_decoded, result_decoded, content_box)
    score = diff.score(calibration)
    hard = _hysteresis(score, calibration)
    kind, orientation = _classify(diff, hard, calibration)
    soft = np.clip((score - calibration.low / 2) / (calibration.high - calibration.low / 2), 0, 1)
    soft *= ndimage.binary_dilation(hard, iterations=2)
    stray = None
    if mask_HW is not None:
        if content_box is not None:
            left, top, right, bottom = (round(edge) for edge in content_box)
            mask_HW = mask_HW[top : max(bottom, top + 1), left : max(right, left + 1)]
        outside = np.asarray(mask_HW) <= 0
        stray = float(hard[outside].mean()) if outside.any() else 0.0
    magnitude = float(_rms(diff.result_HW3 - diff.source_HW3)[hard].mean()) if hard.any() else 0.0
    remainder = (
        hard if orientation == "same" else _hysteresis(_turned_score(diff, orientation, calibration), calibration)
    )
    return ChangeMap(
        soft.astype(np.float32),
        hard,
        kind,
        orientation,
        float(hard.mean()),
        magnitude,
        stray,
        remainder,
        diff,
        calibration,
    )


def _turned_score(diff: Difference, orientation: Orientation, calibration: Calibration) -> np.ndarray:
    """Score against the turned source. A turned picture has other bits and other errors: twice the noise, no gate."""
    source = diff.source_HW3[ORIENTATIONS[orientation]]
    contrast = diff.contrast_HW[ORIENTATIONS[orientation]]
    turned = replace(diff, source_HW3=source, pixel_HW=_smoothed(diff.result_HW3 - source) / 2, contrast_HW=contrast)
    return turned.score(replace(calibration, token=0))


def _seed_pixels(num_pixels: int) -> int:
    """Pixels above `high` that a change must have."""
    return max(1, round(MIN_AREA * num_pixels / 4))


def _hysteresis(score: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Areas above `low` that hold a seed above `high`; no speckle, small holes filled. bool (H, W)."""
    smallest = max(2, round(MIN_AREA * score.size))
    labels, count = ndimage.label(score >= calibration.low, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    seeds = np.bincount(labels[score >= calibration.high], minlength=count + 1)
    keep = (sizes >= smallest) & (seeds >= _seed_pixels(score.size))
    keep[0] = False
    hard = keep[labels]
    holes, count = ndimage.label(~hard)
    small = np.bincount(holes.ravel(), minlength=count + 1) <= MAX_HOLE * score.size
    border = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    small[border] = False  # open to the outside, so not a hole
    small[0] = False
    return hard | small[holes]


# ---------------------------------------------------------------- local or global


@dataclass(frozen=True)
class Evidence:
    """What tells one change of the whole picture from changes in places. Shares from 0 to 1.

    Attributes:
        area: of the picture that changed.
        spread: of the 16 tiles of the picture in which something changed.
        consistent: of the picture that one affine colour transform explains.
        consistent_outside: the same, of the unchanged part: a tone edit leaves alone only what it maps to itself,
            a new background leaves objects alone that it would have mapped to something else.
        structure_lost: error of that transform over the smallest error for the picture turned or mirrored. Near 1
            nothing of the source's layout is left; above 2 the picture was turned.
        fine: of the difference's energy that is gone after a wide blur: blur, sharpen, pixelate change detail only.
        island: of the source's contrast that lies in the largest unchanged area.
        redrawn: of the 16 tiles whose contrast is a quarter weaker, or a third stronger, than the source's.
    """

    area: float
    spread: float
    consistent: float
    consistent_outside: float
    structure_lost: float
    fine: float
    island: float
    redrawn: float

    @property
    def is_tone(self) -> bool:
        """One colour transform of the whole picture."""
        if self.consistent < 0.7 or self.spread < 0.6:
            return False
        if self.area >= 0.97:  # no outside to ask, and flat pictures have no layout to lose
            return True
        return self.structure_lost < 0.6 and (self.area >= 0.85 or self.consistent_outside >= 0.8)

    @property
    def is_filter(self) -> bool:
        """A change of detail everywhere: blur, sharpen, pixelate."""
        return (self.fine >= 0.8 and self.spread >= 0.4) or (self.fine >= 0.6 and self.redrawn >= 0.6)

    @property
    def is_style(self) -> bool:
        """Nearly everything changed, the layout is still the source's, and nothing in one piece was spared."""
        return self.area >= 0.85 and self.structure_lost < 0.75 and self.island < 0.03


def evidence(diff: Difference, hard_HW: np.ndarray, calibration: Calibration) -> tuple[Evidence, Orientation]:
    """Measures what `Evidence` holds, and the orientation whose source explains the result best."""
    source, result = diff.source_HW3, diff.result_HW3
    errors, explained = {}, source
    for name, turn in ORIENTATIONS.items():
        transformed = fit_affine(source[turn], result)
        errors[name] = float(np.abs(transformed - result).mean()) + 0.5
        explained = transformed if name == "same" else explained
    best = min(errors, key=lambda name: errors[name])
    residual = replace(diff, pixel_HW=_smoothed(result - explained))
    consistent = residual.score(replace(calibration, token=0)) < calibration.low
    change = result - source
    energy = np.square(diff.pixel_HW).sum()
    coarse = np.square(ndimage.gaussian_filter(change, (4, 4, 0))).mean(-1).sum()
    labels, count = ndimage.label(ndimage.binary_opening(~hard_HW, iterations=3))
    islands = np.bincount(labels.ravel(), diff.contrast_HW.ravel(), minlength=count + 1)[1:]
    ratios = _tiles(local_contrast(result)) / np.maximum(_tiles(diff.contrast_HW), 1)
    found = Evidence(
        area=float(hard_HW.mean()),
        spread=float(np.mean(_tiles(hard_HW) > 0.1)),
        consistent=float(consistent.mean()),
        consistent_outside=float(consistent[~hard_HW].mean()) if not hard_HW.all() else 1.0,
        structure_lost=errors["same"] / min(errors[name] for name in errors if name != "same"),
        fine=float(1 - coarse / energy) if energy else 0.0,
        island=float(islands.max(initial=0) / max(diff.contrast_HW.sum(), 1e-6)),
        redrawn=float(np.mean((ratios < 0.75) | (ratios > 1.33))),
    )
    return found, cast(Orientation, best)


def _tiles(values_HW: np.ndarray) -> np.ndarray:
    """Means of 4 x 4 tiles (fewer where a side has fewer pixels)."""
    bands = (band for band in np.array_split(values_HW, 4) if band.size)
    return np.array([tile.mean() for band in bands for tile in np.array_split(band, 4, axis=1) if tile.size])


def fit_affine(source_HW3: np.ndarray, result_HW3: np.ndarray, num_rounds: int = 6) -> np.ndarray:
    """The source under the one affine colour transform that explains most of the result. Robust: outliers fade out."""
    ones = np.full(source_HW3.shape[:2] + (1,), 255, np.float32)
    inputs = np.concatenate([source_HW3, ones], -1).reshape(-1, 4).astype(np.float64)
    outputs = result_HW3.reshape(-1, 3).astype(np.float64)
    identity = np.eye(4)[:, :3]
    weights = np.ones((len(inputs), 1))
    ridge = 4.0 * len(inputs)  # worth a contrast of 2 levels: without any, the identity
    for _ in range(num_rounds):
        weighted = (inputs * weights).T
        transform = np.linalg.solve(weighted @ inputs + ridge * np.eye(4), weighted @ outputs + ridge * identity)
        error = np.sqrt(np.square(inputs @ transform - outputs).mean(1, keepdims=True))
        weights = 1 / (1 + np.square(error / 12))  # beyond 12 levels a pixel is taken for changed otherwise
    return (inputs @ transform).astype(np.float32).reshape(source_HW3.shape)


def _classify(diff: Difference, hard: np.ndarray, calibration: Calibration) -> tuple[Kind, Orientation]:
    found, best = evidence(diff, hard, calibration)
    if best != "same" and found.structure_lost > 2 and hard.any():
        return "global", best
    if found.is_filter or (hard.any() and (found.is_tone or found.is_style)):
        return "global", "same"
    return ("local" if hard.any() else "none"), "same"
