"""Fields over a picture in planes, (..., H, W): blurs, window means, and a small linear system at every pixel.

numpy's solver and scipy's filters take one matrix and one line at a time on one thread; at 512 pixels and more they
would take longer than the edit itself.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import ndimage

_WORTH_A_THREAD = 1 << 16
"""Pixels of a plane from which on threads are faster."""


def planes(field: np.ndarray) -> np.ndarray:
    """From pixels of vectors or matrices, (H, W, ...), to planes, (..., H, W)."""
    return np.ascontiguousarray(np.moveaxis(field, (0, 1), (-2, -1)))


def pixels(field: np.ndarray) -> np.ndarray:
    """The way back from `planes`."""
    return np.ascontiguousarray(np.moveaxis(field, (-2, -1), (0, 1)))


def blur(field: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of every plane; the picture is mirrored at its edges."""
    return _each(lambda plane: ndimage.gaussian_filter(plane, sigma), field)


def window_mean(field: np.ndarray, size: int) -> np.ndarray:
    """Mean over a square of `size` pixels a side, of every plane; mirrored at the edges."""
    return _each(lambda plane: ndimage.uniform_filter(plane, size), field)


def _each(compute: Callable[[np.ndarray], np.ndarray], field: np.ndarray) -> np.ndarray:
    """The same numbers on any number of threads: each plane is computed by itself. As many as PyTorch may use."""
    separate = field.reshape(-1, *field.shape[-2:])
    num_threads = min(torch.get_num_threads(), len(separate))
    if num_threads > 1 and separate[0].size >= _WORTH_A_THREAD:
        with ThreadPoolExecutor(num_threads) as pool:
            results = list(pool.map(compute, separate))
    else:
        results = [compute(plane) for plane in separate]
    return np.stack(results).reshape(field.shape)


def outer(vectors: np.ndarray) -> np.ndarray:
    """Products of the components of vectors (3, H, W) with each other: the six planes (6, H, W) of `solve`."""
    x, y, z = vectors
    return np.stack([x * x, x * y, x * z, y * y, y * z, z * z])


def add_to_diagonal(matrices: np.ndarray, amount: np.ndarray | np.float32) -> np.ndarray:
    """Symmetric matrices (6, H, W) with `amount` added to their diagonals, in place."""
    for index in (0, 3, 5):
        matrices[index] += amount
    return matrices


def solve(matrices: np.ndarray, right: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """x of A x = b at every pixel, by L D L^T.

    Args:
        matrices: the six planes (6, H, W) of symmetric positive definite 3 x 3 matrices: rows of the upper triangle.
        right: b, (3, ..., H, W).

    Returns:
        (3, ..., H, W).
    """
    xx, xy, xz, yy, yz, zz = matrices
    least = np.finfo(matrices.dtype).tiny
    y_x, z_x = xy / xx, xz / xx
    rest_yy, rest_yz = np.maximum(yy - y_x * xy, least), yz - y_x * xz
    z_y = rest_yz / rest_yy
    rest_zz = np.maximum(zz - z_x * xz - z_y * rest_yz, least)
    b_x, b_y, b_z = right
    b_y = b_y - y_x * b_x
    z = (b_z - z_x * b_x - z_y * b_y) / rest_zz
    y = b_y / rest_yy - z_y * z
    return np.stack([b_x / xx - y_x * y - z_x * z, y, z])


def apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Matrices (3, 3, ...) times vectors (3, ...): (3, ...)."""
    return np.stack([row[0] * vectors[0] + row[1] * vectors[1] + row[2] * vectors[2] for row in matrices])
