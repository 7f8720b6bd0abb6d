"""PKT: Passalis and Tefas 2018, "Learning deep representations with probabilistic knowledge transfer", ECCV,
arXiv 1803.10837.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, RelationalStrategy, StrategyConfig
from tmkd_ray.types import LossOutput

_EPSILON = 1e-7
"""Added to probabilities before the logarithm: features in opposite directions have probability zero."""


class PKTConfig(StrategyConfig):
    """The loss, a mean over N² small numbers, is scaled as in the comparison that CRD's authors made
    (Tian et al. 2020, arXiv 1910.10699), beside cross-entropy of weight 1.
    """

    name: str = "pkt"
    weight: float = Field(default=30_000.0, gt=0)


def neighbour_probabilities(feature_NS: Tensor) -> Tensor:
    """Return [N, N]: how probably each sample (row) picks each one as its neighbour; rows sum to one.

    Proportional to the cosine kernel of the paper, `(cos + 1) / 2`. A sample is its own neighbour too, as in
    the authors' code.
    """
    unit_NS = F.normalize(feature_NS, dim=1)
    kernel_NN = (unit_NS @ unit_NS.T + 1.0) / 2.0
    return kernel_NN / kernel_NN.sum(dim=1, keepdim=True)


def probabilistic_loss(teacher_ND: Tensor, student_NS: Tensor) -> Tensor:
    """Return the KL divergence of the student's neighbour probabilities from the teacher's, over N² as the
    authors' code has it (the mean over rows of each row's divergence, over N).
    """
    teacher_NN = neighbour_probabilities(teacher_ND)
    student_NN = neighbour_probabilities(student_NS)
    return (teacher_NN * ((teacher_NN + _EPSILON) / (student_NN + _EPSILON)).log()).mean()


@STRATEGIES.register("pkt")
class PKT(RelationalStrategy):
    """Neighbour probabilities within the global batch."""

    Config = PKTConfig

    def __init__(self, config: PKTConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.weight = config.weight

    def compare(self, student_NS: Tensor, teacher_ND: Tensor) -> LossOutput:
        return LossOutput(self.weight * probabilistic_loss(teacher_ND, student_NS))
