"""Batches from data that lies in memory, on the training device: tensor operations only."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmkd_ray.augmentation import AugmentationConfig, augment, draw_parameters, sample_keys, variant_offsets
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.types import Knowledge


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of an epoch: the same on every worker, a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator)


def global_batch_size(num_samples: int, batch_size: int, world_size: int) -> int:
    """Return the batch size, or what the data has of it, rounded down to a multiple of the workers.

    Raises:
        UserError: there are fewer samples than workers.
    """
    if num_samples < world_size:
        raise UserError(
            f"{num_samples} training images cannot be shared among {world_size} workers; "
            "lower num_workers, or give more images (labels_per_class)"
        )
    return min(batch_size, num_samples) // world_size * world_size


def worker_batches(
    order_N: Tensor, batch_size: int, rank: int, world_size: int, first_step: int = 0
) -> Iterator[Tensor]:
    """Yield this worker's part of each global batch; together the parts are the global batch.

    The last, incomplete batch of an epoch is left out (the next epoch's order differs). Data smaller than a
    batch makes one batch an epoch, of as many samples as divide among the workers.

    Args:
        first_step: batches before this one are skipped.

    Raises:
        UserError: there are fewer samples than workers.
    """
    size = global_batch_size(len(order_N), batch_size, world_size)
    local = size // world_size
    for start in range(first_step * size, len(order_N) - size + 1, size):
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


class BatchSource(ABC):
    """Where a student's batches come from.

    Attributes:
        ids: unicode [N], the sample ids by position in the training set.
        class_labels: int64 [N].
        say: shows a line of progress to the user.
        notes: lines for the user, said when the training starts.
    """

    ids: np.ndarray
    class_labels: np.ndarray
    notes: tuple[str, ...] = ()
    say: Callable[[str], None] = staticmethod(lambda line: None)

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        """Yield this worker's batches of an epoch, from the step `first_step` on.

        Which samples make which batch is `epoch_order` and `worker_batches`, whatever the source.
        """


class ResidentImages(BatchSource):
    """Images on the training device, newly augmented every epoch; no teacher takes part.

    Args:
        images: uint8 [N, H, W, 3]. labels: int64 [N]. ids: unicode [N].
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        device: torch.device,
        augmentation: AugmentationConfig,
        seed: int,
    ) -> None:
        self.device = device
        self.augmentation = augmentation
        self.ids = ids
        self.class_labels = labels
        self.keys = sample_keys(ids, seed)
        self.images = self._resident(images)
        self.labels = self._resident(labels)

    def _resident(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="))).to(self.device)

    def fresh_parameters(self, epoch: int) -> Tensor:
        """Return int16 [N, P]: the augmentation of this epoch, which is the variant of its number.

        It stays on the host, which decides by it what is to be done.
        """
        drawn = draw_parameters(self.augmentation, self.keys, np.array([epoch]), self.images.shape[1])
        return torch.from_numpy(drawn[:, 0])

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        parameters_NP = self.fresh_parameters(epoch)
        order_N = epoch_order(len(self), seed, epoch)
        for chosen_B in worker_batches(order_N, batch_size, rank, world_size, first_step):
            rows_B = chosen_B.to(self.device, non_blocking=True)
            images_BHWC = augment(self.images[rows_B], parameters_NP[chosen_B])
            yield Batch(images_BHWC.permute(0, 3, 1, 2), self.labels[rows_B], rows_B, None)


class ResidentKnowledge(ResidentImages):
    """A split of a knowledge store on the training device: epoch `t` replays variant `(t + offset) mod K`.

    Args:
        positions: the rows to train on; None for all.
        seed: of each image's offset.
    """

    def __init__(
        self,
        arrays: KnowledgeArrays,
        device: torch.device,
        augmentation: AugmentationConfig,
        seed: int,
        positions: np.ndarray | None = None,
    ) -> None:
        rows = slice(None) if positions is None else positions
        assert arrays.images is not None
        assert arrays.feature is not None
        super().__init__(arrays.images[rows], arrays.labels[rows], arrays.ids[rows], device, augmentation, seed)
        self.num_variants = arrays.layout.num_variants
        self.offsets = torch.from_numpy(variant_offsets(self.keys, self.num_variants))
        self.parameters = torch.from_numpy(arrays.augmentation[rows].astype(np.int16))
        self.feature = self._resident(arrays.feature[rows])
        self.feature_scale = self._resident_or_none(arrays.feature_scale, rows)
        self.clip_embedding = self._resident_or_none(arrays.clip_embedding, rows)
        self.clip_embedding_scale = self._resident_or_none(arrays.clip_embedding_scale, rows)

    def _resident_or_none(self, values: np.ndarray | None, rows: slice | np.ndarray) -> Tensor | None:
        return None if values is None else self._resident(values[rows])

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        order_N = epoch_order(len(self), seed, epoch)
        for chosen_B in worker_batches(order_N, batch_size, rank, world_size, first_step):
            drawn_B = (epoch + self.offsets[chosen_B]) % self.num_variants
            rows_B = chosen_B.to(self.device, non_blocking=True)
            variants_B = drawn_B.to(self.device, non_blocking=True)
            images_BHWC = augment(self.images[rows_B], self.parameters[chosen_B, drawn_B])
            feature_BVD = _at(self.feature, self.feature_scale, rows_B, variants_B)
            clip_BVE = None
            if self.clip_embedding is not None:
                clip_BVE = _at(self.clip_embedding, self.clip_embedding_scale, rows_B, variants_B)
            knowledge = Knowledge(feature_BVD, clip_BVE)
            yield Batch(images_BHWC.permute(0, 3, 1, 2), self.labels[rows_B], rows_B, knowledge)


def _at(values: Tensor, scale: Tensor | None, rows_B: Tensor, variants_B: Tensor) -> Tensor:
    """Return the vectors of these rows and variants: as they are stored, or float32 if that is with a scale."""
    chosen = values[rows_B, variants_B]
    return chosen if scale is None else chosen.float() * scale[rows_B, variants_B].unsqueeze(-1)
