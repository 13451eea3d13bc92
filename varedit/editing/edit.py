"""One edit and everything a record of it needs: what the command line, sessions, batches and replays all call."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from varedit import quantizer, sixteen_bit
from varedit.alignment import Motion
from varedit.editing.align import find_slip, in_source_pixels, put_back
from varedit.editing.change_map import Calibration, ChangeMap, change_map, within
from varedit.editing.crop import Box, crop_box, cut, place_map, stitch
from varedit.editing.edit_kind import turn_alpha
from varedit.editing.mask import TokenLock, changed_area, check_margin, grow, model_mask, selects
from varedit.editing.preserve import Mode, preserve
from varedit.image_processor import Fit, ImageInput, LoadedImage, Prepared, load_image, prepare, to_pil
from varedit.pipeline import ScaleStep, VAREditPipeline
from varedit.sampling import Sampling
from varedit.scales import ScaleSchedule, scale_schedule

Lock = Literal["auto", "mask", "two-pass", "off"]
Crop = Literal["auto", "off"]
Callback = Callable[[ScaleStep], bool | None]

SECOND_PASS_MARGIN = 8.0
"""Model pixels around what the first pass changed that the second pass may change, fading out: half a token."""

_MODEL_DEFAULTS = ("guidance_scale", "temperature", "top_p", "size", "fit")
_WORDS: dict[str, tuple[str, ...]] = {
    "fit": get_args(Fit), "preserve": get_args(Mode), "lock": get_args(Lock), "crop": get_args(Crop)
}  # fmt: skip
_BEFORE = {"lock": "off", "crop": "off"}  # how edits were made that were recorded before these settings existed


@dataclass(frozen=True)
class Settings:
    """What decides an edit beside the model, the image, the mask, the instruction and the seed.

    Attributes:
        guidance_scale, temperature, top_p, size, fit: of the pipeline's call; None is the model's own default.
        preserve: "exact", "blend" or "off": see `preserve.preserve`.
        strength: of the preservation, 0 to 1.
        calibration: thresholds of the change map.
        lock: "mask": outside the mask, if there is one, the source's bits are forced at every scale. "auto": so they
            are in a second pass, but where a first, free one makes an edit of the whole picture (tone, style, weather),
            that one is taken: held to its surroundings it is drawn badly or not at all. "two-pass": the bits are forced
            in a second pass outside what the first one changed. "off": the model is free everywhere. In every case what
            lies outside the mask is put back in pixels.
        mask_margin: pixels by which the mask is grown on every side, so that nothing drawn in it is cut off.
        crop: "auto": where the mask (or what a first pass changed) is small in a large picture, the part around it is
            edited at the model's size, see `crop`. "off": always the whole.
    """

    guidance_scale: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    size: int | None = None
    fit: Fit | None = None
    preserve: Mode = "exact"
    strength: float = 1.0
    calibration: Calibration = field(default_factory=Calibration)
    lock: Lock = "auto"
    mask_margin: int = 0
    crop: Crop = "auto"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("guidance_scale", "temperature", "top_p")}
        Sampling(**{name: 1.0 if value is None else value for name, value in given.items()})
        if self.size is not None:
            scale_schedule(self.size)
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if value not in words and not (name == "fit" and value is None):
                raise ValueError(
                    f"{name} {value!r} is unknown; use {', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
                )
        check_margin(self.mask_margin)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"preserve strength {self.strength} must lie between 0 and 1")
        if self.preserve == "off" and self.strength != 1:
            raise ValueError(
                f"preserve strength {self.strength} means nothing with preserve off; leave one of them out"
            )

    def resolved(self, pipeline: VAREditPipeline) -> "Settings":
        """The same settings with the model's own defaults filled in.

        Raises:
            ValueError: the model has no such size class.
        """
        missing = {name: pipeline.config[name] for name in _MODEL_DEFAULTS if getattr(self, name) is None}
        if self.size is not None:
            pipeline.check_size(self.size)
        return replace(self, **missing)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Settings":
        """Raises ValueError, naming the field, where the values are not those of `to_json`."""
        if not isinstance(values, dict):
            raise ValueError(f"settings {values!r} are not a table of names and values")
        values = _BEFORE | values
        calibration = values.pop("calibration", {})
        known = {item.name for item in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"setting {name!r} is unknown to this version; known are {', '.join(sorted(known))}")
            wanted: tuple = (str,) if name in _WORDS else (int, float)
            wanted += (type(None),) if name in _MODEL_DEFAULTS else ()
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
        change_map: where the model changed the picture, of a released edit in its area alone; None with preservation
            off and no mask.
        bits: per scale, uint8 (h, w, d) on the image tokenizer's own grid.
        schedule: the grids of the edit.
        rgb16_HW3: the same as `image` at 16 bits a channel, uint16, where the input has them; else None.
        area: mode L, of the input's size: where the edit could go (the mask with its margin, or what a first pass
            changed); None is everywhere.
        box: the part of the picture that was edited by itself; None is the whole.
        motion: by how much the model moved the picture by mistake, in pixels of the input; None where it did not.
        aligned: whether that was undone. It is not for edits of the whole picture.
        released: with `lock="auto"`, whether the area's edit is one of the whole picture, which was not held.
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
    rgb16_HW3: np.ndarray | None = None
    area: Image.Image | None = None
    box: Box | None = None
    motion: Motion | None = None
    aligned: bool = False
    released: bool = False

    @property
    def like(self) -> LoadedImage:
        """What a file of this edit takes from the source: EXIF, and transparency, turned where all of it was turned."""
        change = self.change_map
        if change is None or self.area is not None or self.box is not None:
            return self.source
        return turn_alpha(self.source, change.orientation)

    @property
    def pixels(self) -> Image.Image | np.ndarray:
        """What a file of the edit holds: `image`, or `rgb16_HW3` where there is one."""
        return self.image if self.rgb16_HW3 is None else self.rgb16_HW3


def apply_edit(
    pipeline: VAREditPipeline,
    image: ImageInput,
    prompt: str,
    *,
    seed: int | None = None,
    settings: Settings | None = None,
    mask: Image.Image | None = None,
    callback_on_scale: Callback | None = None,
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
    callback_on_scale: Callback | None = None,
) -> list[EditResult]:
    """Edit several pictures in one call of the pipeline, which runs those of one schedule together.

    Where `lock` takes a second pass it is two calls, and the callback hears of both.
    """
    if not requests:
        return []
    settings = (settings or Settings()).resolved(pipeline)
    tasks = [_task(request, settings) for request in requests]
    held = settings.lock in ("mask", "two-pass")
    drafts = _sample(pipeline, tasks, settings, callback_on_scale, range(len(tasks)), held)
    second = {index: task for index, draft in enumerate(drafts) if (task := _second_task(draft, settings))}
    redone = _sample(pipeline, list(second.values()), settings, callback_on_scale, list(second), True, second_pass=True)
    for index, draft in zip(second, redone):
        drafts[index] = draft
    return [_compose(draft, settings) for draft in drafts]


@dataclass(frozen=True, eq=False)
class _Task:
    """A request with all that decides one pass over it; see `EditResult` for the names."""

    request: EditRequest
    source: LoadedImage
    seed: int
    grown_mask: Image.Image | None
    area: Image.Image | None
    box: Box | None = None

    def seen(self, mask: Image.Image | None) -> Image.Image | None:
        """The part of a mask that the model sees the picture of."""
        return mask if mask is None or self.box is None else mask.crop(self.box)


@dataclass(frozen=True, eq=False)
class _Draft:
    """What the model made of a task, at its own size."""

    task: _Task
    prepared: Prepared
    bits: list[Tensor]
    decoded: Tensor
    change: ChangeMap | None
    motion: Motion | None
    aligned: bool
    held: bool = False
    holdable: bool = False


def _task(request: EditRequest, settings: Settings) -> _Task:
    source, mask = load_image(request.image), request.mask
    if mask is not None and mask.size != (source.width, source.height):
        raise ValueError(
            f"a mask of {mask.width} x {mask.height} pixels for an image of {source.width} x "
            f"{source.height}; make it with image_mask, box_mask or polygon_mask"
        )
    if mask is not None and not selects(mask):
        raise ValueError("the mask is empty; make the area to edit white")
    mask = None if mask is None else grow(mask, settings.mask_margin)
    seed = secrets.randbelow(2**31) if request.seed is None else int(request.seed)
    task = _Task(request, source, seed, mask, mask)
    # Of "two-pass" the first finds out where the edit goes, so it sees everything.
    return task if settings.lock == "two-pass" else _cropped(task, settings)


def _second_task(draft: _Draft, settings: Settings) -> _Task | None:
    """What is left to a second pass; None where the first one will do.

    With "auto" it is the same again, held to the source, unless the first was an edit of the whole picture or there is
    nothing to hold. (In a mirrored or turned picture an area holds what came from elsewhere, so that is held too.)
    With "two-pass" it is what the first changed, unless that was nothing, everything, or only outside.
    """
    if settings.lock == "auto":
        assert draft.change is not None or not draft.holdable
        whole = draft.change and (draft.change.kind, draft.change.orientation) == ("global", "same")
        return draft.task if draft.holdable and not whole else None
    if settings.lock != "two-pass" or draft.change is None or draft.change.kind != "local":
        return None
    task = draft.task
    area = changed_area(draft.change.hard_HW, (task.source.width, task.source.height), SECOND_PASS_MARGIN)
    if task.grown_mask is not None:
        area = ImageChops.darker(area, task.grown_mask)
    return _cropped(replace(task, area=area), settings) if selects(area) else None


def _cropped(task: _Task, settings: Settings) -> _Task:
    assert settings.size is not None and settings.fit is not None
    if task.area is None or settings.crop == "off":
        return task
    return replace(task, box=crop_box(task.area, settings.size, settings.fit))


def _sample(
    pipeline: VAREditPipeline,
    tasks: Sequence[_Task],
    settings: Settings,
    callback: Callback | None,
    indices: Sequence[int],
    held: bool,
    second_pass: bool = False,
) -> list[_Draft]:
    """One pass: the model's bits for all tasks together, then each decoded and compared by itself.

    `held` forces the source's bits outside the areas. By itself, since in a batch the last digit of a decoding can
    differ.
    """
    if not tasks:
        return []
    assert settings.size is not None and settings.fit is not None
    prepared = [prepare(cut(task.source, task.box), settings.size, settings.fit) for task in tasks]
    masks = [task.seen(task.area) for task in tasks]
    masks_HW = [None if mask is None else model_mask(mask, item) for mask, item in zip(masks, prepared)]
    locked = held and any(mask_HW is not None for mask_HW in masks_HW)
    output = pipeline(
        prepared,
        [task.request.prompt for task in tasks],
        seed=[task.seed for task in tasks],
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        top_p=settings.top_p,
        size=settings.size,
        fit=settings.fit,
        callback_on_scale=_told(callback, tasks, indices, second_pass) if callback else None,
        constrain_bits=TokenLock(masks_HW) if locked else None,
        output_type="bits",
    )
    return [_compare(pipeline, *parts, settings, held) for parts in zip(tasks, prepared, output.bits)]


def _told(callback: Callback, tasks: Sequence[_Task], indices: Sequence[int], second_pass: bool) -> Callback:
    """The callback, told of a pass as of the whole call: its indices, and previews of whole pictures."""

    def told(step: ScaleStep) -> bool | None:
        def preview() -> list[Image.Image]:
            return [_whole(tasks[index], image) for index, image in zip(step.indices, step.preview())]

        whole = tuple(indices[index] for index in step.indices)
        return callback(replace(step, indices=whole, preview=preview, second_pass=second_pass))

    return told


def _whole(task: _Task, part: Image.Image) -> Image.Image:
    whole = part if task.box is None else stitch(task.source, part, task.box)
    assert isinstance(whole, Image.Image)
    return whole


@torch.no_grad()
def _compare(
    pipeline: VAREditPipeline, task: _Task, prepared: Prepared, bits: list[Tensor], settings: Settings, held: bool
) -> _Draft:
    """Decode, find what changed, and put a slipped picture back."""
    tokenizer = pipeline.image_tokenizer
    canvas = result_canvas(bits, prepared.schedule, pipeline)
    decoded = tokenizer.decode(canvas)
    if settings.preserve == "off" and settings.lock != "two-pass" and task.area is None:
        return _Draft(task, prepared, bits, decoded, None, None, False)
    features = tokenizer.encode(prepared.image_B3HW.to(canvas.device))
    _, source_canvas = quantizer.encode_bits(features, prepared.schedule, tokenizer.config.patch_size)
    source_decoded = tokenizer.decode(source_canvas)
    mask = task.seen(task.grown_mask)
    mask_HW = None if mask is None else model_mask(mask, prepared).numpy()

    def compared(result: Tensor) -> ChangeMap:
        box, calibration = prepared.content_box, settings.calibration
        return change_map(
            source_canvas, canvas, source_decoded, result, content_box=box, mask_HW=mask_HW, calibration=calibration
        )

    change, motion, aligned = compared(decoded), None, False
    area = task.seen(task.area)
    # An area of everything holds nothing. What is held by the source's own bits cannot slip.
    holdable = area is not None and bool((model_mask(area, prepared) <= 0).any())
    held = held and holdable
    if not held and change.kind != "none" and change.orientation == "same":
        motion = find_slip(source_decoded, decoded, prepared)
    if motion is not None:
        straight = put_back(decoded, source_decoded, prepared, motion)
        without = compared(straight)
        if without.kind != "global":  # a slip alone can look like one, so this is asked of the picture without it
            decoded, change, aligned = straight, without, True
        motion = in_source_pixels(motion, prepared)
    return _Draft(task, prepared, bits, decoded, change, motion, aligned, held, holdable)


def _compose(draft: _Draft, settings: Settings) -> EditResult:
    """Bring an edit to the input's size and bits a channel, and put back what it did not change."""
    task, prepared, change = draft.task, draft.prepared, draft.change
    source, box = task.source, task.box
    edited = prepared.restore(to_pil(draft.decoded)[0])
    own = prepared.source.rgb16_HW3
    output: Image.Image | np.ndarray = edited if own is None else sixteen_bit.to_16_bit(np.asarray(edited))
    if change is not None:
        original = prepared.source if own is None else own
        output = preserve(original, edited, change, settings.preserve, settings.strength, mask=task.seen(task.area))
    if box is not None:
        output = stitch(source, output, box)
        assert change is not None
        change = place_map(change, box, (source.width, source.height), task.grown_mask)
    released = settings.lock == "auto" and draft.holdable and not draft.held
    if released:
        assert change is not None and task.grown_mask is not None
        change = within(change, task.grown_mask)
    return EditResult(
        image=Image.fromarray(sixteen_bit.to_8_bit(output)) if isinstance(output, np.ndarray) else output,
        source=source,
        prompt=task.request.prompt,
        seed=task.seed,
        mask=task.request.mask,
        settings=settings,
        change_map=change,
        bits=draft.bits,
        schedule=prepared.schedule,
        rgb16_HW3=output if isinstance(output, np.ndarray) else None,
        area=task.area,
        box=box,
        motion=draft.motion,
        aligned=draft.aligned,
        released=released,
    )


def result_canvas(bits: Sequence[Tensor], schedule: ScaleSchedule, pipeline: VAREditPipeline) -> Tensor:
    """The canvas (1, d, h, w) of the bits that a call of the pipeline returned for one image."""
    device = pipeline._execution_device
    rows = [part.permute(2, 0, 1)[None].to(device, torch.bool) for part in bits]
    return quantizer.decode_bits(rows, schedule, pipeline.image_tokenizer.config.patch_size)
