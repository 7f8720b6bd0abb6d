"""NST: Huang and Wang 2017, "Like what you like: knowledge distill via neuron selectivity transfer",
arXiv 1707.01219.

The paper's best kernel, the polynomial of degree 2 without constant, on every stage.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, MapStrategy, StrategyConfig, pool_to_smaller
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class NSTConfig(StrategyConfig):
    """The paper's weight for this kernel, beside cross-entropy of weight 1."""

    name: str = "nst"
    weight: float = Field(default=50.0, gt=0)


def mean_kernel(a_BCP: Tensor, b_BDP: Tensor) -> Tensor:
    """Return the mean over the batch and all pairs of channels of `(aᵀ b)²`."""
    return (a_BCP @ b_BDP.mT).square().mean()


def squared_mmd(student_BCHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of the two sets of channels, averaged over the batch.

    A sample is a channel's map over the pixels, of unit length (eq. 5 and 6 of the paper).
    """
    student_BCP = F.normalize(student_BCHW.flatten(2), dim=2)
    teacher_BDP = F.normalize(teacher_BDHW.flatten(2), dim=2)
    within = mean_kernel(student_BCP, student_BCP) + mean_kernel(teacher_BDP, teacher_BDP)
    return within - 2.0 * mean_kernel(student_BCP, teacher_BDP)


@STRATEGIES.register("nst")
class NST(MapStrategy):
    """Squared discrepancy of the channels' selectivity patterns, summed over the stages."""

    Config = NSTConfig

    def __init__(self, config: NSTConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.weight = config.weight

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        with torch.autocast(labels_B.device.type, enabled=False):
            pairs = self.pair(student.feature_maps, teacher.feature_maps)
            losses = [squared_mmd(*pool_to_smaller(s.float(), t.float())) for s, t in pairs]
            return LossOutput(self.weight * torch.stack(losses).sum())
