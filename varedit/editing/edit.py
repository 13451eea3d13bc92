"""One edit and everything a record of it needs: what the command line, sessions, batches and replays all call."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varedit import quantizer
from varedit.editing.change_map import Calibration, ChangeMap, change_map
from varedit.editing.mask import model_mask
from varedit.editing.preserve import Mode, preserve
from varedit.image_processor import Fit, ImageInput, LoadedImage, Prepared, load_image, prepare, to_pil
from varedit.pipeline import Sampling, ScaleStep, VAREditPipeline
from varedit.scales import ScaleSchedule, scale_schedule

_MODEL_DEFAULTS = ("guidance_scale", "temperature", "top_p", "size", "fit")


@dataclass(frozen=True)
class Settings:
    """What decides an edit beside the model, the image, the mask, the instruction and the seed.

    Attributes:
        guidance_scale, temperature, top_p, size, fit: of the pipeline's call; None is the model's own default.
        preserve: "exact", "blend" or "off": see `preserve.preserve`.
        strength: of the preservation, 0 to 1.
        calibration: thresholds of the change map.
    """

    guidance_scale: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    size: int | None = None
    fit: Fit | None = None
    preserve: Mode = "exact"
    strength: float = 1.0
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("guidance_scale", "temperature", "top_p")}
        Sampling(**{name: 1.0 if value is None else value for name, value in given.items()})
        if self.size is not None:
            scale_schedule(self.size)
        if self.fit not in (None, "native", "square"):
            raise ValueError(f"fit {self.fit!r} is unknown; use 'native' or 'square'")
        if self.preserve not in ("exact", "blend", "off"):
            raise ValueError(f"preserve mode {self.preserve!r} is unknown; use 'exact', 'blend' or 'off'")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"preserve strength {self.strength} must lie between 0 and 1")

    def resolved(self, pipeline: VAREditPipeline) -> "Settings":
        """The same settings with the model's own defaults filled in."""
        missing = {name: pipeline.config[name] for name in _MODEL_DEFAULTS if getattr(self, name) is None}
        return replace(self, **missing)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Settings":
        """Raises ValueError, naming the field, where the values are not those of `to_json`."""
        if not isinstance(values, dict):
            raise ValueError(f"settings {values!r} are not a table of names and values")
        values = dict(values)
        calibration = values.pop("calibration", {})
        known = {item.name for item in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"setting {name!r} is unknown to this version; known are {', '.join(sorted(known))}")
            wanted: tuple = (str, type(None)) if name in ("fit", "preserve") else (int, float, type(None))
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f"setting {name!r} has the unusable value {value!r}")
        numbers = isinstance(calibration, dict) and all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in calibration.values()
        )
        if not numbers or set(calibration) - {item.name for item in fields(Calibration)}:
            raise ValueError(f"setting 'calibration' has the unusable value {calibration!r}")
        return cls(**values, calibration=Calibration(**calibration))


@dataclass(frozen=True, eq=False)
class EditRequest:
    """One picture to edit.

    Attributes:
        image: anything `load_image` takes.
        prompt: the instruction.
        seed: None draws one.
        mask: mode L, of the image's size, 0 = leave alone (see `editing.mask`); None lets the edit go everywhere.
    """

    image: ImageInput
    prompt: str
    seed: int | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class EditResult:
    """An edit and what a record of it needs.

    Attributes:
        image: RGB, of the input's width and height, preserved as the settings say.
        source: the input as it was read.
        prompt, seed, mask: of the request; the seed that was drawn where it named none.
        settings: with no None left in it.
        change_map: where the model changed the picture; None with preservation off and no mask.
        bits: per scale, uint8 (h, w, d) on the image tokenizer's own grid.
        schedule: the grids of the edit.
    """

    image: Image.Image
    source: LoadedImage
    prompt: str
    seed: int
    mask: Image.Image | None
    settings: Settings
    change_map: ChangeMap | None
    bits: list[Tensor]
    schedule: ScaleSchedule


