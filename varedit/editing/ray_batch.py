"""The same batch on a Ray cluster, through Ray Data. Needs `pip install ray[data]`.

Pictures, masks, the model and the output folder must be reachable under the same paths from every machine. The record
is kept by the process that started the batch.
"""

import json
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
        raise ValueError('--ray needs Ray Data; install it with: pip install "varedit[ray]"') from None


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
    """
    require_ray()
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    rows = [{"chunk": json.dumps([_absolute(job).to_json() for job in chunk])} for chunk in chunks]
    on_cuda = options.device is None or options.device.startswith("cuda")
    has_cuda = on_cuda and ray.cluster_resources().get("GPU", 0) >= options.num_workers
    model = (
        options.model
        if options.model is None or not Path(options.model).exists()
        else str(Path(options.model).resolve())
    )
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        RayWorker,
        batch_size=1,
        concurrency=options.num_workers,
        num_gpus=1 if has_cuda else 0,
        fn_constructor_kwargs={"folder": str(folder.resolve()), "options": replace(options, model=model)},
    )
    paths = {str(_absolute(job).image): str(job.image) for chunk in chunks for job in chunk}
    masks = {str(_absolute(job).mask): str(job.mask) for chunk in chunks for job in chunk if job.mask}
    for row in dataset.iter_rows():
        yield [
            record | {"image": paths[record["image"]], "mask": masks.get(record["mask"])}
            for record in json.loads(row["records"])
        ]


def _absolute(job: Job) -> Job:
    """Actors run in folders of their own."""
    return replace(job, image=job.image.resolve(), mask=job.mask and job.mask.resolve())
