"""SP: Tung and Mori 2019, "Similarity-preserving knowledge distillation", ICCV, arXiv 1907.09682.

The paper compares feature maps of the last stage; this is the same loss on the penultimate feature.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, RelationalStrategy, StrategyConfig
from tmkd_ray.types import LossOutput


class SPConfig(StrategyConfig):
    """The paper's weight, gamma, beside cross-entropy of weight 1."""

    name: str = "sp"
    weight: float = Field(default=3000.0, gt=0)


def similarities(feature_NS: Tensor) -> Tensor:
    """Return [N, N]: inner products of all pairs, each row of unit length."""
    return F.normalize(feature_NS @ feature_NS.T, dim=1)


def similarity_loss(teacher_ND: Tensor, student_NS: Tensor) -> Tensor:
    """Return `|G_T - G_S|² / N²` (Frobenius) of the similarity matrices."""
    return (similarities(teacher_ND) - similarities(student_NS)).square().mean()


@STRATEGIES.register("sp")
class SP(RelationalStrategy):
    """Pairwise similarities within the global batch."""

    Config = SPConfig

    def __init__(self, config: SPConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.weight = config.weight

    def compare(self, student_NS: Tensor, teacher_ND: Tensor) -> LossOutput:
        return LossOutput(self.weight * similarity_loss(teacher_ND, student_NS))
