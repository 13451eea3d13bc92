"""Alignment: a planted motion is found to a fraction of a pixel and undone."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from varedit.editing.align import find_slip, in_source_pixels, put_back
from varedit.image_processor import prepare

PAD = 24


def picture(height: int, width: int) -> np.ndarray:
    """Structure at every size, like a photograph: uint8 (height, width, 3)."""
    rng = np.random.default_rng(0)
    layers = np.zeros((height, width, 3), np.float32)
    for step in (4, 8, 16, 32, 64):
        noise = rng.integers(0, 256, (height // step + 1, width // step + 1, 3), np.uint8)
        layers += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (layers / 5).astype(np.uint8)


def moved(pixels_HW3: np.ndarray, zoom: float, shift_x: float, shift_y: float) -> np.ndarray:
    """A point at p from the middle goes to p * zoom + shift."""
    wide = np.pad(pixels_HW3, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect").astype(float)
    middle = (np.array(wide.shape[:2]) - 1) / 2
    offset = middle - (middle + (shift_y, shift_x)) / zoom
    planes = [ndimage.affine_transform(wide[..., c], (1 / zoom, 1 / zoom), offset, order=3) for c in range(3)]
    return np.dstack(planes)[PAD:-PAD, PAD:-PAD].clip(0, 255)


def tensor(pixels_HW3: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels_HW3, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def edited(pixels_HW3: np.ndarray) -> np.ndarray:
    pixels_HW3 = pixels_HW3.copy()
    height, width = pixels_HW3.shape[:2]
    pixels_HW3[height // 4 : height // 2, width // 4 : width // 2] = (230, 30, 30)
    return pixels_HW3


@pytest.mark.parametrize(
    "motion", [(1.02, 3, 0), (1, 3, 0), (1, -1.5, 2.25), (0.985, 0, 0), (1.01, 2.4, -3.6)], ids=str
)
@pytest.mark.parametrize("size", [256, 512])
def test_a_planted_motion_is_found_beside_an_edit_and_undone(motion, size):
    zoom, shift_x, shift_y = motion
    prepared = prepare(Image.fromarray(picture(600, 900)), size)
    source = (prepared.image_B3HW + 1)[0].permute(1, 2, 0).numpy() * 127.5
    straight = edited(source)
    rng = np.random.default_rng(1)
    result = moved(straight, *motion) + rng.normal(0, 6, source.shape)  # the decoder's error
    found = find_slip(prepared.image_B3HW, tensor(result), prepared)
    assert found is not None
    assert abs(found.shift_x - shift_x) < 0.3 and abs(found.shift_y - shift_y) < 0.3
    height, width = source.shape[:2]
    assert abs(found.zoom - zoom) * width / 2 < 0.3
    undone = (put_back(tensor(result), prepared.image_B3HW, prepared, found)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    before, after = (np.abs(pixels - straight).mean() for pixels in (result, undone))
    assert after < 0.6 * before
    scaled = in_source_pixels(found, prepared)
    assert scaled.shift_x == pytest.approx(found.shift_x * 900 / width, rel=0.01) and scaled.zoom == found.zoom


def test_what_left_the_frame_comes_from_the_source():
    prepared = prepare(Image.fromarray(picture(256, 256)), 256)
    source = (prepared.image_B3HW + 1)[0].permute(1, 2, 0).numpy() * 127.5
    result = moved(edited(source), 1, 9, 0)
    found = find_slip(prepared.image_B3HW, tensor(result), prepared)
    undone = put_back(tensor(result), prepared.image_B3HW, prepared, found)
    assert torch.equal(undone[..., -8:], prepared.image_B3HW[..., -8:])
    assert not torch.equal(undone[..., :-10], prepared.image_B3HW[..., :-10])


def test_what_the_fit_invented_is_left_alone():
    """Beside a square fit lies white: it neither moves nor counts."""
    prepared = prepare(Image.fromarray(picture(400, 640)), 256, "square")
    source = (prepared.image_B3HW + 1)[0].permute(1, 2, 0).numpy() * 127.5
    result = source.copy()
    result[:160] = moved(source[:160], 1, 3, 0)
    found = find_slip(prepared.image_B3HW, tensor(result), prepared)
    assert abs(found.shift_x - 3) < 0.3
    undone = put_back(tensor(result), prepared.image_B3HW, prepared, found)
    assert torch.equal(undone[:, :, 160:], prepared.image_B3HW[:, :, 160:])


@pytest.mark.parametrize("motion", [(1, 0, 0), (1, 0.3, 0), (1, 24, 0), (1.15, 0, 0)], ids=str)
def test_neither_resampling_nor_an_edit_that_moves_the_picture_is_a_slip(motion):
    prepared = prepare(Image.fromarray(picture(256, 256)), 256)
    source = (prepared.image_B3HW + 1)[0].permute(1, 2, 0).numpy() * 127.5
    assert find_slip(prepared.image_B3HW, tensor(moved(edited(source), *motion)), prepared) is None


def test_a_mirrored_picture_did_not_slip():
    prepared = prepare(Image.fromarray(picture(256, 256)), 256)
    assert find_slip(prepared.image_B3HW, prepared.image_B3HW.flip(-1), prepared) is None
