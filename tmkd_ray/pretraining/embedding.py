"""Plain embedding distillation: the distance to the teacher's embedding, as in CLIP-KD's feature distillation.

Yang et al. 2024, "CLIP-KD: An empirical study of CLIP model distillation", CVPR, arXiv 2307.12732.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from tmkd_ray.pretraining.base import PRETRAINERS, Pretrainer, PretrainingConfig, PretrainingSpec
from tmkd_ray.types import LossOutput


class EmbeddingConfig(PretrainingConfig):
    """`mse` is the squared distance of the student's embedding as it is; `cosine` is one minus the cosine."""

    name: Literal["embedding"] = "embedding"
    loss: Literal["mse", "cosine"] = "mse"


def squared_distance(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return `|s - t|²`, summed over the E dimensions (of unit embeddings a mean would be tiny), batch mean."""
    return (student_BE - teacher_BE).square().sum(dim=1).mean()


def cosine_distance(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return `1 - cos(s, t)`, batch mean."""
    return 1 - F.cosine_similarity(student_BE, teacher_BE, dim=1).mean()


_DISTANCES = {"mse": squared_distance, "cosine": cosine_distance}


@PRETRAINERS.register("embedding")
class Embedding(Pretrainer):
    """Distance of the student's embedding to the teacher's, image by image."""

    Config = EmbeddingConfig

    def __init__(self, config: EmbeddingConfig, spec: PretrainingSpec) -> None:
        super().__init__(config, spec)
        self.loss: Literal["mse", "cosine"] = config.loss

    def compare(self, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
        loss = _DISTANCES[self.loss](student_BE, teacher_BE)
        return LossOutput(loss, {self.loss: loss})
