"""Cases to results: resumable, one manifest line a case.

A folder of results holds

    run.json          what was run: benchmark, its settings, editor, seed
    manifest.jsonl    one line a finished case (the last line of a key counts)
    images/KEY.png    the results as the editor gave them
    scores.json       written by scoring; holds no times, so that it is the same file every time

Several processes may fill one folder, each with its own shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varedit.evaluation.cases import Benchmark, Case, picture_digest, read_picture
from varedit.evaluation.editors import EditFailed, Editor
from varedit.machine import peak_memory_mib

logger = logging.getLogger(__name__)

RUN, MANIFEST, IMAGES = "run.json", "manifest.jsonl", "images"


@dataclass(frozen=True)
class Generated:
    """What a call did: cases done now, found done, and failed with their reasons."""

    done: int
    skipped: int
    failed: dict[str, str]


def generate(
    benchmark: Benchmark,
    editor: Editor,
    output: Path,
    *,
    seed: int = 0,
    workers: int = 1,
    batch_size: int = 1,
    shard: tuple[int, int] = (0, 1),
    on_case: Callable[[int], None] | None = None,
) -> Generated:
    """Edit every case that has no result yet.

    Args:
        seed: the run's; each case gets its own from it and its key, so order, batches and shards do not matter.
        workers: threads, for editors that allow it (endpoints, commands).
        batch_size: cases in one call, for editors that gain by it (our own pipeline).
        shard: (i, n): only chains i, i + n, ...; other processes do the rest.
        on_case: called with the number of cases gone through.

    Raises:
        ValueError: the folder holds a run of something else, or cannot be written.
    """
    try:
        (output / IMAGES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output {output} is no folder that can be written ({error}); choose another --output"
        ) from error
    run = {"benchmark": benchmark.name, "settings": benchmark.settings, "editor": editor.settings, "seed": seed}
    _check_run(output, run)
    _end_line(output / MANIFEST)
    work = _Work(editor, output, seed, _digest(run), read_manifest(output), on_case)
    chains = list(_chains(benchmark.cases))[shard[0] :: shard[1]]
    size = batch_size if editor.batched else 1
    groups = [chains[first : first + size] for first in range(0, len(chains), size)]
    if workers > 1 and editor.concurrent:
        with ThreadPoolExecutor(workers) as pool:
            for future in as_completed([pool.submit(work.group, group) for group in groups]):
                future.result()
    else:
        for group in groups:
            work.group(group)
    return Generated(work.done, work.skipped, work.failed)


@dataclass
class _Work:
    """One call of `generate`. Several threads may work on it."""

    editor: Editor
    output: Path
    seed: int
    run: str
    finished: dict[str, dict[str, Any]]
    on_case: Callable[[int], None] | None
    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def group(self, chains: list[list[Case]]) -> None:
        """Edit some chains turn by turn, a turn of all of them in one call."""
        again: set[str] = set()  # first keys of chains in which a turn is new: those that follow it have to be new too
        for turn in range(max(map(len, chains))):
            todo: list[Case] = []
            for chain in chains:
                if turn >= len(chain):
                    continue
                case, first = chain[turn], chain[0].key
                row = self.finished.get(case.key)
                if first in again or row is None or row["status"] != "ok" or not _holds(self.output, case, row):
                    again.add(first)
                    todo.append(case)
                else:
                    self._count(case, row, new=False)
            for case, row in zip(todo, self._edit(todo)):
                self._count(case, row, new=True)

    def _count(self, case: Case, row: dict[str, Any], new: bool) -> None:
        with self.lock:
            if new:
                _append(self.output / MANIFEST, row)
            if row["status"] != "ok":
                self.failed[case.key] = row["error"]
            elif new:
                self.done += 1
            else:
                self.skipped += 1
            if self.on_case is not None:
                self.on_case(self.done + self.skipped + len(self.failed))

    def _edit(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Edit cases in one call, and write their results; their manifest lines."""
        rows: list[dict[str, Any]] = []
        ready: list[tuple[Case, Image.Image, dict[str, Any]]] = []
        for case in cases:
            row = {"key": case.key, "status": "failed", "seed": case_seed(self.seed, case.key), "run": self.run}
            rows.append(row)
            try:
                row["case"] = case_digest(case)
                ready.append((case, Image.fromarray(self._source(case)), row))
            except (EditFailed, ValueError) as error:
                row |= {"error": str(error), "seconds": 0.0}
        if ready:
            self._edit_ready(ready)
        return rows

    def _source(self, case: Case) -> np.ndarray:
        """What is edited: the case's source, or the result of the turn before (not one left by an earlier call)."""
        if case.previous is None:
            return read_picture(case.source)
        path = result_path(self.output, case.previous)
        if case.previous in self.failed or not path.is_file():
            raise EditFailed(f"the turn before, {case.previous}, has no result")
        return read_picture(path)

    def _edit_ready(self, ready: list[tuple[Case, Image.Image, dict[str, Any]]]) -> None:
        started = time.monotonic()
        cases, sources, lines = zip(*ready)
        try:
            results = self.editor.edit_all(cases, sources, [row["seed"] for row in lines])
        except (EditFailed, ValueError) as error:
            if len(ready) > 1:  # one of them is at fault: see which
                for one in ready:
                    self._edit_ready([one])
            else:
                lines[0].update(error=str(error), seconds=round(time.monotonic() - started, 4))
            return
        seconds = round((time.monotonic() - started) / len(ready), 4)
        memory = peak_memory_mib(self.editor.place)
        for case, result, row in zip(cases, results, lines, strict=True):
            path = result_path(self.output, case.key)
            row |= {"seconds": seconds, "peak_memory_mib": memory} | _write(result, path)


