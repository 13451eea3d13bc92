"""Sessions: a tree of edits in a folder, with undo, branch and replay.

    DIR/session.json             the original's name and hash, and the head: the step that the next edit starts from
    DIR/original.jpg             the original, byte for byte
    DIR/steps/0001/step.json     parent and manifest (instruction, seed, settings, hashes)
    DIR/steps/0001/result.png    lossless; also change_map.png and mask.png where there are any

Steps are numbered from 1; step 0 is the original. Each edit starts from the head's result, and a preserved edit hands
on the very pixels that it did not change, so what no edit touched is the original's, however long the chain.

A step is written aside, flushed and renamed; then the head moves in one rename. So after a crash at any moment the
folder holds all steps finished before, and at most one finished step that the head has not moved to.

What needs PyTorch is imported where it is used: looking at a session and moving its head take a moment, not seconds.
"""

import hashlib
import io
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varedit.durable import flush_folder, write_durably

if TYPE_CHECKING:
    from PIL import Image

    from varedit.editing.edit import EditResult, Settings
    from varedit.editing.manifest import Manifest
    from varedit.editing.model_identity import ModelIdentity
    from varedit.editing.replay import Replay
    from varedit.image_processor import LoadedImage
    from varedit.pipeline import ScaleStep, VAREditPipeline

FORMAT = "varedit-session/1"
_ASIDE = ".aside-"  # what is being written
_STALE_SECONDS = 3600  # what is written aside longer than this was left by a crash


class SessionError(ValueError):
    """A session folder that cannot be used. The message is one line: the value and the fix."""


