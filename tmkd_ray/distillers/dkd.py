"""DKD: Zhao et al. 2022, "Decoupled knowledge distillation", CVPR, arXiv 2203.08679."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, LogitStrategy, LogitStrategyConfig
from tmkd_ray.types import LossOutput


class DKDConfig(LogitStrategyConfig):
    """The paper's CIFAR-100 values, beside ce_weight 1.

    Its authors warm the strategy up, `kd_weight: {start: 0, end: 1, epochs: 20}`, and set beta per pair, from 2
    to 8; on ImageNet temperature 1, beta 0.5 or 2.
    """

    name: str = "dkd"
    temperature: float = Field(default=4.0, gt=0)
    target_weight: float = Field(default=1.0, ge=0, description="alpha of the paper")
    non_target_weight: float = Field(default=8.0, ge=0, description="beta of the paper")


def decoupled_kl(
    teacher_logits_BC: Tensor, student_logits_BC: Tensor, labels_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (TCKD, NCKD), each times T² and averaged over the batch (eq. 7 of the paper).

    TCKD: KL of the binary distributions (target, all others). NCKD: KL among the non-target classes.
    KD = TCKD + (1 - p_T(target)) NCKD, sample by sample.
    """
    teacher = F.log_softmax(teacher_logits_BC.float() / temperature, dim=1)
    student = F.log_softmax(student_logits_BC.float() / temperature, dim=1)
    target_BC = F.one_hot(labels_B, teacher.shape[1]).bool()

    def split(log_probability_BC: Tensor) -> tuple[Tensor, Tensor]:
        others_BC = log_probability_BC.masked_fill(target_BC, -torch.inf)
        log_others_B1 = others_BC.logsumexp(dim=1, keepdim=True)
        log_target_B1 = log_probability_BC.masked_select(target_BC)[:, None]
        # The target column is kept at a finite value and masked out of the sum: inf - inf has no gradient.
        log_non_target_BC = log_probability_BC - log_others_B1
        return torch.cat([log_target_B1, log_others_B1], dim=1), log_non_target_BC

    teacher_binary, teacher_others = split(teacher)
    student_binary, student_others = split(student)
    scale = temperature**2 / len(labels_B)
    tckd = (teacher_binary.exp() * (teacher_binary - student_binary)).sum() * scale
    difference = (teacher_others - student_others).masked_fill(target_BC, 0.0)
    nckd = (teacher_others.masked_fill(target_BC, -torch.inf).exp() * difference).sum() * scale
    return tckd, nckd


@STRATEGIES.register("dkd")
class DKD(LogitStrategy):
    """`alpha TCKD + beta NCKD`."""

    Config = DKDConfig

    def __init__(self, config: DKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.config = config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor) -> LossOutput:
        tckd, nckd = decoupled_kl(teacher_BC, student_BC, labels_B, self.config.temperature)
        loss = self.config.target_weight * tckd + self.config.non_target_weight * nckd
        return LossOutput(loss, {"tckd": tckd, "nckd": nckd})
