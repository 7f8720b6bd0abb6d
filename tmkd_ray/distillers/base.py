"""What every distillation strategy is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tmkd_ray.settings import Settings
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class StrategyConfig(Settings):
    """Options of a strategy; each strategy extends it with its own."""

    name: str


@dataclass(frozen=True)
class DistillationSpec:
    """The widths a strategy's trainable heads are built for.

    Attributes:
        student_width: S. teacher_width: D. clip_width: E; None without a text teacher.
    """

    num_classes: int
    student_width: int
    teacher_width: int | None = None
    clip_width: int | None = None


class Strategy(nn.Module, ABC):
    """A way to teach the student from the teacher's output, plain or fused: it cannot tell which.

    Subclasses declare in `requires` the fields of `TeacherOutput` they read.
    """

    Config: ClassVar[type[StrategyConfig]]
    requires: ClassVar[frozenset[str]]

    def __init__(self, config: StrategyConfig, spec: DistillationSpec) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        """Return the strategy's loss, and its parts by name where it has several."""