@dataclass(frozen=True)
class Step:
    """One edit of a session.

    Attributes:
        number: from 1.
        parent: the step whose result was edited; 0 is the original.
        record: the manifest as plain values.
        folder: result.png, and change_map.png and mask.png where there are any.
    """

    number: int
    parent: int
    record: dict[str, Any]
    folder: Path

    @property
    def instruction(self) -> str:
        return self.record["instruction"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @cached_property
    def manifest(self) -> "Manifest":
        """Instruction, seed, settings, hashes of input and output.

        Raises:
            SessionError: it is damaged, or was written by a later version.
        """
        from varedit.editing.manifest import Manifest

        try:
            return Manifest.from_json(self.record)
        except ValueError as error:
            raise _corrupt(self.folder.parent.parent, f"steps/{self.folder.name}/step.json", str(error)) from error

    @property
    def result(self) -> Path:
        return self.folder / "result.png"

    @property
    def change_map(self) -> Path:
        return self.folder / "change_map.png"

    @property
    def mask(self) -> Path:
        return self.folder / "mask.png"


class Session:
    """A session folder; make one with `create` or `open`. What it reads is checked against the recorded hashes."""

    def __init__(self, folder: Path, original: dict[str, Any], head: int, steps: dict[int, Step]) -> None:
        self.folder = folder
        self.head = head
        self.steps = steps
        self._original = original

    @classmethod
    def create(cls, folder: str | os.PathLike, image: str | os.PathLike) -> "Session":
        """Start a session on an image file, which is copied.

        Raises:
            ImageError: the image cannot be used.
            SessionError: the folder exists and is not empty, or cannot be written.
        """
        from varedit.image_processor import load_image

        folder, image = Path(folder), Path(image)
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile(".")):
                raise SessionError(f"session {str(folder)!r} exists already; name a new folder")
        except OSError as error:  # a name that is too long, for instance
            raise SessionError(f"session {str(folder)!r} cannot be made ({error.strerror}); name another") from error
        load_image(image)
        data = image.read_bytes()
        name = "original" + image.suffix.lower()
        original = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "name": image.name}
        aside = folder.parent / f"{_ASIDE}{secrets.token_hex(8)}"
        try:
            (aside / "steps").mkdir(parents=True)
            write_durably(aside / name, data)
            _write_head(aside, original, 0)
            if folder.exists():
                folder.rmdir()
            aside.rename(folder)
            flush_folder(folder.parent)
        except OSError as error:
            raise _unwritable(folder, error) from error
        finally:  # after the rename there is nothing left to remove
            shutil.rmtree(aside, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike, *, any_head: bool = False) -> "Session":
        """Read a session folder.

        Args:
            any_head: bear a head whose step is missing, to move it with `branch`.

        Raises:
            SessionError: no session, or a damaged one; the message names the file.
        """
        folder = Path(folder)
        if not os.path.isfile(folder / "session.json"):  # unlike Path.is_file it bears names that are too long
            raise SessionError(f"{str(folder)!r} is no session: it has no session.json; start one with session new")
        state = _read_json(folder / "session.json", folder)
        original: Any = state.get("original")
        head = state.get("head")
        if state.get("format") != FORMAT:
            raise _corrupt(folder, "session.json", f"format {state.get('format')!r} is not {FORMAT!r}")
        texts = isinstance(original, dict) and all(isinstance(original.get(k), str) for k in ("file", "sha256", "name"))
        if not texts or Path(original["file"]).name != original["file"] or not isinstance(head, int):
            raise _corrupt(folder, "session.json", "original or head are missing")
        if not os.path.isfile(folder / original["file"]):
            raise _corrupt(folder, original["file"], "the original is missing")
        steps = {step.number: step for step in _read_steps(folder)}
        for step in steps.values():
            if step.parent not in steps and step.parent != 0:
                raise _corrupt(folder, f"steps/{step.folder.name}", f"its parent, step {step.parent}, is missing")
        if head not in steps and head != 0 and not any_head:
            raise SessionError(
                f"session {str(folder)!r} is damaged: steps/{head:04d}, where the session is, is missing; restore it "
                "from a copy, or go to another step with session branch"
            )
        return cls(folder, original, head, steps)

    # -- edits --

    def edit(
        self,
        pipeline: "VAREditPipeline",
        prompt: str,
        *,
        seed: int | None = None,
        settings: "Settings | None" = None,
        mask: "Image.Image | None" = None,
        model: "ModelIdentity | None" = None,
        callback_on_scale: "Callable[[ScaleStep], bool | None] | None" = None,
    ) -> Step:
        """Edit the head's picture; the new step becomes the head. Arguments as of `apply_edit`."""
        from varedit.editing.edit import apply_edit
        from varedit.editing.manifest import make_manifest

        result = apply_edit(
            pipeline,
            self.image(),
            prompt,
            seed=seed,
            settings=settings,
            mask=mask,
            callback_on_scale=callback_on_scale,
        )
        return self.add(result, make_manifest(result, pipeline, input_name=self._name(self.head), model=model))

    def add(self, result: "EditResult", manifest: "Manifest") -> Step:
        """Record an edit of the head's picture; it becomes the head.

        Raises:
            ValueError: the edit was not made from the head's picture.
            SessionError: the folder cannot be written, for instance because the disk is full. Nothing has changed
                then, or the step is there and the head has not moved to it.
        """
        from varedit.editing.manifest import pixels_sha256

        if manifest.input["sha256"] != pixels_sha256(self.image().rgb):
            raise ValueError(f"the edit was not made from step {self.head}, the head of {str(self.folder)!r}")
        try:
            self._sweep()
            step = self._write_step(result, manifest)
            self.steps[step.number] = step
            self._move(step.number)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return step

    def undo(self) -> int:
        """Move the head to its parent, which is returned. The step stays, as a branch.

        Raises:
            SessionError: the head is the original, or the folder cannot be written.
        """
        if self.head == 0:
            raise SessionError(f"nothing to undo: the head of {str(self.folder)!r} is the original")
        self._move(self.steps[self.head].parent)
        return self.head

    def branch(self, number: int) -> None:
        """Move the head to any step; the next edit branches off there. 0 is the original.

        Raises:
            SessionError: no such step, or the folder cannot be written.
        """
        self._check(number)
        self._move(number)

    # -- looking --

    def path(self, number: int | None = None) -> list[Step]:
        """The steps from the original to a step (the head), oldest first."""
        number = self.head if number is None else number
        self._check(number)
        chain: list[Step] = []
        while number:
            chain.append(self.steps[number])
            number = self.steps[number].parent
        return chain[::-1]

    def image(self, number: int | None = None) -> "LoadedImage":
        """The picture of a step (the head); 0 is the original, with its alpha and EXIF.

        Raises:
            SessionError: its file is missing or damaged.
        """
        from varedit.editing.manifest import picture_sha256
        from varedit.image_processor import ImageError, load_image

        number = self.head if number is None else number
        self._check(number)
        file = self.original if number == 0 else self.steps[number].result
        label = file.relative_to(self.folder).as_posix()
        try:
            data = file.read_bytes()
            picture = load_image(data)
        except (OSError, ImageError) as error:
            raise _corrupt(self.folder, label, str(error)) from error
        if number == 0:
            same = hashlib.sha256(data).hexdigest() == self._original["sha256"]
        else:
            output = self.steps[number].manifest.output
            hashes = picture_sha256(picture.rgb, picture.rgb16_HW3)
            same = hashes == {name: output[name] for name in ("sha256", "sha256_16") if name in output}
        if not same:
            raise _corrupt(self.folder, label, "it is not what was written")
        return picture

    @property
    def original(self) -> Path:
        """The copy of the original file."""
        return self.folder / self._original["file"]

    @property
    def original_name(self) -> str:
        """The name of the file that the session was started on."""
        return self._original["name"]

    def export(self, path: str | os.PathLike, number: int | None = None, *, overwrite: bool = False) -> Path:
        """Write the picture of a step (the head) with the step's manifest and the original's EXIF and alpha.

        The alpha is turned as the picture was.

        Raises:
            ImageError: see `save_image`; also an existing side file without `overwrite`.
            SessionError: the file would lie in the session's folder.
        """
        from varedit.editing.edit_kind import turn_alpha
        from varedit.editing.manifest import save_with_manifest, save_without_manifest

        if Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise SessionError(f"output {str(path)!r} is in the session's own folder; export to another")
        number = self.head if number is None else number
        picture, original = self.image(number), self.image(0)
        pixels = picture.rgb if picture.rgb16_HW3 is None else picture.rgb16_HW3
        if number == 0:
            return save_without_manifest(pixels, Path(path), original, overwrite=overwrite)
        for step in self.path(number):
            original = turn_alpha(original, step.manifest.turn)
        return save_with_manifest(pixels, Path(path), self.steps[number].manifest, original, overwrite=overwrite)

    def replay(self, pipeline: "VAREditPipeline", number: int) -> "Replay":
        """Make a step again from its parent's picture, and compare."""
        from varedit.editing.replay import replay

        self._check(number)
        step = self.steps[number]
        return replay(step.manifest, self.image(step.parent), pipeline, self._mask(step))

    # -- pieces --

    def _check(self, number: int) -> None:
        if number and number not in self.steps:
            known = ", ".join(map(str, sorted(self.steps))) or "none yet"
            raise SessionError(
                f"session {str(self.folder)!r} has no step {number}; it has 0, the original, and {known}"
            )

    def _mask(self, step: Step) -> "Image.Image | None":
        from PIL import Image

        from varedit.editing.manifest import describe_mask

        if step.manifest.mask is None:
            return None
        label = step.mask.relative_to(self.folder).as_posix()
        try:
            with Image.open(step.mask) as opened:
                mask = opened.convert("L")
        except (OSError, SyntaxError, ValueError) as error:
            raise _corrupt(self.folder, label, str(error)) from error
        if describe_mask(mask)["sha256"] != step.manifest.mask["sha256"]:
            raise _corrupt(self.folder, label, "it is not what was written")
        return mask

    def _name(self, number: int) -> str:
        return self.original_name if number == 0 else f"step {number}"

    def _move(self, number: int) -> None:
        try:
            _write_head(self.folder, self._original, number)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.head = number

    def _write_step(self, result: "EditResult", manifest: "Manifest") -> Step:
        from varedit.editing.manifest import embed
        from varedit.image_writer import encode_image

        steps = self.folder / "steps"
        aside = steps / f"{_ASIDE}{secrets.token_hex(8)}"
        aside.mkdir(parents=True)
        try:
            data = encode_image(result.pixels, "png")
            files = {"result.png": embed(data, manifest) or data}
            if result.change_map is not None:
                files["change_map.png"] = _png(result.change_map.to_image())
            if result.mask is not None:
                files["mask.png"] = _png(result.mask)
            record = {"format": FORMAT, "parent": self.head, "manifest": manifest.to_json()}
            files["step.json"] = json.dumps(record, indent=1).encode()
            for name, content in files.items():
                write_durably(aside / name, content)
            number = max(self.steps, default=0) + 1
            while True:
                try:
                    aside.rename(steps / f"{number:04d}")
                    break
                except OSError:
                    if not (steps / f"{number:04d}").exists():
                        raise
                    number += 1  # another process has just taken it
        finally:  # after the rename there is nothing left to remove
            shutil.rmtree(aside, ignore_errors=True)
        flush_folder(steps)
        return Step(number, self.head, manifest.to_json(), steps / f"{number:04d}")

    def _sweep(self) -> None:
        """Remove what a crash left behind."""
        for left in (self.folder / "steps").glob(f"{_ASIDE}*"):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write_head(folder: Path, original: dict[str, Any], head: int) -> None:
    state = {"format": FORMAT, "original": original, "head": head}
    write_durably(folder / "session.json", json.dumps(state, indent=1).encode())


