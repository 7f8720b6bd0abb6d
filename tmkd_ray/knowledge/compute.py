"""From images to knowledge, shard by shard: callables that a cluster's actors, or a plain loop, run.

    ShardPlan ──► ViewStage ──► VisualStage ──► ClipStage ──► ShardWriter, or the training

A shard travels as an Arrow table of one row, its arrays as binary values that are handed on without a
copy: whatever moves the rows can neither cut a shard nor mix two. Which images a shard holds, their
augmentation and the batches in which they pass the teachers depend on the plan alone, so a store is the
same whoever computes which shard, when, and after how many failures. Every stage notes its working time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tmkd_ray.augmentation import AugmentationConfig, augment, draw_parameters, sample_keys
from tmkd_ray.datasets.base import ImageDataset, SampleIndex
from tmkd_ray.datasets.decode import decode_batch
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_images, encode_array, encode_images
from tmkd_ray.knowledge.quantization import quantize
from tmkd_ray.knowledge.store import KnowledgeStore
from tmkd_ray.precision import autocast
from tmkd_ray.settings import Precision
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.views.base import View

VERSION = 2
"""Raised whenever the same configuration gives other knowledge; enters the store's fingerprint."""

_AUGMENTED_AT_ONCE = 64
"""Images; more would only leave the processor's cache."""


