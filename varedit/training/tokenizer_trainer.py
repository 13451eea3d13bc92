"""Training of the image tokenizer: reconstruction through the quantizer, at all scales and at few."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit import quantizer
from varedit.data.features import load_image_tokenizer
from varedit.image_processor import to_pil
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.model_folder import in_its_place, sweep
from varedit.scales import ScaleSchedule
from varedit.training.config import TokenizerConfig
from varedit.training.data import HeldOut, MicroBatch, Plan, stream_seed
from varedit.training.journal import Journal
from varedit.training.objective import laplacian_loss
from varedit.training.pictures import contact_sheet
from varedit.training.precision import autocast
from varedit.training.processes import Processes
from varedit.training.sources import open_pairs
from varedit.training.typed_yaml import construct

_SHARPNESS = 10.0
"""How decided a bit counts as in the entropy regularisation (inverse temperature of the soft assignment)."""


class PatchDiscriminator(nn.Module):
    """Real or not, one logit a patch of about 30 pixels: four convolutions (Isola et al., pix2pix, 2017)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for index, (a, b) in enumerate(zip(widths, widths[1:])):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, b)] if index else []
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class TokenizerTraining:
    """The image tokenizer, its discriminator if any, and what one micro-batch teaches.

    Args:
        config: of the run. processes: who we are. folder: of the run.
        perceptual: (reconstruction, image) -> scalar distance, differentiable; needs `perceptual_weight`.

    Raises:
        ValueError: the start folder or the data cannot be used, or weight and module do not go together.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        processes: Processes,
        folder: Path,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if (config.perceptual_weight > 0) != (perceptual is not None):
            raise ValueError(
                f"config field perceptual_weight is {config.perceptual_weight}; it goes with the argument perceptual "
                "of varedit.training.run.train, give both or neither"
            )
        self.config, self.processes, self.perceptual = config, processes, perceptual
        tokenizer = new_tokenizer(config).train().to(processes.device, memory_format=torch.channels_last)
        self.image_tokenizer = tokenizer
        self.modules: dict[str, nn.Module] = {"image_tokenizer": tokenizer}
        if config.adversarial_weight > 0:
            torch.manual_seed(stream_seed("discriminator", config.seed))
            self.modules["discriminator"] = PatchDiscriminator().to(processes.device)
        pairs, held_out = open_pairs(config, processes, folder)
        self.plan = Plan(pairs, config.steps, config.batch_size, config.seed)
        self.held_out = (
            HeldOut(held_out, config.data.validation_count, config.micro_batch_size, config.seed) if held_out else None
        )

    # -- one micro-batch --

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of all losses; each of them, PSNR and bit usage as metrics."""
        config, image = self.config, self._images(batch)
        num_scales = self._num_scales(batch)
        with autocast(config, image.device):
            features = self.image_tokenizer.encoder(image).float()
            pyramid = self._pyramid(features, batch.schedule)
            canvas = pyramid.canvas_of(num_scales)
            # Straight-through: the decoder sees the codes, the encoder gets the decoder's gradient.
            predicted = self.image_tokenizer.decoder(features + (canvas - features).detach()).float()
        parts = {
            "l1": (1.0, (predicted - image).abs().mean()),
            "laplacian": (config.laplacian_weight, laplacian_loss(predicted, image)),
            "commitment": (config.commitment_weight, (features - pyramid.canvases[-1]).square().mean()),
            "entropy": (config.entropy_weight, pyramid.entropy()),
        }
        if self.perceptual is not None:
            parts["perceptual"] = (config.perceptual_weight, self.perceptual(predicted, image))
        if "discriminator" in self.modules:
            started = batch.step >= config.adversarial_start
            fooled, told_apart = self._adversarial(predicted, image)
            parts["adversarial"] = (config.adversarial_weight * float(started), fooled)
            parts["discriminator"] = (1.0, told_apart)
        loss = sum((weight * value for weight, value in parts.values() if weight), torch.zeros((), device=image.device))
        metrics = {name: value for name, (weight, value) in parts.items() if weight or name == "commitment"}
        metrics |= {"psnr": psnr(predicted.detach(), image).mean(), "bit_usage": pyramid.bit_usage()}
        return loss, metrics

    def validate(self, batch: MicroBatch) -> dict[str, Tensor]:
        """PSNR in dB, SSIM and bit usage of held-out images."""
        image = self._images(batch)
        pyramid = self._pyramid(self.image_tokenizer.encode(image), batch.schedule)
        predicted = self.image_tokenizer.decode(pyramid.canvases[-1])
        return {
            "l1": (predicted - image).abs().mean(),
            "psnr": psnr(predicted, image).mean(),
            "ssim": ssim(predicted, image).mean(),
            "bit_usage": pyramid.bit_usage(),
        }

    def _images(self, batch: MicroBatch) -> Tensor:
        images = torch.cat([batch.source_B3HW, batch.target_B3HW]).to(self.processes.device)
        return images.contiguous(memory_format=torch.channels_last)

    def _pyramid(self, features_BChw: Tensor, schedule: ScaleSchedule) -> "Pyramid":
        return Pyramid(features_BChw, schedule, self.image_tokenizer.config.patch_size)

    def _num_scales(self, batch: MicroBatch) -> list[int]:
        """How many scales of each image the decoder sees: a function of (seed, step, position)."""
        counts = []
        for side in ("source", "target"):
            for position in batch.positions:
                rng = random.Random(stream_seed("scales", self.config.seed, batch.step, position, side))
                few = rng.random() < self.config.drop_scales
                counts.append(rng.randrange(1, batch.schedule.num_scales) if few else batch.schedule.num_scales)
        return counts

    def _adversarial(self, predicted: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Hinge losses of the tokenizer (the discriminator held fast) and of the discriminator (the picture held)."""
        discriminator = self.modules["discriminator"]
        fixed = {name: value.detach() for name, value in discriminator.state_dict().items()}
        fooled = -torch.func.functional_call(discriminator, fixed, (predicted,)).mean()
        real, fake = discriminator(image), discriminator(predicted.detach())
        return fooled, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

    # -- what comes out --

    def sample(self, step: int, folder: Path, journal: Journal | None) -> None:
        """A sheet of held-out images: image | first half of the scales | all scales."""
        if self.held_out is None or journal is None:
            return
        rows: list = []
        with torch.no_grad():
            for index in range(len(self.held_out)):
                batch = self.held_out.batch(index)
                image = self._images(batch)[: len(batch.positions)]
                pyramid = self._pyramid(self.image_tokenizer.encode(image), batch.schedule)
                half = pyramid.canvases[batch.schedule.num_scales // 2 - 1]
                decoded = [self.image_tokenizer.decode(canvas) for canvas in (half, pyramid.canvases[-1])]
                rows += [("", images) for images in zip(*(to_pil(part) for part in (image, *decoded)))]
                if len(rows) >= self.config.sample_count:
                    break
        folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(rows[: self.config.sample_count], ("image", "half of the scales", "all scales"))
        sheet.save(folder / f"step_{step:08d}.png")
        journal.picture("reconstructions", step, sheet)

    def export(self, folder: Path) -> None:
        """Write `image_tokenizer/`: for `image_tokenizer` in an editor's config."""
        if not self.processes.first:
            return
        sweep(folder / "image_tokenizer")
        with in_its_place(folder / "image_tokenizer") as partial:
            self.image_tokenizer.save_pretrained(partial)


class Pyramid:
    """The residual pyramid of features, as `quantizer.encode_bits` builds it, with what training needs of it.

    Attributes:
        residuals: what is quantized at each scale, float32 (B, d, h_k, w_k), with gradients to the features.
        canvases: the canvas after each scale, float32 (B, d, h, w), without gradients.
    """

    def __init__(self, features_BChw: Tensor, schedule: ScaleSchedule, patch_size: int) -> None:
        canvas = torch.zeros_like(features_BChw, dtype=torch.float32)
        self.residuals, self.canvases = [], []
        for scale in range(schedule.num_scales):
            grid = quantizer.latent_grid(schedule, scale, patch_size)
            residual = quantizer.resize_area(features_BChw.float() - canvas, grid)
            canvas = quantizer.accumulate(canvas, quantizer.features_to_bits(residual.detach()))
            self.residuals.append(residual)
            self.canvases.append(canvas)

    def canvas_of(self, num_scales: list[int]) -> Tensor:
        """The canvas (B, d, h, w) of each image after its own number of scales."""
        return torch.stack([self.canvases[count - 1][row] for row, count in enumerate(num_scales)])

    def bit_usage(self) -> Tensor:
        """Marginal entropy of the bits of each scale, 0 to 1, mean over channels: float32 (num_scales,)."""
        shares = [quantizer.features_to_bits(residual).float().mean((0, 2, 3)) for residual in self.residuals]
        return torch.stack([_entropy(share).mean() for share in shares]).detach()

    def entropy(self) -> Tensor:
        """Entropy regularisation of binary spherical quantization (Zhao et al. 2024, section 4): the mean entropy of a
        bit's soft assignment, low when bits are decided, less the entropy of the mean, high when all are used.
        """
        terms = []
        for residual in self.residuals:
            unit = F.normalize(residual, dim=1)
            soft = torch.sigmoid(4 * _SHARPNESS * unit * residual.shape[1] ** -0.5)
            terms.append(_entropy(soft).mean() - _entropy(soft.mean((0, 2, 3))).mean())
        return torch.stack(terms).mean()


def _entropy(share: Tensor) -> Tensor:
    """Of a coin, in bits."""
    share = share.clamp(1e-6, 1 - 1e-6)
    return -(share * share.log2() + (1 - share) * (1 - share).log2())


def psnr(predicted: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1]: float32 (B,), at most 100."""
    error = (predicted.clamp(-1, 1) - image).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def ssim(predicted: Tensor, image: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004; Gaussian window of 11 pixels, sigma 1.5), float32 (B,).

    Images (B, 3, H, W) in [-1, 1], at least 11 pixels a side; the mean over channels and whole windows.
    """
    place = torch.arange(11, dtype=torch.float32, device=image.device) - 5
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = (window / window.sum())[None, None].repeat(3, 1, 1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window[:, :, None], groups=3), window[..., None], groups=3)

    x, y = (predicted.float().clamp(-1, 1) + 1) / 2, (image.float() + 1) / 2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def new_tokenizer(config: TokenizerConfig) -> VAREditImageTokenizer:
    """The tokenizer that a run begins with, on the CPU. Raises ValueError."""
    if config.start is None:
        torch.manual_seed(stream_seed("weights", config.seed))
        tokenizer = construct(VAREditImageTokenizer, config.image_tokenizer, "image_tokenizer")
        tokenizer.initialize()
        return tokenizer
    return load_image_tokenizer(config.start).requires_grad_(True)
