"""Batches: many pictures and instructions, resumable, with one line of record each.

A picture is written whole or not at all, then a line is appended to results.jsonl and flushed. So after a crash at any
moment every line tells the truth, and a resumed batch does again only what has no line (or a file that no longer is
what its line says). Each result is the same, bit for bit, as that of a single edit with as many threads.
"""

import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varedit.durable import TEMPORARY, write_durably
from varedit.editing.edit import EditRequest, EditResult, Settings, apply_edits
from varedit.editing.jobs import Job, group_jobs
from varedit.editing.manifest import (
    EMBEDDING_SUFFIXES,
    make_manifest,
    read_manifest,
    save_with_manifest,
    side_file,
)
from varedit.editing.mask import image_mask
from varedit.editing.model_identity import ModelIdentity, identify, identify_folder, model_defaults
from varedit.image_processor import load_image
from varedit.pipeline import VAREditPipeline, load_pipeline

logger = logging.getLogger(__name__)

RESULTS = "results.jsonl"

Record = dict[str, Any]
Runner = Callable[[list[list[Job]], Path, "BatchOptions"], Iterator[list[Record]]]


@dataclass(frozen=True)
class BatchOptions:
    """How a batch runs. Everything here travels to other processes.

    Attributes:
        model, device, dtype: of `load_pipeline`; dtype by name. With several workers and no device, CUDA devices are
            dealt out in turn.
        settings: of every edit.
        batch_size: pictures of one schedule in one call of the pipeline.
        num_workers: processes, each with its own copy of the model.
        num_threads: PyTorch threads of each process; None is PyTorch's own choice, divided among the workers. On a CPU
            convolutions add up in another order with other numbers of threads: now and then a pixel comes out a level
            brighter or darker.
        overwrite: replace existing outputs.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    settings: Settings = field(default_factory=Settings)
    batch_size: int = 1
    num_workers: int = 1
    num_threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_workers", "num_threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")


# ---------------------------------------------------------------- the record


def _identity(path: Path) -> tuple[int, int] | Path:
    """Which file it is, however it is spelled: some file systems do not tell case apart."""
    try:
        found = path.stat()
    except OSError:  # there is none
        return path.resolve()
    return (found.st_dev, found.st_ino) if found.st_ino else path.resolve()  # some network drives number no files


def prepare_output(folder: Path, jobs: list[Job], options: BatchOptions, *, resume: bool = False) -> list[Job]:
    """Ready the output folder and tell which jobs are still to be done. An earlier record stays, see `run_batch`.

    Raises:
        ValueError: a batch was here already and neither `resume` nor `overwrite` is set; it had other settings or
            another model; a job's output exists and is not a leftover of this very job, or was changed since it was
            recorded; an output is an input; the folder cannot be written.
    """
    results = folder / RESULTS
    try:
        inputs = {_identity(path) for job in jobs for path in (job.image, job.mask) if path}
        for job in jobs:
            if _identity(folder / job.output) in inputs:
                raise ValueError(f"output {str(folder / job.output)!r} is an input of the batch; use another folder")
        folder.mkdir(parents=True, exist_ok=True)
        # An empty one is of a batch that was refused before its first picture.
        if results.exists() and results.stat().st_size and not resume and not options.overwrite:
            raise ValueError(f"{str(results)!r} exists already; pass --resume to go on, --overwrite to start anew")
        records = read_results(folder) if resume else []
        made = {(record["output"], record.get("sha256")) for record in records if record["status"] == "ok"}
        recorded = {output for output, _ in made}
        done = _finished(records, folder, jobs, options) if resume else set()
        for left in folder.rglob(TEMPORARY) if resume else ():
            left.unlink()
        todo = [job for job in jobs if job.output not in done]
        for job in todo:
            target = folder / job.output
            embedded = target.suffix.lower() in EMBEDDING_SUFFIXES
            # What was recorded is whole: where it is not a recorded file any more, somebody has changed it since.
            changed = job.output in recorded and target.exists() and (job.output, _file_sha256(target)) not in made
            for path in (target,) if embedded else (target, side_file(target)):
                if not path.exists() or options.overwrite:
                    continue
                if changed:
                    raise ValueError(
                        f"output {str(path)!r} exists already, and is not what {RESULTS} says of this job; move it "
                        "away to keep it, or pass --overwrite"
                    )
                if not (resume and _is_leftover(path, job)):
                    raise ValueError(f"output {str(path)!r} exists already; pass --overwrite, or use another folder")
    except OSError as error:
        where = f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
        raise ValueError(f"the output folder {str(folder)!r} cannot be used ({where})") from error
    return todo


def _finished(lines: list[Record], folder: Path, jobs: list[Job], options: BatchOptions) -> set[str]:
    """Outputs that the record says are done, and that still are what it says."""
    records = {record["output"]: record for record in lines}
    model = identify_folder(options.model)
    defaults = model_defaults(options.model)
    for record in (record for record in records.values() if record["status"] == "ok"):
        if not _same_settings(record["settings"], options.settings.to_json(), defaults):
            raise ValueError(f"{str(folder)!r} was begun with other settings; repeat them, or start anew elsewhere")
        # Earlier versions recorded no configuration.
        if model and (record["model"] != model.sha256 or record.get("configs", model.configs) != model.configs):
            raise ValueError(f"{str(folder)!r} was begun with another model; name that one, or start anew elsewhere")
    return {job.output for job in jobs if job.output in records and _holds(folder, job, records[job.output])}


def _same_settings(recorded: Any, asked: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Records hold the model's defaults where nothing was asked; those of earlier versions hold None there."""
    filled = {name: defaults.get(name, recorded.get(name)) if value is None else value for name, value in asked.items()}
    return recorded in (asked, filled)


