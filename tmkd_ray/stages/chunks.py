"""Work on chunks of a list of samples, on all workers: each sample once; the results stay on the cluster."""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
import torch
from ray import ObjectRef

from tmkd_ray.config import TrainingConfig
from tmkd_ray.config.transfer import ClassificationConfig
from tmkd_ray.stages.evaluation import worker_pool
from tmkd_ray.stages.pipeline import actors_errors, plan_dataset
from tmkd_ray.stages.progress import Rate
from tmkd_ray.stages.room import node_mark

_CHUNK_IMAGES = 512
"""What an actor takes at once, and computes again if it is lost."""


Key = TypeVar("Key")


class ChunkWork(Protocol):
    """Something to do with chunks of a list of samples; it pickles, with its networks."""

    def __len__(self) -> int: ...

    def to(self, device: str | torch.device) -> "ChunkWork": ...

    def __call__(self, positions: np.ndarray) -> Any:
        """Return the chunk's result, picklable."""


class _ChunkActor:
    """A member of the pool; the work lies in the cluster's object store."""

    def __init__(self, work: list[ObjectRef], device: str) -> None:
        loaded: ChunkWork = ray.get(work[0])
        self.work = loaded.to(device)

    def __call__(self, table: pa.Table) -> pa.Table:
        start, stop = table["start"][0].as_py(), table["stop"][0].as_py()
        result = pickle.dumps(self.work(np.arange(start, stop)))
        return pa.table({"start": [start], "result": pa.array([result], pa.large_binary())})


@dataclass(frozen=True)
class ChunkResults:
    """The results of all chunks of a work; they lie in the cluster's object store.

    Attributes:
        blocks: one for each chunk, in any order.
        workers: what the tasks on them ask for.
        gpus: of each such task.
    """

    blocks: Sequence[ObjectRef]
    workers: TrainingConfig | ClassificationConfig
    gpus: float

    def reduce(self, function: Callable[..., Any], *arguments: Any) -> ObjectRef:
        """Start a task that calls `function(results, *arguments)`, the results in the chunks' order."""
        return self.start(_reduced, function, list(self.blocks), *arguments)

    def start(self, function: Callable[..., Any], *arguments: Any) -> ObjectRef:
        """Start a task with a worker's resources, so that a small head does none of it.

        It gets references as what they stand for.
        """
        remote: Any = ray.remote(
            num_cpus=self.workers.num_cpus_per_worker, num_gpus=self.gpus, resources=node_mark("train")
        )(function)
        reference: ObjectRef = remote.remote(*arguments)
        return reference


def finished(tasks: Mapping[Key, ObjectRef]) -> dict[Key, Any]:
    """Wait for tasks and return what they returned.

    Raises:
        UserError: what one of them raised.
    """
    with actors_errors():
        return dict(zip(tasks, ray.get(list(tasks.values())), strict=True))


def task_device() -> str:
    """Return where the task that asks is to compute: on a GPU if it was given one."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


def _reduced(function: Callable[..., Any], blocks: list[ObjectRef], *arguments: Any) -> Any:
    rows = [row for table in ray.get(blocks) for row in table.to_pylist()]
    starts = [row["start"] for row in rows]
    assert len(set(starts)) == len(starts), "a chunk came twice"
    rows.sort(key=lambda row: row["start"])
    return function([pickle.loads(row["result"]) for row in rows], *arguments)


def over_workers(
    work: ChunkWork,
    workers: TrainingConfig | ClassificationConfig,
    label: str,
    chunk_images: int = _CHUNK_IMAGES,
) -> ChunkResults:
    """Return the results of the chunks of `work`; each is computed by one actor of a pool.

    Raises:
        UserError: what an actor raised.
    """
    count = len(work)
    # Small data too is shared among all workers.
    size = max(1, min(chunk_images, math.ceil(count / workers.num_workers)))
    starts = range(0, count, size)
    tables = [pa.table({"start": [start], "stop": [min(start + size, count)]}) for start in starts]
    pool, device = worker_pool(workers, len(tables), label)
    dataset = plan_dataset(tables).map_batches(
        _ChunkActor, fn_constructor_args=([ray.put(work)], device), **pool
    )
    progress = Rate(label, count, "images")
    blocks: list[ObjectRef] = []
    num_chunks = 0
    with actors_errors():
        for bundle in dataset.iter_internal_ref_bundles():
            blocks += bundle.block_refs
            num_chunks += bundle.num_rows() or 0
            progress.advance(min(num_chunks * size, count) - progress.done)
    assert num_chunks == len(tables), "a chunk is missing"
    return ChunkResults(blocks, workers, pool["num_gpus"] or 0.0)
