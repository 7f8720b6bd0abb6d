"""KD: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", arXiv 1503.02531."""

from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, LogitStrategy, LogitStrategyConfig
from tmkd_ray.losses import kl_divergence
from tmkd_ray.types import LossOutput


class KDConfig(LogitStrategyConfig):
    """The field's value on CIFAR-100, with kd_weight 0.9 and ce_weight 0.1; on ImageNet 1, and 0.5 each."""

    name: str = "kd"
    temperature: float = Field(default=4.0, gt=0)


@STRATEGIES.register("kd")
class KD(LogitStrategy):
    """`T² KL(softmax(z_T / T) ‖ softmax(z_S / T))`, averaged over the batch."""

    Config = KDConfig

    def __init__(self, config: KDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.temperature = config.temperature

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor) -> LossOutput:
        return LossOutput(kl_divergence(teacher_BC, student_BC, self.temperature))
