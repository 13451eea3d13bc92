"""Public sets of editing pairs in the layouts they are distributed in.

Column and file names are those of the data cards and loaders of each set. Tables are parquet files, local or at any
address that fsspec opens (`hf://datasets/OWNER/NAME`), read one batch of rows at a time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from varedit.data.archives import Pictures
from varedit.data.faults import FaultError, Skipped, checked_record, image_hw, text_of, texts_of
from varedit.data.record import Encoded, Record, cut_out_mask
from varedit.paths import leaves_folder, visible

Item = Record | Skipped


@dataclass(frozen=True)
class Table:
    """Which columns of a set's parquet files hold what. `identity` columns together name a row."""

    source: str
    target: str
    instruction: str
    identity: tuple[str, ...]
    licence: str
    mask: str = ""
    cut_out: bool = False  # the mask is the source with a hole in it
    edit_type: str = ""
    extra: tuple[str, ...] = field(default=())

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.source, self.target, self.instruction, self.mask, self.edit_type)
        return (*(name for name in named if name), *self.identity, *self.extra)


TABLES: dict[str, Table] = {
    "ultraedit": Table(
        source="source_image",
        target="edited_image",
        instruction="edit_prompt",
        mask="mask_image",  # the region-based part only
        identity=("idx",),
        extra=("source_caption", "target_caption", "clip_sim_dir", "dinov2_sim", "ssim"),
        licence="CC-BY-4.0",
    ),
    "magicbrush": Table(
        source="source_img",
        target="target_img",
        instruction="instruction",
        mask="mask_img",
        cut_out=True,
        identity=("img_id", "turn_index"),
        licence="CC-BY-4.0",
    ),
    "omniedit": Table(
        source="src_img",
        target="edited_img",
        instruction="edited_prompt_list",
        identity=("omni_edit_id",),
        edit_type="task",
        extra=("sc_score_1", "sc_score_2", "pq_score", "o_score"),
        licence="MIT",
    ),
    "instructpix2pix": Table(
        source="original_image",
        target="edited_image",
        instruction="edit_prompt",
        identity=(),
        extra=("original_prompt", "edited_prompt"),
        licence="unknown (data card names none)",
    ),
}
SEED_LICENCE = "CC-BY-NC-4.0"
UNKNOWN_LICENCE = "unknown"
BATCH_ROWS = 16


