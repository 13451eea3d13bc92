"""Training of the image tokenizer: its measures against their definitions, its losses, a run from zero."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from varedit.cli import main
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.quantizer import decode_bits, encode_bits
from varedit.scales import scale_schedule
from varedit.training.config import TokenizerConfig, load_config
from varedit.training.data import MicroBatch
from varedit.training.processes import Processes
from varedit.training.run import train
from varedit.training.tokenizer_trainer import PatchDiscriminator, Pyramid, TokenizerTraining, psnr, ssim

TINY = {"num_code_bits": 4, "base_width": 32, "multipliers": [1, 1], "num_blocks": 1, "stem_patch": 4, "patch_size": 2}
CONFIG = {
    "image_tokenizer": TINY, "steps": 4, "batch_size": 2, "micro_batch_size": 2, "precision": "float32",
    "device": "cpu", "data": {"sizes": {128: 1}, "num_workers": 0, "validation_count": 2}, "log_every": 1,
    "validate_every": 4, "sample_every": 4, "save_every": 2, "optimizer": {"lr": 1e-3},
}  # fmt: skip
CPU = Processes(0, 1, torch.device("cpu"))


def config(folder: Path, *overrides: str) -> TokenizerConfig:
    path = folder / "tokenizer.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return load_config(TokenizerConfig, path, overrides)


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch(step: int = 0) -> MicroBatch:
    return MicroBatch(step, scale_schedule(128), [0, 1], images(1), images(2), [("a",), ("b",)])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_psnr_and_ssim_are_those_of_scikit_image():
    measures = pytest.importorskip("skimage.metrics")
    image = images(0)
    noisy = (image + 0.3 * images(3)).clamp(-1, 1)
    for row in range(2):
        pair = [((part[row].permute(1, 2, 0) + 1) / 2).numpy().astype(np.float64) for part in (image, noisy)]
        expected = measures.structural_similarity(
            *pair, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(noisy, image)[row].item() == pytest.approx(expected, abs=1e-5)
        assert psnr(noisy, image)[row].item() == pytest.approx(measures.peak_signal_noise_ratio(*pair), abs=1e-3)
    torch.testing.assert_close(ssim(image, image), torch.ones(2))


@pytest.mark.parametrize("ratio, patch_size", [(1.0, 1), (0.666, 2)])
def test_the_pyramid_is_that_of_the_quantizer(ratio, patch_size):
    schedule = scale_schedule(128, ratio)
    h, w = schedule.finest
    features = torch.randn(2, 6, h * patch_size, w * patch_size, generator=torch.Generator().manual_seed(0))
    pyramid = Pyramid(features, schedule, patch_size)
    bits, canvas = encode_bits(features, schedule, patch_size)
    assert torch.equal(pyramid.canvases[-1], canvas)
    few = pyramid.canvas_of([2, schedule.num_scales])
    assert torch.equal(few[0], decode_bits(bits[:2], schedule, patch_size)[0]) and torch.equal(few[1], canvas[1])
    assert pyramid.bit_usage().shape == (schedule.num_scales,)
    assert (pyramid.bit_usage() <= 1).all()


def test_entropy_regularisation_prefers_decided_and_used_bits():
    schedule = scale_schedule(128)
    h, w = schedule.finest
    signs = torch.where(torch.rand(2, 4, h, w, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    spread = Pyramid(signs, schedule, 1).entropy()
    same = Pyramid(torch.ones(2, 4, h, w), schedule, 1).entropy()
    assert spread < same - 0.1


def test_the_discriminator_and_the_tokenizer_each_learn_from_their_own_loss(tmp_path):
    training = TokenizerTraining(config(tmp_path, "adversarial_weight=1"), CPU, tmp_path)
    discriminator = training.modules["discriminator"]
    predicted = images(5).requires_grad_()
    fooled, told_apart = training._adversarial(predicted, images(6))
    (to_picture,) = torch.autograd.grad(fooled, predicted, retain_graph=True)
    assert to_picture.abs().sum() > 0
    unused = torch.autograd.grad(fooled, list(discriminator.parameters()), allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in unused)
    gradients = torch.autograd.grad(told_apart, [*discriminator.parameters(), predicted], allow_unused=True)
    assert gradients[-1] is None and all(gradient is not None for gradient in gradients[:-1])


def test_the_adversarial_loss_waits_for_its_step(tmp_path):
    training = TokenizerTraining(config(tmp_path, "adversarial_weight=1", "adversarial_start=5"), CPU, tmp_path)
    assert "adversarial" not in training.loss(batch(step=4))[1]
    assert "adversarial" in training.loss(batch(step=5))[1]
    assert isinstance(training.modules["discriminator"], PatchDiscriminator)


def test_a_perceptual_module_is_called_with_its_weight(tmp_path):
    def distance(predicted: Tensor, image: Tensor) -> Tensor:
        return (predicted - image).square().mean()

    plain = TokenizerTraining(config(tmp_path), CPU, tmp_path).loss(batch())
    training = TokenizerTraining(config(tmp_path, "perceptual_weight=3"), CPU, tmp_path, distance)
    loss, parts = training.loss(batch())
    torch.testing.assert_close(loss, plain[0] + 3 * parts["perceptual"])
    with pytest.raises(ValueError, match="perceptual_weight"):
        TokenizerTraining(config(tmp_path, "perceptual_weight=3"), CPU, tmp_path)


def test_scales_are_dropped_as_often_as_asked(tmp_path):
    training = TokenizerTraining(config(tmp_path, "drop_scales=0.5"), CPU, tmp_path)
    counts = [n for step in range(200) for n in training._num_scales(batch(step))]
    assert set(counts) == {1, 2, 3, 4, 5}
    assert 0.4 < np.mean([n < 5 for n in counts]) < 0.6
    assert training._num_scales(batch(7)) == training._num_scales(batch(7))


def test_a_run_and_its_resumption(tmp_path):
    overrides = ("optimizer.name=muon", "adversarial_weight=0.1", "entropy_weight=0.1", "drop_scales=0.3")
    train(config(tmp_path, *overrides), tmp_path / "whole")
    train(config(tmp_path, *overrides, "steps=2"), tmp_path / "parts")
    train(config(tmp_path, *overrides), tmp_path / "parts", resume=True)
    whole, parts = (
        [row for row in metrics(tmp_path / name) if "loss" in row] for name in ("whole", "parts")
    )  # fmt: skip
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts]
    weights = [
        load_file(tmp_path / n / "image_tokenizer/diffusion_pytorch_model.safetensors") for n in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    last = metrics(tmp_path / "whole")[-1]
    assert 0 < last["validation_psnr"] < 40 and -1 <= last["validation_ssim"] <= 1
    assert len(last["validation_bit_usage"]) == 5
    assert (tmp_path / "whole/samples/step_00000004.png").is_file()
    assert VAREditImageTokenizer.from_pretrained(tmp_path / "whole/image_tokenizer").num_token_bits == 16


@pytest.mark.slow
def test_the_command_learns_to_reconstruct(tmp_path):
    config(tmp_path)
    arguments = ["train", "tokenizer", "--config", str(tmp_path / "tokenizer.yaml"), "--output", str(tmp_path / "run")]
    settings = ["steps=100", "optimizer.name=muon", "optimizer.lr=5e-3", "batch_size=4", "micro_batch_size=4"]
    settings += ["validate_every=50"]
    settings += ["log_every=10", "sample_every=0", "save_every=0", "data.validation_count=8", "optimizer.decay=linear"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *(part for setting in settings for part in ("--set", setting))])
    assert caught.value.code == 0
    rows = metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.85 * losses[0]
    halfway, end = (row["validation_psnr"] for row in rows if "validation_psnr" in row)
    assert end > max(halfway, 11.5)
