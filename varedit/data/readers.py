"""Reading editing pairs from public sets, shards, own folders and tables: one function for all of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from varedit.data.archives import PICTURE_SUFFIXES, Pictures
from varedit.data.faults import FaultError, Skipped, checked_record, text_of, texts_of
from varedit.data.public_sets import (
    TABLES,
    is_seed_row,
    json_lines,
    read_imgedit,
    read_instructpix2pix_folders,
    read_seed,
    read_table,
    table_columns,
)
from varedit.data.record import INDEX, Record
from varedit.data.shards import is_packed, read_packed, read_released, read_shard, released_index
from varedit.paths import visible

Item = Record | Skipped

# Own tables: what a column may be called. The first is what we write.
ALIASES: dict[str, tuple[str, ...]] = {
    "source": ("source", "source_image", "src", "input", "input_image", "before"),
    "target": ("target", "target_image", "tgt", "output", "edited_image", "after"),
    "instructions": ("instructions", "instruction", "prompt", "edit", "text"),
    "mask": ("mask", "mask_image"),
    "edit_type": ("edit_type", "task", "type"),
    "origin": ("origin", "id"),
    "licence": ("licence", "license"),
}

_READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "seed-data-edit": read_seed,
    "imgedit": read_imgedit,
    "instructpix2pix-folders": read_instructpix2pix_folders,
    "released-shards": read_released,
    "packed": read_packed,
    "shard": read_shard,
    "jsonl": lambda source: _read_jsonl(source),
    "csv": lambda source: _read_csv(source),
    "folder": lambda source: _read_folder(source),
}
FORMATS = (*_READERS, *TABLES)


def read(source: str | Path, format: str | None = None) -> Iterator[Item]:
    """Read editing pairs, one at a time, in an order that depends on the source alone.

    Layouts, by the names `format` takes:

    - `seed-data-edit`: `*.jsonl` annotations with pictures in `*.tar.gz.part-*` or unpacked; the folder that holds
      both, or one `*.jsonl`. Sessions of several turns are split into pairs.
    - `imgedit`: a folder with `Parquet/` and `Singleturn/` (tar parts or unpacked).
    - `ultraedit`, `magicbrush`, `omniedit`, `instructpix2pix`: parquet files, a folder of them, or an address such as
      `hf://datasets/osunlp/MagicBrush`, which is streamed.
    - `instructpix2pix-folders`: the generated folders with `seeds.json`.
    - `released-shards`: index files `name<TAB>count<TAB>num_shards` and `wds_<name>_<number>.tar`; `shard`: one tar.
    - `packed`: what `varedit data pack` wrote.
    - `jsonl`, `csv`: own tables with source, target, instruction (or instructions) and optionally mask, edit_type,
      origin, licence; other columns become extras. `jsonl` also takes a folder with `pairs.jsonl`.
    - `folder`: `source/NAME.png`, `target/NAME.png`, `text/NAME.txt` (one phrasing a line) and optionally
      `mask/NAME.png`; or side by side `NAME.src.png`, `NAME.tgt.png`, `NAME.txt`.

    Args:
        source: Path or address.
        format: One of `FORMATS`; None looks at the source.

    Returns:
        Records, and a `Skipped` for each pair or file that cannot be read. Pictures are checked by their headers.

    Raises:
        ValueError: No such source, an unknown format, a layout that is not recognised, or a package that is missing.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if "://" not in str(source) and not Path(source).exists():
        raise ValueError(f"source {source} does not exist: check the path")
    name = format or detect(source)
    if name in TABLES:
        return read_table(str(source), name)
    if "://" in str(source):
        raise ValueError(f"source {source} is an address: {name} is read from local files only; download it first")
    return _READERS[name](Path(source))


def detect(source: str | Path) -> str:
    """The layout of a source, one of `FORMATS`.

    Raises:
        ValueError: None fits.
    """
    path = Path(source)
    if "://" in str(source):
        name = _table_name(str(source))
    elif path.is_dir():
        name = _detect_folder(path)
    else:
        name = _detect_file(path)
    if name is None:
        raise ValueError(f"the layout of {source} is not recognised: name its format, one of {', '.join(FORMATS)}")
    return name


def _table_name(source: str) -> str | None:
    columns = table_columns(source)
    for name, table in TABLES.items():
        if {table.source, table.target, table.instruction} <= columns:
            return name
    return "imgedit" if {"input_images", "output_images"} <= columns or columns == {"data"} else None


def _detect_file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_name(path)
    if suffix == ".parquet":
        return _table_name(str(path))
    if suffix == ".tar":
        return "shard"
    return "released-shards" if suffix == ".txt" and released_index(path) else None


def _jsonl_name(path: Path) -> str:
    first = next((item for item in json_lines(path) if not isinstance(item, Skipped)), None)
    # target_image alone could be anybody's table; SEED's own has no other columns for the pictures.
    return "seed-data-edit" if first is not None and is_seed_row(first[1]) else "jsonl"


def _detect_folder(folder: Path) -> str | None:
    if (folder / INDEX).exists():
        return "jsonl"
    if is_packed(folder):
        return "packed"
    if (folder / "seeds.json").exists():
        return "instructpix2pix-folders"
    if (folder / "Parquet").is_dir():
        return "imgedit"
    if (folder / "source").is_dir() and (folder / "target").is_dir():
        return "folder"
    if any(folder.glob("wds_*.tar")) or any(released_index(path) for path in folder.glob("*.txt")):
        return "released-shards"
    if any(folder.glob("*.src.*")):
        return "folder"
    annotation = next(iter(visible(folder.rglob("*.jsonl"), folder)), None)
    if annotation is not None and _jsonl_name(annotation) == "seed-data-edit":
        return "seed-data-edit"
    if visible(folder.rglob("*.parquet"), folder):
        return _table_name(str(folder))
    return None


