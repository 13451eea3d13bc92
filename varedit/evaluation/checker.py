"""The exact checker: was the asked edit done, and nothing else? From pixels alone, against a known answer.

The procedural world knows what the picture had to become (the target), what it was (the source) and where pixels may
change (the mask). An edit falls into regions (the old place and the new place of a moved object, each object of a
composition, the background), and every region has to be done: nothing is averaged away by a large neighbour.

Tolerance. An editor draws through an image tokenizer, so a perfect edit comes back softened and with a noise of some
ten levels; single pixels must not decide. Pictures are softened before anything is compared. Progress is the share of
the way from source to target that the result has gone (a projection: noise across the way does not count); the error
that is left counts beyond `NOISE` levels. Changes that vanish under that filter cannot be judged: see `visible_change`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import ndimage

REVISION = 4
"""Raised whenever a score could change: part of the protocol's hash."""

SOFTNESS = 1.5 / 128
"""Standard deviation of the filter applied to every picture first, as a share of the short side."""

NOISE = 10.0
"""Root mean square error in levels that a faithful picture may have after that filter."""

MIN_CHANGE = 14.0
"""Root mean square change in levels, after the filter, that a region needs to be judged at all."""

DONE = 0.6
"""Completeness that every region needs for a success, and"""

QUARTER = 0.25
"""that each quarter of a region needs, so that a half-painted region is no success."""

STRAY = 32.0
"""A pixel has strayed when, softened by `STRAY_SOFTNESS`, its root mean square over the channels differs by more levels
than this, and its patch covers at least `STRAY_PATCH` of the frame."""

STRAY_SOFTNESS = 3 / 128
STRAY_PATCH = 0.002

UNTOUCHED = 0.006
"""Largest stray share of the frame that a success may have."""

WHOLE = 0.98
"""A mask that covers at least this share of the frame has no outside."""


@dataclass(frozen=True)
class Verdict:
    """What the checker found.

    Attributes:
        success: every region is done, the rest is untouched, and what stands on a new background still does.
        closer: inside the mask nearer to the target than to the source, by mean absolute difference.
        half: at most half of the way to the target is left there.
        completeness: 0 (nothing of the edit) to 1 (all of it), the mean over the regions.
        regions: completeness of each region, in the order given.
        preservation: 1 - sqrt(stray): 1 is untouched, 0 when the whole frame strayed.
        stray: share of the frame that changed without being asked.
        outside_psnr: decibels to the source outside the mask, at most 60; None where the mask leaves no outside.
        balance: 0..10, the harmonic mean of 10 * completeness and 10 * preservation (the paper's GPT-Balance on exact
            numbers), 0 if either is 0.
    """

    success: bool
    closer: bool
    half: bool
    completeness: float
    regions: tuple[float, ...]
    preservation: float
    stray: float
    outside_psnr: float | None
    balance: float


def check(
    source: np.ndarray,
    target: np.ndarray,
    result: np.ndarray,
    mask: np.ndarray,
    regions: Sequence[np.ndarray] | None = None,
    bare: np.ndarray | None = None,
    kept: Sequence[np.ndarray] = (),
) -> Verdict:
    """Compare a result with the known answer.

    Args:
        source, target, result: uint8 (H, W, 3).
        mask: bool (H, W), True where the edit may change pixels.
        regions: bool (H, W) each, the parts that all have to be done; None takes the connected parts of the mask.
        bare, kept: as in `Answer`.

    Raises:
        ValueError: Shapes that differ, an empty mask, or a region in which the target equals the source.
    """
    _check_shapes(source, target, result, mask)
    if regions is None:
        regions = connected_regions(mask)
    if not regions:
        raise ValueError("the mask is empty: the exact checker needs a place where something changes")
    before, after, got = (soften(picture, SOFTNESS) for picture in (source, target, result))
    done = tuple(completeness(before[part], after[part], got[part]) for part in regions)
    even = all(
        completeness(before[part], after[part], got[part]) >= QUARTER
        for region in regions
        for part in quarters(region, before, after)
    )
    if bare is not None:
        without = soften(bare, SOFTNESS)
        even = even and all(completeness(without[part], after[part], got[part]) >= DONE for part in kept)
    stray = float(stray_pixels(source, target, result, mask).mean())
    mean, preservation = float(np.mean(done)), 1 - float(np.sqrt(stray))
    way, left, back = _distances(before, after, got, mask)
    return Verdict(
        success=min(done) >= DONE and even and stray <= UNTOUCHED,
        closer=left < back,
        half=left < way / 2,
        completeness=mean,
        regions=done,
        preservation=preservation,
        stray=stray,
        outside_psnr=outside_psnr(source, result, mask),
        balance=harmonic_mean(10 * mean, 10 * preservation),
    )


