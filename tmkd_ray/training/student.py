"""Train a student from a knowledge store."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.config import TrainingConfig
from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.datasets.splits import few_labels
from tmkd_ray.distillers import DistillationSpec
from tmkd_ray.fusion import TeacherConstants, TeachingSignal
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.models import ImageClassifier
from tmkd_ray.objective import Distiller, DistillerConfig
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loader import Batch, ResidentKnowledge
from tmkd_ray.training.loop import StepOutput, TrainTask
from tmkd_ray.training.metrics import evaluate
from tmkd_ray.types import ModelOutput


class StudentModule(nn.Module):
    """Student, distiller and the (frozen, parameterless) teaching signal: one module for DDP."""

    def __init__(
        self,
        student: ImageClassifier,
        distiller: Distiller,
        signal: TeachingSignal | None,
        normalize: Normalize,
    ) -> None:
        super().__init__()
        self.student = student
        self.distiller = distiller
        self.signal = signal
        self.normalize = normalize

    def forward(self, batch: Batch) -> StepOutput:
        output: ModelOutput = self.student(self.normalize(batch.images))
        teacher = None
        if self.signal is not None:
            assert batch.knowledge is not None
            teacher = self.signal(batch.knowledge, batch.labels)
        loss = self.distiller(output, teacher, batch.labels)
        return StepOutput(loss, (output.logits.argmax(1) == batch.labels).sum())


class StudentTask(TrainTask):
    """A student taught from resident knowledge.

    Args:
        student: untrained.
        train, validation: the splits of one store.
        constants: classifier and text bank; None when no teacher takes part.
        views: those the teacher looks at.
    """

    def __init__(
        self,
        student: ImageClassifier,
        train: KnowledgeArrays,
        validation: KnowledgeArrays,
        constants: TeacherConstants | None,
        distiller: DistillerConfig,
        views: tuple[str, ...],
        training: TrainingConfig,
        augmentation: AugmentationConfig,
        mean: ImageStatistics,
        std: ImageStatistics,
        device: torch.device,
    ) -> None:
        signal = None
        if constants is not None:
            signal = TeachingSignal(
                constants,
                views,
                distiller.weighting,
                distiller.fusion_temperature,
                distiller.clip_temperature,
            )
        positions = labelled_positions(train, training)
        layout = train.layout
        spec = DistillationSpec(
            num_classes=student.head.out_features,
            student_width=student.feature_width,
            teacher_width=layout.feature_width,
            clip_width=layout.clip_width,
            num_samples=len(train) if positions is None else len(positions),
        )
        self.module: StudentModule = StudentModule(
            student,
            Distiller(distiller, spec, training.label_smoothing),
            signal,
            Normalize(mean, std),
        )
        self.training = training
        self.data = ResidentKnowledge(
            train, device, augmentation, training.seed, positions, with_teacher=signal is not None
        )
        self.num_samples = len(self.data)
        self.validation_images = torch.from_numpy(validation.images.copy())
        self.validation_labels = torch.from_numpy(validation.labels.copy())

    def batches(self, epoch: int, context: WorkerContext) -> Iterator[Batch]:
        return self.data.batches(
            epoch, self.training.batch_size, self.training.seed, context.rank, context.world_size
        )

    def after_step(self, batch: Batch) -> None:
        self.module.distiller.after_step(batch.indices)

    def validate(self, context: WorkerContext) -> dict[str, float]:
        return evaluate(
            self._predict,
            self.validation_images,
            self.validation_labels,
            context,
            self.training.evaluation_batch_size,
        )

    def _predict(self, images_BHWC: Tensor) -> Tensor:
        output: ModelOutput = self.module.student(self.module.normalize(images_BHWC))
        return output.logits

    @property
    def kept(self) -> ImageClassifier:
        return self.module.student


def labelled_positions(arrays: KnowledgeArrays, training: TrainingConfig) -> np.ndarray | None:
    """Return the rows of the few labelled images that the student may see; None for all of them.

    They depend on the training seed: another seed is another draw, the same for every method.
    """
    if training.labels_per_class is None:
        return None
    rows = np.arange(len(arrays))
    index = SampleIndex(arrays.ids, arrays.labels, np.zeros(len(rows), np.int32), rows)
    return np.sort(few_labels(index, training.labels_per_class, training.seed).row)