@dataclass(frozen=True)
class ShardPlan:
    """Which images a shard holds, and which variants of them.

    Attributes:
        split: of the store, `train` or `validation`; both lie in the dataset's train split.
        index: where in the dataset.
        variants: int64 [K], numbers of the augmentations; those of `validation` keep the image.
    """

    split: str
    number: int
    index: SampleIndex
    variants: np.ndarray

    def to_table(self) -> pa.Table:
        """Return the table of one row that the stages start from."""
        index = self.index
        return pa.table(
            {
                "split": [self.split],
                "number": [self.number],
                "ids": pa.array([index.ids.tolist()], pa.list_(pa.string())),
                "labels": pack(index.labels),
                "part": pack(index.part),
                "row": pack(index.row),
                "variants": pack(self.variants),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> "ShardPlan":
        assert len(table) == 1, "one shard at a time"
        index = SampleIndex(
            ids=np.array(table.column("ids")[0].as_py(), dtype=np.str_),
            labels=unpack(table, "labels", np.int64),
            part=unpack(table, "part", np.int32),
            row=unpack(table, "row", np.int64),
        )
        variants = unpack(table, "variants", np.int64)
        return cls(table.column("split")[0].as_py(), table.column("number")[0].as_py(), index, variants)


def plan_shards(split: str, index: SampleIndex, shard_rows: int, num_variants: int) -> list[ShardPlan]:
    """Cut an index into shards of `shard_rows` images, in its order, each with the first `num_variants`."""
    starts = range(0, len(index), shard_rows)
    return [
        ShardPlan(
            split,
            number,
            index.take(np.arange(start, min(start + shard_rows, len(index)))),
            np.arange(num_variants),
        )
        for number, start in enumerate(starts)
    ]


def pack(values: np.ndarray) -> pa.Array:
    """Return one binary value over the array's own memory."""
    values = np.ascontiguousarray(values)
    offsets = pa.py_buffer(np.array([0, values.nbytes], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(values)])


def unpack(table: pa.Table, name: str, dtype: Any, *shape: int) -> np.ndarray:
    """Return the array over the table's own memory: read-only."""
    return np.frombuffer(table.column(name)[0].as_buffer(), dtype=dtype).reshape(-1, *shape)


def _timed(table: pa.Table, stage: str, started: float) -> pa.Table:
    return table.append_column(f"{stage}_seconds", pa.array([time.perf_counter() - started]))


def apply_views(crops_BHWC: np.ndarray, views: dict[str, View]) -> np.ndarray:
    """Return uint8 [B, V, H, W, 3]: every crop through every view."""
    batch, *shape = crops_BHWC.shape
    pixels = np.empty((batch, len(views), *shape), dtype=np.uint8)
    for position, view in enumerate(views.values()):
        pixels[:, position] = view(crops_BHWC)
    return pixels


class ViewStage:
    """Read, decode, augment, and compute every view: CPU work.

    Appends `errors` (list of reason or null), `augmentation` int16 [N, K, P], `pixels` uint8
    [N, K, V, H, W, 3], and the images as `keep` says. Unreadable images are black until the writer sets them
    aside.

    Args:
        layouts: of each split of the store.
        augmentation: of the `train` split; `validation` keeps its images as they are.
        keep: `images`, as the layout stores them, or the `crops` that the student is to see, uint8
            [N, K, H, W, 3].
    """

    def __init__(
        self,
        dataset: ImageDataset,
        views: dict[str, View],
        layouts: dict[str, KnowledgeLayout],
        augmentation: AugmentationConfig,
        seed: int,
        keep: Literal["images", "crops"] = "images",
    ) -> None:
        self.dataset = dataset
        self.views = views
        self.layouts = layouts
        self.augmentation = augmentation
        self.seed = seed
        self.keep = keep
        cv2.setNumThreads(1)  # the pool is the parallelism

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        plan = ShardPlan.from_table(table)
        layout = self.layouts[plan.split]
        count, variants, size = len(plan.index), len(plan.variants), layout.image_size
        images_NHWC, errors = decode_batch(self.dataset, "train", plan.index)
        if self.keep == "images" and layout.image_format != "reference":
            if layout.image_format == "raw":
                stored = pack(images_NHWC)
            else:
                encoded = encode_images(images_NHWC, layout.image_format)
                # What the store will give back is what the teachers are to see.
                images_NHWC = decode_images(encoded, size, num_threads=1)
                stored = pa.array([encoded.to_pylist()], pa.list_(pa.large_binary()))
            table = table.append_column("image", stored)
        recipe = self.augmentation if plan.split == "train" else AugmentationConfig(recipe="none")
        keys_N = sample_keys(plan.index.ids, self.seed)
        parameters_NKP = draw_parameters(recipe, keys_N, plan.variants, size)
        crops_NKHWC = np.empty((count, variants, size, size, 3), dtype=np.uint8)
        pixels = np.empty((count, variants, len(self.views), size, size, 3), dtype=np.uint8)
        rows = max(1, _AUGMENTED_AT_ONCE // variants)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            crops_BHWC = augment(
                torch.from_numpy(np.repeat(images_NHWC[part], variants, axis=0)),
                torch.from_numpy(parameters_NKP[part].reshape(-1, parameters_NKP.shape[-1])),
            ).numpy()
            crops_NKHWC[part] = crops_BHWC.reshape(crops_NKHWC[part].shape)
            pixels[part] = apply_views(crops_BHWC, self.views).reshape(pixels[part].shape)
        arrays = {"augmentation": parameters_NKP, "pixels": pixels}
        if self.keep == "crops":
            arrays["crops"] = crops_NKHWC
        for name, values in arrays.items():
            table = table.append_column(name, pack(values))
        table = table.append_column("errors", pa.array([errors], pa.list_(pa.string())))
        return _timed(table, "views", started)


class _TeacherStage:
    """Run a frozen model over every view of every variant and append what it says as a column.

    Args:
        batch_size: views per forward pass.
        channels_last: memory format of weights and pixels, else channels first.
        compile: by torch.compile; the first shard waits for it.
        last: no stage after this one needs the pixels; they are dropped.
    """

    column: str
    teacher: str
    """What to call it in errors, with the section of the configuration to look at."""

    def __init__(
        self,
        model: VisualTeacher | ClipTeacher,
        layouts: dict[str, KnowledgeLayout],
        device: str,
        batch_size: int,
        precision: Precision = "float32",
        channels_last: bool = True,
        compile: bool = False,
        last: bool = False,
    ) -> None:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=memory_format)
        self.model.normalize.memory_format = memory_format
        self.layouts = layouts
        self.device = device
        self.batch_size = batch_size
        self.precision = precision
        self.last = last
        self._encode: Callable[[Tensor, int], Tensor] = torch.compile(self.encode) if compile else self.encode

    def encode(self, images_BHWC: Tensor, first_view: int) -> Tensor:
        """Return [B, width] of images that go through the views in turn, from `first_view` on."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        layout = self.layouts[table.column("split")[0].as_py()]
        pixels = unpack(table, "pixels", np.uint8, layout.image_size, layout.image_size, 3)
        outputs = []
        for start in range(0, len(pixels), self.batch_size):
            # Copied: Arrow's buffers are read-only, which torch cannot express.
            batch = torch.from_numpy(pixels[start : start + self.batch_size].copy()).to(self.device)
            with autocast(self.device, self.precision):
                outputs.append(self._encode(batch, start % len(layout.views)).float())
        values = torch.cat(outputs).cpu().numpy()
        self._check_finite(values, table, layout)
        for name, stored in self._stored(values, table, layout).items():
            table = table.append_column(name, pack(stored))
        if self.last:
            table = table.drop_columns(["pixels"])
        return _timed(table, self.column, started)

    def _check_finite(self, values: np.ndarray, table: pa.Table, layout: KnowledgeLayout) -> None:
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            where = self._where(int(np.argmin(finite)), table, layout)
            settings = "normalisation" if self.precision == "float32" else f"precision, {self.precision}"
            raise UserError(
                f"{self.teacher} returned NaN or infinite values for {where}; check its weights and {settings}"
            )

    def _stored(self, values: np.ndarray, table: pa.Table, layout: KnowledgeLayout) -> dict[str, np.ndarray]:
        if layout.dtype == "int8":
            quantized, scale = quantize(values)
            return {self.column: quantized, f"{self.column}_scale": scale}
        with np.errstate(over="ignore"):
            stored = values.astype(layout.dtype)
        fits = np.isfinite(stored).all(axis=1)
        if not fits.all():
            row = int(np.argmin(fits))
            raise UserError(
                f"{self.teacher}: values up to {np.abs(values[row]).max():.3g} for "
                f"{self._where(row, table, layout)} are too large for {layout.dtype}; "
                "set knowledge.dtype=float32"
            )
        return {self.column: stored}

    @staticmethod
    def _where(row: int, table: pa.Table, layout: KnowledgeLayout) -> str:
        plan = ShardPlan.from_table(table)
        image, rest = divmod(row, len(plan.variants) * len(layout.views))
        variant, view = divmod(rest, len(layout.views))
        return (
            f"the image {plan.index.ids[image]} (view {layout.views[view]}, variant {plan.variants[variant]})"
        )


class VisualStage(_TeacherStage):
    """Append `feature`, [N, K, V, D]."""

    column = "feature"
    teacher = "the visual teacher (teacher.visual)"
    model: VisualTeacher

    def encode(self, images_BHWC: Tensor, first_view: int) -> Tensor:
        feature_BD: Tensor = self.model(images_BHWC, first_view)
        return feature_BD


class ClipStage(_TeacherStage):
    """Append `clip_embedding`, [N, K, V, E]."""

    column = "clip_embedding"
    teacher = "CLIP (teacher.text)"
    model: ClipTeacher

    def encode(self, images_BHWC: Tensor, first_view: int) -> Tensor:
        return self.model.encode_images(images_BHWC)


STAGES = ("views", VisualStage.column, ClipStage.column, "write")
"""Names of the stages, in order, as their working times are called."""


class ShardWriter:
    """Write and commit a shard; return a row of split, number, rows, set_aside and each stage's seconds."""

    def __init__(self, store: KnowledgeStore, layouts: dict[str, KnowledgeLayout]) -> None:
        self.store = store
        self.layouts = layouts

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        plan = ShardPlan.from_table(table)
        layout = self.layouts[plan.split]
        errors = table.column("errors")[0].as_py()
        readable_N = np.array([error is None for error in errors])
        columns = {
            "id": pa.array(plan.index.ids[readable_N].tolist(), pa.string()),
            "label": pa.array(plan.index.labels[readable_N], pa.int64()),
        }
        schema, arrays = layout.schema(), layout.arrays()
        for name in schema.names:
            if name in arrays:
                dtype, shape = arrays[name]
                columns[name] = encode_array(unpack(table, name, dtype, *shape)[readable_N])
            elif name not in columns:  # encoded images, each of its own length
                files = table.column(name)[0].values.filter(pa.array(readable_N))
                columns[name] = files.cast(schema.field(name).type)
        shard = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
        set_aside = [
            {"id": sample, "reason": error}
            for sample, error in zip(plan.index.ids.tolist(), errors, strict=True)
            if error is not None
        ]
        record = self.store.write_shard(plan.split, plan.number, shard, set_aside)
        done = pa.table(
            {
                "split": [plan.split],
                "number": [plan.number],
                "rows": [record.rows],
                "set_aside": [len(set_aside)],
            }
        )
        for stage in STAGES[:-1]:
            if f"{stage}_seconds" in table.column_names:
                done = done.append_column(f"{stage}_seconds", table.column(f"{stage}_seconds"))
        return _timed(done, "write", started)
