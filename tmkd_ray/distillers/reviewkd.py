"""ReviewKD: Chen et al. 2021, "Distilling knowledge via knowledge review", CVPR, arXiv 2104.09044.

The paper's residual learning framework: attention based fusion (ABF) and the hierarchical context loss (HCL).
As in the authors' code, the penultimate feature is one more, last stage, and the teacher's maps are those
before the activation.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, MapStrategy, StrategyConfig, pool_to
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

_CONTEXTS = (4, 2, 1)
"""Height and width that HCL pools to, beside the map itself."""


class ReviewKDConfig(StrategyConfig):
    """Beside cross-entropy of weight 1. The authors set the weight per pair, from 0.6 to 8 on CIFAR-100 (5 for
    resnet32x4 and resnet8x4), and warm it up: `kd_weight: {start: 0, end: 5, epochs: 20}`.
    """

    name: str = "reviewkd"
    width: int = Field(default=512, ge=1, description="greatest width of the fused maps")


def hierarchical_context_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the mean squared error of the maps and of the maps pooled to 4, 2 and 1 pixels (where smaller).

    Each level weighs half of the one before; the weights sum to one.
    """
    loss = F.mse_loss(student_BCHW, teacher_BCHW)
    weight = total = 1.0
    for size in _CONTEXTS:
        if size < student_BCHW.shape[2]:
            weight /= 2
            total += weight
            student_pooled, teacher_pooled = (pool_to(m, (size, size)) for m in (student_BCHW, teacher_BCHW))
            loss = loss + weight * F.mse_loss(student_pooled, teacher_pooled)
    return loss / total


class AttentionFusion(nn.Module):
    """ABF: a stage of the student, fused with what came from the later ones, pixel by pixel.

    Args:
        size: (height, width) of the teacher's map, and of what comes out.
        fuses: false for the last stage, which nothing comes after.
    """

    def __init__(self, in_width: int, width: int, out_width: int, size: tuple[int, int], fuses: bool) -> None:
        super().__init__()
        self.size = size
        self.reduce = _normalized_convolution(in_width, width, 1)
        self.expand = _normalized_convolution(width, out_width, 3)
        self.attention = nn.Conv2d(2 * width, 2, 1) if fuses else None

    def forward(self, map_BCHW: Tensor, later_BCHW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map to compare with the teacher's, and the fused one to hand to the stage before."""
        fused_BCHW: Tensor = self.reduce(map_BCHW)
        if self.attention is not None:
            assert later_BCHW is not None
            later_BCHW = _resized(later_BCHW, fused_BCHW.shape[2:])
            share_B2HW = torch.sigmoid(self.attention(torch.cat([fused_BCHW, later_BCHW], dim=1)))
            fused_BCHW = fused_BCHW * share_B2HW[:, :1] + later_BCHW * share_B2HW[:, 1:]
        fused_BCHW = _resized(fused_BCHW, self.size)
        return self.expand(fused_BCHW), fused_BCHW


def _normalized_convolution(in_width: int, out_width: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_width, out_width, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_width))


def _resized(map_BCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    return map_BCHW if map_BCHW.shape[2:] == size else F.interpolate(map_BCHW, size, mode="nearest")


@STRATEGIES.register("reviewkd")
class ReviewKD(MapStrategy):
    """Every stage of the teacher is learned by the student's same stage and all its later ones together."""

    Config = ReviewKDConfig
    requires = frozenset({"preactivation_maps", "feature"})

    def __init__(self, config: ReviewKDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        assert spec.teacher_width is not None
        width = min(config.width, spec.student_width)
        levels = [*self.pairs, ((spec.student_width, 1, 1), (spec.teacher_width, 1, 1))]
        self.fusions = nn.ModuleList(
            AttentionFusion(student[0], width, teacher[0], teacher[1:], fuses=index < len(self.pairs))
            for index, (student, teacher) in enumerate(levels)
        )

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        pairs = self.pair(student.feature_maps, teacher.preactivation_maps)
        levels = [*pairs, (student.feature[:, :, None, None], teacher.feature[:, :, None, None])]
        losses = []
        fused = None
        for fusion, (student_BCHW, teacher_BCHW) in zip(reversed(self.fusions), reversed(levels), strict=True):
            out_BCHW, fused = fusion(student_BCHW, fused)
            losses.append(hierarchical_context_loss(out_BCHW.float(), teacher_BCHW.float()))
        return LossOutput(torch.stack(losses).sum())
