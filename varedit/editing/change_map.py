"""The change map: where an edit changed the picture, measured against the noise of a do-nothing edit.

`difference` compares, `extent` draws the line between changed and unchanged, `edit_kind` tells one change of the whole
picture from changes in places. Everything is in the model's pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor

from varedit.editing.difference import HIGH_SHARE, SMOOTHING, Calibration, Difference, difference, rms, smoothed
from varedit.editing.edit_kind import ORIENTATIONS, Kind, Orientation, classify

__all__ = ["ORIENTATIONS", "Calibration", "ChangeMap", "calibrate", "change_map", "difference", "within"]

SMALLEST = 0.15
"""Smallest change kept, in cells: what one code can draw and a glance can see."""

SEED_WEIGHT = 1.0
"""Evidence above `log(low)` that a change must have, summed over its pixels, in cells: a faint change must be large."""

SPILL, SPILL_REACH = 6.0, 1.25
"""A score this many times weaker than one within so many cells is that one's spill through the decoder, no change."""

NEAR_SHARE, NEAR_REACH = 0.6, 0.75
"""Within so many cells of a change, this share of `low` is enough: its faint border, the rest of its object."""

MARGIN = 1.15
"""Factor on the thresholds that silence the do-nothing edits of a calibration: others are noisier."""

MAX_HOLE = 0.02
"""Unchanged islands inside a change are filled up to this share of the frame; larger ones are real (a ring)."""

MOSTLY = 0.5
"""A change of more than this share of the frame spares objects: it is not grown, and its holes are not filled."""


@dataclass(frozen=True, eq=False)
class ChangeMap:
    """Where an edit changed the picture.

    Attributes:
        soft_HW: float32 in [0, 1], how surely a pixel changed; 0 outside `hard_HW`'s neighbourhood.
        hard_HW: bool, the changed area. An exact edit fades out around it: `preserve.reach` is what it may touch.
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
        false_alarm: share of do-nothing edits in which a change may be found all the same. Edits with masks also stray
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
        token=float(np.median(tokens)),
    )
    return replace(base, **_thresholds(differences, kept, base, false_alarm))


def _thresholds(
    differences: Sequence[Difference], kept: Sequence[np.ndarray], base: Calibration, false_alarm: float
) -> dict[str, float]:
    """The lowest `low` and `high` at which no more than `false_alarm` of the edits show a change."""
    least, most = np.log(1.2), np.log(60)
    for _ in range(8):
        low = float(np.exp((least + most) / 2))
        trial = replace(base, low=low, high=low * HIGH_SHARE)
        found = [(extent(d.evidence(trial), trial, d.cell) & keep).any() for d, keep in zip(differences, kept)]
        least, most = (np.log(low), most) if np.mean(found) > false_alarm else (least, np.log(low))
    low = MARGIN * float(np.exp(most))
    return {"low": low, "high": low * HIGH_SHARE}


# ---------------------------------------------------------------- the map


def within(change: ChangeMap, area: Image.Image) -> ChangeMap:
    """The map of an edit that was put into an area alone; `difference` and `stray` stay those of what the model drew.

    Args:
        area: mode L, of the picture that the map is of.
    """
    inside_HW = np.asarray(area.resize(change.hard_HW.shape[::-1], Image.Resampling.BOX)) > 0
    hard_HW = change.hard_HW & inside_HW
    return replace(
        change,
        soft_HW=np.where(inside_HW, change.soft_HW, np.float32(0)),
        hard_HW=hard_HW,
        kind="local" if hard_HW.any() else "none",
        area=float(hard_HW.mean()),
        remainder_HW=hard_HW,
    )


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
    evidence = diff.evidence(calibration)
    hard = extent(evidence, calibration, diff.cell)
    kind, orientation = classify(diff, hard, calibration)
    faint, sure = np.log(calibration.low / 2), np.log(calibration.high)
    soft = np.clip((evidence - faint) / (sure - faint), 0, 1) * ndimage.binary_dilation(hard, iterations=2)
    stray = None
    if mask_HW is not None:
        if content_box is not None:
            left, top, right, bottom = (round(edge) for edge in content_box)
            mask_HW = mask_HW[top : max(bottom, top + 1), left : max(right, left + 1)]
        outside = np.asarray(mask_HW) <= 0
        stray = float(hard[outside].mean()) if outside.any() else 0.0
    magnitude = float(rms(diff.result_HW3 - diff.source_HW3)[hard].mean()) if hard.any() else 0.0
    return ChangeMap(
        soft.astype(np.float32),
        hard,
        kind,
        orientation,
        float(hard.mean()),
        magnitude,
        stray,
        hard if orientation == "same" else _turned_extent(diff, orientation, calibration),
        diff,
        calibration,
    )


def _turned_extent(diff: Difference, orientation: Orientation, calibration: Calibration) -> np.ndarray:
    """Extent against the turned source. A turned picture has other bits and other errors: twice the noise, no gate."""
    source = diff.source_HW3[ORIENTATIONS[orientation]]
    pixel = smoothed(diff.result_HW3 - source, SMOOTHING * diff.cell) / 2
    turned = replace(diff, source_HW3=source, pixel_HW=pixel, contrast_HW=diff.contrast_HW[ORIENTATIONS[orientation]])
    calibration = replace(calibration, token=0)
    return extent(turned.evidence(calibration), calibration, diff.cell)


def extent(evidence_HW: np.ndarray, calibration: Calibration, cell: float) -> np.ndarray:
    """The changed area: connected pixels above `low` that together weigh enough, and what faintly changed around them.

    Args:
        evidence_HW: of `Difference.evidence`. cell: pixels a side of a cell.

    Returns:
        bool (H, W); no speckle, small holes filled.
    """
    low, high = np.log(calibration.low), np.log(calibration.high)
    strongest = ndimage.maximum_filter(ndimage.uniform_filter(evidence_HW, 3), 2 * round(SPILL_REACH * cell) + 1)
    is_spill = evidence_HW < strongest - np.log(SPILL)
    labels, count = ndimage.label((evidence_HW >= low) & ~is_spill, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    weights = np.bincount(labels.ravel(), np.maximum(evidence_HW - low, 0).ravel(), count + 1)
    seeds = np.bincount(labels[evidence_HW >= high], minlength=count + 1)
    keep = (sizes >= SMALLEST * cell**2) & (weights >= SEED_WEIGHT * cell**2) & (seeds > 0)
    keep[0] = False
    hard = keep[labels]
    if not hard.any() or hard.mean() > MOSTLY:
        return _fill(hard, SMALLEST * cell**2)
    near = ndimage.distance_transform_edt(~hard) <= NEAR_REACH * cell
    near &= (evidence_HW >= low + np.log(NEAR_SHARE)) & ~is_spill
    labels, count = ndimage.label(hard | near, np.ones((3, 3)))
    keep = np.bincount(labels[hard], minlength=count + 1) > 0
    return _fill(keep[labels], MAX_HOLE * hard.size)


def _fill(hard: np.ndarray, max_hole: float) -> np.ndarray:
    """Fill enclosed unchanged areas of up to `max_hole` pixels."""
    holes, count = ndimage.label(~hard)
    small = np.bincount(holes.ravel(), minlength=count + 1) <= max_hole
    border = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    small[border] = False  # open to the outside, so not a hole
    small[0] = False
    return hard | small[holes]
