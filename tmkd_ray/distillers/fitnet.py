"""FitNet: Romero et al. 2015, "FitNets: hints for thin deep nets", ICLR, arXiv 1412.6550.

Theirs: one hidden layer of the student, the guided one, regresses one of the teacher's, the hint. Ours: the
regressor is a 1×1 convolution, and maps of different size are pooled to the smaller (theirs has a kernel as
large as the difference); the hint is learned beside the other terms, as in CRD's comparison (arXiv 1910.10699),
not in a stage of its own before them.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, MapStrategy, StrategyConfig, pool_to_smaller
from tmkd_ray.errors import UserError
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class FitNetConfig(StrategyConfig):
    """Stage and weight of the field's comparisons, beside cross-entropy of weight 1."""

    name: str = "fitnet"
    stage: int = Field(default=2, ge=1, description="1 is the earliest that both models have")
    weight: float = Field(default=100.0, gt=0)


@STRATEGIES.register("fitnet")
class FitNet(MapStrategy):
    """Mean squared error between the regressed student map and the teacher's, over batch, channels and pixels.

    Raises:
        UserError: there are fewer stages than `stage`.
    """

    Config = FitNetConfig

    def __init__(self, config: FitNetConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        if config.stage > len(self.pairs):
            raise UserError(
                f"distiller.strategy.stage={config.stage}: {spec.student_name} and {spec.teacher_name} have "
                f"{len(self.pairs)} stages in common; choose 1 to {len(self.pairs)}"
            )
        self.index = config.stage - 1
        self.weight = config.weight
        (student_channels, *_), (teacher_channels, *_) = self.pairs[self.index]
        self.regressor = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        pair = self.pair(student.feature_maps, teacher.feature_maps)[self.index]
        # The weight of this loss would take the regressor's gradient beyond half precision.
        with torch.autocast(labels_B.device.type, enabled=False):
            student_BCHW, teacher_BCHW = pool_to_smaller(*(map_BCHW.float() for map_BCHW in pair))
            return LossOutput(self.weight * F.mse_loss(self.regressor(student_BCHW), teacher_BCHW))