def pyarrow_parquet() -> Any:
    """The module that reads parquet. Raises ValueError naming the extra where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def parquet_files(source: str) -> list[tuple[str, Any]]:
    """Name and opener of every parquet file of a local path or an address; sorted by name."""
    if "://" not in source:
        path = Path(source)
        files = visible(path.rglob("*.parquet"), path) if path.is_dir() else [path]
        return [(file.as_posix(), file.open) for file in files]
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        found = filesystem.glob(path) if path.endswith(".parquet") else filesystem.glob(path + "/**/*.parquet")
    except (OSError, ImportError, ValueError, RuntimeError) as error:  # no network, no such protocol, no such set
        raise ValueError(f"{source} cannot be listed: {error}") from error
    if not found:
        raise ValueError(f"{source} holds no parquet files: check the address, or add @refs/convert/parquet to it")
    return [(name, lambda mode, name=name: filesystem.open(name, mode)) for name in sorted(found)]


def table_columns(source: str) -> set[str]:
    """Column names of the first readable parquet file; empty if there is none."""
    parquet = pyarrow_parquet()
    for _, opener in parquet_files(source):
        try:
            with opener("rb") as stream:
                return set(parquet.ParquetFile(stream).schema_arrow.names)
        except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
            continue
    return set()


def rows_of(source: str, wanted: tuple[str, ...] | None = None) -> Iterator[tuple[str, dict[str, Any]] | Skipped]:
    """Origin and values of each row; texts come as bytes, so that one bad caption does not spoil its batch."""
    parquet = pyarrow_parquet()
    for name, opener in parquet_files(source):
        short = name.rsplit("/", 1)[-1]
        number = 0
        try:
            with opener("rb") as stream:
                file = parquet.ParquetFile(stream)
                columns = [column for column in file.schema_arrow.names if wanted is None or column in wanted]
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                    values = {column: _as_bytes(batch.column(column)).to_pylist() for column in columns}
                    for row in range(batch.num_rows):
                        yield f"{short} row {number}", {column: values[column][row] for column in columns}
                        number += 1
        except (OSError, ValueError) as error:
            yield Skipped(name, "truncated shard", f"{error} (after {number} rows)")


def _as_bytes(column: Any) -> Any:
    """Texts, also in lists and structures, as their bytes."""
    import pyarrow

    def plain(kind: Any) -> Any:
        types = pyarrow.types
        if types.is_string(kind) or types.is_large_string(kind):
            return pyarrow.large_binary()
        if types.is_list(kind) or types.is_large_list(kind):
            return pyarrow.large_list(plain(kind.value_type))
        if types.is_struct(kind):
            return pyarrow.struct([(one.name, plain(one.type)) for one in kind])
        return kind

    kind = plain(column.type)
    return column if kind == column.type else column.cast(kind)


def read_table(source: str, name: str) -> Iterator[Item]:
    """UltraEdit, MagicBrush, OmniEdit or InstructPix2Pix from parquet files."""
    table = TABLES[name]
    root = Path(source)
    pictures = Pictures(root if root.is_dir() else root.parent) if "://" not in source else Pictures()
    for item in rows_of(source, table.columns):
        if isinstance(item, Skipped):
            yield item
            continue
        place, row = item
        identity = " ".join(_plain(row[column]) for column in table.identity if column in row)
        origin = f"{name} {place}" + (f" ({identity})" if identity else "")
        try:
            yield _table_record(table, row, origin, pictures)
        except FaultError as error:
            yield Skipped(origin, error.fault, str(error))


def _table_record(table: Table, row: dict[str, Any], origin: str, pictures: Pictures) -> Item:
    for column in (table.source, table.target, table.instruction):
        if row.get(column) is None:
            raise FaultError("missing image" if column != table.instruction else "bad row", f"{column} is empty")
    mask = row.get(table.mask) if table.mask else None
    source = _cell_picture(row[table.source], f"{origin} {table.source}", pictures)
    return checked_record(
        source,
        _cell_picture(row[table.target], f"{origin} {table.target}", pictures),
        texts_of(row[table.instruction], table.instruction),
        origin,
        mask=None if mask is None else _mask(table, mask, source, f"{origin} {table.mask}", pictures),
        edit_type=_plain(row[table.edit_type]) if row.get(table.edit_type) is not None else "",
        licence=table.licence,
        extra={
            column: _plain(row[column]) if isinstance(row[column], bytes) else row[column]
            for column in table.extra
            if row.get(column) is not None
        },
    )


def _mask(table: Table, cell: Any, source: Path | Encoded, name: str, pictures: Pictures) -> Path | Encoded:
    """A mask cell as a black and white picture file."""
    mask = _cell_picture(cell, name, pictures)
    if not table.cut_out:
        return mask
    try:
        white_HW = cut_out_mask(mask, image_hw(source))
    except ValueError as error:
        raise FaultError("unreadable image", str(error)) from error
    file = io.BytesIO()
    Image.fromarray(white_HW).save(file, "PNG")
    return Encoded(file.getvalue(), name)


def _cell_picture(cell: Any, name: str, pictures: Pictures) -> Path | Encoded:
    """A picture cell: {"bytes", "path"} as the `datasets` library writes it, or bare bytes."""
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return Encoded(cell["bytes"], name)
        if cell.get("path"):
            return pictures.get(text_of(cell["path"], "path"))
    elif isinstance(cell, bytes) and cell:
        return Encoded(cell, name)
    raise FaultError("missing image", f"{name} is empty")


def _plain(value: Any) -> str:
    return text_of(value, "a text column") if isinstance(value, bytes) else str(value)


# ---- SEED-Data-Edit ------------------------------------------------------------------------------------------------
def is_seed_row(row: dict[str, Any]) -> bool:
    return "source_image" in row and ("target_image" in row or "instruction_1" in row)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]] | Skipped]:
    """Origin and object of each line; lines are decoded one by one, so that a bad one costs only itself."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            origin = f"{path.name} line {number}"
            try:
                row = json.loads(text_of(line, "line"))
                if not isinstance(row, dict):
                    raise FaultError("bad row", "not a JSON object")
                yield origin, row
            except FaultError as error:
                yield Skipped(origin, error.fault, str(error))
            except (ValueError, RecursionError) as error:
                yield Skipped(origin, "bad row", f"no JSON: {error}")


def read_seed(source: Path) -> Iterator[Item]:
    """SEED-Data-Edit, parts 1 to 3: `*.jsonl` annotations, pictures in `*.tar.gz.part-*` or unpacked.

    Part 3 has sessions (source_image, instruction_1, edit_image_1, instruction_2, ...): turn k becomes the pair of
    pictures k - 1 and k, as the paper's appendix A.1 does.
    """
    folder = source if source.is_dir() else _seed_root(source)
    pictures = Pictures(folder)
    annotations = visible(source.rglob("*.jsonl"), source) if source.is_dir() else [source]
    for annotation in annotations:
        for item in json_lines(annotation):
            if isinstance(item, Skipped):
                yield item
                continue
            origin, row = item
            yield from _seed_pairs(f"seed-data-edit {origin}", row, pictures)
    yield from pictures.faults
    pictures.close()


def _seed_root(annotation: Path) -> Path:
    """The folder that holds annotations and images side by side."""
    parents = annotation.resolve().parents
    return next((folder.parent for folder in parents if folder.name.startswith("annotations")), parents[0])


