"""The same batch on a Ray cluster, through Ray Data. Needs `pip install ray[data]`.

Pictures, masks, the model and the output folder must be reachable under the same paths from every machine. The record
is kept by the process that started the batch.
"""

import itertools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varedit.editing.jobs import Job

if TYPE_CHECKING:
    from varedit.editing.batch import BatchOptions


def require_ray() -> None:
    """Raises ValueError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise ValueError('--ray needs Ray Data: pip install "ray[data]"') from None


class RayWorker:
    """One actor: a model that does chunks of jobs, see `batch.Worker`."""

    def __init__(self, folder: str, options: "BatchOptions") -> None:
        from varedit.editing.batch import Worker

        # Ray gives each actor its own processors and shows it only its own CUDA device.
        self._worker = Worker(Path(folder), replace(options, num_workers=1))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """{"chunk": JSON of jobs} -> {"records": JSON of their records}."""
        chunks = [[Job.from_json(values) for values in json.loads(text)] for text in batch["chunk"]]
        return {"records": [json.dumps(self._worker(chunk)) for chunk in chunks]}


def run_on_ray(chunks: list[list[Job]], folder: Path, options: "BatchOptions") -> Iterator[list[dict[str, Any]]]:
    """Do chunks of jobs on the cluster that `RAY_ADDRESS` names, else on a local one; the `run` of `run_batch`.

    Yields the records of each chunk as it is done.

    Raises:
        ValueError: no Ray, or the batch ended, for instance because the model does not load.
    """
    require_ray()
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield from _run(chunks, folder, options)
    finally:
        if started:
            ray.shutdown()


def _run(chunks: list[list[Job]], folder: Path, options: "BatchOptions") -> Iterator[list[dict[str, Any]]]:
    import ray
    from ray.exceptions import RayError

    # The batch has a progress bar of its own.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"chunk": json.dumps([job.to_json() for job in chunk])} for chunk in chunks]
    if options.model is not None and Path(options.model).exists():
        options = replace(options, model=str(Path(options.model).resolve()))  # actors run in folders of their own
    on_cuda = options.device is None or options.device.startswith("cuda")
    num_gpus = ray.cluster_resources().get("GPU", 0) if on_cuda else 0
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        RayWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.num_workers),
        num_cpus=processors_each(
            [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]], options.num_workers
        ),
        num_gpus=1 / math.ceil(options.num_workers / num_gpus) if num_gpus else 0,  # of one, where workers share it
        fn_constructor_kwargs={"folder": str(folder.resolve()), "options": options},
    )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["records"])
    except RayError as error:
        reason = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), "unknown")
        raise ValueError(f"the batch ended on Ray ({reason.strip()}); mend that and go on with --resume") from error


def processors_each(nodes: list[float], num_workers: int) -> float:
    """How many processors each worker can have: a whole number, or 1/2, 1/3, ... where there are more workers.

    Ray gives an actor as many threads as it reserved processors (at least one), and one processor unless told.

    Args:
        nodes: processors of each machine; those of an actor lie on one of them.
    """
    if sum(nodes) <= 0:  # a cluster that has yet to grow
        return 1
    for share in range(int(max(nodes)), 0, -1):
        if sum(int(processors / share) for processors in nodes) >= num_workers:
            return share
    return 1 / next(count for count in itertools.count(2) if sum(int(n * count) for n in nodes) >= num_workers)