def apply_edit(
    pipeline: VAREditPipeline,
    image: ImageInput,
    prompt: str,
    *,
    seed: int | None = None,
    settings: Settings | None = None,
    mask: Image.Image | None = None,
    callback_on_scale: Callable[[ScaleStep], bool | None] | None = None,
) -> EditResult:
    """Edit one picture. The same arguments give the same result, alone or among others (`apply_edits`).

    Raises:
        ValueError: an input is unusable; the message names the value and the fix.
        EditCancelled: the callback returned False.
    """
    return apply_edits(pipeline, [EditRequest(image, prompt, seed, mask)], settings, callback_on_scale)[0]


def apply_edits(
    pipeline: VAREditPipeline,
    requests: Sequence[EditRequest],
    settings: Settings | None = None,
    callback_on_scale: Callable[[ScaleStep], bool | None] | None = None,
) -> list[EditResult]:
    """Edit several pictures in one call of the pipeline, which runs those of one schedule together."""
    if not requests:
        return []
    settings = (settings or Settings()).resolved(pipeline)
    sources = [load_image(request.image) for request in requests]
    for request, source in zip(requests, sources):
        if request.mask is not None and request.mask.size != (source.width, source.height):
            raise ValueError(
                f"a mask of {request.mask.width} x {request.mask.height} pixels for an image of {source.width} x "
                f"{source.height}; make it with image_mask, box_mask or polygon_mask"
            )
    output = pipeline(
        sources,
        [request.prompt for request in requests],
        seed=[secrets.randbelow(2**31) if request.seed is None else request.seed for request in requests],
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        top_p=settings.top_p,
        size=settings.size,
        fit=settings.fit,
        callback_on_scale=callback_on_scale,
    )
    results = []
    for index, (request, source) in enumerate(zip(requests, sources)):
        image, change = _finish(pipeline, request, source, output.bits[index], settings)
        results.append(
            EditResult(
                image,
                source,
                request.prompt,
                output.seeds[index],
                request.mask,
                settings,
                change,
                output.bits[index],
                output.schedule[index],
            )
        )
    return results


def _finish(
    pipeline: VAREditPipeline, request: EditRequest, source: LoadedImage, bits: list[Tensor], settings: Settings
) -> tuple[Image.Image, ChangeMap | None]:
    """Decode one edit by itself (in a batch the last digit of a decoding can differ) and preserve what was there."""
    assert settings.size is not None and settings.fit is not None
    prepared = prepare(source, settings.size, settings.fit)
    canvas = result_canvas(bits, prepared.schedule, pipeline)
    with torch.no_grad():
        decoded = pipeline.image_tokenizer.decode(canvas)
    edited = prepared.restore(to_pil(decoded)[0])
    if settings.preserve == "off" and request.mask is None:
        return edited, None
    change = _change_map(pipeline, request, prepared, canvas, decoded, settings)
    image = preserve(source, edited, change, settings.preserve, settings.strength, mask=request.mask)
    assert isinstance(image, Image.Image)
    return image, change


@torch.no_grad()
def _change_map(
    pipeline: VAREditPipeline,
    request: EditRequest,
    prepared: Prepared,
    canvas: Tensor,
    decoded: Tensor,
    settings: Settings,
) -> ChangeMap:
    tokenizer = pipeline.image_tokenizer
    features = tokenizer.encode(prepared.image_B3HW.to(canvas.device))
    _, source_canvas = quantizer.encode_bits(features, prepared.schedule, tokenizer.config.patch_size)
    return change_map(
        source_canvas,
        canvas,
        tokenizer.decode(source_canvas),
        decoded,
        content_box=prepared.content_box,
        mask_HW=None if request.mask is None else model_mask(request.mask, prepared).numpy(),
        calibration=settings.calibration,
    )


def result_canvas(bits: Sequence[Tensor], schedule: ScaleSchedule, pipeline: VAREditPipeline) -> Tensor:
    """The canvas (1, d, h, w) of the bits that a call of the pipeline returned for one image."""
    device = pipeline._execution_device
    rows = [part.permute(2, 0, 1)[None].to(device, torch.bool) for part in bits]
    return quantizer.decode_bits(rows, schedule, pipeline.image_tokenizer.config.patch_size)
