"""Train a student from a knowledge store."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.config import ObjectiveConfig, TrainingConfig
from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.datasets.splits import few_labels
from tmkd_ray.distillers import DistillationSpec
from tmkd_ray.distillers.base import MapShape
from tmkd_ray.fusion import TeacherConstants, TeachingSignal
from tmkd_ray.knowledge import KnowledgeArrays, KnowledgeLayout
from tmkd_ray.models import ImageClassifier
from tmkd_ray.objective import Distiller, DistillerConfig
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loader import Batch, BatchSource, ResidentImages, ResidentKnowledge
from tmkd_ray.training.loop import StepOutput, TrainTask
from tmkd_ray.training.metrics import evaluate
from tmkd_ray.training.mixing import Mixing, mixed_loss
from tmkd_ray.types import ModelOutput


class StudentModule(nn.Module):
    """Student, distiller and the (frozen, parameterless) teaching signal: one module for DDP."""

    def __init__(
        self,
        student: ImageClassifier,
        distiller: Distiller,
        signal: TeachingSignal | None,
        normalize: Normalize,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__()
        assert mixing is None or signal is None, "no teacher saw the mixed images"
        self.mixing = mixing
        self.student = student
        self.distiller = distiller
        self.signal = signal
        self.normalize = normalize

    def forward(self, batch: Batch) -> StepOutput:
        images = self.normalize(batch.images)
        if self.mixing is not None:
            return self._learn_mixed(self.mixing, images, batch.labels)
        output: ModelOutput = self.student(images)
        teacher = None
        if self.signal is not None:
            assert batch.knowledge is not None
            teacher = self.signal(batch.knowledge, batch.labels)
        loss = self.distiller(output, teacher, batch.labels)
        return StepOutput(loss, (output.logits.argmax(1) == batch.labels).sum())

    def _learn_mixed(self, mixing: Mixing, images_BCHW: Tensor, labels_B: Tensor) -> StepOutput:
        images_BCHW, mixture = mixing(images_BCHW, labels_B)
        output: ModelOutput = self.student(images_BCHW)
        return StepOutput(mixed_loss(lambda labels: self.distiller(output, None, labels), labels_B, mixture))


class TaughtTask(TrainTask):
    """What trainings on a `BatchSource` have in common: its batches, and validation by a prediction.

    Args:
        source: of the batches.
        validation_images: uint8 [N, H, W, 3]. validation_labels: int64 [N].
    """

    def __init__(
        self,
        module: nn.Module,
        source: BatchSource,
        validation_images: np.ndarray,
        validation_labels: np.ndarray,
        training: TrainingConfig,
    ) -> None:
        self.module = module
        self.training = training
        self.source = source
        self.num_samples = len(source)
        self.notes = source.notes
        self.validation_images = _images_tensor(validation_images)
        self.validation_labels = torch.from_numpy(validation_labels.copy())

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[Batch]:
        self.source.say = context.say
        return self.source.batches(
            epoch,
            self.training.batch_size,
            self.training.seed,
            context.rank,
            context.world_size,
            first_step,
        )

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        return [str(self.source.ids[index]) for index in indices_B.tolist()]

    def validate(self, context: WorkerContext) -> dict[str, float]:
        return evaluate(
            self._predict,
            self.validation_images,
            self.validation_labels,
            context,
            self.training.evaluation_batch_size,
        )

    @abstractmethod
    def _predict(self, images_BHWC: Tensor) -> Tensor:
        """Return logits [B, C] of uint8 images."""


class StudentTask(TaughtTask):
    """A student and what it learns from.

    Args:
        student: untrained.
        source: of the batches.
        layout: of the knowledge.
        validation_images: uint8 [N, H, W, 3]. validation_labels: int64 [N].
        constants: classifier and text bank; None when no teacher takes part.
        views: those the teacher looks at.
        teacher_maps: shapes of the visual teacher's feature maps, where a strategy reads them.
    """

    module: StudentModule

    def __init__(
        self,
        student: ImageClassifier,
        source: BatchSource,
        layout: KnowledgeLayout,
        validation_images: np.ndarray,
        validation_labels: np.ndarray,
        constants: TeacherConstants | None,
        distiller: DistillerConfig,
        views: tuple[str, ...],
        training: TrainingConfig,
        mean: ImageStatistics,
        std: ImageStatistics,
        teacher_maps: tuple[MapShape, ...] | None = None,
    ) -> None:
        signal = None if constants is None else teaching_signal(constants, views, distiller)
        spec = DistillationSpec(
            num_classes=student.head.out_features,
            student_width=student.feature_width,
            teacher_width=layout.feature_width,
            clip_width=layout.clip_width,
            num_samples=len(source),
            class_counts=tuple(np.bincount(source.class_labels, minlength=student.head.out_features).tolist()),
            student_maps=student.map_shapes(layout.image_size) if distiller.needs_online else None,
            teacher_maps=teacher_maps,
        )
        module = StudentModule(
            student,
            Distiller(distiller, spec, training.label_smoothing),
            signal,
            Normalize(mean, std),
            Mixing(training.mixup, training.cutmix) if training.mixes else None,
        )
        super().__init__(module, source, validation_images, validation_labels, training)

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[Batch]:
        self.module.distiller.set_progress(epoch)
        return super().batches(epoch, context, first_step)

    def after_step(self, batch: Batch) -> None:
        self.module.distiller.after_step(batch.indices)

    def _predict(self, images_BHWC: Tensor) -> Tensor:
        output: ModelOutput = self.module.student(self.module.normalize(images_BHWC))
        return output.logits

    @property
    def kept(self) -> ImageClassifier:
        return self.module.student


def teaching_signal(
    constants: TeacherConstants, views: tuple[str, ...], objective: ObjectiveConfig
) -> TeachingSignal:
    """Return what turns knowledge into the signal that an objective asks for."""
    return TeachingSignal(
        constants, views, objective.weighting, objective.fusion_temperature, objective.clip_temperature
    )


def resident_source(
    arrays: KnowledgeArrays,
    training: TrainingConfig,
    augmentation: AugmentationConfig,
    device: torch.device,
    with_teacher: bool,
) -> ResidentImages:
    """Return what a store holds for the student's few or all labels, on the training device."""
    positions = labelled_positions(arrays.ids, arrays.labels, training)
    if with_teacher:
        return ResidentKnowledge(arrays, device, augmentation, training.seed, positions)
    rows = slice(None) if positions is None else positions
    assert arrays.images is not None
    return ResidentImages(
        arrays.images[rows], arrays.labels[rows], arrays.ids[rows], device, augmentation, training.seed
    )


def _images_tensor(images: np.ndarray) -> Tensor:
    """Return images that are only read: those mapped from a file without a copy, which trainings share."""
    if not isinstance(images, np.memmap):
        return torch.from_numpy(images.copy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images)


def labelled_positions(ids: np.ndarray, labels: np.ndarray, training: TrainingConfig) -> np.ndarray | None:
    """Return the rows of the few labelled images that the student may see; None for all of them.

    They depend on the training seed: another seed is another draw, the same for every method.
    """
    if training.labels_per_class is None:
        return None
    rows = np.arange(len(ids))
    index = SampleIndex(ids, labels, np.zeros(len(rows), np.int32), rows)
    return np.sort(few_labels(index, training.labels_per_class, training.seed).row)
