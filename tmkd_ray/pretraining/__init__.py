"""Label-free pre-training: a small encoder learns a CLIP's embedding of the image; one objective a file."""

from tmkd_ray.pretraining.base import (
    PRETRAINERS,
    EmbeddingStudent,
    Pretrainer,
    PretrainingConfig,
    PretrainingSpec,
    ZeroShotStudent,
    build_pretrainer,
    build_projector,
    read_projector,
)
from tmkd_ray.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = [
    "PRETRAINERS",
    "EmbeddingStudent",
    "Pretrainer",
    "PretrainingConfig",
    "PretrainingSpec",
    "ZeroShotStudent",
    "build_pretrainer",
    "build_projector",
    "read_projector",
]
