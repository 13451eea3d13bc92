"""Blurs and small systems over pictures, against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from varedit.editing import fields
from varedit.editing.edit_kind import apply_tone, tone_gain


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_planes_are_filtered_as_scipy_filters_pixels(num_threads, monkeypatch):
    """To the bit, on any number of threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(fields, "_WORTH_A_THREAD", 1)
    field = picture(20, 31, 3, 3)
    blurred = fields.pixels(fields.blur(fields.planes(field), 2.5))
    assert np.array_equal(blurred, ndimage.gaussian_filter(field, (2.5, 2.5, 0, 0)))
    mean = fields.pixels(fields.window_mean(fields.planes(field), 5))
    assert np.array_equal(mean, ndimage.uniform_filter(field, (5, 5, 1, 1)))
    assert np.array_equal(fields.blur(field[..., 0, 0], 2.5), blurred[..., 0, 0])


def test_the_system_of_every_pixel_is_solved():
    roots, right = picture(6, 7, 3, 4), picture(6, 7, 3, 2)
    matrices = roots @ roots.swapaxes(-1, -2)
    planes = fields.planes(matrices)
    six = fields.add_to_diagonal(planes[[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]], np.float32(0.5))
    expected = np.linalg.solve(matrices + 0.5 * np.eye(3), right)
    found = fields.pixels(fields.solve(six, fields.planes(right)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    singular = fields.outer(np.ones((3, 2, 2), np.float32))
    assert np.isfinite(fields.solve(fields.add_to_diagonal(singular, np.float32(1e-3)), np.ones((3, 2, 2)))).all()


def test_products():
    vectors, matrices = picture(3, 6, 7), picture(3, 3, 6, 7)
    np.testing.assert_allclose(
        fields.apply(matrices, vectors), np.einsum("ijhw,jhw->ihw", matrices, vectors), rtol=1e-5, atol=1e-5
    )
    both = np.einsum("ihw,jhw->ijhw", vectors, vectors)
    assert np.array_equal(fields.outer(vectors), both[[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]])


def test_the_gain_of_a_tone_is_its_derivative():
    transform, colours = 0.1 * picture(10, 3), np.random.default_rng(1).uniform(20, 230, (50, 3)).astype(np.float32)
    gain, step = tone_gain(transform, colours), 0.5
    for channel in range(3):
        ahead, behind = colours.copy(), colours.copy()
        ahead[:, channel] += step
        behind[:, channel] -= step
        slope = (apply_tone(transform, ahead) - apply_tone(transform, behind)) / (2 * step)
        np.testing.assert_allclose(gain[:, channel].T, slope, atol=2e-3)
