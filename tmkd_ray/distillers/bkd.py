"""BKD: Zhang et al. 2021, "Balanced knowledge distillation for long-tailed learning", arXiv 2104.10510.

As in the authors' code: the teacher's softened probabilities are multiplied by the classes' weights and
normalised. The weights are those of Cui et al. 2019, "Class-balanced loss based on effective number of
samples", CVPR, arXiv 1901.05555: the rarer a class, the more its probability counts.
"""

import torch
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec
from tmkd_ray.distillers.kd import KD, KDConfig
from tmkd_ray.losses import kl_divergence
from tmkd_ray.types import LossOutput


class BKDConfig(KDConfig):
    """The authors' values for CIFAR-100; cross-entropy and this strategy weigh 1 each."""

    name: str = "bkd"
    temperature: float = Field(default=2.0, gt=0)
    beta: float = Field(default=0.9999, ge=0, lt=1, description="of the effective number; 0 is plain KD")


def class_weights(counts_C: Tensor, beta: float) -> Tensor:
    """Return [C]: the inverse effective numbers, `(1 - β) / (1 - β^n)`, scaled to a mean of one.

    Args:
        counts_C: n, images of each class; a class without any has the weight of a class with one.
    """
    log_power_C = counts_C.double().clamp(min=1) * torch.tensor(beta, dtype=torch.float64).log()
    weights_C = -1.0 / torch.expm1(log_power_C)
    return (weights_C / weights_C.mean()).float()


@STRATEGIES.register("bkd")
class BKD(KD):
    """KD from the class-balanced probabilities of the teacher."""

    Config = BKDConfig
    log_weights: Tensor

    def __init__(self, config: BKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        assert spec.class_counts is not None
        weights_C = class_weights(torch.tensor(spec.class_counts), config.beta)
        self.register_buffer("log_weights", weights_C.log(), persistent=False)

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor) -> LossOutput:
        # A factor of the softened probability is a summand of the softened logit.
        balanced_BC = teacher_BC + self.temperature * self.log_weights
        return LossOutput(kl_divergence(balanced_BC, student_BC, self.temperature))