@dataclass(frozen=True)
class Answer:
    """One right answer to an instruction.

    Attributes:
        target: what the picture becomes, uint8 (H, W, 3).
        mask: where pixels may change for that, bool (H, W).
        regions: the parts that all have to be done, bool (H, W) each.
        bare: a new background without the objects that stay, uint8 (H, W, 3); None where it stays what it is.
        kept: where those objects stand, bool (H, W) each: they may not be painted over with it.
    """

    target: np.ndarray
    mask: np.ndarray
    regions: Sequence[np.ndarray]
    bare: np.ndarray | None = None
    kept: Sequence[np.ndarray] = ()

    def check(self, source: np.ndarray, result: np.ndarray) -> Verdict:
        return check(source, self.target, result, self.mask, self.regions, self.bare, self.kept)


def check_any(source: np.ndarray, result: np.ndarray, answers: Sequence[Answer]) -> Verdict:
    """Compare a result with several right answers: the verdict of the one that it meets best.

    A result that also does another of them, at a place of its own, is no success: one object was asked for, not two. A
    second one may be small enough to pass for stray pixels.

    Raises:
        ValueError: as `check`.
    """
    if len(answers) == 1:
        return answers[0].check(source, result)
    before, got = soften(source, SOFTNESS), soften(result, SOFTNESS)
    glances = [_glance(before, got, answer) for answer in answers]
    done = [answer for answer, glance in zip(answers, glances) if glance.least >= DONE]
    nearest = answers[max(range(len(answers)), key=lambda index: glances[index].rank)]
    verdicts = [one.check(source, result) for one in (*done, nearest)]
    best = max(verdicts, key=lambda v: (v.success, v.half, v.closer, v.completeness))
    twice = any(not (one.mask & other.mask).any() for one, other in combinations(done, 2))
    return replace(best, success=best.success and not twice)


@dataclass(frozen=True)
class _Glance:
    """What decides between answers, without the costly look for stray pixels."""

    least: float
    rank: tuple[bool, bool, float]


def _glance(before: np.ndarray, got: np.ndarray, answer: Answer) -> _Glance:
    window, after = soften_part(answer.target, [answer.mask, *answer.regions])
    before, got, mask = before[window], got[window], answer.mask[window]
    parts = [region[window] for region in answer.regions]
    done = [completeness(before[part], after[part], got[part]) for part in parts]
    way, left, back = _distances(before, after, got, mask)
    return _Glance(min(done), (left < way / 2, left < back, float(np.mean(done))))


