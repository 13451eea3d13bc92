"""The jobs of a batch: read from a folder, a CSV or JSON lines, checked before any work is done."""

import contextlib
import csv
import io
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from PIL import ExifTags, Image

from varedit.editing.mask import Convention
from varedit.image_reader import CODEC_ERRORS, ImageError
from varedit.image_writer import encode_image
from varedit.paths import leaves_folder, visible
from varedit.pipeline import check_prompt, check_seed
from varedit.scales import ScaleSchedule, nearest_schedule

logger = logging.getLogger(__name__)

COLUMNS = ("image", "instruction", "seed", "mask", "mask_convention", "output")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".heic")
_TURNED = {5, 6, 7, 8}  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Job:
    """One picture of a batch.

    Attributes:
        line: where it stands in the job list, from 1.
        image, mask: files, absolute: a job means the same in any process.
        mask_convention: which pixels of the mask are to be edited, see `image_mask`.
        instruction, seed: of the edit.
        output: file name below the output folder; its suffix decides the format.
    """

    line: int
    image: Path
    instruction: str
    seed: int
    output: str
    mask: Path | None = None
    mask_convention: Convention = "white"

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the way back."""
        mask = None if self.mask is None else str(self.mask)
        return vars(self) | {"image": str(self.image), "mask": mask}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Job":
        mask = None if values["mask"] is None else Path(values["mask"])
        return cls(**values | {"image": Path(values["image"]), "mask": mask})


def read_jobs(
    source: Path, *, instruction: str | None = None, seed: int = 0, mask_convention: Convention = "white"
) -> list[Job]:
    """Read a job list. Paths in a list are relative to the list's folder; jobs hold them absolute.

    Args:
        source: a folder of pictures, or a .csv or .jsonl with the columns image, instruction (unless given here) and
            any of seed, mask, mask_convention, output.
        instruction, seed, mask_convention: of the jobs that name none.

    Raises:
        ValueError: the list or folder cannot be read, there is nothing in it, or a line cannot be used; the message
            names the line. A picture that is missing is not looked for here: it fails by itself, later.
    """
    check_seed(seed)
    if instruction is not None:
        check_prompt(instruction)
    if os.path.isdir(source):  # unlike Path.is_dir it bears names that are too long
        if instruction is None:
            raise ValueError(f"a folder of pictures ({str(source)!r}) needs --instruction; or give a CSV or JSON lines")
        try:
            found = visible(source.iterdir(), source)
            pictures = [path for path in found if path.suffix.lower() in _PICTURES and path.is_file()]
        except OSError as error:
            raise ValueError(f"folder {str(source)!r} cannot be read ({error.strerror}); check permissions") from error
        rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(({"image": path.name} for path in pictures), 1)
        folder = source.absolute()
    else:
        text = _read_text(source)
        rows = _csv_rows(text, source) if source.suffix.lower() == ".csv" else _json_rows(text, source)
        folder = source.absolute().parent
    rows = list(rows)
    unused = sorted({name for _, row in rows for name in row} - set(COLUMNS))
    if unused:
        logger.warning("%s: columns not used: %s", source.name, ", ".join(unused))
    common = {"instruction": instruction, "seed": seed, "mask_convention": mask_convention}
    jobs = [_job(line, row, folder, f"{source.name} line {line}", common) for line, row in rows]
    if not jobs:
        raise ValueError(f"there is nothing to do in {str(source)!r}: no picture, no line")
    _check_outputs(jobs, source.name)
    return jobs


def _read_text(source: Path) -> str:
    if source.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"jobs {str(source)!r} are neither a folder nor .csv nor .jsonl")
    try:
        return source.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark before a CSV
    except OSError as error:
        raise ValueError(f"jobs {str(source)!r} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"jobs {str(source)!r} are not UTF-8 text; save them as UTF-8") from error


def _csv_rows(text: str, source: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if "image" not in (reader.fieldnames or []):
            raise ValueError(f"{source.name} has no column 'image'; its first line must name the columns")
        for row in reader:
            if None in row:
                raise ValueError(f"{source.name} line {reader.line_num} has more cells than columns; quote commas")
            yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
    except csv.Error as error:
        raise ValueError(f"{source.name} line {reader.line_num} is no CSV ({error})") from error


def _json_rows(text: str, source: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source.name} line {line} is no JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f'{source.name} line {line} is no object such as {{"image": "a.png", ...}}')
        yield line, {key: value for key, value in row.items() if value not in (None, "")}


def _job(line: int, row: dict[str, Any], folder: Path, label: str, common: dict[str, Any]) -> Job:
    try:
        for name in ("image", "instruction", "mask", "mask_convention", "output"):
            if name in row and not isinstance(row[name], str):
                raise ValueError(f"{name} {row[name]!r} is no text")
            if "\0" in row.get(name, ""):
                raise ValueError(f"{name} {row[name]!r} has a null character; remove it")
        if "image" not in row:
            raise ValueError("image is missing")
        prompt = row.get("instruction", common["instruction"])
        if prompt is None:
            raise ValueError("instruction is missing; add it, or --instruction for all that have none")
        check_prompt(prompt)
        number = _seed(row.get("seed", common["seed"]))
        mask = folder / row["mask"] if "mask" in row else None
        convention = row.get("mask_convention", common["mask_convention"])
        if convention not in get_args(Convention):
            raise ValueError(f"mask_convention {convention!r} is unknown; use 'white' or 'transparent'")
        image = folder / row["image"]
        output = row.get("output") or f"{image.stem}.edited{_writable_suffix(image.suffix)}"
        _check_output(output)
        return Job(line, image, prompt, number, output, mask, convention)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _seed(value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"seed {value!r} is no whole number")
    check_seed(number)
    return number


def _writable_suffix(suffix: str) -> str:
    try:
        encode_image(Image.new("RGB", (1, 1)), suffix)
    except ImageError:
        return ".png"
    return suffix


def _check_output(output: str) -> None:
    path = Path(output)
    if leaves_folder(output) or not path.name:
        raise ValueError(f"output {output!r} must be a name below the output folder")
    if path.suffix.lower() != _writable_suffix(path.suffix).lower():
        raise ValueError(f"output {output!r} has a suffix that cannot be written; use .png")


def _check_outputs(jobs: list[Job], source: str) -> None:
    seen: dict[str, Job] = {}
    for job in jobs:
        key = Path(job.output).as_posix().lower()  # some file systems do not tell case apart
        if key in seen:
            raise ValueError(
                f"{source}: lines {seen[key].line} and {job.line} ({seen[key].image.name}, {job.image.name}) would "
                f"both write {job.output!r}; give them different names in the column 'output' of a list"
            )
        seen[key] = job


def group_jobs(jobs: list[Job], size: int, batch_size: int) -> list[list[Job]]:
    """Chunks of jobs that run together, those of one scale schedule in a row.

    Pictures that cannot be read are put last; they fail by themselves.
    """
    groups: dict[ScaleSchedule | None, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_schedule(job.image, size), []).append(job)
    unreadable = groups.pop(None, [])
    return [
        group[start : start + batch_size]
        for group in [*groups.values(), unreadable]
        for start in range(0, len(group), batch_size)
    ]


def _schedule(path: Path, size: int) -> ScaleSchedule | None:
    """From the header alone."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            with contextlib.suppress(*CODEC_ERRORS):  # damaged EXIF is left out when the picture is read, too
                if image.getexif().get(ExifTags.Base.Orientation) in _TURNED:
                    width, height = height, width
        return nearest_schedule(size, height, width)
    except (*CODEC_ERRORS, Image.DecompressionBombError):
        return None
