"""Pre-train a student without labels, from the CLIP embeddings of a knowledge store."""

from collections.abc import Mapping

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.fusion import TeacherConstants, TeachingSignal
from tmkd_ray.models import ImageClassifier
from tmkd_ray.pretraining import (
    EmbeddingStudent,
    Pretrainer,
    PretrainingConfig,
    PretrainingSpec,
    ZeroShotStudent,
    build_pretrainer,
    build_projector,
)
from tmkd_ray.pretraining.base import write_projector
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loader import Batch, BatchSource
from tmkd_ray.training.loop import StepOutput
from tmkd_ray.training.student import TaughtTask, teaching_signal
from tmkd_ray.types import ModelOutput

PROJECTOR = "projector.safetensors"
"""The MLP head's file, beside the student's `model.safetensors`."""


class PretrainingModule(nn.Module):
    """Student, objective and the (frozen, parameterless) teaching signal: one module for DDP.

    Labels reach no further than the signal, whose weightings `label` and `margin` alone read them.
    """

    def __init__(
        self,
        student: EmbeddingStudent,
        pretrainer: Pretrainer,
        signal: TeachingSignal,
        normalize: Normalize,
    ) -> None:
        super().__init__()
        self.student = student
        self.pretrainer = pretrainer
        self.signal = signal
        self.normalize = normalize

    def forward(self, batch: Batch) -> StepOutput:
        embedding_BE = self.student(self.normalize(batch.images))
        assert batch.knowledge is not None
        teacher = self.signal(batch.knowledge, batch.labels)
        return StepOutput(self.pretrainer(embedding_BE, teacher.clip_embedding))


class PretrainingTask(TaughtTask):
    """A student that learns to embed as CLIP does; validation is its zero-shot accuracy.

    The zero-shot classifier is the text bank of the dataset's classes, by the prompts of the first taught view.

    Args:
        encoder: untrained.
        source: of the batches.
        validation_images: uint8 [N, H, W, 3]. validation_labels: int64 [N].
        constants: with the text bank of the dataset's classes.
        views: those the teacher looks at.
        bank_CE: an objective's own textual bank; None: that of the dataset's classes.
        origin: the encoder's name and where the embedding comes from, kept with the weights; see
            `read_projector`.
    """

    module: PretrainingModule

    def __init__(
        self,
        encoder: ImageClassifier,
        source: BatchSource,
        validation_images: np.ndarray,
        validation_labels: np.ndarray,
        constants: TeacherConstants,
        config: PretrainingConfig,
        views: tuple[str, ...],
        training: TrainingConfig,
        mean: ImageStatistics,
        std: ImageStatistics,
        bank_CE: Tensor | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        assert constants.clip_temperature is not None
        self.origin = dict(origin or {})
        signal = teaching_signal(constants, views, config)
        assert signal.text_bank is not None
        texts_CE = signal.text_bank[0]
        width = texts_CE.shape[1]
        projector = build_projector(encoder.feature_width, width, config.hidden_width)
        student = EmbeddingStudent(encoder, projector)
        spec = PretrainingSpec(width, texts_CE if bank_CE is None else bank_CE)
        module = PretrainingModule(student, build_pretrainer(config, spec), signal, Normalize(mean, std))
        super().__init__(module, source, validation_images, validation_labels, training)
        self.zero_shot = ZeroShotStudent(student, texts_CE, constants.clip_temperature)

    def after_step(self, batch: Batch) -> None:
        self.module.pretrainer.after_step()

    def after_update(self) -> None:
        self.module.pretrainer.after_update()

    def validate(self, context: WorkerContext) -> dict[str, float]:
        self.zero_shot.texts.to(context.device)  # the rest of it is the trained module's
        return super().validate(context)

    def _predict(self, images_BHWC: Tensor) -> Tensor:
        output: ModelOutput = self.zero_shot(self.module.normalize(images_BHWC))
        return output.logits

    @property
    def kept(self) -> EmbeddingStudent:
        return self.module.student

    def num_parameters(self) -> int:
        return self.kept.num_parameters()

    def save(self, folder: str, weights: Mapping[str, Tensor]) -> None:
        """Write the encoder under its own names (its classifier is untrained), and the MLP head beside it."""
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "projector": {}}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value.contiguous()
        width = parts["projector"]["2.weight"].shape[0]
        metadata = {"embedding_width": str(width), **self.origin}
        write_projector(storage.join(folder, PROJECTOR), parts["projector"], metadata)
        untrained = {"classifier": "untrained", "measured_by": "zero-shot", "projector": PROJECTOR}
        metadata = {"format": "pt", **untrained, **self.origin}
        content = safetensors.torch.save(parts["encoder"], metadata=metadata)
        storage.write_bytes(storage.join(folder, "model.safetensors"), content)
