"""Scores from pretrained networks: CLIP, DINO, DINO structure distance, LPIPS.

Networks come through transformers and can be given instead of named. How a picture is prepared is chosen by the name of
the reference: published numbers of this field differ by nothing more than that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varedit.evaluation.cases import picture_digest

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Preprocessing = Literal["pie-bench", "magicbrush", "ip2p"]
"""For CLIP: "pie-bench" and "magicbrush" resize the short side (bicubic) and crop the centre, as OpenAI's own transform
and torchmetrics' CLIPScore do; "ip2p" squashes the whole frame (bicubic without antialiasing)."""


def clip_pixels(picture: np.ndarray, side: int, preprocessing: Preprocessing) -> Tensor:
    """CLIP's input (1, 3, side, side) from uint8 (H, W, 3)."""
    if preprocessing == "ip2p":
        image_13HW = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        image_13HW = F.interpolate(image_13HW, size=(side, side), mode="bicubic", align_corners=False)
    elif preprocessing in ("pie-bench", "magicbrush"):
        image_13HW = _crop(picture, side, side)
    else:
        raise ValueError(f"preprocessing {preprocessing!r} is unknown; use {', '.join(get_args(Preprocessing))}")
    return _normalise(image_13HW, CLIP_MEAN, CLIP_STD)


def dino_pixels(picture: np.ndarray) -> Tensor:
    """DINO's input (1, 3, 224, 224): short side 256 (bicubic), centre crop, ImageNet statistics (MagicBrush)."""
    return _normalise(_crop(picture, 256, 224), IMAGENET_MEAN, IMAGENET_STD)


def structure_pixels(picture: np.ndarray) -> Tensor:
    """Input of the structure distance, (1, 3, h, w): short side 224, long side at most 480.

    PIE-Bench's reference applies the ImageNet statistics to 0..255, without dividing by 255 first, and in the
    environment it names (torchvision 0.13) tensors are resized without antialiasing; its published numbers are made
    that way, so this does the same.
    """
    height, width = picture.shape[:2]
    size = _resized(height, width, 224, 480)
    image_13HW = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    if size != (height, width):
        image_13HW = F.interpolate(image_13HW, size=size, mode="bilinear", align_corners=False)
    return _normalise(image_13HW, IMAGENET_MEAN, IMAGENET_STD)


def _resized(height: int, width: int, short: int, longest: int | None = None) -> tuple[int, int]:
    """Height and width with the short side at `short`, rounded down as torchvision and transformers do."""
    least, most = min(height, width), max(height, width)
    new_least, new_most = short, int(short * most / least)
    if longest is not None and new_most > longest:
        new_least, new_most = int(longest * new_least / new_most), longest
    return (new_least, new_most) if height <= width else (new_most, new_least)


