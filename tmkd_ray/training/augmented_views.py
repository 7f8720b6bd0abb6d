"""Batches of freshly augmented images, each seen through one view: for fitting teachers and CLIP."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmkd_ray.augmentation import AugmentationConfig, augment, draw_parameters, sample_keys
from tmkd_ray.datasets.decode import LoadedImages
from tmkd_ray.training.loader import epoch_order, worker_batches
from tmkd_ray.training.prefetch import prefetched
from tmkd_ray.views.base import View


@dataclass
class ViewBatch:
    """Attributes:
    images: uint8 [B, H, W, 3], after view and augmentation. labels, view_indices: int64 [B].
    indices: int64 [B], positions in the training set.
    """

    images: Tensor
    labels: Tensor
    view_indices: Tensor
    indices: Tensor


class AugmentedViews:
    """Images in memory; each epoch every image appears once, newly cropped, through a view drawn at random."""

    def __init__(
        self, images: LoadedImages, views: list[View], augmentation: AugmentationConfig, seed: int
    ) -> None:
        self.images = images
        self.views = views
        self.augmentation = augmentation
        self.seed = seed
        self.keys = sample_keys(images.ids, seed)

    def __len__(self) -> int:
        return len(self.images.labels)

    def batches(
        self,
        epoch: int,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        first_step: int = 0,
    ) -> Iterator[ViewBatch]:
        """Yield this worker's batches of an epoch, from the step `first_step` on."""
        size = self.images.images.shape[1]
        parameters_NP = draw_parameters(self.augmentation, self.keys, np.array([epoch]), size)[:, 0]
        generator = np.random.default_rng([self.seed, epoch])
        view_N = generator.integers(len(self.views), size=len(self))
        order_N = epoch_order(len(self), self.seed, epoch)

        def prepared() -> Iterator[ViewBatch]:
            for rows_B in worker_batches(order_N, batch_size, rank, world_size, first_step):
                yield self._batch(rows_B.numpy(), parameters_NP, view_N)

        for batch in prefetched(prepared()):
            yield ViewBatch(
                batch.images.to(device),
                batch.labels.to(device),
                batch.view_indices.to(device),
                batch.indices.to(device),
            )

    def _batch(self, rows_B: np.ndarray, parameters_NP: np.ndarray, view_N: np.ndarray) -> ViewBatch:
        crops = augment(
            torch.from_numpy(self.images.images[rows_B]), torch.from_numpy(parameters_NP[rows_B])
        ).numpy()
        for position, view in enumerate(self.views):
            chosen = view_N[rows_B] == position
            if chosen.any():
                crops[chosen] = view(crops[chosen])
        return ViewBatch(
            torch.from_numpy(crops),
            torch.from_numpy(self.images.labels[rows_B]),
            torch.from_numpy(view_N[rows_B]),
            torch.from_numpy(rows_B),
        )
