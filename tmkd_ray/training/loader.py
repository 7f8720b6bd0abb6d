"""Batches from data that lies in memory, on the training device: tensor operations only."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmkd_ray.augmentation import (
    AugmentationConfig,
    apply_crop_torch,
    draw_parameters,
    sample_keys,
    variant_offsets,
)
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.types import Knowledge


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of an epoch: the same on every worker, a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator)


def worker_batches(order_N: Tensor, batch_size: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """Yield this worker's part of each global batch; together the parts are the global batch.

    The last, incomplete batch of an epoch is left out (the next epoch's order differs). Data smaller than a
    batch makes one batch an epoch, of as many samples as divide among the workers.

    Raises:
        UserError: there are fewer samples than workers.
    """
    if len(order_N) < world_size:
        raise UserError(
            f"{len(order_N)} training images cannot be shared among {world_size} workers; "
            "lower num_workers, or give more images (labels_per_class)"
        )
    size = min(batch_size, len(order_N) // world_size * world_size)
    local = size // world_size
    for start in range(0, len(order_N) - size + 1, size):
        yield order_N[start + rank * local : start + (rank + 1) * local]


@dataclass
class Batch:
    """What a training step sees.

    Attributes:
        images: uint8 [B, 3, H, W]. labels: int64 [B]. indices: int64 [B], positions in the training set.
        knowledge: of the same pixels; None when no teacher takes part.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    knowledge: Knowledge | None


class ResidentKnowledge:
    """A split of a knowledge store on the training device.

    Args:
        positions: the rows to train on; None for all.
        with_teacher: False leaves the knowledge out and draws fresh augmentation every epoch, since no stored
            output has to fit the pixels.
    """

    def __init__(
        self,
        arrays: KnowledgeArrays,
        device: torch.device,
        augmentation: AugmentationConfig,
        seed: int,
        positions: np.ndarray | None = None,
        with_teacher: bool = True,
    ) -> None:
        rows = slice(None) if positions is None else positions
        self.device = device
        self.augmentation = augmentation
        self.image_size = arrays.layout.image_size
        self.num_variants = arrays.layout.num_variants
        self.keys = sample_keys(arrays.ids[rows], seed)
        self.offsets = torch.from_numpy(variant_offsets(self.keys, self.num_variants)).to(device)
        self.images = self._resident(arrays.images[rows])
        self.labels = self._resident(arrays.labels[rows])
        self.parameters = self._resident(arrays.augmentation[rows])
        self.feature = self._resident(arrays.feature[rows]) if with_teacher else None
        self.clip_embedding = None
        if with_teacher and arrays.clip_embedding is not None:
            self.clip_embedding = self._resident(arrays.clip_embedding[rows])

    def _resident(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="))).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Yield this worker's batches of an epoch."""
        fresh_NP = None
        if self.feature is None:
            drawn = draw_parameters(self.augmentation, self.keys, np.array([epoch]), self.image_size)
            fresh_NP = torch.from_numpy(drawn[:, 0]).to(self.device)
        order_N = epoch_order(len(self), seed, epoch).to(self.device)
        for rows_B in worker_batches(order_N, batch_size, rank, world_size):
            variants_B = (epoch + self.offsets[rows_B]) % self.num_variants
            parameters_BP = self.parameters[rows_B, variants_B] if fresh_NP is None else fresh_NP[rows_B]
            images = apply_crop_torch(self.images[rows_B], parameters_BP)
            yield Batch(images, self.labels[rows_B], rows_B, self._knowledge(rows_B, variants_B))

    def _knowledge(self, rows_B: Tensor, variants_B: Tensor) -> Knowledge | None:
        if self.feature is None:
            return None
        clip_embedding = None if self.clip_embedding is None else self.clip_embedding[rows_B, variants_B]
        return Knowledge(self.feature[rows_B, variants_B], clip_embedding)
