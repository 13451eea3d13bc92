"""Benchmarks that come as parquet or arrow files with pictures in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from varedit.data.record import Encoded, open_picture


class Table:
    """Rows of parquet or arrow files, pictures read one row group at a time.

    Args:
        pictures: columns with pictures, those that there are. needed: columns that every file has to have.

    Raises:
        ValueError: a file that cannot be read or lacks a column.
    """

    def __init__(self, paths: list[Path], pictures: tuple[str, ...], needed: tuple[str, ...]) -> None:
        self.pictures = pictures
        self._groups: list[Callable[[list[str]], Any]] = []
        self.rows: list[dict[str, Any]] = []
        for path in paths:
            for read in groups(path):
                names = read([])
                missing = [name for name in needed if name not in names]
                if missing:
                    raise ValueError(
                        f"{path} has no column {missing[0]!r} but {', '.join(names)}: name the benchmark's own folder"
                    )
                columns = [name for name in names if name not in pictures]
                number = len(self._groups)
                self._groups.append(read)
                for index, row in enumerate(read(columns).to_pylist()):
                    self.rows.append(row | {"_at": (number, index)})
        self._read = lru_cache(maxsize=2)(lambda number: self._groups[number](list(self.pictures)))

    def picture(self, at: tuple[int, int], column: str) -> np.ndarray:
        """uint8 (H, W, 3).

        Raises:
            ValueError: no picture there.
        """
        try:
            return np.asarray(open_picture(self.encoded(at, column)).convert("RGB"))
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            # The reason alone: Pillow's own words hold an address in memory, and score files have to repeat.
            raise ValueError(f"{column} of row {at} is no picture ({type(error).__name__})") from error

    def encoded(self, at: tuple[int, int], column: str) -> Encoded:
        """The picture's file."""
        value = self._read(at[0])[column][at[1]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        return Encoded(data or b"", f"{column} of row {at}")


def groups(file: Path) -> Iterator[Callable[[list[str]], Any]]:
    """Readers of a file's row groups: a list of columns -> a table; an empty list -> the names of all columns."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("this benchmark comes as parquet: pip install pyarrow") from error
    if file.suffix == ".parquet":
        try:
            opened = parquet.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        for group in range(opened.num_row_groups):
            yield partial(_row_group, opened, group)
        return
    yield partial(_columns, _arrow(file))


def _arrow(file: Path) -> Any:
    """The table of an arrow file of either kind."""
    import pyarrow as pa

    try:
        source = pa.memory_map(str(file))
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _row_group(opened: Any, group: int, wanted: list[str]) -> Any:
    names = opened.schema_arrow.names
    return opened.read_row_group(group, columns=[name for name in wanted if name in names]) if wanted else names


def _columns(table: Any, wanted: list[str]) -> Any:
    names = table.schema.names
    return table.select([name for name in wanted if name in names]) if wanted else names


def table_files(data: Path, split: str, *suffixes: str) -> list[Path]:
    found = [
        path for suffix in suffixes for path in (*data.glob(f"{split}*{suffix}"), *data.glob(f"data/{split}*{suffix}"))
    ]
    return sorted(found)
