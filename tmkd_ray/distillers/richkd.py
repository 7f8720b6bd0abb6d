"""RichKD, its logit part: Mansourian, Babaei, Kasaei 2025, "Enriching knowledge distillation with cross-modal
teacher fusion", CVPR Findings 2026, arXiv 2511.09286.

Theirs: KD from the fused logits `α z_T + (1 - α) z_CLIP`, α 0.7, temperature 3, kd_weight 3 beside
cross-entropy of weight 1. Ours: z_CLIP is at CLIP's own temperature, as `text_logits` are; their code fuses
bare cosines, which change the target little. Their feature part, CRD against the fused features of teacher
and CLIP, is not here.
"""

from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec
from tmkd_ray.distillers.kd import KD, KDConfig
from tmkd_ray.types import TeacherOutput


class RichKDConfig(KDConfig):
    """The values of the authors' CIFAR-100 configuration."""

    name: str = "richkd"
    temperature: float = Field(default=3.0, gt=0)
    teacher_share: float = Field(default=0.7, ge=0, le=1, description="alpha of the paper; 1 is plain KD")


def fused_logits(teacher_logits_BC: Tensor, text_logits_BC: Tensor, teacher_share: float) -> Tensor:
    """Return `α z_T + (1 - α) z_CLIP`."""
    return teacher_share * teacher_logits_BC.float() + (1.0 - teacher_share) * text_logits_BC.float()


@STRATEGIES.register("richkd")
class RichKD(KD):
    """KD from the fused logits of the visual teacher and CLIP's zero-shot classifier."""

    Config = RichKDConfig
    requires = frozenset({"logits", "text_logits"})

    def __init__(self, config: RichKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.teacher_share = config.teacher_share

    def target_logits(self, teacher: TeacherOutput) -> Tensor:
        assert teacher.text_logits is not None
        return fused_logits(teacher.logits, teacher.text_logits, self.teacher_share)
