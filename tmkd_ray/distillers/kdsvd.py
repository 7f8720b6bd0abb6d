"""KDSVD: Lee, Kim, Song 2018, "Self-supervised knowledge distillation using singular value decomposition",
ECCV, arXiv 1807.06819.

Theirs: right singular vectors of each map, the student's aligned with the teacher's, and the radial basis
functions between those of neighbouring stages, compared by squared error. Theirs unfolds a map to pixels ×
channels, so that student and teacher must be equally wide. Ours unfolds it to (channels, rows) × columns, as
mdistiller does to compare unlike networks: the vectors lie along the columns, of which both have as many. A
singular vector has no sign of its own, but the functions between two stages depend on it: the teacher's are
turned so that their entries sum to more than zero. Left out: the separate training stage of the paper.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, MapStrategy, StrategyConfig, pool_to_smaller
from tmkd_ray.errors import UserError
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

_CANDIDATES = 3
"""So many more vectors of the student than of the teacher take part in the alignment."""

_LEAST_GAP = 1e-5
"""Eigenvalues closer than this part of the largest have no directions of their own in float32."""


class KDSVDConfig(StrategyConfig):
    """The values of the field's comparisons, beside cross-entropy of weight 1."""

    name: str = "kdsvd"
    num_vectors: int = Field(default=1, ge=1)
    weight: float = Field(default=1.0, gt=0)


class _Eigenvectors(torch.autograd.Function):
    """Eigenvectors of symmetric matrices [B, n, n], as columns, of the largest eigenvalue first.

    The derivative divides by the gaps between eigenvalues. Where one is too small, the vectors are not
    determined and the pair has no derivative, instead of an infinite one.
    """

    @staticmethod
    def forward(ctx: Any, matrix_Bnn: Tensor) -> tuple[Tensor, Tensor]:
        values_Bn, vectors_Bnn = (found.flip(-1) for found in torch.linalg.eigh(matrix_Bnn))
        ctx.save_for_backward(values_Bn, vectors_Bnn)
        ctx.mark_non_differentiable(values_Bn)
        return values_Bn, vectors_Bnn

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _, gradient_Bnn = gradients
        values_Bn, vectors_Bnn = ctx.saved_tensors
        gap_Bnn = values_Bn[:, None, :] - values_Bn[:, :, None]
        determined_Bnn = gap_Bnn.abs() > _LEAST_GAP * values_Bn[:, :1, None]
        along_Bnn = torch.where(determined_Bnn, (vectors_Bnn.mT @ gradient_Bnn) / gap_Bnn, 0.0)
        whole_Bnn: Tensor = vectors_Bnn @ along_Bnn @ vectors_Bnn.mT
        return (whole_Bnn + whole_Bnn.mT) / 2


def singular_vectors(map_BCHW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest singular values [B, count], without gradient, and right vectors [B, W, count].

    Of the map as a matrix of (channels, rows) × columns; fewer where there are fewer columns.
    """
    matrix_BMW = map_BCHW.flatten(1, 2)
    values_BW, vectors_BWW = _Eigenvectors.apply(matrix_BMW.mT @ matrix_BMW)
    return values_BW[:, :count].clamp(min=0).sqrt(), vectors_BWW[:, :, :count]


def aligned(student_BWM: Tensor, teacher_BWK: Tensor) -> Tensor:
    """Return [B, W, K]: for each vector of the teacher the student's most parallel one, of the same sign."""
    cosine_BMK = student_BWM.detach().mT @ teacher_BWK
    picked_B1K = cosine_BMK.abs().argmax(dim=1, keepdim=True)
    sign_B1K = cosine_BMK.gather(1, picked_B1K).sign()
    return student_BWM.gather(2, picked_B1K.expand(-1, student_BWM.shape[1], -1)) * sign_B1K


def radial_basis(late_BWK: Tensor, early_BWK: Tensor) -> Tensor:
    """Return [B, W_late, W_early, K]: `exp(-(late - early)² / 8)` of all pairs of entries."""
    return (-(late_BWK[:, :, None] - early_BWK[:, None]).square() / 8.0).exp()


@STRATEGIES.register("kdsvd")
class KDSVD(MapStrategy):
    """How the main singular vectors change from stage to stage.

    Raises:
        UserError: the two models have only one stage in common.
    """

    Config = KDSVDConfig

    def __init__(self, config: KDSVDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        if len(self.pairs) < 2:
            raise UserError(
                f"distiller.strategy=kdsvd compares neighbouring stages, and {spec.student_name} and "
                f"{spec.teacher_name} have only one in common; choose another model or strategy"
            )
        self.config = config

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        stages = []
        with torch.autocast(labels_B.device.type, enabled=False):
            for pair in self.pair(student.feature_maps, teacher.feature_maps):
                stages.append(self._vectors(*pool_to_smaller(*(map_BCHW.float() for map_BCHW in pair))))
            losses = []
            for (early_S, early_T), (late_S, late_T) in pairwise(stages):
                difference = radial_basis(late_S, early_S) - radial_basis(late_T, early_T)
                losses.append(difference.square().sum() / len(labels_B))
            return LossOutput(self.config.weight * torch.stack(losses).sum())

    def _vectors(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return both models' vectors, weighted by the teacher's singular values (of unit length together)."""
        count = self.config.num_vectors
        values_BK, teacher_BWK = singular_vectors(teacher_BCHW, count)
        teacher_BWK = teacher_BWK * torch.where(teacher_BWK.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
        _, student_BWM = singular_vectors(student_BCHW, count + _CANDIDATES)
        weight_B1K = F.normalize(values_BK, dim=1)[:, None]
        return aligned(student_BWM, teacher_BWK) * weight_B1K, teacher_BWK * weight_B1K