def read_results(folder: Path) -> list[Record]:
    """The record of a batch, a line a job. A last line that a crash tore is cut off the file.

    Raises:
        ValueError: a damaged line; the message names it.
    """
    results = folder / RESULTS
    if not results.exists():
        return []
    content = results.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(results, "rb+") as file:
            file.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        known = isinstance(record, dict) and {"output", "status", "settings", "model"} <= set(record)
        if not known or not isinstance(record["output"], str) or not isinstance(record["settings"], dict):
            raise ValueError(f"{str(results)!r} line {number} is damaged; remove it to do its job again")
        records.append(record)
    return records


def _holds(folder: Path, job: Job, record: Record) -> bool:
    asked = job.to_json()
    same = all(record.get(name) == asked[name] for name in ("image", "instruction", "seed", "mask"))
    same = same and record.get("mask_convention", "white") == job.mask_convention  # not in earlier records
    if record["status"] != "ok" or not same:
        return False
    try:
        return _file_sha256(folder / job.output) == record.get("sha256")
    except OSError:
        return False


def _is_leftover(target: Path, job: Job) -> bool:
    """Whether a file was written for this job by a batch that ended before it could record it."""
    try:
        manifest = read_manifest(target)
    except ValueError:
        return False
    if manifest is None:
        return False
    made = (manifest.instruction, manifest.seed, manifest.input.get("name"))
    return made == (job.instruction, job.seed, job.image.name)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- running


def run_batch(
    jobs: list[Job],
    folder: Path,
    options: BatchOptions | None = None,
    *,
    anew: bool = False,
    on_result: Callable[[Record], None] | None = None,
    run: "Runner | None" = None,
) -> list[Record]:
    """Do the jobs and record each.

    Args:
        jobs: of `read_jobs`, less what `prepare_output` found done.
        anew: replace the record of an earlier batch (else lines are added to it), but not before there is something to
            record: a model that does not load must not cost it. Until then its lines may tell of pictures that are
            replaced already.
        on_result: told each record as it is made.
        run: where chunks of jobs are done; None is this machine, `ray_batch.run_on_ray` a cluster.

    Returns:
        The records, one a job, in the order of completion: job, status "ok" or "failed", error, sha256 of the file.

    Raises:
        ValueError: the model does not load, or the record cannot be written, for instance because the disk is full.
    """
    options = options or BatchOptions()
    chunks = group_jobs(jobs, options.settings.size or 512, options.batch_size)
    records: list[Record] = []
    _append(folder / RESULTS, b"")
    for done in (run or run_here)(chunks, folder, options):
        for record in done:
            line = json.dumps(record).encode() + b"\n"
            _append(folder / RESULTS, line, anew=anew and not records)
            records.append(record)
            if on_result:
                on_result(record)
    return records


def _append(results: Path, line: bytes, *, anew: bool = False) -> None:
    try:
        if anew:
            write_durably(results, line)
            return
        with open(results, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{str(results)!r} cannot be written ({error.strerror}); mend that and go on with --resume"
        ) from error


def run_here(chunks: list[list[Job]], folder: Path, options: BatchOptions) -> Iterator[list[Record]]:
    """Do the chunks in this process, or in `num_workers` others.

    Raises:
        ValueError: the model does not load, or the processes die whatever they are given.
    """
    if options.num_workers == 1:
        worker = Worker(folder, options)
        for chunk in chunks:
            yield worker(chunk)
        return
    waiting, num_done = deque(chunks), 0
    while waiting:
        suspects = []
        for chunk, records in _in_processes(waiting, options.num_workers, folder, options):
            if records is None:
                suspects.append(chunk)
            else:
                num_done += 1
                yield records
        # One process that dies takes the others with it. Who was to blame is found by doing each again alone.
        alone = [pair for chunk in suspects for pair in _in_processes(deque([chunk]), 1, folder, options)]
        num_done += sum(records is not None for _, records in alone)
        if suspects and not num_done:
            raise ValueError("the worker processes die, perhaps for lack of memory; use fewer --workers")
        for chunk, records in alone:
            reason = "its process died, perhaps for lack of memory; --resume tries again"
            yield records or [_record(job, options) | _failure(reason) for job in chunk]