def case_seed(seed: int, key: str) -> int:
    """The seed of one case: a function of the run's seed and the key."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4]) >> 1


def case_digest(case: Case) -> str:
    """Hash of what a case asks, its source's pixels included."""
    asked = [case.key, case.instruction, case.edit_type, case.source_caption, case.target_caption, case.previous]
    return _digest([*asked, picture_digest(read_picture(case.source))])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def read_manifest(output: Path) -> dict[str, dict[str, Any]]:
    """The last manifest line of every key; a line cut off by an interruption is passed over."""
    path = output / MANIFEST
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError):
                logger.warning("a manifest line of %s is damaged; its case is done again", output)
    return rows


def result_path(output: Path, key: str) -> Path:
    return output / IMAGES / f"{key}.png"


def _chains(cases: tuple[Case, ...]) -> Iterator[list[Case]]:
    """Cases that need each other's results, in order; most are alone."""
    chains: dict[str, list[Case]] = {}
    member: dict[str, str] = {}
    for case in cases:
        head = case.key
        if case.previous is not None:
            if case.previous not in member:
                raise ValueError(f"case {case.key!r} follows {case.previous!r}, which does not come before it")
            head = member[case.previous]
        member[case.key] = head
        chains.setdefault(head, []).append(case)
    yield from chains.values()


def _check_run(output: Path, run: dict[str, Any]) -> None:
    """Write run.json, or compare with the one there."""
    path = output / RUN
    text = json.dumps(run, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); choose another --output") from error
        differing = [key for key in run if before.get(key) != json.loads(text)[key]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{output} holds a run with {key} {json.dumps(before.get(key))}, not {json.dumps(run[key])}; "
                "choose another --output"
            )
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _holds(output: Path, case: Case, row: dict[str, Any]) -> bool:
    """True if a manifest line still describes the case and the file that lies there."""
    path = result_path(output, case.key)
    return (
        path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        and row["case"] == case_digest(case)
    )


def _write(result: Image.Image, path: Path) -> dict[str, Any]:
    """Write a result whole or not at all; what the manifest says of it."""
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    result.convert("RGB").save(temporary, "PNG", compress_level=3)
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    os.replace(temporary, path)
    return {"status": "ok", "width": result.width, "height": result.height, "sha256": digest}


def _end_line(path: Path) -> None:
    """Close a line that an interruption cut off, so that the next one starts its own."""
    if path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n":
        with path.open("ab") as file:
            file.write(b"\n")


def _append(path: Path, row: dict[str, Any]) -> None:
    """One whole line in one write: several processes may append."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