def _crop(picture: np.ndarray, short: int, side: int) -> Tensor:
    """Short side to `short` (bicubic), the centre of `side`, on [0, 1]: (1, 3, side, side)."""
    height, width = _resized(picture.shape[0], picture.shape[1], short)
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    pixels = np.array(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def _normalise(image_13HW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (image_13HW - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of two vectors; 0 if either has no length."""
    return float(F.cosine_similarity(first.double(), second.double(), dim=-1, eps=1e-12))


def clip_direction(
    source: Tensor, result: Tensor, source_text: Tensor, target_text: Tensor, *, normalise: bool = True
) -> float:
    """CLIP-Dir: cosine of the change in the picture with the change in the caption (paper A.2.1).

    Args:
        source, result, source_text, target_text: embeddings (D,).
        normalise: scale each embedding to length 1 before subtracting, as InstructPix2Pix's reference does; some
            re-implementations do not.

    Returns:
        -1 to 1; 0 when the picture or the caption did not change at all.
    """
    if normalise:
        source, result, source_text, target_text = (
            F.normalize(vector.double(), dim=-1) for vector in (source, result, source_text, target_text)
        )
    return cosine(result - source, target_text - source_text)


@dataclass
class Clip:
    """A CLIP model with its tokenizer. The last embeddings are kept: several scores of a case ask for the same ones."""

    model: Any
    tokenizer: Any
    preprocessing: Preprocessing = "magicbrush"
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def image(self, picture: np.ndarray) -> Tensor:
        """Embedding (D,) of uint8 (H, W, 3), not normalised."""
        return self._keep(picture_digest(picture), lambda: self._image(picture))

    def text(self, text: str) -> Tensor:
        """Embedding (D,) of a caption, cut at the model's length; not normalised."""
        return self._keep(f"text {text}", lambda: self._text(text))

    def _keep(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            if len(self._kept) >= 8:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[key] = compute()
        return self._kept[key]

    @torch.no_grad()
    def _image(self, picture: np.ndarray) -> Tensor:
        side = self.model.config.vision_config.image_size
        pixels = clip_pixels(picture, side, self.preprocessing).to(self.model.device, self.model.dtype)
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def _text(self, text: str) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        return _pooled(
            self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )


def _pooled(output: Any) -> Tensor:
    """transformers 5 wraps the embedding, earlier versions return it. On the CPU, since MPS has no float64."""
    return getattr(output, "pooler_output", output)[0].float().cpu()


@torch.no_grad()
def dino_embedding(model: Any, picture: np.ndarray) -> Tensor:
    """The class token (D,) of a ViT."""
    pixels = dino_pixels(picture).to(model.device, model.dtype)
    return model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[0, 0].float().cpu()


@torch.no_grad()
def self_similarity(model: Any, picture: np.ndarray) -> Tensor:
    """Cosines (N, N) between the keys of all tokens in a ViT's last block, heads side by side."""
    keys: list[Tensor] = []
    layers = [module for name, module in model.named_modules() if name.endswith(("k_proj", "attention.key"))]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no key projection that is known; use a ViT of transformers")
    hook = layers[-1].register_forward_hook(lambda module, inputs, output: keys.append(output))
    try:
        pixels = structure_pixels(picture).to(model.device, model.dtype)
        model(pixel_values=pixels, interpolate_pos_encoding=True)
    finally:
        hook.remove()
    unit_ND = F.normalize(keys[-1][0].float(), dim=-1)
    return unit_ND @ unit_ND.T


def structure_distance(model: Any, source: np.ndarray, result: np.ndarray) -> float:
    """PIE-Bench's structure distance: mean squared difference of the two self-similarities."""
    return float((self_similarity(model, source) - self_similarity(model, result)).square().mean())


@dataclass
class Backbones:
    """The networks of a benchmark, loaded when first used; any of them can be given instead.

    Attributes:
        clip_name, dino_name, structure_name: names that transformers loads; part of the protocol.
        preprocessing: for CLIP.
        given: networks by role: "clip" (a `Clip`), "dino", "structure" (ViTs), "lpips" (function of two tensors).
    """

    clip_name: str = "openai/clip-vit-base-patch32"
    dino_name: str = "facebook/dino-vits16"
    structure_name: str = "facebook/dino-vitb8"
    preprocessing: Preprocessing = "magicbrush"
    device: str = "cpu"
    given: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def clip(self) -> Clip:
        if "clip" in self.given:
            return self.given["clip"]
        from transformers import AutoTokenizer, CLIPModel

        model = _load(CLIPModel.from_pretrained, self.clip_name, self.device)
        tokenizer = _load(AutoTokenizer.from_pretrained, self.clip_name)
        return Clip(model, tokenizer, self.preprocessing)

    @cached_property
    def dino(self) -> Any:
        return self.given.get("dino") or self._vit(self.dino_name)

    @cached_property
    def structure(self) -> Any:
        return self.given.get("structure") or self._vit(self.structure_name)

    @cached_property
    def lpips(self) -> Callable[[Tensor, Tensor], float]:
        """Distance of two pictures (1, 3, H, W) on [-1, 1], SqueezeNet as in PIE-Bench."""
        if "lpips" in self.given:
            return self.given["lpips"]
        try:
            import torchvision  # noqa: F401 - torchmetrics builds SqueezeNet with it
            from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
        except ImportError as error:
            raise ValueError(
                f"lpips needs torchmetrics and torchvision ({error}); leave it out of --metrics"
            ) from error
        with _weights_only():
            metric = _load(lambda _: LearnedPerceptualImagePatchSimilarity(net_type="squeeze"), "squeeze", self.device)
        return lambda first, second: float(metric(first.to(self.device), second.to(self.device)))

    def protocol(self, role: str) -> dict[str, str]:
        """What of a network belongs to the protocol: its name and how pictures are prepared for it."""
        if role == "clip":
            return {"name": "given" if "clip" in self.given else self.clip_name, "preprocessing": self.preprocessing}
        if role == "lpips":
            return {"name": "given" if role in self.given else "squeeze"}
        name = self.dino_name if role == "dino" else self.structure_name
        return {"name": "given" if role in self.given else name}

    def _vit(self, name: str) -> Any:
        from transformers import ViTModel

        return _load(lambda source: ViTModel.from_pretrained(source, add_pooling_layer=False), name, self.device)


NETWORKS = ("clip", "dino", "structure")


def backbones_of(
    benchmark: str,
    device: str = "cpu",
    preprocessing: str | None = None,
    networks: dict[str, str] | None = None,
) -> Backbones:
    """The networks and the preparation that a benchmark's reference uses.

    Args:
        preprocessing: another preparation for CLIP.
        networks: other networks by role, names or folders for transformers.

    Raises:
        ValueError: an unknown preparation or role.
    """
    chosen: dict[str, Any] = {"device": device}
    if benchmark == "pie-bench":
        chosen |= {"clip_name": "openai/clip-vit-large-patch14", "preprocessing": "pie-bench"}
    if preprocessing is not None:
        if preprocessing not in get_args(Preprocessing):
            raise ValueError(f"preprocessing {preprocessing!r} is unknown; use {', '.join(get_args(Preprocessing))}")
        chosen["preprocessing"] = preprocessing
    for role, name in (networks or {}).items():
        if role not in NETWORKS:
            raise ValueError(f"network {role!r} is unknown; use {', '.join(NETWORKS)}")
        chosen[f"{role}_name"] = name
    return Backbones(**chosen)


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load reads tensors only meanwhile; torchvision downloads a pickle and lets it be anything."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load(load: Callable[[str], Any], name: str, device: str | None = None) -> Any:
    try:
        loaded = load(name)
        return loaded.eval().to(device) if device else loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot load {name!r}: download it where the hub can be reached, name a folder, or choose --metrics "
            f"that need no network ({str(error).strip().splitlines()[0]})"
        ) from error
