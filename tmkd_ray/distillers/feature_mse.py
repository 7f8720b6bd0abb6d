"""Feature MSE with a learned projection, the strongest single loss of CLIP-KD.

Yang et al. 2024, "CLIP-KD: an empirical study of CLIP model distillation", CVPR, arXiv 2307.12732;
the idea of regressing a teacher's feature is FitNets', Romero et al. 2015, arXiv 1412.6550.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, Strategy, StrategyConfig
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class FeatureMSEConfig(StrategyConfig):
    name: str = "feature_mse"


@STRATEGIES.register("feature_mse")
class FeatureMSE(Strategy):
    """Mean squared error between the projected student feature and the teacher's, over batch and width."""

    Config = FeatureMSEConfig
    requires = frozenset({"feature"})

    def __init__(self, config: FeatureMSEConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        assert spec.teacher_width is not None
        self.projection = nn.Linear(spec.student_width, spec.teacher_width)

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        return LossOutput(F.mse_loss(self.projection(student.feature).float(), teacher.feature.float()))
