"""MLKD (or MLLD): Jin, Wang, Lin 2023, "Multi-level logit distillation", CVPR, pp. 24276-24285.

Theirs: the three levels, each summed over several temperatures. Left out: the second, strongly augmented view
of each image that their recipe adds, and the halving of some terms by teacher confidence in their code.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, LogitStrategyConfig, Strategy
from tmkd_ray.losses import gather_from_workers, gather_with_gradient, kl_divergence, standardize
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class MLKDConfig(LogitStrategyConfig):
    """The temperatures of the authors' code; their levels weigh the same, kd_weight 0.9 beside ce_weight 0.1.

    `standardize_logits` acts on the instance level alone, as in the code of Sun et al. 2024, where MLKD with it
    does best: z-scored probabilities are so even that the other two levels would vanish.
    """

    name: str = "mlkd"
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(2.0, 3.0, 4.0, 5.0, 6.0), min_length=1, description="the prediction augmentation of the paper"
    )
    instance_weight: float = Field(default=1.0, ge=0)
    batch_weight: float = Field(default=1.0, ge=0)
    class_weight: float = Field(default=1.0, ge=0)


def correlation_losses(
    teacher_logits_NC: Tensor, student_logits_NC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (batch level, class level): `|P_T P_Tᵀ - P_S P_Sᵀ|² / N` and `|P_Tᵀ P_T - P_Sᵀ P_S|² / C`.

    P [N, C] are the softened probabilities; the norm is Frobenius'. The first compares how alike samples are
    predicted, the second which classes are predicted together.
    """
    teacher = F.softmax(teacher_logits_NC.float() / temperature, dim=1)
    student = F.softmax(student_logits_NC.float() / temperature, dim=1)
    samples, classes = teacher.shape
    batch_level = (teacher @ teacher.T - student @ student.T).square().sum() / samples
    class_level = (teacher.T @ teacher - student.T @ student).square().sum() / classes
    return batch_level, class_level


@STRATEGIES.register("mlkd")
class MLKD(Strategy):
    """Instance (KL), batch and class level; the latter two of the global batch."""

    Config = MLKDConfig
    requires = frozenset({"logits"})
    trains_classifier = True

    def __init__(self, config: MLKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.config = config

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        config = self.config
        with torch.autocast(student.logits.device.type, enabled=False):
            student_BC, teacher_BC = student.logits.float(), teacher.logits.float()
            student_NC, (teacher_NC, _) = gather_with_gradient(student_BC), gather_from_workers(teacher_BC)
            if config.standardize_logits:
                student_BC, teacher_BC = standardize(student_BC), standardize(teacher_BC)
            levels = torch.stack(
                [
                    torch.stack(
                        [
                            kl_divergence(teacher_BC, student_BC, temperature),
                            *correlation_losses(teacher_NC, student_NC, temperature),
                        ]
                    )
                    for temperature in config.temperatures
                ]
            ).sum(dim=0)
        instance, batch, per_class = levels.unbind()
        loss = config.instance_weight * instance + config.batch_weight * batch + config.class_weight * per_class
        return LossOutput(loss, {"instance_level": instance, "batch_level": batch, "class_level": per_class})
