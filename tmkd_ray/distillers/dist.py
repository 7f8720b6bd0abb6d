"""DIST: Huang et al. 2022, "Knowledge distillation from a stronger teacher", NeurIPS, arXiv 2205.10536."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, LogitStrategy, LogitStrategyConfig
from tmkd_ray.losses import gather_from_workers, gather_with_gradient
from tmkd_ray.types import LossOutput


class DISTConfig(LogitStrategyConfig):
    """The authors' values for CIFAR-100, beside cross-entropy of weight 1; on ImageNet temperature 1."""

    name: str = "dist"
    temperature: float = Field(default=4.0, gt=0)
    inter_weight: float = Field(default=2.0, ge=0, description="beta of the paper")
    intra_weight: float = Field(default=2.0, ge=0, description="gamma of the paper")


def pearson_distance(a_BC: Tensor, b_BC: Tensor) -> Tensor:
    """Return 1 minus Pearson's correlation of each row, averaged over rows: from 0 to 2.

    A row without any spread correlates with nothing: its distance is 1 and it has no gradient.
    """
    return 1.0 - (_unit_deviation(a_BC) * _unit_deviation(b_BC)).sum(dim=1).mean()


def _unit_deviation(values_BC: Tensor) -> Tensor:
    deviation_BC = values_BC - values_BC.mean(dim=1, keepdim=True)
    length_B1 = torch.linalg.vector_norm(deviation_BC, dim=1, keepdim=True)
    rounding_B1 = 1e-6 * torch.linalg.vector_norm(values_BC, dim=1, keepdim=True)
    return deviation_BC / torch.where(length_B1 > rounding_B1, length_B1, torch.inf)


def dist_losses(
    teacher_logits_NC: Tensor, student_logits_NC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (inter-class, intra-class) loss of the softened probabilities, times T² as in the authors' code.

    Inter-class: correlation over the classes, sample by sample. Intra-class: over the samples, class by class.
    """
    teacher = F.softmax(teacher_logits_NC.float() / temperature, dim=1)
    student = F.softmax(student_logits_NC.float() / temperature, dim=1)
    scale = temperature**2
    return scale * pearson_distance(student, teacher), scale * pearson_distance(student.T, teacher.T)


@STRATEGIES.register("dist")
class DIST(LogitStrategy):
    """`beta inter + gamma intra`; the intra-class part correlates over the global batch."""

    Config = DISTConfig

    def __init__(self, config: DISTConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.config = config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor) -> LossOutput:
        teacher_NC, _ = gather_from_workers(teacher_BC)
        inter, intra = dist_losses(teacher_NC, gather_with_gradient(student_BC), self.config.temperature)
        loss = self.config.inter_weight * inter + self.config.intra_weight * intra
        return LossOutput(loss, {"inter": inter, "intra": intra})
