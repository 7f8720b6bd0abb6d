"""VID: Ahn et al. 2019, "Variational information distillation for knowledge transfer", CVPR, arXiv 1904.05835.

The paper's loss on the penultimate features, where the mean is a linear function of the student's.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, Strategy, StrategyConfig
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

_LEAST_VARIANCE = 1e-5


class VIDConfig(StrategyConfig):
    """The first variance is the authors' code's; the loss stands beside cross-entropy of weight 1."""

    name: str = "vid"
    initial_variance: float = Field(default=5.0, gt=_LEAST_VARIANCE)


def gaussian_nll(mean_BD: Tensor, variance_D: Tensor, target_BD: Tensor) -> Tensor:
    """Return -log q(t | s) less a constant: the mean over batch and width of `(log σ² + (t - μ)² / σ²) / 2`."""
    return 0.5 * ((target_BD - mean_BD).square() / variance_D + variance_D.log()).mean()


@STRATEGIES.register("vid")
class VID(Strategy):
    """Negative log-likelihood of the teacher's feature under a Gaussian that the student's feature predicts.

    Learned with the student: the linear mean, and one variance per dimension, `softplus(α) + 1e-5`.
    """

    Config = VIDConfig
    requires = frozenset({"feature"})

    def __init__(self, config: VIDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        assert spec.teacher_width is not None
        self.mean = nn.Linear(spec.student_width, spec.teacher_width)
        raw = config.initial_variance - _LEAST_VARIANCE
        inverse_softplus = raw + math.log(-math.expm1(-raw))
        self.raw_variance = nn.Parameter(torch.full((spec.teacher_width,), inverse_softplus))

    @property
    def variance(self) -> Tensor:
        """[D], σ² of each dimension of the teacher's feature."""
        return F.softplus(self.raw_variance) + _LEAST_VARIANCE

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        with torch.autocast(student.feature.device.type, enabled=False):
            mean_BD = self.mean(student.feature.float())
            return LossOutput(gaussian_nll(mean_BD, self.variance, teacher.feature.float()))