def _in_processes(
    waiting: deque[list[Job]], num_workers: int, folder: Path, options: BatchOptions
) -> Iterator[tuple[list[Job], list[Record] | None]]:
    """Takes chunks and gives them with their records.

    When a process dies, it ends: the chunks begun by then come with None, the others are left in `waiting`.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    ranks = context.SimpleQueue()
    for rank in range(num_workers):
        ranks.put(rank)
    running: dict[Future, list[Job]] = {}
    with ProcessPoolExecutor(num_workers, context, _start_worker, (ranks, folder, options)) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    running[pool.submit(_work, waiting[0])] = waiting[0]
                    waiting.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    records = future.result()
                    yield running.pop(future), records
        except BrokenProcessPool:
            yield from ((chunk, None) for chunk in running.values())


_worker: "Worker | Exception | None" = None  # of a worker process: its worker, or why it has none


def _start_worker(ranks: Any, folder: Path, options: BatchOptions) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _worker = Worker(folder, options, ranks.get())
    except Exception as error:  # noqa: BLE001 - raised by the first piece of work: here it would break the pool
        _worker = error


def _exit_with_parent() -> None:
    """A pool's processes wait for work for ever when the process that started them is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(chunk: list[Job]) -> list[Record]:
    if isinstance(_worker, Exception):
        raise _worker
    assert _worker is not None
    return _worker(chunk)


class Worker:
    """Holds a model and does chunks of jobs; one a process."""

    def __init__(self, folder: Path, options: BatchOptions, rank: int = 0) -> None:
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        threads = options.num_threads or max(1, torch.get_num_threads() // options.num_workers)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        device = options.device
        if device is None and options.num_workers > 1 and torch.cuda.is_available():
            device = f"cuda:{rank % torch.cuda.device_count()}"
        dtype = getattr(torch, options.dtype) if options.dtype else None
        self.folder = folder
        self.options = options
        self.pipeline: VAREditPipeline = load_pipeline(options.model, device, dtype)
        self.model: ModelIdentity = identify(self.pipeline)
        # What would fail picture by picture ends the batch before it begins.
        self.settings = options.settings.resolved(self.pipeline)
        self.pipeline.check_text_encoder()

    def __call__(self, chunk: list[Job]) -> list[Record]:
        """The records of a chunk. What fails, fails by itself, whatever the reason: else a batch would never get by."""
        records, ready = [], []
        for job in chunk:
            try:
                ready.append((job, _request(job)))
            except Exception as error:  # noqa: BLE001 - see above
                records.append(self._failed(job, error))
        try:
            results = apply_edits(self.pipeline, [request for _, request in ready], self.options.settings)
            return records + [self._save(job, result) for (job, _), result in zip(ready, results)]
        except Exception as error:  # noqa: BLE001 - see above
            if len(ready) == 1:
                return records + [self._failed(ready[0][0], error)]
            logger.info("%d pictures did not run together (%s): one by one", len(ready), error)
        # The others are not to blame. Out here, where nothing holds what the failed call had in memory any more.
        return records + [record for job, _ in ready for record in self([job])]

    def _save(self, job: Job, result: EditResult) -> Record:
        mask_name = job.mask.name if job.mask else None
        try:
            manifest = make_manifest(
                result, self.pipeline, input_name=job.image.name, mask_name=mask_name, model=self.model
            )
            target = self.folder / job.output
            target.parent.mkdir(parents=True, exist_ok=True)
            # What was here and must not be replaced was refused before the start: see prepare_output.
            save_with_manifest(result.pixels, target, manifest, result.like, overwrite=True)
            done = {"status": "ok", "error": None, "change": manifest.change, "sha256": _file_sha256(target)}
            return self._record(job) | done
        except Exception as error:  # noqa: BLE001 - see above
            return self._failed(job, error)

    def _failed(self, job: Job, error: Exception) -> Record:
        logger.debug("%s failed", job.output, exc_info=error)
        return self._record(job) | _failure(error)

    def _record(self, job: Job) -> Record:
        made_by = {"model": self.model.sha256, "configs": self.model.configs}
        return _record(job, self.options) | {"settings": self.settings.to_json()} | made_by


def _request(job: Job) -> EditRequest:
    source = load_image(job.image)
    mask = None if job.mask is None else image_mask(job.mask, (source.width, source.height), job.mask_convention)
    return EditRequest(source, job.instruction, job.seed, mask)


def _record(job: Job, options: BatchOptions) -> Record:
    return job.to_json() | {"settings": options.settings.to_json(), "model": None}


def _failure(error: Exception | str) -> Record:
    reason = " ".join(str(error).split())
    if not isinstance(error, (str, ValueError)):  # not in words for the user
        reason = f"{type(error).__name__}: {reason}"
    return {"status": "failed", "error": reason, "change": None, "sha256": None}