def _distances(before: np.ndarray, after: np.ndarray, got: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Mean absolute differences in the mask: source to target, result to target, result to source."""
    pairs = (before, after), (got, after), (got, before)
    way, left, back = (float(np.abs(one[mask] - two[mask]).mean()) for one, two in pairs)
    return way, left, back


def soften(picture: np.ndarray, softness: float, short: int | None = None) -> np.ndarray:
    """float32 (H, W, 3) in 0..255 after a Gaussian of `softness` times the short side (of a part: of the whole's)."""
    sigma = softness * (short or min(picture.shape[:2]))
    return ndimage.gaussian_filter(picture.astype(np.float32), (sigma, sigma, 0), mode="nearest")


def soften_part(picture: np.ndarray, regions: Sequence[np.ndarray]) -> tuple[tuple[slice, ...], np.ndarray]:
    """The window that holds all regions, and the picture in it, softened: in the regions just as the whole would be."""
    short = min(picture.shape[:2])
    reach = int(4 * SOFTNESS * short) + 1  # where the Gaussian ends
    window = tuple(
        slice(max(0, int(at.min()) - reach), int(at.max()) + reach + 1) for at in np.any(regions, axis=0).nonzero()
    )
    return window, soften(picture[window], SOFTNESS, short)


def completeness(before: np.ndarray, after: np.ndarray, got: np.ndarray) -> float:
    """How much of the way from `before` to `after` a region has gone, float (N, 3) pixels each; 0 to 1.

    The smaller of progress (projection on the way; going past the end counts against it) and closeness (1 - the error
    beyond `NOISE`, relative to the length of the way). The source scores 0, the target 1, a half blend 0.5, and
    something else altogether little, however far it went.
    """
    way, gone = after - before, got - before
    length = float(np.square(way).sum())
    if length == 0:
        raise ValueError("a region of the target equals the source: nothing was asked there")
    progress = float((way * gone).sum()) / length
    progress = min(progress, 2 - progress)
    error = float(np.sqrt(np.square(got - after).mean()))
    closeness = 1 - max(0.0, error - NOISE) / np.sqrt(length / way.size)
    return float(np.clip(min(progress, closeness), 0, 1))


def quarters(region: np.ndarray, before: np.ndarray, after: np.ndarray) -> Iterator[np.ndarray]:
    """The quarters of a region about its median row and column, those where something visible was asked."""
    rows, columns = region.nonzero()
    middle = np.median(rows), np.median(columns)
    upper = np.arange(region.shape[0])[:, None] <= middle[0]
    left = np.arange(region.shape[1])[None] <= middle[1]
    for vertical in (upper, ~upper):
        for horizontal in (left, ~left):
            part = region & vertical & horizontal
            if part.sum() >= 16 and np.sqrt(np.square(after[part] - before[part]).mean()) >= MIN_CHANGE:
                yield part


def visible_change(source: np.ndarray, target: np.ndarray, regions: Sequence[np.ndarray]) -> bool:
    """True if the change of every region survives the checker's filter: else the case cannot be judged.

    Sharpening, a slight blur or a thin needle on a like background are gone at this tolerance.
    """
    if not regions or not all(part.any() for part in regions):
        return False
    window, before = soften_part(source, regions)
    _, after = soften_part(target, regions)
    parts = [region[window] for region in regions]
    return all(np.sqrt(np.square(after[part] - before[part]).mean()) >= MIN_CHANGE for part in parts)


def stray_pixels(source: np.ndarray, target: np.ndarray, result: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where the picture changed without being asked, bool (H, W).

    Outside the mask: pixels far from the source. An edit of the whole picture has no outside; there a pixel strays that
    is far from every point between its source and its target.
    """
    before, after, got = (soften(picture, STRAY_SOFTNESS) for picture in (source, target, result))
    margin = 2 * STRAY_SOFTNESS * min(mask.shape)  # what the filter carries across the border of the mask
    if mask.mean() >= WHOLE:
        way = after - before
        share = (way * (got - before)).sum(-1) / np.maximum(np.square(way).sum(-1), 1e-6)
        nearest = before + np.clip(share, 0, 1)[..., None] * way
        far = _rms(got - nearest) > STRAY
    else:
        far = (_rms(got - before) > STRAY) & (ndimage.distance_transform_edt(~mask) > margin)
    labels, _ = ndimage.label(far)
    large = np.bincount(labels.ravel()) >= STRAY_PATCH * mask.size
    large[0] = False
    return large[labels]


def outside_psnr(source: np.ndarray, result: np.ndarray, mask: np.ndarray) -> float | None:
    """PSNR in dB of the pixels outside the mask, capped at 60; None where the mask covers the frame."""
    if mask.mean() >= WHOLE:
        return None
    error = np.square(source[~mask].astype(np.float64) - result[~mask]).mean()
    return float(min(60.0, 10 * np.log10(255**2 / max(error, 1e-9))))


def connected_regions(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask; specks below 0.05 % of the frame are left out where there is anything larger."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    parts = [labels == number for number in range(1, count + 1)]
    return [part for part in parts if part.mean() >= 0.0005] or parts[:1]


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b), and 0 if either is 0 (paper section A.2.2)."""
    return 0.0 if min(first, second) <= 0 else 2 * first * second / (first + second)


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(difference).mean(-1))


def _check_shapes(source: np.ndarray, target: np.ndarray, result: np.ndarray, mask: np.ndarray) -> None:
    for name, picture in (("target", target), ("result", result)):
        if picture.shape != source.shape:
            raise ValueError(f"{name} has shape {picture.shape}, the source {source.shape}: resize it first")
    if mask.shape != source.shape[:2] or mask.dtype != bool:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}: use bool {source.shape[:2]}")
