"""The configuration of an experiment: one typed tree, a file for each of its parts.

YAML file, then dotted overrides (`training.epochs=20`); see `config_reading` for how it is read.
"""

from tmkd_ray.config.experiment import DEFAULT_VIEWS, ClusterConfig, ExperimentConfig, StudentConfig
from tmkd_ray.config.knowledge import KnowledgeConfig, PoolConfig, TeacherPoolConfig, ViewPoolConfig
from tmkd_ray.config.objective import ObjectiveConfig, resolve_objective
from tmkd_ray.config.report import ReportConfig
from tmkd_ray.config.teacher import ClipArchitecture, TeacherConfig, TextTeacherConfig, VisualTeacherConfig
from tmkd_ray.config.training import ClipTrainingConfig, Seed, TrainingConfig

__all__ = [
    "DEFAULT_VIEWS",
    "ClipArchitecture",
    "ClipTrainingConfig",
    "ClusterConfig",
    "ExperimentConfig",
    "KnowledgeConfig",
    "ObjectiveConfig",
    "PoolConfig",
    "ReportConfig",
    "Seed",
    "StudentConfig",
    "TeacherConfig",
    "TeacherPoolConfig",
    "TextTeacherConfig",
    "TrainingConfig",
    "ViewPoolConfig",
    "VisualTeacherConfig",
    "resolve_objective",
]
