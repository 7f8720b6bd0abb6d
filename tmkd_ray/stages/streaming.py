"""What flows into the training workers: from views and teachers beside the training, or from a store."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train.collective
import torch

from tmkd_ray.config import PoolConfig, TrainingConfig
from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.knowledge import KnowledgeLayout, KnowledgeStore
from tmkd_ray.knowledge.compute import ViewStage
from tmkd_ray.knowledge.node_copy import map_store
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.pipeline import (
    actors_errors,
    knowledge_layouts,
    plan_dataset,
    teacher_stages,
    view_stage,
    view_stage_options,
    wait_for_pools,
)
from tmkd_ray.stages.throughput import StageTimes, pool_sizes
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.training.loader import Batch, BatchSource
from tmkd_ray.training.mapped import StoredRows
from tmkd_ray.training.streamed import Piece, StoredPieceStage, StreamedViewStage, StreamPlan, piece_batches

_MAX_PIECES = 2000
"""Of one pipeline: starting one costs seconds, and so do very many pieces."""


class StreamedSource(BatchSource):
    """Pieces that the cluster's actors make just before the workers need them.

    One pipeline serves several epochs, so that the next epoch's images are on their way while this one is
    validated. All workers construct this and iterate it together.

    Args:
        index: the images to train on.
        layout: of the `train` split.
        training: how; nothing is computed beyond its last epoch.
    """

    def __init__(
        self,
        index: SampleIndex,
        layout: KnowledgeLayout,
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.ids = index.ids
        self.class_labels = index.labels
        self.index = index
        self.layout = layout
        self.training = training
        self.device = device
        self._arriving: Iterator[pa.Table] | None = None
        self._said: set[str] = set()
        self._times: StageTimes | None = None
        """Of the stages that noted their working time on what this worker received, until it was said."""

    @abstractmethod
    def pipeline(self, dataset: ray.data.Dataset, plan: StreamPlan) -> ray.data.Dataset:
        """Map pieces, a block each, to what `piece_batches` reads."""

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        bytes_per_image = len(self.layout.views) * self.layout.image_size**2 * 3
        plan = StreamPlan(self.index, seed, batch_size, world_size, bytes_per_image)
        step = first_step
        while step < plan.num_steps:
            table = None if self._arriving is None else next(self._arriving, None)
            if table is None:
                self._arriving = self._start(plan, epoch, step, rank)
                table = next(self._arriving)
            piece = Piece.from_table(table)
            if self._times is not None:
                noted = table.select([name for name in table.column_names if name.endswith("_seconds")])
                self._times.add(noted.to_pylist()[0], piece.num_steps * plan.local_size)
            assert (piece.epoch, piece.rank) == (epoch, rank), (piece, epoch, rank)
            assert piece.first_step <= step < piece.first_step + piece.num_steps, (piece, step)
            yield from piece_batches(table, self.layout, self.device, self._say_once, step)
            step = piece.first_step + piece.num_steps
        if self._times is not None:  # after the first epoch; the others are alike
            for line in self._times.lines():
                self.say(line)
            self._times = None

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def _start(self, plan: StreamPlan, epoch: int, first_step: int, rank: int) -> Iterator[pa.Table]:
        """Start a pipeline from a step on; rank 0 does it for all."""
        splits = None
        if rank == 0:
            pieces = plan.pieces(epoch, first_step)
            for later in range(epoch + 1, self.training.epochs):
                if len(pieces) + len(more := plan.pieces(later)) > _MAX_PIECES:
                    break
                pieces += more
            context = ray.data.DataContext.get_current()
            # Pieces arrive in their order, the workers taking turns.
            context.execution_options.preserve_order = True
            # What the training workers hold is not there for the pools.
            context.execution_options.exclude_resources = ray.data.ExecutionResources(
                cpu=plan.world_size * self.training.num_cpus_per_worker,
                gpu=plan.world_size * self._gpu_of_worker(),
            )
            dataset = plan_dataset([piece.to_table() for piece in pieces])
            splits = self.pipeline(dataset, plan).streaming_split(plan.world_size, equal=False)
        if plan.world_size > 1:
            splits = ray.train.collective.broadcast_from_rank_zero(splits)
        assert splits is not None
        return self._tables(splits[rank])

    @staticmethod
    def _gpu_of_worker() -> float:
        held: float = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
        return held

    @staticmethod
    def _tables(split: Any) -> Iterator[pa.Table]:
        with actors_errors():
            yield from split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


class _ViewActor(StreamedViewStage):
    """A member of the view pool; the plan lies in the cluster's object store."""

    def __init__(self, plan: list[Any], options: tuple[Any, ...]) -> None:
        super().__init__(ray.get(plan[0]), ViewStage(*(*options, "crops")))


class StreamedKnowledge(StreamedSource):
    """Fresh augmentation every epoch, seen by the cluster's frozen teachers just before the student sees it."""

    def __init__(
        self,
        experiment: Experiment,
        index: SampleIndex,
        visual: VisualTeacher,
        clip: ClipTeacher | None,
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.layouts = knowledge_layouts(experiment.config, visual, clip)
        super().__init__(index, self.layouts["train"], training, device)
        self.experiment = experiment
        self.visual, self.clip = visual, clip
        self._times = StageTimes(pool_sizes(experiment.config.knowledge))

    def pipeline(self, dataset: ray.data.Dataset, plan: StreamPlan) -> ray.data.Dataset:
        options = view_stage_options(self.experiment, self.layouts)
        return teacher_stages(
            dataset,
            self.experiment.config,
            _ViewActor,
            ([ray.put(plan)], options),
            self.visual,
            self.clip,
            self.layouts,
            [self._gpu_of_worker()] * plan.world_size,
        )


class _ReaderActor(StoredPieceStage):
    """A reader of the store; it maps its machine's copy."""

    def __init__(self, plan: list[Any], store: str, root: str | None, seed: int, positions: list[Any]) -> None:
        arrays = map_store(KnowledgeStore(store), "train", root)
        super().__init__(ray.get(plan[0]), StoredRows(arrays, seed, ray.get(positions[0])))


class StreamedStore(StreamedSource):
    """A store read by actors of the cluster: the same batches as from memory.

    Args:
        rows: the store's rows to train on, mapped.
        pool: of the readers.
        root: of the machines' copies.
    """

    def __init__(
        self,
        store: KnowledgeStore,
        rows: StoredRows,
        pool: PoolConfig,
        root: str | None,
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        count = len(rows.ids)
        index = SampleIndex(rows.ids, rows.labels, np.zeros(count, np.int32), rows.positions)
        super().__init__(index, rows.arrays.layout, training, device)
        self.store, self.rows, self.pool, self.root = store, rows, pool, root

    def pipeline(self, dataset: ray.data.Dataset, plan: StreamPlan) -> ray.data.Dataset:
        arguments = (
            [ray.put(plan)],
            self.store.path,
            self.root,
            self.training.seed,
            [ray.put(self.rows.positions)],
        )
        wait_for_pools([("knowledge.views", self.pool, 0.0, "views")])
        return view_stage(dataset, _ReaderActor, arguments, self.pool)
