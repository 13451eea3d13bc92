"""The released models as data: sizes, and what tensors cannot tell. Imports neither PyTorch nor diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FLAN_T5_XL = "google/flan-t5-xl"


@dataclass(frozen=True)
class Preset:
    """One known checkpoint.

    Attributes:
        transformer, image_tokenizer: constructor arguments of `VAREditTransformer` and `VAREditImageTokenizer`.
        size: size class it was trained for, or where its training as an editor begins.
        fit: how images are brought to a template, see `image_processor.prepare`.
        guidance_scale, temperature, top_p: recommended sampling.
        num_parameters: of transformer, image tokenizer and text encoder together.
        text_encoder: hub name of the encoder whose states it was trained on.
    """

    transformer: Mapping[str, int | str]
    image_tokenizer: Mapping[str, int | tuple[int, ...]]
    size: int
    fit: Literal["native", "square"]
    guidance_scale: float
    temperature: float
    top_p: float
    num_parameters: int
    text_encoder: str = FLAN_T5_XL

    @property
    def position_layout(self) -> str:
        """ "released" or "offset", see `transformer.token_positions`."""
        return str(self.transformer["position_layout"])


_TEXT = {"text_features": 2048, "num_text_heads": 16, "max_text_tokens": 512, "num_levels": 15}
_2B = {"num_bits": 32, "width": 2048, "num_blocks": 32, "num_heads": 16, **_TEXT}
_8B = {"num_bits": 56, "width": 3584, "num_blocks": 40, "num_heads": 28, **_TEXT}

_TOKENIZER_32_BITS = {
    "num_code_bits": 32, "base_width": 128, "multipliers": (1, 2, 4, 4, 4), "num_blocks": 2, "patch_size": 1,
}  # fmt: skip
_TOKENIZER_14_BITS = {
    "num_code_bits": 14, "base_width": 128, "multipliers": (1, 2, 4, 4), "num_blocks": 2, "patch_size": 2,
}  # fmt: skip

_NUM_PARAMETERS_TEXT = 1_223_527_424
_NUM_PARAMETERS_2B = 2_204_564_032 + 110_118_051 + _NUM_PARAMETERS_TEXT
_NUM_PARAMETERS_8B = 8_375_791_824 + 81_624_209 + _NUM_PARAMETERS_TEXT


def _released(transformer: dict, image_tokenizer: dict, size: int, num_parameters: int) -> Preset:
    """A released editor: the position table and square fit of the released code, the sampling of its README.

    The paper's own numbers were made with guidance 4 and temperature 0.5.
    """
    transformer = transformer | {"position_layout": "released"}
    return Preset(transformer, image_tokenizer, size, "square", 3.0, 0.1, 0.97, num_parameters)


def _start(transformer: dict, image_tokenizer: dict, size: int, num_parameters: int) -> Preset:
    """A text-to-image checkpoint to train an editor from: the paper's positions, first size and sampling."""
    transformer = transformer | {"position_layout": "offset"}
    return Preset(transformer, image_tokenizer, size, "native", 4.0, 0.5, 0.97, num_parameters)


PRESETS: dict[str, Preset] = {
    "2b-512": _released(_2B, _TOKENIZER_32_BITS, 512, _NUM_PARAMETERS_2B),
    "8b-512": _released(_8B, _TOKENIZER_14_BITS, 512, _NUM_PARAMETERS_8B),
    "8b-1024": _released(_8B, _TOKENIZER_14_BITS, 1024, _NUM_PARAMETERS_8B),
    "infinity-2b": _start(_2B, _TOKENIZER_32_BITS, 256, _NUM_PARAMETERS_2B),
    "infinity-8b": _start(_8B, _TOKENIZER_14_BITS, 512, _NUM_PARAMETERS_8B),
}
