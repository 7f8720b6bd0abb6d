"""What every distillation strategy is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.losses import gather_from_workers, gather_with_gradient, standardize
from tmkd_ray.settings import Settings
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class StrategyConfig(Settings):
    """Options of a strategy; each strategy extends it with its own."""

    name: str


@dataclass(frozen=True)
class DistillationSpec:
    """The sizes a strategy's trainable heads and banks are built for.

    Attributes:
        student_width: S. teacher_width: D. clip_width: E; None without a text teacher.
        num_samples: of the training set.
    """

    num_classes: int
    student_width: int
    teacher_width: int | None = None
    clip_width: int | None = None
    num_samples: int | None = None


class Strategy(nn.Module, ABC):
    """A way to teach the student from the teacher's output, plain or fused: it cannot tell which.

    Subclasses declare in `requires` the fields of `TeacherOutput` they read. The loss is a mean over the batch,
    or a function of the global batch gathered from all DDP workers: either way two workers equal one.
    """

    Config: ClassVar[type[StrategyConfig]]
    requires: ClassVar[frozenset[str]]

    def __init__(self, config: StrategyConfig, spec: DistillationSpec) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        """Return the strategy's loss, and its parts by name where it has several."""

    def after_step(self, sample_indices_B: Tensor) -> None:
        """Update state that no gradient trains, such as a memory bank, after the optimiser's step.

        `forward` changes no such state. The state is in the state dict and the same on every worker.

        Args:
            sample_indices_B: positions in the training set of the images that `forward` saw last.
        """


class LogitStrategyConfig(StrategyConfig):
    """Options of every strategy that compares logits.

    Logit standardisation (Sun et al. 2024, "Logit standardization in knowledge distillation", CVPR,
    arXiv 2403.01427): the temperature becomes the paper's base temperature, 2 for most pairs on CIFAR-100.
    Z-scores are small, so the paper's code raises the weight: kd_weight 9 beside ce_weight 0.1, where plain KD
    has 0.9 and 0.1.
    """

    standardize_logits: bool = Field(
        default=False, description="compare z-scores; use with temperature 2, kd_weight 9, ce_weight 0.1"
    )


class LogitStrategy(Strategy):
    """A strategy that compares the student's logits with the teacher's, in float32."""

    requires = frozenset({"logits"})

    def __init__(self, config: LogitStrategyConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.standardize_logits = config.standardize_logits

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        with torch.autocast(student.logits.device.type, enabled=False):
            student_BC, teacher_BC = student.logits.float(), self.target_logits(teacher).float()
            if self.standardize_logits:
                student_BC, teacher_BC = standardize(student_BC), standardize(teacher_BC)
            return self.compare(student_BC, teacher_BC, labels_B)

    def target_logits(self, teacher: TeacherOutput) -> Tensor:
        """Return the logits to learn from, [B, C]."""
        return teacher.logits

    @abstractmethod
    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor) -> LossOutput:
        """Return the loss of the (possibly standardised) logits."""


class RelationalStrategy(Strategy):
    """A strategy that compares how the features of the global batch's N samples lie to one another, in float32.

    No projection is needed: S and D may differ.
    """

    requires = frozenset({"feature"})

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        with torch.autocast(student.feature.device.type, enabled=False):
            student_NS = gather_with_gradient(student.feature.float())
            teacher_ND, _ = gather_from_workers(teacher.feature.float())
            return self.compare(student_NS, teacher_ND)

    @abstractmethod
    def compare(self, student_NS: Tensor, teacher_ND: Tensor) -> LossOutput:
        """Return the loss of the global batch."""
