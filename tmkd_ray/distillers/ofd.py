"""OFD: Heo et al. 2019, "A comprehensive overhaul of feature distillation", ICCV, arXiv 1904.01866.

Theirs: the maps before each stage's ReLU, the teacher's through a margin ReLU, the student's through a 1×1
convolution with batch norm, the partial L2 distance. Ours: a distiller holds no teacher, so the margins are not
computed from its batch-norm parameters but measured, which is the paper's definition of them: the mean of a
channel's negative responses over the training images (here: over those seen so far). That is right for the
fused teacher too, which has no batch norm. Where the sizes differ, the larger map is pooled.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, MapStrategy, StrategyConfig, pool_to_smaller
from tmkd_ray.losses import gather_from_workers
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput


class OFDConfig(StrategyConfig):
    """The authors' weight on CIFAR-100, beside cross-entropy of weight 1; on ImageNet 1e-4."""

    name: str = "ofd"
    weight: float = Field(default=1e-3, gt=0)


def partial_l2(student_BCHW: Tensor, teacher_BCHW: Tensor, margin_C: Tensor) -> Tensor:
    """Return the squared distance to `max(teacher, margin)`, summed over a sample, averaged over the batch.

    No distance where that target is not positive and the student is not above it: a negative response is none,
    however negative (eq. 3 and 4 of the paper).
    """
    target_BCHW = torch.maximum(teacher_BCHW, margin_C[:, None, None])
    counts_BCHW = (student_BCHW > target_BCHW) | (target_BCHW > 0)
    return (student_BCHW - target_BCHW).square().mul(counts_BCHW).sum() / len(student_BCHW)


def negative_responses(map_BCHW: Tensor) -> Tensor:
    """Return [2, C]: the sum of each channel's negative values, and their number, both per sample."""
    negative_BCHW = map_BCHW < 0
    sums_C = map_BCHW.clamp(max=0).sum(dim=(0, 2, 3))
    return torch.stack([sums_C, negative_BCHW.sum(dim=(0, 2, 3)).float()]) / len(map_BCHW)


def _connector(in_width: int, out_width: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_width, out_width, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_width))


@STRATEGIES.register("ofd")
class OFD(MapStrategy):
    """Partial L2 distance of the maps before the activation; each earlier stage weighs half of the next one."""

    Config = OFDConfig
    requires = frozenset({"preactivation_maps"})
    responses: Tensor

    def __init__(self, config: OFDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        self.weight = config.weight
        self.connectors = nn.ModuleList(_connector(student[0], teacher[0]) for student, teacher in self.pairs)
        self.widths = [teacher[0] for _, teacher in self.pairs]
        # Means over the batches so far of what `negative_responses` returns, the stages' channels in one row.
        self.register_buffer("responses", torch.zeros(2, sum(self.widths)))
        self.step = 0
        self._measured_last: Tensor | None = None

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        pairs = self.pair(student.preactivation_maps, teacher.preactivation_maps)
        responses = self._measured([teacher_BCHW.float() for _, teacher_BCHW in pairs])
        sums, counts = responses
        # A channel that never is negative gets no margin: zero.
        margins = torch.split(torch.where(counts > 0, sums / counts, 0.0), self.widths)
        losses = []
        for index, (pair, margin_C) in enumerate(zip(pairs, margins, strict=True)):
            student_BCHW, teacher_BCHW = pool_to_smaller(*pair)
            regressed_BCHW = self.connectors[index](student_BCHW).float()
            share = 0.5 ** (len(pairs) - 1 - index)
            losses.append(share * partial_l2(regressed_BCHW, teacher_BCHW.float(), margin_C))
        self._measured_last = responses
        return LossOutput(self.weight * torch.stack(losses).sum())

    def _measured(self, teacher_maps: list[Tensor]) -> Tensor:
        """Return `responses` with the global batch in it; nothing is kept."""
        own = torch.cat([negative_responses(map_BCHW) for map_BCHW in teacher_maps], dim=1)
        every_W, _ = gather_from_workers(own[None])
        return self.responses.lerp(every_W.mean(dim=0), 1.0 / (self.step + 1))

    @torch.no_grad()
    def after_step(self, sample_indices_B: Tensor) -> None:
        """Keep the measure of the global batch, on every worker alike."""
        assert self._measured_last is not None, "forward comes first"
        self.responses.copy_(self._measured_last)
        self._measured_last = None
        self.step += 1
