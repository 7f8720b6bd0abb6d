"""Which images flow to which worker at which step, without what moves them: for all that streams.

A piece is what one worker needs for a few steps in a row. Pieces are numbered as they are consumed, the workers
taking turns; each travels, like a shard, as an Arrow table of one row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.compute import ShardPlan, ViewStage, pack, unpack
from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.knowledge.quantization import dequantize
from tmkd_ray.training.loader import Batch, epoch_order, global_batch_size
from tmkd_ray.training.mapped import StoredRows
from tmkd_ray.types import Knowledge

_PIECE_BYTES = 16 * 2**20
"""Of views in a piece: large beside the price of moving a row, small beside the memory of a worker."""


@dataclass(frozen=True)
class Piece:
    """The steps `first_step` … `first_step + num_steps - 1` of an epoch, for the worker `rank`."""

    epoch: int
    first_step: int
    num_steps: int
    rank: int

    def to_table(self) -> pa.Table:
        return pa.table({name: [value] for name, value in vars(self).items()})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Piece":
        return cls(*(table.column(name)[0].as_py() for name in ("epoch", "first_step", "num_steps", "rank")))


@dataclass(frozen=True)
class StreamPlan:
    """The order of a training's images, the same as that of a resident loader.

    Attributes:
        index: the images to train on.
        seed: of the epochs' orders, `training.seed`.
        batch_size: of all workers together.
        bytes_per_image: of its views, uncompressed.
    """

    index: SampleIndex
    seed: int
    batch_size: int
    world_size: int
    bytes_per_image: int

    @property
    def local_size(self) -> int:
        """Images of a step on one worker."""
        return global_batch_size(len(self.index), self.batch_size, self.world_size) // self.world_size

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return len(self.index) // (self.local_size * self.world_size)

    def pieces(self, epoch: int, first_step: int = 0) -> list[Piece]:
        """Return the pieces of an epoch, from the one of a step on, in the order in which they are consumed.

        Where an epoch is entered does not change how it is cut.
        """
        length = max(1, _PIECE_BYTES // (self.local_size * self.bytes_per_image))
        return [
            Piece(epoch, start, min(length, self.num_steps - start), rank)
            for start in range(first_step // length * length, self.num_steps, length)
            for rank in range(self.world_size)
        ]

    def rows(self, piece: Piece) -> np.ndarray:
        """Return int64 positions of the piece's images in the training set, step after step."""
        order_N = _order_of(len(self.index), self.seed, piece.epoch)
        size = self.local_size * self.world_size
        steps = order_N[: self.num_steps * size].reshape(self.num_steps, self.world_size, self.local_size)
        chosen: np.ndarray = steps[piece.first_step : piece.first_step + piece.num_steps, piece.rank].reshape(
            -1
        )
        return chosen


@functools.lru_cache(maxsize=2)
def _order_of(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return an epoch's permutation, which all of its pieces need: drawn for each, it would outweigh them."""
    order: np.ndarray = epoch_order(num_samples, seed, epoch).numpy()
    return order


class StreamedViewStage:
    """Turn a piece into its images' crops and views: epoch `t` shows variant `t`.

    Args:
        views: computes the views of a shard, keeping the crops.
    """

    def __init__(self, plan: StreamPlan, views: ViewStage) -> None:
        self.plan = plan
        self.views = views

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = self.plan.rows(Piece.from_table(table))
        variants = np.array([table.column("epoch")[0].as_py()])
        shard = ShardPlan("train", table.column("first_step")[0].as_py(), self.plan.index.take(rows), variants)
        streamed = self.views(shard.to_table()).append_column("rows", pack(rows))
        for name in table.column_names:
            streamed = streamed.append_column(name, table.column(name))
        return streamed


class StoredPieceStage:
    """Turn a piece into what a store holds of its images: crops and the teachers' vectors."""

    def __init__(self, plan: StreamPlan, rows: StoredRows) -> None:
        self.plan = plan
        self.rows = rows

    def __call__(self, table: pa.Table) -> pa.Table:
        piece = Piece.from_table(table)
        rows = self.plan.rows(piece)
        shard = ShardPlan("train", piece.first_step, self.plan.index.take(rows), np.array([piece.epoch]))
        arrays = {"rows": rows, "crops": self.rows.crops(rows, piece.epoch)}
        for name in ("feature", "clip_embedding"):
            values = self.rows.vectors(name, rows, piece.epoch)
            if values is not None:
                arrays[name] = values
        streamed = shard.to_table()
        for name, values in arrays.items():
            streamed = streamed.append_column(name, pack(values))
        streamed = streamed.append_column("errors", pa.array([[None] * len(rows)], pa.list_(pa.string())))
        for name in table.column_names:
            streamed = streamed.append_column(name, table.column(name))
        return streamed


def piece_batches(
    table: pa.Table,
    layout: KnowledgeLayout,
    device: torch.device,
    say: Callable[[str], None],
    first_step: int = 0,
) -> Iterator[Batch]:
    """Yield a piece's batches, step after step, from the epoch's step `first_step` on.

    Another image of the piece takes the place of one that cannot be read: batches stay of one size.

    Args:
        layout: of the `train` split.

    Raises:
        UserError: not one image of the piece can be read.
    """
    piece = Piece.from_table(table)
    plan = ShardPlan.from_table(table)
    taken = _readable(table.column("errors")[0].as_py(), plan.index.ids, say)
    size, views = layout.image_size, len(layout.views)
    crops_BHWC = unpack(table, "crops", np.uint8, size, size, 3)
    labels_B, rows_B = plan.index.labels, unpack(table, "rows", np.int64)
    feature_BVD = _vectors(table, "feature", layout, views)
    clip_BVE = None if layout.clip_width is None else _vectors(table, "clip_embedding", layout, views)
    local = len(rows_B) // piece.num_steps

    def send(values: np.ndarray, chosen: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values[chosen]).to(device)

    for start in range(max(0, first_step - piece.first_step) * local, len(rows_B), local):
        chosen = taken[start : start + local]
        yield Batch(
            send(crops_BHWC, chosen).permute(0, 3, 1, 2),
            send(labels_B, chosen),
            send(rows_B, chosen),
            Knowledge(send(feature_BVD, chosen), None if clip_BVE is None else send(clip_BVE, chosen)),
        )


def _readable(errors: Sequence[str | None], ids: np.ndarray, say: Callable[[str], None]) -> np.ndarray:
    """Return for each image its own position, or that of a readable one to take its place."""
    good = np.array([error is None for error in errors])
    positions = np.arange(len(good))
    if good.all():
        return positions
    for position in np.flatnonzero(~good):
        reason = errors[int(position)]
        say(f"train: {ids[position]} is unreadable and was replaced by another image: {reason}")
    if not good.any():
        raise UserError(f"none of {len(good)} images can be decoded; the first, {ids[0]}: {errors[0]}")
    before = np.maximum.accumulate(np.where(good, positions, -1))
    return np.where(before >= 0, before, int(np.argmax(good)))


def _vectors(table: pa.Table, name: str, layout: KnowledgeLayout, views: int) -> np.ndarray:
    dtype, shape = layout.arrays()[name]
    scales = f"{name}_scale"
    if scales not in layout.arrays():
        return unpack(table, name, dtype, views, shape[-1])
    if scales not in table.column_names:  # read from a store, which gives them dequantised
        return unpack(table, name, np.float32, views, shape[-1])
    values = unpack(table, name, dtype, views, shape[-1])
    return dequantize(values, unpack(table, scales, layout.arrays()[scales][0], views))
