"""The training objective against its definition and against recorded losses of the released code."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from varedit.scales import ASPECT_RATIOS, ScaleSchedule, scale_schedule
from varedit.training.objective import bit_accuracy, bit_losses, edit_weights, objective, token_weights

NUM_BITS = 6


def random_case(schedule: ScaleSchedule, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (2, L, C, 2) and bits (2, L, C)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, schedule.offsets[-1], NUM_BITS)
    return torch.randn(*shape, 2, generator=generator) * 3, torch.rand(shape, generator=generator) < 0.5


def reference(logits_BLC2: Tensor, bits_BLC: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Cross-entropy over two classes, mean over bits, scales weighted by sqrt(finest area / own area)."""
    losses_BLC = F.cross_entropy(logits_BLC2.flatten(0, 2), bits_BLC.flatten().long(), reduction="none")
    losses_BL = losses_BLC.view(bits_BLC.shape).mean(-1)
    (finest_h, finest_w), total, weighted = schedule.grids[-1], 0.0, 0.0
    start = 0
    for h, w in schedule.grids:
        weight = (finest_h * finest_w / (h * w)) ** 0.5
        weighted = weighted + weight * losses_BL[:, start : start + h * w].sum(1)
        total += weight * h * w
        start += h * w
    return (weighted / total).mean()


@pytest.mark.parametrize("size, ratio", [(128, 1.0), (128, 0.333), (256, 1.5)])
def test_objective_is_weighted_cross_entropy(size, ratio):
    schedule = scale_schedule(size, ratio)
    logits_BLC2, bits_BLC = random_case(schedule)
    ours, theirs = logits_BLC2.clone().requires_grad_(), logits_BLC2.clone().requires_grad_()
    loss, expected = objective(ours, bits_BLC, schedule), reference(theirs, bits_BLC, schedule)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)


def test_bit_losses_are_cross_entropies():
    logits_BLC2, bits_BLC = random_case(scale_schedule(128))
    expected = F.cross_entropy(logits_BLC2.flatten(0, 2), bits_BLC.flatten().long(), reduction="none")
    torch.testing.assert_close(bit_losses(logits_BLC2, bits_BLC).flatten(), expected)


def test_token_weights_sum_to_one_and_fall_with_the_grid():
    for size in (128, 256, 1024):
        for ratio in ASPECT_RATIOS:
            schedule = scale_schedule(size, ratio)
            weights_L = token_weights(schedule)
            assert weights_L.shape == (schedule.offsets[-1],) and weights_L.dtype == torch.float32
            torch.testing.assert_close(weights_L.sum(), torch.tensor(1.0))
            finest = weights_L[-1]
            for scale, count in enumerate(schedule.num_tokens):
                part = weights_L[schedule.offsets[scale] : schedule.offsets[scale + 1]]
                assert (part == part[0]).all()
                torch.testing.assert_close(part[0] / finest, torch.tensor((schedule.num_tokens[-1] / count) ** 0.5))


def test_chance_costs_one_bit_and_certainty_nothing():
    schedule = scale_schedule(128)
    _, bits_BLC = random_case(schedule)
    chance = torch.zeros(*bits_BLC.shape, 2)
    torch.testing.assert_close(objective(chance, bits_BLC, schedule), torch.tensor(2.0).log())
    sure = F.one_hot(bits_BLC.long(), 2).float() * 1e4
    assert objective(sure, bits_BLC, schedule) == 0
    torch.testing.assert_close(objective(sure, ~bits_BLC, schedule), torch.tensor(1e4))


def test_objective_of_a_batch_is_the_mean_of_its_members():
    schedule = scale_schedule(128)
    logits_BLC2, bits_BLC = random_case(schedule)
    alone = [objective(logits_BLC2[row : row + 1], bits_BLC[row : row + 1], schedule) for row in range(2)]
    torch.testing.assert_close(objective(logits_BLC2, bits_BLC, schedule), torch.stack(alone).mean())


def random_masks(schedule: ScaleSchedule) -> Tensor:
    """An empty mask, a full one, one of a single pixel, and a block."""
    masks_BHW = torch.zeros(4, *schedule.image_hw, dtype=torch.bool)
    masks_BHW[1] = True
    masks_BHW[2, -1, 0] = True
    masks_BHW[3, 20:50, 30:70] = True
    return masks_BHW


