"""From images to knowledge, shard by shard: callables that a cluster's actors, or a plain loop, run.

    ShardPlan ──► ViewStage ──► VisualStage ──► ClipStage ──► ShardWriter

A shard travels as an Arrow table of one row, its arrays as binary values that are handed on without a
copy: whatever moves the rows can neither cut a shard nor mix two. Which images a shard holds, their
augmentation and the batches in which they pass the teachers depend on the plan alone, so a store is the
same whoever computes which shard, when, and after how many failures.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

from tmkd_ray.augmentation import AugmentationConfig, apply_crop, draw_parameters, sample_keys
from tmkd_ray.datasets.base import ImageDataset, SampleIndex
from tmkd_ray.datasets.decode import decode_batch
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import KnowledgeLayout, encode_array
from tmkd_ray.knowledge.store import KnowledgeStore
from tmkd_ray.precision import autocast
from tmkd_ray.settings import Precision
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.views.base import View

VERSION = 1
"""Raised whenever the same configuration gives other knowledge; enters the store's fingerprint."""


@dataclass(frozen=True)
class ShardPlan:
    """Which images a shard holds.

    Attributes:
        split: of the store, `train` or `validation`; both lie in the dataset's train split.
        index: where in the dataset.
    """

    split: str
    number: int
    index: SampleIndex

    def to_table(self) -> pa.Table:
        """Return the table of one row that the stages start from."""
        index = self.index
        return pa.table(
            {
                "split": [self.split],
                "number": [self.number],
                "ids": pa.array([index.ids.tolist()], pa.list_(pa.string())),
                "labels": _pack(index.labels),
                "part": _pack(index.part),
                "row": _pack(index.row),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> "ShardPlan":
        assert len(table) == 1, "one shard at a time"
        index = SampleIndex(
            ids=np.array(table.column("ids")[0].as_py(), dtype=np.str_),
            labels=_unpack(table, "labels", np.int64),
            part=_unpack(table, "part", np.int32),
            row=_unpack(table, "row", np.int64),
        )
        return cls(table.column("split")[0].as_py(), table.column("number")[0].as_py(), index)


def plan_shards(split: str, index: SampleIndex, shard_rows: int) -> list[ShardPlan]:
    """Cut an index into shards of `shard_rows` images, in its order."""
    starts = range(0, len(index), shard_rows)
    return [
        ShardPlan(split, number, index.take(np.arange(start, min(start + shard_rows, len(index)))))
        for number, start in enumerate(starts)
    ]


def _pack(values: np.ndarray) -> pa.Array:
    """Return one binary value over the array's own memory."""
    values = np.ascontiguousarray(values)
    offsets = pa.py_buffer(np.array([0, values.nbytes], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(values)])


def _unpack(table: pa.Table, name: str, dtype: Any, *shape: int) -> np.ndarray:
    """Return the array over the table's own memory: read-only."""
    return np.frombuffer(table.column(name)[0].as_buffer(), dtype=dtype).reshape(-1, *shape)


class ViewStage:
    """Read, decode, augment, and compute every view: CPU work.

    Appends `errors` (list of reason or null), `image` uint8 [N, H, W, 3], `augmentation` int16 [N, K, 5] and
    `pixels` uint8 [N, K, V, H, W, 3]. Unreadable images are black until the writer sets them aside.

    Args:
        layouts: of each split of the store.
        augmentation: of the `train` split; `validation` keeps its images as they are.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        views: dict[str, View],
        layouts: dict[str, KnowledgeLayout],
        augmentation: AugmentationConfig,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.views = views
        self.layouts = layouts
        self.augmentation = augmentation
        self.seed = seed
        cv2.setNumThreads(1)  # the pool is the parallelism

    def __call__(self, table: pa.Table) -> pa.Table:
        plan = ShardPlan.from_table(table)
        layout = self.layouts[plan.split]
        count, variants, size = len(plan.index), layout.num_variants, layout.image_size
        images_NHWC, errors = decode_batch(self.dataset, "train", plan.index)
        recipe = self.augmentation if plan.split == "train" else AugmentationConfig(recipe="none")
        keys_N = sample_keys(plan.index.ids, self.seed)
        parameters_NKP = draw_parameters(recipe, keys_N, np.arange(variants), size)
        crops = apply_crop(
            np.repeat(images_NHWC, variants, axis=0), parameters_NKP.reshape(count * variants, -1)
        )
        pixels = np.empty((count, variants, len(self.views), size, size, 3), dtype=np.uint8)
        for position, view in enumerate(self.views.values()):
            pixels[:, :, position] = view(crops).reshape(count, variants, size, size, 3)
        table = table.append_column("errors", pa.array([errors], pa.list_(pa.string())))
        arrays = {"image": images_NHWC, "augmentation": parameters_NKP, "pixels": pixels}
        for name, values in arrays.items():
            table = table.append_column(name, _pack(values))
        return table


class _TeacherStage:
    """Run a frozen model over every view of every variant and append what it says as a column."""

    column: str

    def __init__(
        self,
        model: torch.nn.Module,
        layouts: dict[str, KnowledgeLayout],
        device: str,
        batch_size: int,
        precision: Precision = "float32",
    ) -> None:
        self.model = model.to(device)
        self.layouts = layouts
        self.device = device
        self.batch_size = batch_size
        self.precision = precision

    def encode(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        layout = self.layouts[table.column("split")[0].as_py()]
        pixels = _unpack(table, "pixels", np.uint8, layout.image_size, layout.image_size, 3)
        outputs = []
        for start in range(0, len(pixels), self.batch_size):
            # Copied: Arrow's buffers are read-only, which torch cannot express.
            batch = torch.from_numpy(pixels[start : start + self.batch_size].copy()).to(self.device)
            with autocast(self.device, self.precision):
                output = self.encode(batch)
            outputs.append(self._stored(output.cpu().numpy(), layout.dtype))
        return table.append_column(self.column, _pack(np.concatenate(outputs)))

    def _stored(self, values: np.ndarray, dtype: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"{self.column}: values up to {np.abs(values).max():.3g} are too large for {dtype}; "
                "set knowledge.dtype=float32"
            )
        return stored


class VisualStage(_TeacherStage):
    """Append `feature`, [N, K, V, D]."""

    column = "feature"
    model: VisualTeacher

    def encode(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        feature_BD: torch.Tensor = self.model(images_BHWC)
        return feature_BD


class ClipStage(_TeacherStage):
    """Append `clip_embedding`, [N, K, V, E]."""

    column = "clip_embedding"
    model: ClipTeacher

    def encode(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        embedding_BE = self.model.encode_images(images_BHWC)
        if not torch.isfinite(embedding_BE).all():
            raise UserError("CLIP returned NaN or infinite embeddings; check teacher.text.model")
        return embedding_BE


class ShardWriter:
    """Write and commit a shard without its pixels; return a row of split, number, rows, set_aside."""

    def __init__(self, store: KnowledgeStore, layouts: dict[str, KnowledgeLayout]) -> None:
        self.store = store
        self.layouts = layouts

    def __call__(self, table: pa.Table) -> pa.Table:
        plan = ShardPlan.from_table(table)
        layout = self.layouts[plan.split]
        errors = table.column("errors")[0].as_py()
        readable_N = np.array([error is None for error in errors])
        columns = [
            pa.array(plan.index.ids[readable_N].tolist(), pa.string()),
            pa.array(plan.index.labels[readable_N], pa.int64()),
        ]
        for name, (dtype, shape) in layout.arrays().items():
            columns.append(encode_array(_unpack(table, name, dtype, *shape)[readable_N]))
        shard = pa.Table.from_arrays(columns, schema=layout.schema())
        set_aside = [
            {"id": sample, "reason": error}
            for sample, error in zip(plan.index.ids.tolist(), errors, strict=True)
            if error is not None
        ]
        record = self.store.write_shard(plan.split, plan.number, shard, set_aside)
        return pa.table(
            {
                "split": [plan.split],
                "number": [plan.number],
                "rows": [record.rows],
                "set_aside": [len(set_aside)],
            }
        )
