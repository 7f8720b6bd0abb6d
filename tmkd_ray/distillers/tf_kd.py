"""Tf-KD (regularisation): Yuan et al. 2020, "Revisiting knowledge distillation via label smoothing
regularization", CVPR, arXiv 1909.11723, §4.

A virtual teacher, right with probability `correct_probability` and even among the other classes. As in the
authors' code, the softmax at the temperature is taken of these probabilities themselves, and the student is not
softened. It needs no teacher: it can be the strategy of `distiller: alone`.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, Strategy, StrategyConfig
from tmkd_ray.losses import kl_divergence
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class TfKDConfig(StrategyConfig):
    """The authors' values for ResNet-18 on CIFAR-100, beside ce_weight 0.9 and kd_weight 0.1.

    They set temperature (10 to 40) and weights per network.
    """

    name: str = "tf_kd"
    correct_probability: float = Field(default=0.99, gt=0, lt=1, description="a of the paper")
    temperature: float = Field(default=20.0, gt=0)


def virtual_probabilities(labels_B: Tensor, num_classes: int, correct_probability: float) -> Tensor:
    """Return [B, C]: `correct_probability` for the label, the rest shared evenly."""
    label_BC = F.one_hot(labels_B, num_classes).float()
    others = (1.0 - correct_probability) / max(num_classes - 1, 1)
    return others + (correct_probability - others) * label_BC


@STRATEGIES.register("tf_kd")
class TfKD(Strategy):
    """`KL(softmax(p / T) ‖ softmax(z_S))`, averaged over the batch; p: the virtual teacher's probabilities."""

    Config = TfKDConfig
    requires = frozenset()
    trains_classifier = True

    def __init__(self, config: TfKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.config = config

    def forward(self, student: ModelOutput, teacher: TeacherOutput | None, labels_B: Tensor) -> LossOutput:
        config = self.config
        with torch.autocast(labels_B.device.type, enabled=False):
            num_classes = student.logits.shape[1]
            virtual_BC = virtual_probabilities(labels_B, num_classes, config.correct_probability)
            return LossOutput(kl_divergence(virtual_BC / config.temperature, student.logits, 1.0))
