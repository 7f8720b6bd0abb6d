"""Batches that the frozen teachers look at in the training worker itself (`knowledge.mode: online`)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tmkd_ray.augmentation import AugmentationConfig, augment
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.compute import apply_views
from tmkd_ray.teachers import FrozenTeachers
from tmkd_ray.training.loader import Batch, ResidentImages, epoch_order, worker_batches
from tmkd_ray.training.prefetch import prefetched
from tmkd_ray.types import Knowledge
from tmkd_ray.views.base import View


class OnlineKnowledge(ResidentImages):
    """Images in memory, newly augmented every epoch; views in a thread, teachers on the training device.

    Args:
        views: those of the knowledge, in its order.
        device: where the batches go. The images stay in the memory of the processor, which computes the views.
        seed: of the augmentation, `knowledge.seed`: variant `t` of the knowledge is what epoch `t` shows.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        views: dict[str, View],
        teachers: FrozenTeachers,
        device: torch.device,
        augmentation: AugmentationConfig,
        seed: int,
    ) -> None:
        super().__init__(images, labels, ids, torch.device("cpu"), augmentation, seed)
        self.views = views
        self.teachers = teachers
        self.target = device

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        parameters_NP = self.fresh_parameters(epoch)
        order_N = epoch_order(len(self), seed, epoch)

        def prepared() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for rows_B in worker_batches(order_N, batch_size, rank, world_size, first_step):
                crops_BHWC = augment(self.images[rows_B], parameters_NP[rows_B])
                yield rows_B, crops_BHWC, torch.from_numpy(apply_views(crops_BHWC.numpy(), self.views))

        for rows_B, crops_BHWC, pixels_BVHWC in prefetched(prepared()):
            knowledge = self.teachers(pixels_BVHWC)
            self._check_finite(knowledge, rows_B)
            yield Batch(
                crops_BHWC.to(self.target).permute(0, 3, 1, 2),
                self.labels[rows_B].to(self.target),
                rows_B.to(self.target),
                knowledge,
            )

    def _check_finite(self, knowledge: Knowledge, rows_B: Tensor) -> None:
        for name, values in (("visual", knowledge.feature), ("text", knowledge.clip_embedding)):
            if values is None:
                continue
            finite_B = torch.isfinite(values).flatten(1).all(1)
            if not finite_B.all():
                sample = self.ids[int(rows_B[int(finite_B.int().argmin())])]
                raise UserError(
                    f"teacher.{name} returned NaN or infinite values for the image {sample}; "
                    "check its weights and normalisation"
                )
