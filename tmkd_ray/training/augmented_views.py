"""Batches of freshly augmented images, each seen through one view: for fitting teachers and CLIP."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmkd_ray.augmentation import AugmentationConfig, apply_crop, draw_parameters, sample_keys
from tmkd_ray.datasets.decode import LoadedImages
from tmkd_ray.training.loader import epoch_order, worker_batches
from tmkd_ray.views.base import View

_AHEAD = 4
"""Batches prepared while the step before runs (OpenCV and NumPy release the interpreter's lock)."""


@dataclass
class ViewBatch:
    """Attributes:
    images: uint8 [B, H, W, 3], after view and augmentation. labels, view_indices: int64 [B].
    """

    images: Tensor
    labels: Tensor
    view_indices: Tensor


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
        self, epoch: int, batch_size: int, rank: int, world_size: int, device: torch.device
    ) -> Iterator[ViewBatch]:
        """Yield this worker's batches of an epoch."""
        size = self.images.images.shape[1]
        parameters_NP = draw_parameters(self.augmentation, self.keys, np.array([epoch]), size)[:, 0]
        generator = np.random.default_rng([self.seed, epoch])
        view_N = generator.integers(len(self.views), size=len(self))
        order_N = epoch_order(len(self), self.seed, epoch)
        # A thread keeps a few batches ready; `done` ends it when the consumer leaves early.
        ready: queue.Queue[ViewBatch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        done = threading.Event()

        def offer(item: ViewBatch | BaseException | None) -> None:
            while not done.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def prepare() -> None:
            try:
                for rows_B in worker_batches(order_N, batch_size, rank, world_size):
                    if done.is_set():
                        return
                    offer(self._batch(rows_B.numpy(), parameters_NP, view_N))
                offer(None)
            except BaseException as error:  # handed to the consumer, which raises it
                offer(error)

        thread = threading.Thread(target=prepare, daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield ViewBatch(item.images.to(device), item.labels.to(device), item.view_indices.to(device))
        finally:
            done.set()
            thread.join()

    def _batch(self, rows_B: np.ndarray, parameters_NP: np.ndarray, view_N: np.ndarray) -> ViewBatch:
        crops = apply_crop(self.images.images[rows_B], parameters_NP[rows_B])
        for position, view in enumerate(self.views):
            chosen = view_N[rows_B] == position
            if chosen.any():
                crops[chosen] = view(crops[chosen])
        return ViewBatch(
            torch.from_numpy(crops),
            torch.from_numpy(self.images.labels[rows_B]),
            torch.from_numpy(view_N[rows_B]),
        )
