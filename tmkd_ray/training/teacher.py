"""Fit a visual teacher, on the original images or on all views."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.config import TrainingConfig
from tmkd_ray.datasets.decode import LoadedImages, list_set_aside
from tmkd_ray.models import ImageClassifier
from tmkd_ray.models.view_batch_norm import (
    estimate_statistics,
    num_view_statistics,
    samples_of_views,
    use_view_statistics,
)
from tmkd_ray.progress import Rate
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.augmented_views import AugmentedViews, ViewBatch
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loop import StepOutput, TrainTask
from tmkd_ray.training.metrics import evaluate
from tmkd_ray.types import LossOutput, ModelOutput
from tmkd_ray.views.base import View


class ClassifierModule(nn.Module):
    """A classifier with its normalisation, trained by cross-entropy."""

    def __init__(self, model: ImageClassifier, normalize: Normalize, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.num_views = num_view_statistics(model)

    def forward(self, batch: ViewBatch) -> StepOutput:
        images, labels = batch.images, batch.labels
        if self.num_views is None:
            output: ModelOutput = self.model(self.normalize(images))
        else:  # sorted by view, so that each layer finds the images of a view side by side
            order_B = torch.argsort(batch.view_indices, stable=True)
            labels = labels[order_B]
            counts = torch.bincount(batch.view_indices, minlength=self.num_views).tolist()
            with samples_of_views(self.model, counts):
                output = self.model(self.normalize(images[order_B]))
        loss = F.cross_entropy(output.logits.float(), labels, label_smoothing=self.label_smoothing)
        return StepOutput(LossOutput(loss, {"ce": loss}), (output.logits.argmax(1) == labels).sum())


def adapt_statistics(
    model: ImageClassifier,
    train: LoadedImages,
    views: dict[str, View],
    augmentation: AugmentationConfig,
    normalize: Normalize,
    seed: int,
    device: torch.device,
) -> None:
    """Give `model`, on `device`, batch-norm statistics of each view: those of training images, as augmented.

    The view `original` keeps those that the model has. No weight is changed.

    Raises:
        UserError: the model has no batch normalisation.
    """
    use_view_statistics(model, len(views))
    for position, (name, view) in enumerate(views.items()):
        if name == KEEPS_STATISTICS:
            continue
        data = AugmentedViews(train, [view], augmentation, seed)
        progress = Rate(f"statistics of {name}", max(1, len(data) // _STATISTICS_BATCH), "batches")
        batches = progress.over(data.batches(0, _STATISTICS_BATCH, 0, 1, device))
        estimate_statistics(model, (normalize(batch.images) for batch in batches), position)


KEEPS_STATISTICS = "original"
"""The view that a given teacher was trained on."""

_STATISTICS_BATCH = 256


class TeacherTask(TrainTask):
    """A visual teacher in training. The epoch to keep is the best on the mean over the views it is fitted on.

    Args:
        model: one with batch-norm statistics for each view has them in the order of `views`.
        views: by name; those the teacher is to see.
    """

    def __init__(
        self,
        model: ImageClassifier,
        train: LoadedImages,
        validation: LoadedImages,
        views: dict[str, View],
        training: TrainingConfig,
        augmentation: AugmentationConfig,
        mean: ImageStatistics,
        std: ImageStatistics,
    ) -> None:
        self.module: ClassifierModule = ClassifierModule(model, Normalize(mean, std), training.label_smoothing)
        self.training = training
        self.data = AugmentedViews(train, list(views.values()), augmentation, training.seed)
        self.num_samples = len(self.data)
        self.notes = list_set_aside("train", train.set_aside) + list_set_aside(
            "validation", validation.set_aside
        )
        self.validation_views = {
            name: torch.from_numpy(view(validation.images)) for name, view in views.items()
        }
        self.validation_labels = torch.from_numpy(validation.labels)

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[ViewBatch]:
        return self.data.batches(
            epoch, self.training.batch_size, context.rank, context.world_size, context.device, first_step
        )

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        return [str(self.data.images.ids[index]) for index in indices_B.tolist()]

    def validate(self, context: WorkerContext) -> dict[str, float]:
        accuracies = {
            name: evaluate(
                functools.partial(self._predict, position),
                images,
                self.validation_labels,
                context,
                self.training.evaluation_batch_size,
            )["accuracy"]
            for position, (name, images) in enumerate(self.validation_views.items())
        }
        return {"accuracy": sum(accuracies.values()) / len(accuracies)} | {
            f"{name}_accuracy": value for name, value in accuracies.items()
        }

    def _predict(self, view: int, images_BHWC: Tensor) -> Tensor:
        counts = [0] * (self.module.num_views or 0)
        with contextlib.ExitStack() as stack:
            if counts:
                counts[view] = len(images_BHWC)
                stack.enter_context(samples_of_views(self.module.model, counts))
            output: ModelOutput = self.module.model(self.module.normalize(images_BHWC))
        return output.logits

    @property
    def kept(self) -> ImageClassifier:
        return self.module.model
