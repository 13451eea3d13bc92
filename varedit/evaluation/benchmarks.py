"""Readers of the public benchmarks, in the layouts in which they are published.

Rows that cannot be read become problems of the benchmark: they are counted and named, never silently left out.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varedit.data.record import cut_out_mask
from varedit.evaluation.cases import Benchmark, Case, file_key, own, read_picture
from varedit.evaluation.hub import SOURCES, download
from varedit.evaluation.procedural import procedural
from varedit.evaluation.tables import Table, groups, table_files

EMU_TYPES = ("global", "add", "text", "background", "color", "style", "remove", "local")
EMU_ROWS = 3589
EMU_CAPTIONS = ("input_caption", "output_caption")
PIE_ROWS = 700
PIE_SIZE = (512, 512)
PIE_TYPES = (
    "random",
    "change object",
    "add",
    "delete",
    "attribute",
    "pose",
    "color",
    "material",
    "background",
    "style",
)
IMGEDIT_TYPES = ("extract", "style", "add", "adjust", "background", "replace", "remove", "action", "compose")
GEDIT_TYPES = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change", "subject-add",
    "subject-remove", "subject-replace", "text_change", "tone_transfer",
)  # fmt: skip


def load(
    name: str,
    data: Path | None = None,
    *,
    size: int | None = None,
    limit: int | None = None,
    options: dict[str, str] | None = None,
) -> Benchmark:
    """A benchmark by name, or a folder or .jsonl file of one's own.

    Args:
        data: folder of the benchmark's files; None downloads those that lie open on the hub. Which commit was taken
            is in the benchmark's settings; the option `revision` asks for another.
        size: of the procedural pictures, 128 if not given; the others have their own.
        limit: the first so many cases.
        options: of the reader, see the functions below; texts.

    Raises:
        ValueError: unknown name or option, missing files (the message says how to get them).
    """
    options = dict(options or {})
    if name == "procedural":
        _check_options(name, procedural, options)
        return procedural(data, 128 if size is None else size, limit, **options)
    if size is not None:
        raise ValueError(f"size {size} means nothing for {name}, whose pictures have theirs; leave --size out")
    readers: dict[str, Callable[..., Benchmark]] = {
        "emu-edit": emu_edit,
        "pie-bench": pie_bench,
        "magicbrush": magicbrush,
        "magicbrush-multi": partial(magicbrush, turns="multi"),
        "imgedit": imgedit,
        "gedit": gedit,
    }
    if name not in readers:
        if not Path(name).exists():
            known = ", ".join(("procedural", *readers))
            raise ValueError(
                f"benchmark {name!r} is unknown; use {known}, or name a folder or a .jsonl file that exists"
            )
        if data is not None:
            raise ValueError(f"data folder {data} is not used for {name}, whose paths are its own: leave --data out")
        _check_options(name, own, options)
        return own(Path(name)).first(limit)
    published = name.removesuffix("-multi")
    revision = options.pop("revision", None)
    _check_options(name, readers[name], options)
    settings: dict[str, Any] = {}
    if data is None:
        data, settings["revision"] = download(published, revision)
    elif revision is not None:
        raise ValueError(f"reader option revision={revision} is for downloads: leave --data out")
    if not data.is_dir():
        raise ValueError(f"data folder {data} does not exist: {SOURCES[published].help}")
    benchmark = readers[name](data, **options)
    if not benchmark.cases:
        first = f": {': '.join(benchmark.problems[0])}" if benchmark.problems else ""
        raise ValueError(f"{name} in {data} has no usable row{first}")
    return replace(benchmark, settings=benchmark.settings | settings).first(limit)


def _check_options(name: str, reader: Callable[..., Benchmark], options: dict[str, str]) -> None:
    """All options have to be known, before anything is downloaded."""
    parameters = inspect.signature(reader).parameters.values()
    known = [one.name for one in parameters if one.name not in ("data", "path", "size", "limit", "turns")]
    for option in options:
        if option not in known:
            raise ValueError(f"reader option {option!r} is unknown; {name} takes {', '.join(known) or 'none'}")


def _choice(name: str, value: str, *allowed: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use {' or '.join(allowed)}")
    return value


# ---- EMU-Edit


def emu_edit(data: Path, bad_captions: str = "keep", split: str = "reported") -> Benchmark:
    """EMU-Edit's test set.

    Args:
        data: folder with data/test-*.parquet and data/validation-*.parquet, of either repository.
        bad_captions: "keep" (as the paper) or "drop" rows whose captions are equal or a placeholder: they corrupt
            CLIP-Dir and CLIP-Out. Their number is in the notes either way.
        split: "reported" is the set of 3,589 rows that papers report on: `test` of facebook/emu_edit_test_set, but
            `validation` of facebook/emu_edit_test_set_generations, whose splits are swapped. Or a name.
    """
    _choice("bad_captions", bad_captions, "keep", "drop")
    _choice("split", split, "reported", "test", "validation")
    if split == "reported":
        probe = table_files(data, "", ".parquet")
        swapped = bool(probe) and "edited_image" in next(iter(groups(probe[0])))([])
        split = "validation" if swapped else "test"
    files = table_files(data, split, ".parquet")
    if not files:
        raise ValueError(f"{data} has no {split}-*.parquet: {SOURCES['emu-edit'].help}")
    table = Table(files, ("image", "edited_image"), ("image", "instruction", "task", *EMU_CAPTIONS, "idx", "hash"))
    repeated = Counter(str(row[side]).strip().lower() for row in table.rows for side in EMU_CAPTIONS)
    cases, problems, notes = [], [], Counter({"identical_captions": 0, "placeholder_captions": 0, "dropped": 0})
    for number, row in enumerate(table.rows):
        before, after = (str(row[side] or "").strip() for side in EMU_CAPTIONS)
        identical = before == after
        placeholder = any("train station" in text.lower() and repeated[text.lower()] > 2 for text in (before, after))
        notes["identical_captions"] += identical
        notes["placeholder_captions"] += placeholder
        if bad_captions == "drop" and (identical or placeholder):
            notes["dropped"] += 1
            continue
        if not (row["instruction"] or "").strip():
            problems.append((f"row {number}", "no instruction"))
            continue
        task = str(row["task"]).lower()
        task = "color" if task == "texture" else task
        if task not in EMU_TYPES:
            notes[f"unknown type {task}"] += 1
        cases.append(
            Case(
                key=f"{number:05d}",
                instruction=row["instruction"],
                source=partial(table.picture, row["_at"], "image"),
                edit_type=task,
                source_caption=before,
                target_caption=after,
                extra={"idx": row["idx"], "hash": row["hash"]},
            )
        )
    notes["rows"] = len(table.rows)
    return Benchmark(
        "emu-edit",
        tuple(cases),
        ("clip_out", "clip_dir", "clip_i_source", "dino_source", "l1_source"),
        {"bad_captions": bad_captions, "split": split},
        problems=tuple(problems),
        notes=dict(notes) | {"rows_expected": EMU_ROWS},
    )


# ---- PIE-Bench


def decode_mask(runs: list[int], size: tuple[int, int] = PIE_SIZE) -> np.ndarray:
    """PIE-Bench's mask: start and length of every run over the row-major frame; bool (H, W), True is to be edited.

    A run beyond the end is cut. The border of one pixel is set to True afterwards, as the reference does.

    Raises:
        ValueError: an odd number of values, or values that are no runs.
    """
    height, width = size
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(value) is int and value >= 0 for value in runs):
        raise ValueError("the mask is no list of starts and lengths")
    flat = np.zeros(height * width, bool)
    for start, length in zip(runs[::2], runs[1::2]):
        if start >= flat.size:
            raise ValueError(f"the mask has a run at {start}, beyond the frame of {width} x {height}")
        flat[start : start + length] = True
    mask = flat.reshape(height, width)
    mask[[0, -1], :] = True
    mask[:, [0, -1]] = True
    return mask


def pie_bench(data: Path) -> Benchmark:
    """PIE-Bench: 700 pictures of 512 x 512 with masks.

    Args:
        data: folder with mapping_file.json and annotation_images/, or the one with that folder as data/.
    """
    data, mapping = _json(data, "mapping_file.json", "pie-bench")
    cases, problems = [], []
    for key, row in mapping.items():
        try:
            number = int(row["editing_type_id"])
            if not 0 <= number < len(PIE_TYPES):
                raise ValueError(f"unknown editing_type_id {row['editing_type_id']!r}")
            source = _inside(data / "annotation_images", row["image_path"])
            with Image.open(source) as image:
                size = image.height, image.width
            if size != PIE_SIZE:
                raise ValueError(f"picture {row['image_path']} is {image.width} x {image.height}, its mask 512 x 512")
            mask = decode_mask(row["mask"])
            cases.append(
                Case(
                    key=file_key(key),
                    instruction=row["editing_instruction"],
                    source=source,
                    edit_type=PIE_TYPES[number],
                    mask=mask,
                    source_caption=_no_brackets(row["original_prompt"]),
                    target_caption=_no_brackets(row["editing_prompt"]),
                    extra={"file": row["image_path"], "blended_word": row.get("blended_word", "")},
                )
            )
        except (KeyError, ValueError, TypeError, OSError) as error:
            problems.append((str(key), f"{type(error).__name__}: {error}"))
    names = ("structure", "psnr", "lpips", "mse", "ssim", "clip_whole", "clip_edit")
    notes = {"rows": len(mapping), "rows_expected": PIE_ROWS}
    return Benchmark("pie-bench", tuple(cases), names, fit="corner", problems=tuple(problems), notes=notes)


def _no_brackets(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


# ---- MagicBrush


def magicbrush(data: Path, turns: str = "single", split: str = "dev") -> Benchmark:
    """MagicBrush against its recorded targets.

    Args:
        data: the unpacked test set (edit_sessions.json, images/, local_captions.json), or parquet files of the hub.
        turns: "single" edits every turn from its recorded source; "multi" chains them and scores the last turn.
        split: of the parquet files, "dev" or "train".
    """
    _choice("turns", turns, "single", "multi")
    if (data / "edit_sessions.json").is_file():
        sessions, problems = _magicbrush_folder(data)
    else:
        sessions, problems = _magicbrush_table(data, _choice("split", split, "dev", "train")), []
    cases: list[Case] = []
    for name, session in sessions.items():
        unclear = [number for number, row in enumerate(session, 1) if not str(row["instruction"] or "").strip()]
        if unclear:
            problems.append((name, f"turn {unclear[0]} has no instruction"))
            continue
        previous: str | None = None
        for number, row in enumerate(session, 1):
            key = file_key(name, *((1,) if number == 1 else ("iter" if turns == "multi" else "inde", number)))
            last = number == len(session)
            case = Case(
                key, edit_type=f"turn {number}", previous=previous, scored=turns == "single" or last,
                extra={"file": f"{name}/{key}.png"}, **row,
            )  # fmt: skip
            cases.append(case)
            previous = key if turns == "multi" else None
    captioned = any(case.target_caption for case in cases)  # a caption missing among others is named by its case
    names = (
        "l1",
        "l2",
        "clip_i",
        "dino",
        *(("clip_out",) if captioned else ()),
        *(("drift",) if turns == "multi" else ()),
    )
    label = "magicbrush" if turns == "single" else "magicbrush-multi"
    return Benchmark(label, tuple(cases), names, {"turns": turns}, fit="bicubic", problems=tuple(problems))


def _magicbrush_folder(data: Path) -> tuple[dict[str, list[dict[str, Any]]], list[tuple[str, str]]]:
    _, listed = _json(data, "edit_sessions.json", "magicbrush")
    path = data / "local_captions.json"
    captions = _json(data, "local_captions.json", "magicbrush")[1] if path.is_file() else {}
    sessions, problems = {}, []
    for name, turns in listed.items():
        try:
            sessions[name] = [
                {
                    "instruction": turn["instruction"],
                    "source": _inside(data / "images", f"{name}/{turn['input']}"),
                    "target": _inside(data / "images", f"{name}/{turn['output']}"),
                    "mask": _magicbrush_mask(data / "images", name, turn) if turn.get("mask") else None,
                    "target_caption": captions.get(name, {}).get(turn["output"], ""),
                }
                for turn in turns
            ]
        except (KeyError, ValueError, TypeError) as error:
            problems.append((str(name), f"{type(error).__name__}: {error}"))
    return sessions, problems


def _magicbrush_mask(images: Path, name: str, turn: dict[str, Any]) -> Callable[[], np.ndarray]:
    mask, source = (_inside(images, f"{name}/{turn[role]}") for role in ("mask", "input"))
    return lambda: cut_out_mask(mask, read_picture(source).shape[:2])


def _magicbrush_cell(table: Table, at: tuple[int, int]) -> np.ndarray:
    return cut_out_mask(table.encoded(at, "mask_img"), table.picture(at, "source_img").shape[:2])


def _magicbrush_table(data: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    files = table_files(data, split, ".parquet")
    if not files:
        raise ValueError(f"{data} has neither edit_sessions.json nor {split}-*.parquet: {SOURCES['magicbrush'].help}")
    pictures = ("source_img", "mask_img", "target_img")
    table = Table(files, pictures, (*pictures, "img_id", "turn_index", "instruction"))
    sessions: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(table.rows, key=lambda row: (str(row["img_id"]), row["turn_index"])):
        sessions.setdefault(str(row["img_id"]), []).append(
            {
                "instruction": row["instruction"],
                "source": partial(table.picture, row["_at"], "source_img"),
                "target": partial(table.picture, row["_at"], "target_img"),
                "mask": partial(_magicbrush_cell, table, row["_at"]),
            }
        )
    return sessions


# ---- ImgEdit-Bench and GEdit-Bench


def imgedit(data: Path, suite: str = "basic") -> Benchmark:
    """ImgEdit-Bench, scored by a judge.

    Args:
        data: folder with basic_edit.json (or UGE_edit.json) and the pictures its `id` fields name.
        suite: "basic" (737 cases of nine types) or "uge" (47 hard ones).
    """
    _choice("suite", suite, "basic", "uge")
    data, listed = _json(data, "basic_edit.json" if suite == "basic" else "UGE_edit.json", "imgedit")
    cases, problems = [], []
    for key, row in listed.items():
        try:
            kind = row["edit_type"] if suite == "basic" else "uge"
            if suite == "basic" and kind not in IMGEDIT_TYPES:
                raise ValueError(f"unknown edit_type {kind!r}")
            source = _inside(data, row["id"])
            cases.append(Case(file_key(key), row["prompt"], source, kind, extra={"file": f"{key}.png"}))
        except (KeyError, ValueError, TypeError) as error:
            problems.append((str(key), f"{type(error).__name__}: {error}"))
    return Benchmark("imgedit", tuple(cases), (), {"suite": suite}, problems=tuple(problems))


def gedit(data: Path, language: str = "en", subset: str = "full") -> Benchmark:
    """GEdit-Bench, scored by a judge.

    Args:
        data: folder with the train split as .parquet or .arrow.
        language: "en" or "cn". subset: "full", or "intersection" (rows with Intersection_exist).
    """
    _choice("language", language, "en", "cn")
    _choice("subset", subset, "full", "intersection")
    files = table_files(data, "", ".parquet", ".arrow") or sorted(data.glob("train/*.arrow"))
    if not files:
        raise ValueError(f"{data} has no .parquet or .arrow files: {SOURCES['gedit'].help}")
    needed = ("input_image", "key", "instruction", "instruction_language", "task_type", "Intersection_exist")
    table = Table(files, ("input_image", "input_image_raw"), needed)
    cases, problems = [], []
    for row in table.rows:
        if row["instruction_language"] != language or (subset == "intersection" and not row["Intersection_exist"]):
            continue
        if row["task_type"] not in GEDIT_TYPES:
            problems.append((str(row["key"]), f"unknown task_type {row['task_type']!r}"))
            continue
        if not (row["instruction"] or "").strip():
            problems.append((str(row["key"]), "no instruction"))
            continue
        cases.append(
            Case(
                key=file_key(row["key"]),
                instruction=row["instruction"],
                source=partial(table.picture, row["_at"], "input_image"),
                edit_type=row["task_type"],
                extra={"file": f"fullset/{row['task_type']}/{language}/{row['key']}.png"},
            )
        )
    settings = {"language": language, "subset": subset}
    return Benchmark("gedit", tuple(cases), (), settings, fit="bicubic", mean_over="types", problems=tuple(problems))


def _json(data: Path, name: str, benchmark: str) -> tuple[Path, dict[str, Any]]:
    """A benchmark's index, in `data` or `data`/data, and the folder that it lies in."""
    folder = data / "data" if (data / "data" / name).is_file() and not (data / name).is_file() else data
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / name} cannot be read ({error}): {SOURCES[benchmark].help}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name} is no JSON object: {SOURCES[benchmark].help}")
    return folder, value


def _inside(folder: Path, name: str) -> Path:
    """A picture of the benchmark; its index must not reach files elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"path {name!r} leaves the folder")
    return folder / name
