"""Batches read from one copy of the store per machine (`knowledge.loader: mapped`): for what fits no memory."""

from collections.abc import Iterator

import numpy as np
import torch

from tmkd_ray.augmentation import (
    AugmentationConfig,
    augment,
    draw_parameters,
    sample_keys,
    variant_offsets,
)
from tmkd_ray.knowledge.quantization import dequantize
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.training.loader import Batch, BatchSource, epoch_order, worker_batches
from tmkd_ray.training.prefetch import prefetched
from tmkd_ray.types import Knowledge


class StoredRows:
    """What a store says of any rows in any epoch: epoch `t` replays variant `(t + offset) mod K`.

    Args:
        positions: the rows to train on; None for all.
        seed: of each image's offset.
    """

    def __init__(self, arrays: KnowledgeArrays, seed: int, positions: np.ndarray | None = None) -> None:
        assert arrays.images is not None
        assert arrays.feature is not None
        self.arrays = arrays
        self.positions = np.arange(len(arrays)) if positions is None else positions
        self.ids = arrays.ids[self.positions]
        self.labels = np.asarray(arrays.labels[self.positions])
        self.offsets = variant_offsets(sample_keys(self.ids, seed), arrays.layout.num_variants)

    def crops(self, rows_B: np.ndarray, epoch: int) -> np.ndarray:
        """Return uint8 [B, H, W, 3]."""
        assert self.arrays.images is not None
        stored = self.positions[rows_B]
        images_BHWC = torch.from_numpy(self.arrays.images[stored])
        parameters_BP = self.arrays.augmentation[stored, self._variants(rows_B, epoch)]
        return augment(images_BHWC, torch.from_numpy(parameters_BP.astype(np.int16))).numpy()

    def vectors(self, name: str, rows_B: np.ndarray, epoch: int) -> np.ndarray | None:
        """Return `feature` or `clip_embedding`, [B, V, D or E], as stored or, from int8, float32."""
        values: np.ndarray | None = getattr(self.arrays, name)
        scale: np.ndarray | None = getattr(self.arrays, f"{name}_scale")
        if values is None:
            return None
        where = (self.positions[rows_B], self._variants(rows_B, epoch))
        return values[where] if scale is None else dequantize(values[where], scale[where])

    def _variants(self, rows_B: np.ndarray, epoch: int) -> np.ndarray:
        variants: np.ndarray = (epoch + self.offsets[rows_B]) % self.arrays.layout.num_variants
        return variants


class MappedImages(BatchSource):
    """Images alone, newly augmented every epoch; no teacher takes part.

    Args:
        seed: of the augmentation.
    """

    def __init__(
        self, rows: StoredRows, device: torch.device, augmentation: AugmentationConfig, seed: int
    ) -> None:
        self.rows = rows
        self.device = device
        self.augmentation = augmentation
        self.ids = rows.ids
        self.class_labels = rows.labels
        self.keys = sample_keys(rows.ids, seed)

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        images = self.rows.arrays.images
        assert images is not None
        drawn = draw_parameters(self.augmentation, self.keys, np.array([epoch]), images.shape[1])[:, 0]
        order_N = epoch_order(len(self), seed, epoch)

        def read() -> Iterator[tuple[torch.Tensor, ...]]:
            for chosen_B in worker_batches(order_N, batch_size, rank, world_size, first_step):
                rows_B = chosen_B.numpy()
                stored = torch.from_numpy(images[self.rows.positions[rows_B]])
                labels = torch.from_numpy(self.rows.labels[rows_B])
                yield augment(stored, torch.from_numpy(drawn[rows_B])), labels, chosen_B

        for values in prefetched(read()):
            crops, labels, rows = (value.to(self.device, non_blocking=True) for value in values)
            yield Batch(crops.permute(0, 3, 1, 2), labels, rows, None)


class MappedKnowledge(BatchSource):
    """The rows of each batch are read by a thread while the step before runs; processes share the pages."""

    def __init__(self, rows: StoredRows, device: torch.device) -> None:
        self.rows = rows
        self.device = device
        self.ids = rows.ids
        self.class_labels = rows.labels

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        order_N = epoch_order(len(self), seed, epoch)

        def read() -> Iterator[tuple[torch.Tensor, ...]]:
            for chosen_B in worker_batches(order_N, batch_size, rank, world_size, first_step):
                rows_B = chosen_B.numpy()
                clip = self.rows.vectors("clip_embedding", rows_B, epoch)
                feature = self.rows.vectors("feature", rows_B, epoch)
                assert feature is not None
                found = [self.rows.crops(rows_B, epoch), self.rows.labels[rows_B], rows_B, feature]
                yield tuple(torch.from_numpy(values) for values in (found if clip is None else [*found, clip]))

        for values in prefetched(read()):
            images, labels, rows, *vectors = (value.to(self.device, non_blocking=True) for value in values)
            knowledge = Knowledge(vectors[0], vectors[1] if len(vectors) == 2 else None)
            yield Batch(images.permute(0, 3, 1, 2), labels, rows, knowledge)
