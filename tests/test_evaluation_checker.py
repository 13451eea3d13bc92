"""The exact checker: perfect targets score 1, sources 0, and half-done or excessive edits are caught."""

import numpy as np
import pytest
from scipy import ndimage

from varedit.evaluation import checker
from varedit.evaluation.cases import read_picture
from varedit.evaluation.procedural import procedural


@pytest.fixture(scope="module")
def drawn():
    """Source, target, mask, regions of some cases."""
    return [
        (read_picture(case.source), read_picture(case.target), case.mask(), case.answers()[0].regions)
        for case in procedural(limit=16).cases
    ]


def verdicts(drawn, make):
    found = []
    for source, target, mask, regions in drawn:
        found.append(checker.check(source, target, make(source, target, mask), mask, regions))
    return found


def test_target_scores_one(drawn):
    for verdict in verdicts(drawn, lambda source, target, mask: target):
        assert verdict.success and verdict.completeness == 1 and verdict.stray == 0 and verdict.balance == 10
        assert verdict.closer and verdict.half


def test_source_scores_zero(drawn):
    for verdict in verdicts(drawn, lambda source, target, mask: source):
        assert not verdict.success and verdict.completeness == 0 and verdict.balance == 0 and verdict.stray == 0
        assert not verdict.closer and not verdict.half


def test_blurred_noisy_target_still_succeeds(drawn):
    """What an image tokenizer does to a faithful picture: softer, and a noise of ten levels."""
    rng = np.random.default_rng(0)

    def lossy(source, target, mask):
        soft = ndimage.gaussian_filter(target.astype(float), (0.8, 0.8, 0)) + rng.normal(0, 10, target.shape)
        return np.clip(soft, 0, 255).astype(np.uint8)

    assert np.mean([verdict.success for verdict in verdicts(drawn, lossy)]) >= 0.95


def test_blurred_noisy_source_never_succeeds(drawn):
    rng = np.random.default_rng(0)

    def lossy(source, target, mask):
        soft = ndimage.gaussian_filter(source.astype(float), (0.8, 0.8, 0)) + rng.normal(0, 10, target.shape)
        return np.clip(soft, 0, 255).astype(np.uint8)

    assert not any(verdict.success for verdict in verdicts(drawn, lossy))