def _read_steps(folder: Path) -> list[Step]:
    steps = []
    for entry in sorted((folder / "steps").glob("[0-9]*")):
        if not entry.name.isdigit():
            raise _corrupt(folder, f"steps/{entry.name}", "a step's name is a number")
        label = f"steps/{entry.name}/step.json"
        record = _read_json(entry / "step.json", folder)
        parent = record.get("parent")
        if not isinstance(parent, int) or not 0 <= parent < int(entry.name):
            raise _corrupt(folder, label, f"the parent {parent!r} is no earlier step")
        manifest = record.get("manifest")
        if not isinstance(manifest, dict) or not isinstance(manifest.get("instruction"), str) or "seed" not in manifest:
            raise _corrupt(folder, label, "the manifest lacks its instruction or its seed")
        steps.append(Step(int(entry.name), parent, manifest, entry))
    return steps


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    label = path.relative_to(folder).as_posix()
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise _corrupt(folder, label, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(folder, label, "it is no JSON") from error
    if not isinstance(values, dict):
        raise _corrupt(folder, label, "it is no table of names and values")
    return values


def _unwritable(folder: Path, error: OSError) -> SessionError:
    return SessionError(
        f"session {str(folder)!r} cannot be written ({error.strerror or error}); free some space or check permissions"
    )


def _corrupt(folder: Path, file: str, reason: str) -> SessionError:
    return SessionError(f"session {str(folder)!r} is damaged: {file}: {reason}; restore that file from a copy")