@pytest.mark.parametrize("size, ratio", [(128, 1.0), (128, 0.333), (256, 1.5)])
def test_edit_weights_of_factor_one_are_the_token_weights(size, ratio):
    schedule = scale_schedule(size, ratio)
    weights_BL = edit_weights(random_masks(schedule), schedule, 1.0)
    torch.testing.assert_close(weights_BL, token_weights(schedule).expand(4, -1), rtol=1e-6, atol=0)
    logits_BLC2, bits_BLC = random_case(schedule)
    torch.testing.assert_close(
        objective(logits_BLC2, bits_BLC, schedule, weights_BL[:2]), objective(logits_BLC2, bits_BLC, schedule)
    )


@pytest.mark.parametrize("factor", [1.5, 4.0, 100.0])
@pytest.mark.parametrize("size, ratio", [(128, 1.0), (128, 0.333), (256, 1.5)])
def test_edit_weights_count_the_tokens_that_the_mask_touches(size, ratio, factor):
    schedule = scale_schedule(size, ratio)
    masks_BHW = random_masks(schedule)
    weights_BL = edit_weights(masks_BHW, schedule, factor)
    torch.testing.assert_close(weights_BL.sum(1), torch.ones(4))
    # Empty and full masks tell no tokens apart.
    torch.testing.assert_close(weights_BL[:2], token_weights(schedule).expand(2, -1), rtol=1e-5, atol=0)
    height, width = schedule.image_hw
    for mask_HW, raised_L in zip(masks_BHW[2:], (weights_BL / token_weights(schedule))[2:]):
        # A token reaches from its first to its last pixel, those that it shares with a neighbour included.
        touched_L = torch.tensor(
            [
                bool(
                    mask_HW[
                        i * height // h : -(-(i + 1) * height // h), j * width // w : -(-(j + 1) * width // w)
                    ].any()
                )
                for h, w in schedule.grids
                for i in range(h)
                for j in range(w)
            ]
        )
        inside_l, outside_l = raised_L[touched_L], raised_L[~touched_L]
        assert len(inside_l) >= schedule.num_scales and len(outside_l) > schedule.num_tokens[-1] / 2
        torch.testing.assert_close(inside_l, inside_l[:1].expand_as(inside_l))
        torch.testing.assert_close(outside_l, inside_l[:1].expand_as(outside_l) / factor)


def test_objective_of_edit_weights_is_the_weighted_mean_of_the_bits():
    schedule = scale_schedule(128)
    logits_BLC2, bits_BLC = random_case(schedule)
    weights_BL = edit_weights(random_masks(schedule)[2:], schedule, 5.0)
    expected = (bit_losses(logits_BLC2, bits_BLC) * weights_BL[..., None]).sum() / (2 * NUM_BITS)
    torch.testing.assert_close(objective(logits_BLC2, bits_BLC, schedule, weights_BL), expected)


def test_bit_accuracy_tells_scales_apart():
    schedule = scale_schedule(128)
    _, bits_BLC = random_case(schedule)
    predicted = bits_BLC.clone()
    first, last = schedule.offsets[2], schedule.offsets[3]
    predicted[:, first:last] ^= True  # scale 2 all wrong
    predicted[0, schedule.offsets[3] : schedule.offsets[4]] ^= True  # scale 3 wrong in one of two images
    logits_BLC2 = F.one_hot(predicted.long(), 2).float()
    assert bit_accuracy(logits_BLC2, bits_BLC, schedule).tolist() == [1, 1, 0, 0.5, 1]


@pytest.mark.parametrize("case, size", [("0.06M", 256), ("0.25M", 512)])
@pytest.mark.parametrize("name", ["bsq32_f16", "bsq14_f8_patchify"])
def test_recorded_losses(parity_dir: Path, name, case, size):
    recorded = json.loads((parity_dir / f"{name}.json").read_text())["cases"][case]["train"]
    with safe_open(parity_dir / f"{name}.golden.safetensors", "pt") as golden:
        logits, bits = (golden.get_tensor(f"{case}.train.{key}") for key in ("logits", "gt_bits"))
    logits_BLC2, bits_BLC = logits.unflatten(-1, (-1, 2)), bits.bool()
    loss = objective(logits_BLC2, bits_BLC, scale_schedule(size))
    assert loss.item() == pytest.approx(recorded["loss_reweighted"], abs=1e-5)
    assert bit_losses(logits_BLC2, bits_BLC).mean().item() == pytest.approx(recorded["loss_mean"], abs=1e-5)