# ---- own tables and folders ----------------------------------------------------------------------------------------
def _read_jsonl(source: Path) -> Iterator[Item]:
    path = source / INDEX if source.is_dir() else source
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a JSON lines file or a folder with {INDEX}")
    pictures = Pictures(path.parent)
    for item in json_lines(path):
        if isinstance(item, Skipped):
            yield item
        else:
            yield _row_record(*item, pictures)


def _read_csv(path: Path) -> Iterator[Item]:
    """A table with a header line, separated by commas or, in `.tsv`, by tabs.

    The file is read as Latin-1, which no byte can spoil, and each cell is then decoded as the UTF-8 it must be.
    """
    pictures = Pictures(path.parent)
    with path.open(encoding="latin-1", newline="") as lines:
        start = lines.read(3)
        lines.seek(3 if start == "\xef\xbb\xbf" else 0)  # the byte order mark that spreadsheets write
        rows = _csv_rows(path, lines)
        _, first = next(rows, (1, []))
        if isinstance(first, csv.Error):
            raise ValueError(f"{path} has no readable header ({first})")
        header = [_cell(name) for name in first]
        names = [name.decode("utf-8", "replace").strip() for name in header]
        for role in ("source", "target", "instructions"):
            if not set(ALIASES[role]) & set(names):
                raise ValueError(f"{path} has no column {role!r}: its header is {', '.join(names) or 'empty'}")
        for number, cells in rows:
            if not cells:
                continue
            origin = f"{path.name} line {number}"
            if isinstance(cells, csv.Error):
                yield Skipped(origin, "bad row", f"{cells}; double the quotes inside a quoted cell, or close it")
                continue
            if len(cells) != len(names):
                yield Skipped(origin, "bad row", f"{len(cells)} cells under {len(names)} headings")
                continue
            yield _row_record(origin, {name: _cell(cell) for name, cell in zip(names, cells)}, pictures)


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The lines on which the rows of a table begin, and the rows, or errors in place of those that cannot be read.

    Raises:
        ValueError: A quoted cell has no end, and takes all later rows into it.
    """
    rows, first = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True), 1
    while True:
        try:
            yield first, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if " expected after " not in str(error):  # text after a closed quote spoils its own row only
                raise ValueError(
                    f"{path} line {first} cannot be read ({error}): close the quote that opens there"
                ) from error
            yield first, error
        first = rows.line_num + 1


def _cell(text: str) -> bytes:
    return text.encode("latin-1")


def _row_record(origin: str, row: dict[str, Any], pictures: Pictures) -> Item:
    """A record from a row of an own table; values are JSON values or bytes."""
    try:
        found = {
            role: next((name for name in names if not _is_empty(row.get(name), role)), None)
            for role, names in ALIASES.items()
        }
        for role in ("source", "target"):
            if found[role] is None:
                raise FaultError("bad row", f"no {role}")
        known = {role: row[name] for role, name in found.items() if name is not None}
        instructions = known.get("instructions", b"" if _has_any(row, "instructions") else None)
        if instructions is None:
            raise FaultError("bad row", "no instruction")
        extra = {
            name: text_of(value, name) if isinstance(value, bytes) else value
            for name, value in row.items()
            if not any(name in names for names in ALIASES.values())
        }
        return checked_record(
            pictures.get(text_of(known["source"], "source")),
            pictures.get(text_of(known["target"], "target")),
            texts_of(instructions),
            _word(known, "origin") or origin,
            mask=pictures.get(text_of(known["mask"], "mask")) if "mask" in known else None,
            edit_type=_word(known, "edit_type"),
            licence=_word(known, "licence"),
            extra=extra,
        )
    except FaultError as error:
        return Skipped(origin, error.fault, str(error))


def _is_empty(value: Any, role: str) -> bool:
    return value is None or value == b"" or (value == "" and role != "instructions")  # "" is said of an instruction


def _has_any(row: dict[str, Any], role: str) -> bool:
    return any(name in row for name in ALIASES[role])


def _word(known: dict[str, Any], role: str) -> str:
    value = known.get(role, "")
    return text_of(value, role) if isinstance(value, (bytes, str)) else json.dumps(value, ensure_ascii=False)


def _read_folder(folder: Path) -> Iterator[Item]:
    if (folder / "source").is_dir():
        sides = {role: _by_stem(folder / role) for role in ("source", "target", "mask")}
        texts = {path.stem: path for name in ("target", "source", "text") for path in folder.glob(f"{name}/*.txt")}
    else:
        sides = {
            role: {path.name.rpartition(f".{short}.")[0]: path for path in visible(folder.glob(f"*.{short}.*"), folder)}
            for role, short in (("source", "src"), ("target", "tgt"), ("mask", "mask"))
        }
        texts = {path.stem: path for path in folder.glob("*.txt")}
    if not sides["source"]:
        raise ValueError(f"{folder} holds no source pictures: put them in source/, or name them NAME.src.png")
    for name in sorted(sides["source"]):
        origin = f"{folder.name}/{name}"
        try:
            for role, found in (("target picture", sides["target"]), ("text", texts)):
                if name not in found:
                    raise FaultError("missing image" if role != "text" else "bad row", f"no {role} for {name}")
            lines = io.StringIO(text_of(texts[name].read_bytes(), texts[name].name))
            phrasings = tuple(line.strip() for line in lines if line.strip())
        except FaultError as error:
            yield Skipped(origin, error.fault, str(error))
            continue
        pair = sides["source"][name], sides["target"][name]
        yield checked_record(*pair, phrasings or ("",), origin, mask=sides["mask"].get(name))


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in visible(folder.glob("*"), folder) if path.suffix.lower() in PICTURE_SUFFIXES}