def test_half_blend_is_half_done(drawn):
    def blend(source, target, mask):
        return ((source.astype(int) + target) // 2).astype(np.uint8)

    for verdict in verdicts(drawn, blend):
        assert not verdict.success and 0.4 < verdict.completeness < 0.6


@pytest.mark.parametrize(
    ("share", "closer", "half"), [(0.0, 0, 0), (0.45, 0, 0), (0.48, 0, 0), (0.52, 1, 1), (1.4, 1, 1), (1.6, 1, 0)]
)
def test_closer_and_half_worked_by_hand(share, closer, half):
    """A square that goes from 100 to 150 levels; the result went `share` of that way."""
    source = np.full((64, 64, 3), 100, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    target, result = source.copy(), source.copy()
    target[mask], result[mask] = 150, round(100 + 50 * share)
    verdict = checker.check(source, target, result, mask)
    assert (verdict.closer, verdict.half) == (bool(closer), bool(half))


def test_half_is_the_stricter_one():
    """What goes across the way can be nearer to the target and yet far from it."""
    source = np.full((64, 64, 3), (100, 100, 100), np.uint8)
    mask = np.ones((64, 64), bool)
    target, result = source.copy(), source.copy()
    target[...], result[...] = (200, 100, 100), (180, 145, 100)  # 65 levels left, 125 gone, of 100
    verdict = checker.check(source, target, result, mask)
    assert verdict.closer and not verdict.half


@pytest.mark.parametrize("axis", [0, 1])
def test_half_painted_is_no_success(drawn, axis):
    def half(source, target, mask):
        places = mask.nonzero()[axis]
        before = np.arange(mask.shape[axis]) <= np.median(places)
        result = source.copy()
        chosen = mask & (before[:, None] if axis == 0 else before[None])
        result[chosen] = target[chosen]
        return result

    assert not any(verdict.success for verdict in verdicts(drawn, half))


def test_planted_overedit_is_caught(drawn):
    """A perfect edit with one more patch changed, far from the mask."""
    tried = 0
    for source, target, mask, regions in drawn:
        free = ndimage.distance_transform_edt(np.pad(~mask, 8))[8:-8, 8:-8]  # a patch is not cut by the frame either
        row, column = np.unravel_index(int(free.argmax()), free.shape)
        if free[row, column] < 18:
            continue
        tried += 1
        result = target.copy()
        patch = result[row - 10 : row + 10, column - 10 : column + 10]
        patch[...] = np.where(patch.mean() > 127, 0, 255)
        verdict = checker.check(source, target, result, mask, regions)
        assert verdict.completeness == 1 and not verdict.success
        assert verdict.stray > 0.006 and verdict.preservation < 0.92 and verdict.balance < 9.6
    assert tried > 3


def test_overedit_of_a_whole_picture_is_caught():
    """A mask of the whole frame: what lies on no way from source to target has strayed."""
    rng = np.random.default_rng(1)
    source = rng.integers(60, 200, (4, 4, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    target = (source * 0.5).astype(np.uint8)
    result = target.copy()
    result[20:44, 20:44] = (255, 0, 255)
    verdict = checker.check(source, target, result, np.ones((64, 64), bool))
    assert verdict.stray > 0.05 and verdict.outside_psnr is None
    assert checker.check(source, target, target, np.ones((64, 64), bool)).stray == 0


def test_every_region_has_to_be_done():
    """A moved square that was painted at the new place but not removed from the old."""
    source = np.full((64, 64, 3), 200, np.uint8)
    target = source.copy()
    source[8:24, 8:24] = 20
    target[40:56, 40:56] = 20
    mask = (source != target).any(-1)
    result = source.copy()
    result[40:56, 40:56] = 20
    verdict = checker.check(source, target, result, mask)
    assert verdict.regions == (0.0, 1.0) and verdict.completeness == 0.5 and not verdict.success


def test_wrong_colour_is_not_the_asked_colour():
    source = np.full((64, 64, 3), (200, 30, 30), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    target, result = source.copy(), source.copy()
    target[mask], result[mask] = (30, 30, 200), (30, 200, 30)
    assert not checker.check(source, target, result, mask).success


def test_stray_share_and_psnr_worked_by_hand():
    source = np.full((64, 64, 3), 100, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    target = source.copy()
    target[:32] = 200
    result = target.copy()
    result[40:] = 110  # 24 of the 32 rows outside are off by 10 levels
    psnr = 10 * np.log10(255**2 / (100 * 24 / 32))
    assert checker.outside_psnr(source, result, mask) == pytest.approx(psnr)
    assert checker.check(source, target, result, mask).stray == 0  # 10 levels are noise
    result[48:] = 250
    assert checker.stray_pixels(source, target, result, mask).mean() == pytest.approx(16 / 64, abs=0.03)


def test_balance_is_the_harmonic_mean_and_zero_with_a_zero():
    assert checker.harmonic_mean(6, 3) == pytest.approx(4)
    assert checker.harmonic_mean(0, 10) == 0 and checker.harmonic_mean(10, 0) == 0


def test_invisible_changes_are_passed_over():
    rng = np.random.default_rng(2)
    source = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = [np.ones((64, 64), bool)]
    assert not checker.visible_change(source, np.roll(source, 1, 0) // 2 + source // 2, whole)
    assert checker.visible_change(source, 255 - source // 4, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, m: (s, t, t[:32], m), "resize it first"),
        (lambda s, t, m: (s, t, t, m.astype(np.uint8)), "use bool"),
        (lambda s, t, m: (s, t, t, np.zeros_like(m)), "mask is empty"),
        (lambda s, t, m: (s, s, t, m), "nothing was asked"),
    ],
)
def test_bad_input_is_named(change, message):
    source = np.full((64, 64, 3), 90, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:16] = True
    target = source.copy()
    target[mask] = 200
    with pytest.raises(ValueError, match=message):
        checker.check(*change(source, target, mask))
