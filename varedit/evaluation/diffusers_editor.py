"""Any diffusers pipeline as an editor: those that edit by instruction, and fill pipelines with an adapter."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

from PIL import Image

from varedit.evaluation.cases import Case
from varedit.evaluation.editors import EditFailed, Editor

DIPTYCH = (
    "A diptych with two side-by-side images of the same scene. "
    "On the right, the scene is exactly the same as on the left but {instruction}"
)
"""The prompt with which ICEdit was trained."""

_FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, NameError)
"""What a pipeline may raise over a picture or an instruction it cannot use; none of it is ours."""


class DiffusersEditor(Editor):
    """A diffusers pipeline.

    Options: `layout` (else read off the pipeline's call), `lora` (repository or folder) with `lora_file`, `dtype`,
    `side` or `width` (the source is resized to this short side or width), `sized=false` (the pipeline chooses the size
    of its result); all others go to the call.

    Layouts: "edit" passes the source and the instruction; "omnigen" passes it in `input_images`; "fill" lets a fill
    pipeline redraw the whole frame while it sees all of the source (ACE++); "diptych" puts the source left and takes
    the right half (ICEdit).
    """

    LAYOUTS = ("edit", "omnigen", "fill", "diptych")
    OWN = ("layout", "lora", "lora_file", "dtype", "side", "width", "sized")

    def __init__(
        self, name: str, options: dict[str, Any], device: str | None = None, pipeline: Any | None = None
    ) -> None:
        self.settings = {"editor": "diffusers", "model": name, **options}
        self.own: dict[str, Any] = {key: options.get(key) for key in self.OWN}
        self.options = {key: value for key, value in options.items() if key not in self.OWN}
        if self.own["layout"] not in (None, *self.LAYOUTS):
            raise ValueError(f"layout {self.own['layout']!r} is unknown; use {', '.join(self.LAYOUTS)}")
        if self.own["dtype"] not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.own['dtype']!r} is unknown; use float32, bfloat16 or float16")
        for key in ("side", "width"):
            value = self.own[key]
            if value is not None and (type(value) is not int or value < 16):
                raise ValueError(f"{key} is {value!r}: use a whole number of pixels from 16")
        self.pipeline = pipeline if pipeline is not None else _load(name, self.own, device)
        self.pipeline.set_progress_bar_config(disable=True)
        parameters = inspect.signature(self.pipeline.__call__).parameters
        self.layout = self.own["layout"] or ("omnigen" if "input_images" in parameters else "edit")
        if self.own["layout"] is None and "mask_image" in parameters:
            raise ValueError(f"{name} fills masks; say layout=fill or layout=diptych")
        self.sized = {"height", "width"} <= set(parameters) and self.own["sized"] is not False
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [key for key in self.options if key not in parameters]
        if unknown and not open_ended:
            raise ValueError(f"option {unknown[0]!r} is unknown to {type(self.pipeline).__name__}")

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        import torch

        source = self._sized(source)
        arguments = self._arguments(case.instruction, source)
        generator = torch.Generator("cpu").manual_seed(seed)
        torch.manual_seed(seed)  # OmniGen samples its encoder with the global generator
        if self.layout == "fill":
            self._show(source)
        try:
            result = self.pipeline(**(arguments | self.options), generator=generator).images[0].convert("RGB")
        except _FAULTS as error:
            raise EditFailed(f"{type(error).__name__}: {error}") from error
        if self.layout == "diptych":
            result = result.crop((result.width // 2, 0, result.width, result.height))
        return result

    def _show(self, source: Image.Image) -> None:
        """Let a fill pipeline see the source under the mask: it would black out what it may redraw."""
        visible = self.pipeline.image_processor.preprocess(source)

        def prepare(mask: Any, masked_image: Any, *rest: Any) -> Any:
            return type(self.pipeline).prepare_mask_latents(
                self.pipeline, mask, visible.to(masked_image.device, masked_image.dtype), *rest
            )

        self.pipeline.prepare_mask_latents = prepare

    def _sized(self, source: Image.Image) -> Image.Image:
        """Sides as asked for, in steps of 16 as latent models need."""
        side, across = self.own["side"], self.own["width"]
        scale = across / source.width if across else side / min(source.size) if side else 1.0
        width, height = (max(16, round(side * scale / 16) * 16) for side in source.size)
        size = (width, height)
        return source if size == source.size else source.resize(size, Image.Resampling.LANCZOS)

    def _arguments(self, instruction: str, source: Image.Image) -> dict[str, Any]:
        width, height = source.size
        arguments: dict[str, Any]
        if self.layout == "omnigen":
            arguments = {"prompt": f"<img><|image_1|></img> {instruction}", "input_images": [source]}
        elif self.layout == "fill":
            arguments = {"prompt": instruction, "image": source, "mask_image": Image.new("L", source.size, 255)}
        elif self.layout == "diptych":
            both, mask = Image.new("RGB", (2 * width, height)), Image.new("L", (2 * width, height), 0)
            both.paste(source, (0, 0))
            both.paste(source, (width, 0))
            mask.paste(255, (width, 0, 2 * width, height))
            arguments = {"prompt": DIPTYCH.format(instruction=instruction), "image": both, "mask_image": mask}
            width *= 2
        else:
            arguments = {"prompt": instruction, "image": source}
        return arguments | ({"height": height, "width": width} if self.sized else {})


def _load(name: str, own: dict[str, Any], device: str | None) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from varedit.pipeline import default_device

    device = device or default_device()
    dtype = getattr(torch, own["dtype"] or ("float32" if device == "cpu" else "bfloat16"))
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, use_safetensors=True)
        if own["lora"]:
            pipeline.load_lora_weights(own["lora"], weight_name=own["lora_file"])
    except (*_FAULTS, OSError, ImportError) as error:
        # Without torchvision diffusers leaves names undefined (OmniGen), and transformers refuses (Qwen-Image-Edit).
        needs = "; it may need torchvision" if find_spec("torchvision") is None else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the pipeline {name!r}: {reason}{needs}") from error
    return pipeline.to(device)
