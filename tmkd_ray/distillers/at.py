"""AT: Zagoruyko and Komodakis 2017, "Paying more attention to attention: improving the performance of
convolutional neural networks via attention transfer", ICLR, arXiv 1612.03928.

Activation-based attention of every stage. As in the authors' code the squared difference is averaged over batch
and pixels, which is what the weight in use is for; the paper sums it.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, MapStrategy, StrategyConfig, pool_to_smaller
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class ATConfig(StrategyConfig):
    """The authors' values, beside cross-entropy of weight 1."""

    name: str = "at"
    weight: float = Field(default=1000.0, gt=0, description="beta of the paper")
    power: float = Field(default=2.0, ge=1, description="p of the paper")


def attention(map_BCHW: Tensor, power: float) -> Tensor:
    """Return [B, H W]: the mean over channels of |map|^power, each row of unit length."""
    return F.normalize(map_BCHW.abs().pow(power).mean(dim=1).flatten(1), dim=1)


@STRATEGIES.register("at")
class AT(MapStrategy):
    """Squared difference of the attention maps, summed over the stages."""

    Config = ATConfig

    def __init__(self, config: ATConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.config = config

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        power = self.config.power
        losses = []
        with torch.autocast(labels_B.device.type, enabled=False):
            for pair in self.pair(student.feature_maps, teacher.feature_maps):
                student_BCHW, teacher_BCHW = pool_to_smaller(*(map_BCHW.float() for map_BCHW in pair))
                difference_BP = attention(student_BCHW, power) - attention(teacher_BCHW, power)
                losses.append(difference_BP.square().mean())
            return LossOutput(self.config.weight * torch.stack(losses).sum())
