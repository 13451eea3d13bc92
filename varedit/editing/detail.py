"""What an edit did to the source's detail: a field of colour gains, estimated on the decoded source and result.

Recoloured, all of the source's detail is kept, in other colours; removed or painted over, none of it; blurred, less of
it the finer it is. The decodings show no detail finer than the image tokenizer's, so the gain of what is finer still is
extrapolated: from how the gain changes from coarse to fine. Everything is in the model's pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from varedit.editing.change_map import ORIENTATIONS, Calibration, ChangeMap
from varedit.editing.edit_kind import apply_tone, fit_tone, tone_gain
from varedit.editing.fields import add_to_diagonal, apply, blur, outer, pixels, planes, solve

DETAIL = 2.0
"""Standard deviation that parts detail from tone."""

FINE = 0.7
"""Standard deviation of what is too fine to compare: the decoder's own noise."""

TONE = 12.0
"""Standard deviation of the windows in which the change of tone may differ from the whole area's: a vignette."""

REMOVED, KEPT = 0.35, 0.5
"""Gain of the visible detail over that of the tone: up to the first the edit removed detail, from the second on not.

What removes some of it removes all that is finer (blur, pixelate). The decoded source has errors of its own, which draw
every such ratio below 1.
"""

SHARPENED = 1.6
"""Largest such ratio that is believed: sharpening."""

FAINT, PLAIN = 0.2, 0.5
"""Gains of a local edit: up to the first they are chance and show as ghosts, from the second on they count in full."""

UNEXPLAINED = 4.0
"""Squared error over the noise from which on a change of tone is not trusted at all; one less, and it is fully."""

TRUSTED_RIDGE, TRUSTED_NOISE = 100.0, 8.0
"""How much more a trusted change of tone holds against local estimates, and against the result's own offsets."""


SMOOTH_COLOUR = 3.0
"""Standard deviation within which colours are compared: finer ones are fringes of the decoder."""

COLOURED = 10.0
"""Root mean square colour of a source that can be made grey."""

GREY, VIVID, TINT, FOLLOWS = 5.5, 13.0, 4.0, 0.13
"""What a grey result may have of colour: root mean square and 99th percentile, as a common tint, and of the source's
colours as a share of them.

Black and white done as asked has less, drawn by the default model in eight of nine cases; rain, night, sepia and what
else keeps some colour has more. Where it has more, nothing is lost but certainty.
"""


@dataclass(frozen=True, eq=False)
class Transfer:
    """An edit in the form that any resolution can use. Model pixels.

    Attributes:
        source_HW3: float32, the decoded source in levels of 255, turned as the edit turned it.
        result_HW3: float32, the decoded result, without the noise that differs from decoding to decoding.
        gain_HW33: float32, [..., i, j] is the share of the source's detail in channel j that goes to channel i.
    """

    source_HW3: np.ndarray
    result_HW3: np.ndarray
    gain_HW33: np.ndarray


def transfer(change: ChangeMap, calibration: Calibration | None = None) -> Transfer:
    """Estimate what the edit did to the source's detail.

    Every changed area first gets the gain of its change of tone (a global edit is one area), the prior of gains in
    windows that shrink; each step moves away from its prior only as far as the source has detail there to tell. Where
    the result's detail cannot be had from the source's, the gain falls to zero.
    """
    calibration = calibration or change.calibration
    diff = change.difference
    source, result = planes(diff.source_HW3[ORIENTATIONS[change.orientation]]), planes(diff.result_HW3)
    grey = change.kind == "global" and _made_grey(source, result)
    if grey:
        result = _without_colour(result)
    noise = np.square(calibration.noise(diff.contrast_HW))
    labels = _areas(change)
    tone, gain, trust = _tones(source, result, labels, noise)
    refined, left = _gains(source, result, gain, labels, trust, float(np.mean(noise)), diff.cell)
    if change.kind != "global":
        size = np.sqrt(np.square(refined).sum((0, 1)) / 3)
        refined *= np.clip((size - FAINT) / (PLAIN - FAINT), 0, 1)
    expected = tone + apply(refined - gain, _finer(source, DETAIL))
    # What the edit drew anew is taken as it is; where it only changed the tone, every offset is suspect.
    noise = noise * np.where(left < 1, np.maximum(left, 0.2), 1 + TRUSTED_NOISE * trust)
    settled = _settle(result, expected, labels, noise)
    if grey:
        settled, refined = _without_colour(settled), _without_colour(refined)
    return Transfer(pixels(source), pixels(settled), pixels(refined.astype(np.float32)))


