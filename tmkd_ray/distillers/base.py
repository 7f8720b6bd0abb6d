"""What every distillation strategy is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.losses import gather_from_workers, gather_with_gradient, standardize
from tmkd_ray.settings import Settings
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

MapShape = tuple[int, int, int]
"""(channels, height, width) of a feature map."""


class StrategyConfig(Settings):
    """Options of a strategy; each strategy extends it with its own."""

    name: str


@dataclass(frozen=True)
class DistillationSpec:
    """The sizes a strategy's trainable heads and banks are built for.

    Attributes:
        student_width: S. teacher_width: D. clip_width: E; None without a text teacher.
        num_samples: of the training set. class_counts: of each class in it.
        student_maps, teacher_maps: of each feature map, early to late, as `ImageClassifier.map_shapes` has
            them; empty for a model without any, None where no strategy asks for them.
        student_name, teacher_name: for messages.
    """

    num_classes: int
    student_width: int
    teacher_width: int | None = None
    clip_width: int | None = None
    num_samples: int | None = None
    class_counts: tuple[int, ...] | None = None
    student_maps: tuple[MapShape, ...] | None = None
    teacher_maps: tuple[MapShape, ...] | None = None
    student_name: str = "the student"
    teacher_name: str = "the teacher"


class Strategy(nn.Module, ABC):
    """A way to teach the student from the teacher's output, plain or fused: it cannot tell which.

    Subclasses declare in `requires` the fields of `TeacherOutput` they read. The loss is a mean over the batch,
    or a function of the global batch gathered from all DDP workers: either way two workers equal one.

    Attributes:
        trains_classifier: whether the loss depends on the student's logits.
    """

    Config: ClassVar[type[StrategyConfig]]
    requires: ClassVar[frozenset[str]]
    trains_classifier: ClassVar[bool] = False

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
    arXiv 2403.01427): the temperature becomes the paper's base temperature. Z-scores are small, so its authors
    raise the weight tenfold: by default they take temperature 2 and kd_weight 9, beside the ce_weight that the
    strategy has without it (KD and MLKD 0.1, DKD 1), and for some pairs another temperature or weight.
    """

    standardize_logits: bool = Field(
        default=False, description="compare z-scores; use with temperature 2, kd_weight 9 (KD: ce_weight 0.1)"
    )


class LogitStrategy(Strategy):
    """A strategy that compares the student's logits with the teacher's, in float32."""

    requires = frozenset({"logits"})
    trains_classifier = True

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


class MapStrategy(Strategy):
    """A strategy that compares feature maps, or the maps before the stages' last activation.

    The student's and the teacher's stages are paired from the last one backwards; where one of them has more
    stages, its earliest are left out. Maps of different size are both pooled to the smaller height and width.

    Attributes:
        pairs: shapes of the maps that are compared, (student's, teacher's), early to late.
    """

    requires = frozenset({"feature_maps"})

    def __init__(self, config: StrategyConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        assert spec.student_maps is not None
        assert spec.teacher_maps is not None
        self.strategy_name = config.name
        self.names = (spec.student_name, spec.teacher_name)
        for name, shapes in zip(self.names, (spec.student_maps, spec.teacher_maps), strict=True):
            if not shapes:
                raise UserError(self._without(name, "feature maps"))
        count = min(len(spec.student_maps), len(spec.teacher_maps))
        self.pairs: list[tuple[MapShape, MapShape]] = list(
            zip(spec.student_maps[-count:], spec.teacher_maps[-count:], strict=True)
        )

    def pair(
        self, student_maps: tuple[Tensor, ...], teacher_maps: tuple[Tensor, ...] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (student's, teacher's) map of each pair, as they are.

        Raises:
            UserError: a model hands out none: it has feature maps (else this strategy could not have been
                built), but does not tell what they were before the activation.
        """
        assert teacher_maps is not None, "no teacher runs beside the student"
        for name, maps in zip(self.names, (student_maps, teacher_maps), strict=True):
            if not maps:
                raise UserError(self._without(name, "the maps before its stages' last activation"))
        count = len(self.pairs)
        return list(zip(student_maps[-count:], teacher_maps[-count:], strict=True))

    def _without(self, name: str, what: str) -> str:
        return (
            f"distiller.strategy={self.strategy_name} compares {what}, and {name} hands out none; choose "
            "another model (the CIFAR networks, torchvision's ResNets, VGGs and MobileNets have them), "
            "or a strategy on logits or features"
        )


def pool_to_smaller(student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps, pooled by averages to the smaller height and width of the two."""
    (height, width), (other_height, other_width) = student_BCHW.shape[2:], teacher_BCHW.shape[2:]
    size = (min(height, other_height), min(width, other_width))
    return pool_to(student_BCHW, size), pool_to(teacher_BCHW, size)


def pool_to(map_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the map pooled by averages to (height, width), or as it is where it has that size already."""
    return map_BCHW if map_BCHW.shape[2:] == size else F.adaptive_avg_pool2d(map_BCHW, size)
