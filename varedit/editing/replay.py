"""Replay: make an edit again from its manifest, or say exactly what differs."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varedit.editing.edit import EditResult, apply_edit
from varedit.editing.manifest import (
    Manifest,
    bits_sha256,
    describe_mask,
    device_of,
    picture_sha256,
    pixels_sha256,
    software,
)
from varedit.editing.model_identity import ModelIdentity, state_configs, state_sha256
from varedit.image_processor import LoadedImage, load_image
from varedit.image_writer import encode_image
from varedit.pipeline import VAREditPipeline


@dataclass(frozen=True, eq=False)
class Replay:
    """What came of a replay.

    Attributes:
        differences: one sentence each, starting with what differs: input, mask, model, settings, pixels or file.
        notes: versions and devices that differ, and the number of threads where the picture came out different. They
            need not change a picture; where it came out different, they are the likely cause.
        result: the edit made again; None where a difference made it pointless to try.
    """

    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    result: EditResult | None = None

    @property
    def same(self) -> bool:
        """Whether the very same picture came out."""
        return not self.differences


def replay(
    manifest: Manifest, source: LoadedImage, pipeline: VAREditPipeline, mask: Image.Image | None = None
) -> Replay:
    """Make an edit again with what was recorded, and compare.

    Args:
        source, mask: of the edit; see `check_inputs`, which is run first.
        pipeline: the model. Weights from files are not hashed here: see `check_model`.
    """
    found = check_inputs(manifest, source, mask)
    if manifest.model["kind"] == "memory":
        if state_sha256(pipeline) != manifest.model["sha256"]:
            found.append(
                "model: the weights are not those of the edit, which came from memory; save that model and use it"
            )
        else:
            found += _check_configs(manifest, "this pipeline", state_configs(pipeline))
    if not found and manifest.settings.resolved(pipeline) != manifest.settings:
        found.append("settings: the manifest leaves some to the model; they cannot be told any more")
    notes = differing_software(manifest, pipeline)
    if found:
        return Replay(tuple(found), notes)
    result = apply_edit(
        pipeline, source, manifest.instruction, seed=manifest.seed, settings=manifest.settings, mask=mask
    )
    if not _same(manifest.output, picture_sha256(result.image, result.rgb16_HW3)):
        same_bits = bits_sha256(result.bits) == manifest.output.get("bits_sha256")
        where = "in decoding or preserving; the model chose the same bits" if same_bits else "in the model's bits"
        found.append(f"pixels: the edit came out different {where}")
        notes += _differing_threads(manifest, pipeline)
    return Replay(tuple(found), notes, result)


def check_inputs(manifest: Manifest, source: LoadedImage, mask: Image.Image | None) -> list[str]:
    """What of the input and the mask is not what was edited."""
    found = []
    given = picture_sha256(source.rgb, source.rgb16_HW3)
    if not _same(manifest.input, given):
        name = "sha256" if manifest.input["sha256"] != given["sha256"] else "sha256_16"
        size = f"{source.width} x {source.height}"
        recorded = f"{manifest.input.get('width')} x {manifest.input.get('height')}"
        found.append(
            f"input: {size} pixels with {name} {_short(given.get(name))}, but the edit was made from {recorded} with "
            f"{_short(manifest.input.get(name))}"
        )
    recorded_mask = None if manifest.mask is None else manifest.mask["sha256"]
    given_mask = None if mask is None else describe_mask(mask)["sha256"]
    if recorded_mask != given_mask:
        found.append(f"mask: {_short(given_mask)}, but the edit was made with {_short(recorded_mask)}")
    return found


def check_model(manifest: Manifest, model: ModelIdentity | None) -> list[str]:
    """Whether this is the model of the edit; None is a model whose files are not on this disk yet."""
    if model is None or manifest.model["kind"] != model.kind:
        return []
    if model.sha256 != manifest.model["sha256"]:
        return [
            f"model: {model.name} with sha256 {_short(model.sha256)}, but the edit was made by "
            f"{manifest.model.get('name')} with {_short(manifest.model['sha256'])}"
        ]
    return _check_configs(manifest, model.name, model.configs)


def _check_configs(manifest: Manifest, name: str, configs: dict[str, str]) -> list[str]:
    recorded = manifest.model.get("configs")
    if not recorded:  # an earlier version hashed the weights only
        return []
    parts = sorted(part for part in recorded.keys() | configs.keys() if recorded.get(part) != configs.get(part))
    if not parts:
        return []
    return [f"model: {name} has the weights of the edit, but another configuration of {', '.join(parts)}"]


def differing_software(manifest: Manifest, pipeline: VAREditPipeline) -> tuple[str, ...]:
    """Versions and devices that are not those of the edit, one sentence each."""
    now, then = (
        versions | {f"device {name}": value for name, value in device.items() if name != "threads"}
        for versions, device in ((software(), device_of(pipeline)), (manifest.software, manifest.device))
    )
    return tuple(
        f"version: {name} is {now.get(name, 'absent')}, was {then.get(name, 'not recorded')}"
        for name in now
        if now[name] != then.get(name)
    )


def _differing_threads(manifest: Manifest, pipeline: VAREditPipeline) -> tuple[str, ...]:
    """With another number of threads a CPU adds up in another order."""
    then, now = (device.get("threads") for device in (manifest.device, device_of(pipeline)))
    if None in (then, now) or then == now:  # None: not a CPU, or recorded by an earlier version
        return ()
    return (f"threads: {now}, was {then}; set OMP_NUM_THREADS={then} and replay again",)


def check_file(path: Path, result: EditResult) -> list[str]:
    """Whether an image file holds the pixels that writing this edit would give it."""
    found = load_image(path)
    data = encode_image(result.pixels, path.suffix, result.like)
    wanted = load_image(io.BytesIO(data))
    alphas = [None if image.alpha is None else pixels_sha256(image.alpha) for image in (found, wanted)]
    hashes = [picture_sha256(image.rgb, image.rgb16_HW3) for image in (found, wanted)]
    if hashes[0] == hashes[1] and alphas[0] == alphas[1]:
        return []
    return [f"file: {path.name} does not hold the pixels of its edit; it was saved again, or by another encoder"]


def _same(recorded: dict[str, Any], found: dict[str, str]) -> bool:
    return all(recorded[name] == found.get(name) for name in ("sha256", "sha256_16") if name in recorded)


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
