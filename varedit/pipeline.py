"""VAREditPipeline: check inputs, encode, predict scale by scale, decode."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from varedit import quantizer
from varedit._diffusers import check_text_encoder
from varedit.image_processor import Fit, ImageInput, Prepared, prepare, to_pil
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.next_scale import next_scales
from varedit.runtime import computes_bfloat16
from varedit.sampling import Sampling
from varedit.scales import NUM_SCALES, Grid, ScaleSchedule
from varedit.text import encode_prompts, pad_text
from varedit.transformer import VAREditTransformer

logger = logging.getLogger(__name__)

DEFAULT_MODEL = Path(__file__).parent / "models" / "tiny"
"""The model that ships with the package."""

MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1


class EditCancelled(RuntimeError):
    """The callback asked to stop between two scales."""


@dataclass(frozen=True)
class ScaleStep:
    """What a callback is told after each scale.

    Attributes:
        scale: the scale just finished, from 0; num_scales: how many there are; grid: its tokens (height, width).
        indices: which images of the call this is about (images of one schedule are edited together).
        seconds: since the edit of these images began.
        preview: decodes the canvas so far; RGB images of the input's sizes, one an index.
        second_pass: whether these images were drawn before, see the lock of `editing.edit.Settings`.
    """

    scale: int
    num_scales: int
    grid: Grid
    indices: tuple[int, ...]
    seconds: float
    preview: Callable[[], list[Image.Image]]
    second_pass: bool = False


@dataclass(frozen=True)
class SampledScale:
    """What a constraint is told after a scale was sampled, before its codes go onto the canvas. All of one schedule.

    Attributes:
        bits_BChw: bool, the sampled bits on the image tokenizer's own grid.
        canvas_BChw: the canvas before this scale.
        features_BChw: the sources' continuous features, on the image tokenizer's finest grid.
        schedule, scale, patch_size: where in the pyramid this is.
        indices: which images of the call the rows are.
    """

    bits_BChw: Tensor
    canvas_BChw: Tensor
    features_BChw: Tensor
    schedule: ScaleSchedule
    scale: int
    patch_size: int
    indices: tuple[int, ...]


BitConstraint = Callable[[SampledScale], Tensor]
"""The bits to put onto the canvas in place of the sampled ones: bool, the same shape."""


@dataclass
class VAREditOutput(BaseOutput):
    """Result of a call, one entry an image.

    Attributes:
        images: RGB, of the input's width and height; none with `output_type="bits"`.
        bits: per image, per scale: uint8 (h, w, d) on the image tokenizer's own grid.
        seeds: the seed of each image; the same seed and inputs give the same bits.
        schedule: the scale schedule of each image.
    """

    images: list[Image.Image]
    bits: list[list[Tensor]]
    seeds: list[int]
    schedule: list[ScaleSchedule]


class VAREditPipeline(DiffusionPipeline):
    """Edits images by instructions.

    Args:
        transformer, image_tokenizer: the model.
        text_encoder, tokenizer: any transformers encoder with `last_hidden_state`; without them `prompt_embeds`
            must be given.
        size: size class of a call that names none, one of 128, 256, 512, 768, 1024.
        fit: "native" or "square", see `image_processor.prepare`.
        guidance_scale, temperature, top_p: this model's defaults, see the call.
    """

    _optional_components = ["text_encoder", "tokenizer"]
    model_cpu_offload_seq = "text_encoder->transformer->image_tokenizer"

    def __init__(
        self,
        transformer: VAREditTransformer,
        image_tokenizer: VAREditImageTokenizer,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        size: int = 256,
        fit: str = "native",
        guidance_scale: float = 3.0,
        temperature: float = 0.5,
        top_p: float = 1.0,
    ) -> None:
        super().__init__()
        if transformer.config.num_bits != image_tokenizer.num_token_bits:
            raise ValueError(
                f"the transformer predicts {transformer.config.num_bits} bits a token, the image tokenizer has "
                f"{image_tokenizer.num_token_bits}; they are not from the same model"
            )
        self.register_modules(
            transformer=transformer, image_tokenizer=image_tokenizer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(size=size, fit=fit, guidance_scale=guidance_scale, temperature=temperature, top_p=top_p)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "VAREditPipeline":
        """As in diffusers, from a folder or a hub repository, safetensors only.

        Raises:
            ValueError: a weight is missing, extra or of another shape.
        """
        kwargs["use_safetensors"] = True
        folder = str(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            folder = str(cls.download(folder, **kwargs))
        if "text_encoder" not in kwargs:
            check_text_encoder(folder, cls.load_config(folder), kwargs.get("variant"))
        pipeline = super().from_pretrained(folder, **kwargs)
        for name, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                missing = [key for key, value in module.state_dict().items() if value.is_meta]
                if missing:
                    raise ValueError(
                        f"{name} of {pretrained_model_name_or_path} lacks weights: {', '.join(missing[:5])}"
                    )
        return pipeline

    def load_lora_weights(self, source: str | os.PathLike, name: str = "default") -> None:
        """Load a LoRA adapter into the transformer; it is active at once, in place of others. Needs the extra `train`.

        `varedit.lora` has the rest: `stack_lora` uses several together, `merge_lora` adds them into the weights,
        `unload_lora` takes them out.

        Args:
            source: the file that training wrote, or its folder.
            name: to tell several adapters apart.

        Raises:
            ValueError: no such file, the name is taken, or the adapter is not for this transformer.
        """
        from varedit.lora import load_lora

        load_lora(self, source, name)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Prepared | Sequence[ImageInput | Prepared],
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        seed: int | Sequence[int | None] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        size: int | None = None,
        fit: Fit | None = None,
        callback_on_scale: Callable[[ScaleStep], bool | None] | None = None,
        constrain_bits: BitConstraint | None = None,
        output_type: Literal["pil", "bits"] = "pil",
    ) -> VAREditOutput:
        """Edit one or more images.

        `image`, `prompt` and `seed` may each be one value or a list; single values are repeated. Results do not depend
        on what else is in the call: random numbers are a function of (seed, scale, position, bit).

        Args:
            image: anything `image_processor.prepare` takes.
            prompt: the instruction. `prompt_embeds` in its place: encoder states, (T, F) each, unpadded.
            seed: from 0 to 2**63 - 1; None draws one and reports it.
            guidance_scale: how strongly the instruction is followed; 1 is no guidance (and half the work).
            temperature: 0 takes the likelier bit each time.
            top_p: drops a bit value when the other alone has this probability.
            size: size class; `fit`: "native" or "square". None everywhere means this model's own default.
            callback_on_scale: called after each scale; returning False cancels.
            constrain_bits: may replace the bits of each scale, such as `editing.mask.TokenLock`.
            output_type: "bits" leaves out the decoding.

        Raises:
            ValueError: an input is unusable; the message names the value and the fix.
            EditCancelled: the callback returned False.
        """
        sampling = Sampling(
            *(self._default(name, value) for name, value in
              (("guidance_scale", guidance_scale), ("temperature", temperature), ("top_p", top_p)))
        )  # fmt: skip
        if output_type not in ("pil", "bits"):
            raise ValueError(f"output_type {output_type!r} is unknown; use 'pil' or 'bits'")
        texts = self._check_prompts(prompt, prompt_embeds)
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        wanted: list[int | None] = list(seed) if isinstance(seed, (list, tuple)) else [seed]  # type: ignore[list-item]
        for value in wanted:
            if value is not None:
                check_seed(value)
        count = max(len(images), len(texts), len(wanted))
        seeds = [secrets.randbelow(2**31) if s is None else s for s in _repeat(wanted, count, "seed")]
        texts, images = _repeat(texts, count, "prompt"), _repeat(images, count, "image")
        prepared = [
            prepare(item, self.check_size(self._default("size", size)), self._default("fit", fit)) for item in images
        ]
        features = self._encode_texts(texts)

        groups: dict[ScaleSchedule, list[int]] = {}
        for index, item in enumerate(prepared):
            groups.setdefault(item.schedule, []).append(index)
        edited: dict[int, Image.Image] = {}
        bits: dict[int, list[Tensor]] = {}
        for schedule, indices in groups.items():
            inputs = [prepared[index] for index in indices]
            canvas_BChw, scales = self._edit(
                schedule,
                inputs,
                [features[index] for index in indices],
                torch.tensor([seeds[index] for index in indices]),
                sampling,
                tuple(indices),
                callback_on_scale,
                constrain_bits,
            )
            bits |= {index: [part[row] for part in scales] for row, index in enumerate(indices)}
            if output_type == "pil":
                edited |= zip(indices, self._decode(canvas_BChw, inputs))
        self.maybe_free_model_hooks()
        return VAREditOutput(
            images=[edited[index] for index in sorted(edited)],
            bits=[bits[index] for index in range(count)],
            seeds=seeds,
            schedule=[item.schedule for item in prepared],
        )

    def _edit(
        self,
        schedule: ScaleSchedule,
        prepared: list[Prepared],
        texts: list[Tensor],
        seeds_B: Tensor,
        sampling: Sampling,
        indices: tuple[int, ...],
        callback_on_scale: Callable[[ScaleStep], bool | None] | None,
        constrain_bits: BitConstraint | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Edit images of one schedule together: next-scale prediction (paper section 3.1).

        Returns:
            The canvas, and the bits of each scale, uint8 (B, h, w, d).
        """
        started = time.monotonic()
        device, patch_size = self._execution_device, self.image_tokenizer.config.patch_size
        # One by one, here and in `_decode`: in a batch the last digit of a convolution can differ.
        features_BChw = torch.cat([self.image_tokenizer.encode(item.image_B3HW.to(device)) for item in prepared])
        text_BTF, text_mask_BT = (part.to(device) for part in pad_text(texts))

        def constrain(scale: int, bits_BChw: Tensor, canvas_BChw: Tensor) -> Tensor:
            assert constrain_bits is not None
            sampled = SampledScale(bits_BChw, canvas_BChw, features_BChw, schedule, scale, patch_size, indices)
            return constrain_bits(sampled)

        scales = next_scales(
            self.transformer, schedule, patch_size, self._source(features_BChw, schedule), text_BTF, text_mask_BT,
            seeds_B.to(device), sampling, constrain if constrain_bits else None,
        )  # fmt: skip
        bits = []
        for scale, (bits_BChw, canvas_BChw) in enumerate(scales):
            bits.append(bits_BChw)
            if callback_on_scale:
                preview = partial(self._decode, canvas_BChw, prepared)
                canvas_BChw.flatten()[0].item()  # waits for the device
                seconds = time.monotonic() - started
                step = ScaleStep(scale, schedule.num_scales, schedule.grids[scale], indices, seconds, preview)
                _notify(callback_on_scale, step)
        return canvas_BChw, [b.permute(0, 2, 3, 1).to("cpu", torch.uint8) for b in bits]

    # -- pieces --

    def _source(self, features_BChw: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Continuous source features on the finest token grid, (B, C, h, w)."""
        tokens_BSC = quantizer.patchify(features_BChw, self.image_tokenizer.config.patch_size)
        return tokens_BSC.transpose(1, 2).unflatten(2, schedule.finest)

    def _decode(self, canvas_BChw: Tensor, prepared: list[Prepared]) -> list[Image.Image]:
        decoded = [to_pil(self.image_tokenizer.decode(canvas_1Chw))[0] for canvas_1Chw in canvas_BChw.split(1)]
        return [item.restore(image) for item, image in zip(prepared, decoded, strict=True)]

    def _encode_texts(self, texts: list[str | Tensor]) -> list[Tensor]:
        """Encoder states (T, F) of each instruction, on the encoder's device."""
        max_tokens = self.transformer.config.max_text_tokens
        prompts = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
        encoded = {}
        if prompts:
            self.check_text_encoder()
            device = self._execution_device
            states = encode_prompts(prompts, self.tokenizer, self.text_encoder, max_tokens, device=device)
            encoded = dict(zip(prompts, states))
        return [encoded[text] if isinstance(text, str) else text for text in texts]

    def _default(self, name: str, value):
        return self.config[name] if value is None else value

    def check_text_encoder(self) -> None:
        """Raise ValueError if instructions cannot be read."""
        if self.text_encoder is None:
            raise ValueError("this model has no text encoder; pass prompt_embeds, or convert with --text-encoder")

    def check_size(self, size: int) -> int:
        """`size`, if it is a size class of this model; else ValueError."""
        usable = [s for s, num_scales in NUM_SCALES.items() if num_scales <= self.transformer.config.num_levels]
        if size not in usable:
            raise ValueError(f"size {size} is not one that this model can use; choose {', '.join(map(str, usable))}")
        return size

    def _check_prompts(self, prompt, prompt_embeds) -> list[str | Tensor]:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if prompt_embeds is not None:
            width = self.transformer.config.text_features
            embeds = [prompt_embeds] if isinstance(prompt_embeds, Tensor) else list(prompt_embeds)
            for item in embeds:
                if item.ndim != 2 or item.shape[1] != width or not len(item):
                    raise ValueError(f"prompt_embeds of shape {tuple(item.shape)}; pass (tokens, {width})")
            return embeds
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in prompts:
            check_prompt(text)
        return prompts


def check_prompt(prompt: str) -> None:
    """Raise ValueError if `prompt` is not a usable instruction."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the instruction {prompt!r} is empty; say what to change, as in 'blur the photo'")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"the instruction has {len(prompt)} characters; shorten it to at most {MAX_PROMPT_CHARACTERS}")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # half of a character, or bytes that a terminal passed on
        raise ValueError(f"the instruction {prompt!r} is no valid text; type it as UTF-8") from None


def check_seed(seed: int) -> None:
    """Raise ValueError if `seed` is out of range."""
    if not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed!r} must be a whole number between 0 and {MAX_SEED}")


def _repeat(values: list, count: int, name: str) -> list:
    if len(values) not in (1, count):
        raise ValueError(f"{len(values)} values for {name}, but the call has {count} images; give 1 or {count}")
    return values * count if len(values) == 1 else values


def _notify(callback: Callable[[ScaleStep], bool | None], step: ScaleStep) -> None:
    if callback(step) is False:
        raise EditCancelled(f"cancelled after scale {step.scale + 1} of {step.num_scales}")


def load_pipeline(
    model: str | os.PathLike | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> VAREditPipeline:
    """Load a model by folder or hub name; None is the model that ships with the package.

    Args:
        device: None takes CUDA, then MPS, then the CPU.
        dtype: None takes float32 on the CPU and bfloat16 elsewhere. float16 is refused: T5 overflows in it, and on a
            CPU it is unusably slow.

    Raises:
        ValueError: no such model, an incomplete checkpoint, an unusable device or dtype.
    """
    device = device or default_device()
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not usable here; try cpu ({str(error).splitlines()[0]})") from error
    dtype = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    if dtype == torch.float16:
        raise ValueError("dtype float16 is not supported (T5 overflows in it); use bfloat16 or float32")
    if dtype == torch.bfloat16 and not computes_bfloat16(target):
        logger.warning("%s has no bfloat16 and computes it very slowly; float32 is faster, in twice the memory", target)
    source = DEFAULT_MODEL if model is None else model
    if model is None and not (DEFAULT_MODEL / "model_index.json").exists():
        raise ValueError("this installation has no default model; name one with --model FOLDER")
    try:
        pipeline = VAREditPipeline.from_pretrained(source, dtype=dtype)
    except HFValidationError as error:  # neither a folder nor a hub name
        raise ValueError(f"cannot load the model {str(source)!r}: there is no such folder") from error
    except (OSError, httpx.HTTPError) as error:  # the latter from a proxy that refuses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" (")[0]
        raise ValueError(f"cannot load the model {str(source)!r}: {reason}") from error
    return pipeline.to(target)


def default_device() -> str:
    """The best device at hand: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
