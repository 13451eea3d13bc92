"""VAREditImageTokenizer: the convolutional encoder and decoder around the quantizer.

`encode(image) -> features` and `decode(features or canvas) -> image`; bits are the quantizer's business.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from varedit._diffusers import VAREditModel
from varedit.runtime import exact_convolutions


class ResidualBlock(nn.Module):
    """Group normalisation, SiLU, 3x3 convolution, twice; a 1x1 convolution on the skip path where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden


class Level(nn.Module):
    """The residual blocks of one resolution and, where another level follows, the change of resolution after them."""

    def __init__(self, widths: list[int], num_groups: int, resample: str | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResidualBlock(a, b, num_groups) for a, b in zip(widths, widths[1:])])
        self.resample = resample
        if resample == "down":
            self.conv = nn.Conv2d(widths[-1], widths[-1], 3, stride=2)
        elif resample == "up":
            self.conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.resample == "down":
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        if self.resample == "up":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> features (B, d, h, w)."""

    def __init__(
        self, widths: list[int], num_blocks: int, num_code_bits: int, stem_patch: int, num_groups: int
    ) -> None:
        super().__init__()
        self.stem_patch = stem_patch
        self.conv_in = nn.Conv2d(3 * stem_patch**2, widths[0], 3, padding=1)
        levels = []
        for index, width in enumerate(widths):
            previous = widths[max(index - 1, 0)]
            last = index == len(widths) - 1
            levels.append(Level([previous] + [width] * num_blocks, num_groups, None if last else "down"))
        self.levels = nn.ModuleList(levels)
        self.middle = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1], num_groups) for _ in range(2)))
        self.norm_out = nn.GroupNorm(num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], num_code_bits, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(image, self.stem_patch))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features (B, d, h, w) -> image (B, 3, H, W). `levels` is stored finest first and runs backwards."""

    def __init__(
        self, widths: list[int], num_blocks: int, num_code_bits: int, stem_patch: int, num_groups: int
    ) -> None:
        super().__init__()
        self.stem_patch = stem_patch
        self.conv_in = nn.Conv2d(num_code_bits, widths[-1], 3, padding=1)
        self.middle = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1], num_groups) for _ in range(2)))
        levels = []
        for index, width in enumerate(widths):
            coarser = widths[min(index + 1, len(widths) - 1)]
            levels.append(Level([coarser] + [width] * (num_blocks + 1), num_groups, "up" if index else None))
        self.levels = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(num_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * stem_patch**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.middle(self.conv_in(features))
        for level in reversed(self.levels):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.stem_patch)


class VAREditImageTokenizer(VAREditModel, ConfigMixin):
    """Encoder and decoder of the multi-scale tokenizer (paper section 3.1; architecture of the Infinity tokenizers).

    Args:
        num_code_bits: d, bits of one code on this tokenizer's grid.
        base_width: channels of the finest level; `multipliers` gives each level's multiple of it.
        multipliers: one entry a level, finest first.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        stem_patch: side of the pixel square folded into channels before the first convolution (1: none). Small
            models use 2, which keeps every convolution off the full resolution.
        patch_size: codes a token side: 2 means that a token carries 2 x 2 codes.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        num_code_bits: int = 32,
        base_width: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 4, 4, 4),
        num_blocks: int = 2,
        stem_patch: int = 1,
        patch_size: int = 1,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [base_width * multiplier for multiplier in multipliers]
        if any(width % num_groups for width in widths):
            raise ValueError(f"level widths {widths} must be multiples of num_groups {num_groups}")
        if self.stride * patch_size != 16:
            raise ValueError(
                f"stride {self.stride} times patch_size {patch_size} must be 16 pixels, the side of a token"
            )
        self.encoder = Encoder(widths, num_blocks, num_code_bits, stem_patch, num_groups)
        self.decoder = Decoder(widths, num_blocks, num_code_bits, stem_patch, num_groups)

    @property
    def stride(self) -> int:
        """Pixels a code side."""
        return self.config.stem_patch * 2 ** (len(self.config.multipliers) - 1)

    @property
    def num_token_bits(self) -> int:
        """C, bits a token."""
        return self.config.num_code_bits * self.config.patch_size**2

    @torch.no_grad()
    def initialize(self) -> None:
        """Start of a training from zero: every residual block is the identity."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
                module.conv2.bias.zero_()

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct without quantization: `decode(encode(image))`."""
        return self.decode(self.encode(image))

    @apply_forward_hook
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image in [-1, 1], (B, 3, H, W) -> continuous features float32 (B, d, H / stride, W / stride)."""
        with exact_convolutions(self.device):  # rounding flips the bits of features near zero
            return self.encoder(image_B3HW.to(self.dtype)).float()

    @apply_forward_hook
    def decode(self, features_BChw: Tensor) -> Tensor:
        """Features or canvas (B, d, h, w) -> image float32 in [-1, 1], (B, 3, H, W)."""
        with exact_convolutions(self.device):
            return self.decoder(features_BChw.to(self.dtype)).float().clamp(-1, 1)
