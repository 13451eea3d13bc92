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
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varedit.evaluation.cases import Benchmark, Case, picture_digest, read_picture
from varedit.evaluation.editors import EditFailed, Editor

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
    shard: tuple[int, int] = (0, 1),
    on_case: Callable[[int], None] | None = None,
) -> Generated:
    """Edit every case that has no result yet.

    Args:
        seed: the run's; each case gets its own from it and its key, so order and shards do not matter.
        workers: threads, for editors that allow it (endpoints, commands).
        shard: (i, n): only chains i, i + n, ...; other processes do the rest.
        on_case: called with the number of cases gone through.

    Raises:
        ValueError: the folder holds a run of something else.
    """
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    _check_run(output, {
        "benchmark": benchmark.name, "settings": benchmark.settings, "editor": editor.settings, "seed": seed,
    })  # fmt: skip
    finished = read_manifest(output)
    _end_line(output / MANIFEST)
    chains = list(_chains(benchmark.cases))[shard[0] :: shard[1]]
    lock, failed = threading.Lock(), dict[str, str]()
    counts = {"done": 0, "skipped": 0}

    def work(chain: list[Case]) -> None:
        again = False  # a turn that follows a new result has to be done again too
        for case in chain:
            row = finished.get(case.key)
            again = again or row is None or row["status"] != "ok" or not _holds(output, case, row)
            if again or row is None:
                row = _one(case, editor, output, case_seed(seed, case.key))
                with lock:
                    _append(output / MANIFEST, row)
                    counts["done"] += row["status"] == "ok"
            else:
                counts["skipped"] += 1
            with lock:
                if row["status"] != "ok":
                    failed[case.key] = row["error"]
                if on_case is not None:
                    on_case(counts["done"] + counts["skipped"] + len(failed))

    if workers > 1 and editor.concurrent:
        with ThreadPoolExecutor(workers) as pool:
            for future in as_completed([pool.submit(work, chain) for chain in chains]):
                future.result()
    else:
        for chain in chains:
            work(chain)
    return Generated(**counts, failed=failed)


def case_seed(seed: int, key: str) -> int:
    """The seed of one case: a function of the run's seed and the key."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4]) >> 1


def case_digest(case: Case) -> str:
    """Hash of what a case asks, its source's pixels included."""
    asked = [case.key, case.instruction, case.edit_type, case.source_caption, case.target_caption, case.previous]
    text = json.dumps([*asked, picture_digest(read_picture(case.source))], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _one(case: Case, editor: Editor, output: Path, seed: int) -> dict[str, Any]:
    """Edit one case and write its result; the manifest line."""
    row: dict[str, Any] = {"key": case.key, "status": "failed", "seed": seed}
    started = time.monotonic()
    try:
        row["case"] = case_digest(case)
        source = Image.fromarray(_source(case, output))
        started = time.monotonic()
        result = editor.edit(case, source, seed)
    except (EditFailed, ValueError) as error:
        return row | {"error": str(error), "seconds": round(time.monotonic() - started, 4)}
    row |= {"seconds": round(time.monotonic() - started, 4), "peak_memory_mib": peak_memory_mib()}
    path = result_path(output, case.key)
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    result.convert("RGB").save(temporary, "PNG", compress_level=3)
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    os.replace(temporary, path)
    return row | {"status": "ok", "width": result.width, "height": result.height, "sha256": digest}


def _source(case: Case, output: Path) -> np.ndarray:
    """What is edited: the case's source, or the result of the turn before."""
    if case.previous is None:
        return read_picture(case.source)
    path = result_path(output, case.previous)
    if not path.is_file():
        raise EditFailed(f"the turn before, {case.previous}, has no result")
    return read_picture(path)


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


def peak_memory_mib() -> int:
    """The most memory this process held so far: of the GPU where one is used, else of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
