"""What the frozen image tokenizer and text encoder make of a pair: computed once, and kept in its shard.

Training then runs neither of them. Continuous features are kept, not bits: bitwise self-correction needs the residuals.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoModelForTextEncoding, AutoTokenizer

from varedit.data.record import Encoded, Picture, Record
from varedit.data.shards import INDEX
from varedit.image_processor import Fit, prepare
from varedit.image_reader import LoadedImage, load_image
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.pipeline import default_device
from varedit.scales import SIZES
from varedit.text import encode_prompts

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class FeatureEncoder:
    """Makes the features of pairs, in float32 whatever they are stored in.

    Args:
        model: Folder of a model, or of an image tokenizer alone.
        text_encoder: Folder or hub name of a text encoder, if it is not the model's.
        sizes: Size classes to train at. fit: How pictures are brought to a template, as in `prepare`.
        dtype: To store. float16 rounds a feature by up to 1 in 2,000, which flips the bits of those next to zero.
        device: None takes the best at hand.

    Raises:
        ValueError: An unknown size, fit or dtype, or no such model.
    """

    def __init__(
        self,
        model: str,
        text_encoder: str | None = None,
        *,
        sizes: Sequence[int] = (256,),
        fit: Fit = "native",
        dtype: Literal["float16", "float32"] = "float16",
        device: str | None = None,
    ) -> None:
        for value, known, name in ((fit, ("native", "square"), "fit"), (dtype, tuple(DTYPES), "dtype")):
            if value not in known:
                raise ValueError(f"{name} of the features is {value!r}: use {' or '.join(known)}")
        for size in sizes:
            if size not in SIZES:
                raise ValueError(f"size {size} of the features is not a size class; use {', '.join(map(str, SIZES))}")
        self.device = torch.device(device or default_device())
        self.image_tokenizer = load_image_tokenizer(model).to(self.device)
        self.tokenizer, encoder = load_text_encoder(text_encoder or model, torch.float32)
        self.text_encoder = encoder.to(self.device)
        self.sizes, self.fit, self.dtype = tuple(sizes), fit, DTYPES[dtype]
        self.facts: dict[str, Any] = {
            "model": model,
            "image_tokenizer": model_sha256(self.image_tokenizer),
            "text_encoder": model_sha256(self.text_encoder),
            "sizes": list(sizes),
            "fit": fit,
            "dtype": dtype,
        }

    def read(self, record: Record) -> list[LoadedImage]:
        """Source and target as the trainer reads them. Raises ValueError for what cannot be decoded."""
        return [load_image(picture_input(picture)) for picture in (record.source, record.target)]

    @torch.no_grad()
    def encode(self, images: list[LoadedImage], instructions: Sequence[str]) -> bytes:
        """Features of one pair as a safetensors file.

        Tensors: "source.256" and "target.256" (d, h, w) on the tokenizer's grid, for each size; "text.0", "text.1",
        ... (T, F), the encoder's states of each phrasing.

        Raises:
            ValueError: a feature too large for float16.
        """
        tensors: dict[str, Tensor] = {}
        for size in self.sizes:
            pair = torch.cat([prepare(image.rgb, size, self.fit).image_B3HW for image in images])
            source, target = self.image_tokenizer.encode(pair.to(self.device))
            tensors |= {f"source.{size}": source, f"target.{size}": target}
        states = encode_prompts(instructions, self.tokenizer, self.text_encoder, max_tokens=1 << 30)
        tensors |= {f"text.{number}": state for number, state in enumerate(states)}
        stored = {name: value.to("cpu", self.dtype).contiguous() for name, value in tensors.items()}
        for name, value in stored.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"the features {name} of {instructions[0]!r} exceed {self.dtype}: store float32")
        return save(stored)


def read_features(data: bytes) -> dict[str, Tensor]:
    """What `FeatureEncoder.encode` wrote, as float32. Raises ValueError for damaged bytes."""
    try:
        return {name: value.float() for name, value in load(data).items()}
    except SafetensorError as error:
        raise ValueError(f"the features cannot be read: {error}") from error


def picture_input(picture: Picture) -> Path | bytes | np.ndarray:
    """A record's picture as `load_image` takes it."""
    return picture.data if isinstance(picture, Encoded) else picture


def stored_facts(folder: Path) -> dict[str, Any] | None:
    """What the features in packed shards were made with (`FeatureEncoder.facts`); None if there are none."""
    return json.loads((folder / INDEX).read_text("utf-8")).get("features")


def model_sha256(module: nn.Module) -> str:
    """Hash of a model's configuration and weights; the same whether it is held in float32 or bfloat16."""
    digest = hashlib.sha256()
    if isinstance(module, VAREditImageTokenizer):  # groups of a normalisation, for one, show in no weight's shape
        settings = {name: value for name, value in module.config.items() if not name.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        rounded = value.detach().to(torch.bfloat16).cpu().contiguous().view(-1)
        digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_image_tokenizer(source: str) -> VAREditImageTokenizer:
    """The image tokenizer, float32 and frozen, of a model folder or of a folder of its own. Raises ValueError."""
    if not Path(source).is_dir():  # diffusers would look for it on the hub
        raise ValueError(f"no image tokenizer in {source!r}: no such folder; train or convert one first")
    diffusers.utils.logging.disable_progress_bar()
    subfolder = "image_tokenizer" if Path(source, "model_index.json").is_file() else None
    try:
        tokenizer = VAREditImageTokenizer.from_pretrained(source, subfolder=subfolder, dtype=torch.float32)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no image tokenizer in {source!r}: {str(error).strip().splitlines()[0]}") from error
    return tokenizer.requires_grad_(False).eval()


def load_text_encoder(source: str, dtype: torch.dtype) -> tuple:
    """Tokenizer and frozen text encoder of a model folder, or of an encoder's folder or hub name. Raises ValueError."""
    transformers.utils.logging.disable_progress_bar()
    inside = Path(source, "model_index.json").is_file()
    places = [str(Path(source, name)) if inside else source for name in ("tokenizer", "text_encoder")]
    if Path(places[1]).is_dir() and not Path(places[1], "config.json").is_file():
        raise ValueError(f"no text encoder in {source!r}: it holds no config.json; give a folder or hub name of one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(places[0])
        encoder, loading = AutoModelForTextEncoding.from_pretrained(places[1], dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no text encoder in {source!r}: {str(error).strip().splitlines()[0]}") from error
    wrong = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if wrong:
        raise ValueError(f"text encoder {source!r} lacks {', '.join(map(str, wrong[:5]))}; fetch it again")
    return tokenizer, encoder.requires_grad_(False).eval()
