"""Work on chunks of a list of samples, on all workers: each sample once."""

import math
import pickle
from typing import Any, Protocol

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

_CHUNK_IMAGES = 512
"""What an actor takes at once, and computes again if it is lost."""


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


def over_workers(
    work: ChunkWork,
    workers: TrainingConfig | ClassificationConfig,
    label: str,
    chunk_images: int = _CHUNK_IMAGES,
) -> list[Any]:
    """Return the results of the chunks of `work`, in their order; each is computed by one actor of a pool.

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
    results: dict[int, Any] = {}
    with actors_errors():
        for row in dataset.iter_rows():
            assert row["start"] not in results, "a chunk came twice"
            results[row["start"]] = pickle.loads(row["result"])
            progress.advance(min(size, count - row["start"]))
    return [results[start] for start in starts]
