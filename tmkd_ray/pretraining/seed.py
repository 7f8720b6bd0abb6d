"""SEED: Fang et al. 2021, "SEED: Self-supervised distillation for visual representation", arXiv 2101.04731."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.pretraining.base import (
    PRETRAINERS,
    BankPretrainer,
    PretrainingConfig,
    PretrainingSpec,
    random_rows,
    similarity_distillation,
)
from tmkd_ray.types import LossOutput


class SEEDConfig(PretrainingConfig):
    """The paper's values. The queue takes `4 x E` bytes a row, in memory and in every checkpoint."""

    name: Literal["seed"] = "seed"
    queue_size: int = Field(
        default=65_536, ge=1, description="rows; fewer than the training images are sensible"
    )
    teacher_temperature: float = Field(default=0.01, gt=0)
    student_temperature: float = Field(default=0.2, gt=0)


@PRETRAINERS.register("seed")
class SEED(BankPretrainer):
    """Cross-entropy over the similarities with a queue of the teacher's past embeddings and the image's own.

    The queue starts as random unit vectors; each batch replaces its oldest rows.
    """

    Config = SEEDConfig
    queue: Tensor
    position: Tensor

    def __init__(self, config: SEEDConfig, spec: PretrainingSpec) -> None:
        super().__init__(config, spec)
        self.config = config
        self.register_buffer("queue", random_rows(config.queue_size, spec.embedding_width))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def compare(self, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
        config = self.config
        loss = similarity_distillation(
            F.normalize(student_BE, dim=1),
            teacher_BE,
            self.queue,
            config.student_temperature,
            config.teacher_temperature,
            with_own=True,
        )
        return LossOutput(loss, {"similarity": loss})

    def remember(self, teacher_NE: Tensor) -> None:
        size = len(self.queue)
        newest_NE = teacher_NE[-size:]
        rows_N = (self.position + torch.arange(len(newest_NE), device=teacher_NE.device)) % size
        self.queue[rows_N] = newest_NE
        self.position.copy_((self.position + len(newest_NE)) % size)