def _made_grey(source: np.ndarray, result: np.ndarray) -> bool:
    """True if what the result has of colour is the decoder's error: the edit made a coloured picture grey."""
    before, after = (
        smooth - smooth.mean(0, keepdims=True) for smooth in (blur(x, SMOOTH_COLOUR) for x in (source, result))
    )
    energy, left = np.square(before).mean(), np.sqrt(np.square(after).mean(0))
    if energy < COLOURED**2 or np.sqrt(np.square(left).mean()) > GREY or np.percentile(left, 99) > VIVID:
        return False
    tint = np.square(after.mean((1, 2))).mean()
    return bool(tint <= TINT**2 and abs((before * after).mean()) <= FOLLOWS * energy)


def _without_colour(field: np.ndarray) -> np.ndarray:
    """Every channel (the first axis) the mean of all."""
    return np.broadcast_to(field.mean(0, keepdims=True), field.shape).copy()


def _areas(change: ChangeMap) -> np.ndarray:
    """Area of each pixel, 0 where nothing changed: int (H, W)."""
    if change.kind == "global":
        return np.ones(change.hard_HW.shape, int)
    # One pixel more on every side: the edge of what was changed tells most about how.
    labels, _ = ndimage.label(ndimage.binary_dilation(change.hard_HW, iterations=2), np.ones((3, 3)))
    return labels


def _boxes(labels: np.ndarray) -> Iterator[tuple[tuple, np.ndarray]]:
    """Every area: the index of its box in any planes (..., H, W), and bool where it is in the box."""
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        yield (..., *box), labels[box] == label


