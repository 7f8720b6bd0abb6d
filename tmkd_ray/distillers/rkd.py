"""RKD: Park et al. 2019, "Relational knowledge distillation", CVPR, arXiv 1904.05068."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, RelationalStrategy, StrategyConfig
from tmkd_ray.types import LossOutput


class RKDConfig(StrategyConfig):
    """The weights of the paper's CIFAR-100 and Tiny ImageNet experiments, beside cross-entropy of weight 1."""

    name: str = "rkd"
    distance_weight: float = Field(default=25.0, ge=0)
    angle_weight: float = Field(default=50.0, ge=0)


def relations(feature_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the potentials of the paper's §3.2: distances over their mean [N, N], and angles [N, N, N].

    Entry (j, i, k) of the angles is the cosine of the angle at j between i and k; 0 where j is i or k. The mean
    distance is over pairs of distinct samples. Memory grows with N³: 64 MiB per copy at a global batch of 256.
    """
    count = len(feature_NS)
    difference = feature_NS[None, :] - feature_NS[:, None]
    length_NN = torch.linalg.vector_norm(difference, dim=2)
    # Equal features have no direction; without this their gradient would be divided by zero.
    direction = difference / torch.where(length_NN > 0, length_NN, 1.0)[:, :, None]
    mean = length_NN.sum() / max(count * (count - 1), 1)
    return length_NN / torch.where(mean > 0, mean, 1.0), direction @ direction.mT


def relational_losses(teacher_ND: Tensor, student_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Return (distance, angle) loss: Huber's with threshold 1, averaged over the N² pairs and N³ triplets.

    The paper sums over pairs and triplets of distinct samples; the others are zero here. The weights in use are
    those of the mean that the authors' code takes.
    """
    with torch.no_grad():
        teacher_distance, teacher_angle = relations(teacher_ND)
    student_distance, student_angle = relations(student_NS)
    distance = F.smooth_l1_loss(student_distance, teacher_distance)
    return distance, F.smooth_l1_loss(student_angle, teacher_angle)


@STRATEGIES.register("rkd")
class RKD(RelationalStrategy):
    """Distance-wise and angle-wise relations of the global batch."""

    Config = RKDConfig

    def __init__(self, config: RKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.config = config

    def compare(self, student_NS: Tensor, teacher_ND: Tensor) -> LossOutput:
        distance, angle = relational_losses(teacher_ND, student_NS)
        loss = self.config.distance_weight * distance + self.config.angle_weight * angle
        return LossOutput(loss, {"distance": distance, "angle": angle})