def _seed_pairs(origin: str, row: dict[str, Any], pictures: Pictures) -> Iterator[Item]:
    if "instruction_1" not in row:
        yield _named_pair(origin, row, "source_image", "target_image", "instruction", pictures, SEED_LICENCE)
        return
    turn, before = 1, "source_image"
    while f"instruction_{turn}" in row:
        after = f"edit_image_{turn}"
        place = f"{origin} turn {turn}"
        yield _named_pair(place, row, before, after, f"instruction_{turn}", pictures, SEED_LICENCE, {"turn": turn})
        turn, before = turn + 1, after


def _named_pair(
    origin: str,
    row: dict[str, Any],
    source: str,
    target: str,
    instruction: str,
    pictures: Pictures,
    licence: str,
    extra: dict[str, Any] | None = None,
    edit_type: str = "",
) -> Item:
    """A pair from a row that names its pictures."""
    try:
        missing = [key for key in (source, target, instruction) if row.get(key) is None]
        if missing:
            raise FaultError("bad row", f"no {', '.join(missing)}")
        return checked_record(
            pictures.get(text_of(row[source], source)),
            pictures.get(text_of(row[target], target)),
            texts_of(row[instruction], instruction),
            origin,
            licence=licence,
            extra=extra or {},
            edit_type=edit_type,
        )
    except FaultError as error:
        return Skipped(origin, error.fault, str(error))


# ---- ImgEdit -------------------------------------------------------------------------------------------------------
def read_imgedit(source: Path) -> Iterator[Item]:
    """ImgEdit: `Parquet/<task>_partN.parquet` with paths, pictures in `Singleturn/` and `Multiturn/` tars or unpacked.

    A multi-turn row holds the same columns once a turn, with its own input picture: each turn is a pair.
    """
    root = source.parent if source.is_file() else source
    root = root.parent if root.name == "Parquet" else root
    folders = [root / name for name in ("Singleturn", "Multiturn") if (root / name).is_dir()]
    pictures = Pictures(*(folders or [root]))
    for item in rows_of(str(source)):
        if isinstance(item, Skipped):
            yield item
            continue
        place, row = item
        task = place.split("_part", 1)[0]
        turns = row["data"] if "data" in row else [row]
        for number, turn in enumerate(turns or [], 1):
            origin = f"imgedit {place}" + (f" turn {number}" if "data" in row else "")
            found = turn if isinstance(turn, dict) else {}
            yield _imgedit_pair(origin, found, task, {"turn": number} if "data" in row else {}, pictures)
    yield from pictures.faults
    pictures.close()


def _imgedit_pair(origin: str, turn: dict[str, Any], task: str, extra: dict[str, Any], pictures: Pictures) -> Item:
    sides = {key: turn.get(key) or [] for key in ("input_images", "output_images")}
    counts = [len(names) for names in sides.values()]
    if counts != [1, 1]:
        return Skipped(origin, "bad row", f"{counts[0]} input and {counts[1]} output pictures are not one pair")
    row = {key: names[0] for key, names in sides.items()} | {"prompt": turn.get("prompt")}
    return _named_pair(origin, row, "input_images", "output_images", "prompt", pictures, UNKNOWN_LICENCE, extra, task)


# ---- InstructPix2Pix as generated ------------------------------------------------------------------------------------
def read_instructpix2pix_folders(source: Path) -> Iterator[Item]:
    """InstructPix2Pix as generated: `<prompt>/prompt.json`, `<seed>_0.jpg` and `<seed>_1.jpg`, with `seeds.json`."""
    try:
        seeds = json.loads((source / "seeds.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source / 'seeds.json'} cannot be read: {error}") from error
    if not isinstance(seeds, list):
        raise ValueError(f"{source / 'seeds.json'} is no list of names and seeds: check it, or name another format")
    pictures = Pictures(source)
    for place, entry in enumerate(seeds):
        try:
            name, numbers, prompt = _prompt(source, entry)
        except FaultError as error:
            yield Skipped(f"instructpix2pix seeds.json {place}", error.fault, str(error))
            continue
        extra = {"original_prompt": prompt.get("input", ""), "edited_prompt": prompt.get("output", "")}
        for seed in numbers:
            row = {"0": f"{name}/{seed}_0.jpg", "1": f"{name}/{seed}_1.jpg", "edit": prompt.get("edit")}
            origin = f"instructpix2pix {name}/{seed}"
            yield _named_pair(origin, row, "0", "1", "edit", pictures, UNKNOWN_LICENCE, extra)


def _prompt(source: Path, entry: Any) -> tuple[str, list[Any], dict[str, Any]]:
    """Folder, seeds and prompt.json of an entry of seeds.json. Raises FaultError."""
    name, numbers = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if not isinstance(name, str) or not isinstance(numbers, list):
        raise FaultError("bad row", f"{entry!r} is not a name and its seeds")
    if leaves_folder(name):
        raise FaultError("bad row", f"path {name!r} leaves the folder: use a path relative to it")
    try:
        prompt = json.loads(text_of((source / name / "prompt.json").read_bytes(), f"{name}/prompt.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise FaultError("bad row", f"{name}/prompt.json: {error}") from error
    if not isinstance(prompt, dict):
        raise FaultError("bad row", f"{name}/prompt.json is no JSON object")
    return name, numbers, prompt