def _tones(
    source: np.ndarray, result: np.ndarray, labels: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The source under each area's change of tone, unchanged elsewhere.

    Returns:
        Transformed source (3, H, W), its gain (3, 3, H, W), and (H, W) in [0, 1] how well that explains the area.
    """
    tone, trust = source.copy(), np.zeros(labels.shape, np.float32)
    gain = np.zeros((3, 3, *labels.shape), np.float32)
    for channel in range(3):
        gain[channel, channel] = 1
    for box, inside in _boxes(labels):
        colours = source[box][:, inside].T
        transform = fit_tone(colours, result[box][:, inside].T)
        tone[box][:, inside], gain[box][:, :, inside] = apply_tone(transform, colours).T, tone_gain(transform, colours)
    rest = np.square(blur(result - tone, DETAIL)).mean(0)
    for box, inside in _boxes(labels):
        explained = np.median(rest[box][inside]) / np.median(noise[box][inside])
        trust[box][inside] = np.clip(UNEXPLAINED - explained, 0, 1)
    return tone, gain, trust


def _gains(
    source: np.ndarray,
    result: np.ndarray,
    gain: np.ndarray,
    labels: np.ndarray,
    trust: np.ndarray,
    noise: float,
    cell: float,
) -> tuple[np.ndarray, np.ndarray]:
    """How much of the source's detail goes on, starting from the gain of the tone.

    Returns:
        The gain, float32 (3, 3, H, W), and how much of the finest detail the edit left, 0 to 1.
    """
    changed = labels > 0
    ridge = noise * (1 + TRUSTED_RIDGE * trust)
    gain = _refined(gain, _finer(source, TONE), _finer(result, TONE), changed, TONE, 4 * ridge)
    detail, wanted = _finer(source, DETAIL), _finer(result, DETAIL)
    visible = [blur(x, FINE) for x in (detail, wanted)]
    ratios, left = np.ones(labels.shape, np.float32), np.ones(labels.shape, np.float32)
    for box, inside in _boxes(labels):
        own = gain[box][:, :, inside]
        expected = apply(own, visible[0][box][:, inside])
        prior = noise * min(1, cell**2 / inside.sum())  # errors come a cell at a time
        ratio = (np.mean(expected * visible[1][box][:, inside]) + prior) / (np.mean(np.square(expected)) + prior)
        left[box][inside] = np.clip((ratio - REMOVED) / (KEPT - REMOVED), 0, 1)
        # The decoded source has errors of its own, which draw a regression on it towards zero.
        ratios[box][inside] = np.clip(ratio, KEPT, 1)
        own = own * np.clip(ratio, 1, SHARPENED)
        drawn = wanted[box][:, inside]
        rest = np.square(drawn - ratios[box][inside] * apply(own, detail[box][:, inside])).mean()
        share = _explained(rest, np.square(drawn).mean(), noise)
        gain[box][:, :, inside] = own * _trusting(np.square(share), trust[box][inside])
    whole = wanted / ratios
    energy = np.square(wanted).mean(0)
    for sigma in (6.0, 2.5):
        finer = _refined(gain, detail, whole, changed, sigma, ridge)
        rest = np.square(wanted - ratios * apply(finer, detail)).mean(0)
        share = _explained(blur(rest, sigma), blur(energy, sigma), noise)
        gain = np.where(changed, finer * _trusting(np.square(share), trust), gain)
    return gain * left, left


def _trusting(share: np.ndarray, trust: np.ndarray) -> np.ndarray:
    return 1 - (1 - share) * (1 - trust)


def _finer(image: np.ndarray, sigma: float) -> np.ndarray:
    return image - blur(image, sigma)


def _refined(
    gain: np.ndarray, detail: np.ndarray, wanted: np.ndarray, changed: np.ndarray, sigma: float, ridge: np.ndarray
) -> np.ndarray:
    """Gains with the least squared error in windows of the changed area, drawn to the given ones by `ridge`."""
    weight = changed.astype(np.float32)
    weighed = weight * detail
    moment = blur(outer(detail) * weight, sigma)
    cross = blur(weighed[:, None] * wanted, sigma)  # [j, i]
    amount = blur(weight * ridge, sigma) + np.float32(1e-3)
    solved = solve(add_to_diagonal(moment, amount), cross + amount * gain.swapaxes(0, 1))
    return np.where(changed, solved.swapaxes(0, 1), gain)


def _explained(rest: np.ndarray, energy: np.ndarray, noise: float) -> np.ndarray:
    """Share of the result's detail that is neither noise nor new, in [0, 1]."""
    return 1 - np.clip((rest - noise) / np.maximum(energy, noise), 0, 1)


def _settle(result: np.ndarray, expected: np.ndarray, labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The result without decoding noise: what was expected plus an offset as smooth as the result allows.

    The offset is built coarse to fine; at each step what is left is added in proportion to how far it exceeds the
    noise. So tone edits come out clean, and what is drawn anew comes through whole.
    """
    left = (result - expected).astype(np.float32)
    offset = np.zeros_like(left)
    for box, inside in _boxes(labels):
        offset[box][:, inside] = np.median(left[box][:, inside], axis=1, keepdims=True)
    for sigma in (12.0, 5.0, 2.0, 0.0):
        step = blur(left - offset, sigma) if sigma else left - offset
        energy = blur(np.square(step).mean(0), max(sigma, 1.0))
        # Errors of neighbouring pixels come from the same cell of about 8 pixels, so averages calm down slowly.
        trust = np.maximum(1 - 1.5 * noise / (1 + sigma) / np.maximum(energy, 1e-6), 0)
        offset += trust * step
    offset[:, labels == 0] = left[:, labels == 0]
    return (expected + offset).astype(np.float32)
