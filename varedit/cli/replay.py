"""`varedit replay`: make an edit again, or say what differs."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from varedit.cli import options

if TYPE_CHECKING:
    from PIL import Image

    from varedit.editing.manifest import Manifest
    from varedit.pipeline import VAREditPipeline

DIFFERS = 1
"""Exit code of a replay that did not make the same picture."""


def replay(
    file: Annotated[
        Path,
        typer.Argument(help="An edited picture, its .varedit.json, or a session's folder.", show_default=False),
    ],
    input: Annotated[
        Path | None,
        typer.Option("--input", help="The picture that was edited.", show_default="the one of that name beside FILE"),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="The mask, if there was one.", show_default="as recorded, or beside FILE")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the new edit here.", show_default=False)
    ] = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Precision.", show_default="the edit's")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
) -> None:
    """Make an edit again from its manifest: the same bits, or exactly what differs.

    Exit code 0: the same picture; 1: it differs, or could not be made again, and why; 2: bad input.
    """
    if os.path.isdir(file):  # unlike Path.is_dir it bears names that are too long
        if input or mask or output:
            raise ValueError("a session has its own inputs; --input, --mask and --output go with a single picture")
        _replay_session(file, model, device, dtype)
    else:
        _replay_picture(file, input, mask, output, model, device, dtype, overwrite)


def _replay_picture(
    file: Path,
    input: Path | None,
    mask: Path | None,
    output: Path | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    overwrite: bool,
) -> None:
    """One edit, from its file or the one beside it."""
    from varedit.cli.edit import check_outputs
    from varedit.editing.manifest import SIDE_SUFFIX, make_manifest, read_manifest, save_with_manifest
    from varedit.editing.model_identity import identify_folder
    from varedit.editing.replay import check_file, check_inputs, check_model
    from varedit.editing.replay import replay as replay_edit
    from varedit.image_processor import load_image

    manifest = read_manifest(file)
    if manifest is None:
        raise ValueError(f"{str(file)!r} has no manifest, and there is none beside it; it cannot be replayed")
    if output is not None:
        check_outputs(output, None, overwrite=overwrite, manifest=True)
    source = load_image(input or _beside(file, manifest.input.get("name"), "input"))
    area = _mask(manifest, file, mask, (source.width, source.height))
    found = check_inputs(manifest, source, area) + check_model(manifest, identify_folder(model))
    if found:
        _tell(file, found, ())

    pipeline = _load_like(manifest, model, device, dtype)
    done = replay_edit(manifest, source, pipeline, area)
    found = list(done.differences)
    picture = file.with_name(file.name.removesuffix(SIDE_SUFFIX))
    if done.same and done.result is not None and os.path.isfile(picture):
        found += check_file(picture, done.result)
    if output is not None and done.result is not None:
        mask_of = manifest.mask or {}
        again = make_manifest(
            done.result,
            pipeline,
            input_name=manifest.input.get("name"),
            mask_name=mask_of.get("name"),
            mask_polygon=mask_of.get("polygon"),
        )
        save_with_manifest(done.result.pixels, output, again, done.result.like, overwrite=overwrite)
    _tell(file, found, done.notes)


def _replay_session(folder: Path, model: str | None, device: str | None, dtype: str | None) -> None:
    """Every step of a session, each from its parent's picture."""
    from varedit.editing.model_identity import identify_folder
    from varedit.editing.replay import check_model
    from varedit.editing.session import Session

    session = Session.open(folder)
    if not session.steps:
        raise ValueError(f"{str(folder)!r} has no steps yet; there is nothing to replay")
    identity = identify_folder(model)
    pipelines: dict[str, VAREditPipeline] = {}
    differing = 0
    for number, step in sorted(session.steps.items()):
        found = check_model(step.manifest, identity)
        notes: tuple[str, ...] = ()
        if not found:
            precision = dtype or step.manifest.device.get("dtype", "")
            if precision not in pipelines:
                pipelines[precision] = _load_like(step.manifest, model, device, dtype)
            done = session.replay(pipelines[precision], number)
            found, notes = list(done.differences), done.notes
        differing += bool(found)
        typer.echo(f"step {number}: {'; '.join([*found, *notes]) if found else 'the same picture'}")
    if differing:
        raise typer.Exit(DIFFERS)


def _beside(file: Path, name: str | None, what: str) -> Path:
    path = file.with_name(Path(name).name) if name else None
    if path is None or not os.path.isfile(path):  # unlike Path.is_file it bears names that are too long
        found = f"{name!r} is not beside it" if name else "its manifest does not name it"
        raise ValueError(f"the {what} of {str(file)!r} is missing: {found}; pass --{what} FILE")
    return path


def _mask(manifest: "Manifest", file: Path, given: Path | None, size: tuple[int, int]) -> "Image.Image | None":
    """The mask of an edit: given, or a recorded box or polygon, or the file of that name beside the picture."""
    from varedit.editing.mask import box_mask, image_mask, polygon_mask

    if manifest.mask is None:
        return None if given is None else image_mask(given, size)
    if given is not None:
        return _read_mask(given, size, manifest.mask["sha256"])
    box = manifest.mask.get("box")
    if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int) for edge in box):
        return box_mask((box[0], box[1], box[2], box[3]), size)
    if (polygon := manifest.mask.get("polygon")) is not None:
        return polygon_mask(polygon, size)
    return _read_mask(_beside(file, manifest.mask.get("name"), "mask"), size, manifest.mask["sha256"])


def _read_mask(path: Path, size: tuple[int, int], sha256: str) -> "Image.Image":
    """The mask in a file by the convention that gives the recorded one; by the usual one where none does."""
    from varedit.editing.manifest import pixels_sha256
    from varedit.editing.mask import Convention, image_mask

    for convention in get_args(Convention):
        with contextlib.suppress(ValueError):
            mask = image_mask(path, size, convention)
            if pixels_sha256(mask) == sha256:
                return mask
    return image_mask(path, size)


def _load_like(manifest: "Manifest", model: str | None, device: str | None, dtype: str | None) -> "VAREditPipeline":
    """The model in the precision of the edit. Only where to find it is never taken from a file."""
    from varedit.cli.edit import load_model

    recorded = manifest.device.get("dtype")
    return load_model(model, device, dtype or (recorded if recorded in ("float32", "bfloat16") else None))


def _tell(file: Path, found: list[str], notes: tuple[str, ...]) -> None:
    """Report; ends the command with exit code 1 where something differs."""
    if not found:
        typer.echo(f"{file}: the same picture, bit for bit")
        if notes:
            typer.echo(f"although {'; '.join(notes)}")
        return
    typer.echo(f"{file}: differs")
    for line in (*found, *notes):
        typer.echo(f"  {line}")
    raise typer.Exit(DIFFERS)
