"""What the benchmarks of training share: a student of CIFAR-100's sizes and what it learns from, all noise.

Nothing here is worth learning: only the work is that of a real run.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import NUM_CLASSES
from torch import Tensor

from tmkd_ray.augmentation import AugmentationConfig, draw_parameters, sample_keys
from tmkd_ray.config import TrainingConfig
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge import KnowledgeArrays, KnowledgeLayout
from tmkd_ray.models import build_model
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.training.loader import Batch, BatchSource
from tmkd_ray.training.student import StudentTask, resident_source
from tmkd_ray.types import TaskSpec

VIEWS = ("original", "edge", "high_frequency")
AUGMENTATION = AugmentationConfig(recipe="cifar")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CLASS_NAMES = tuple(f"class {label}" for label in range(NUM_CLASSES))
STEPS_FILE = "steps.json"
_NUM_VALIDATION = 16
"""Images; validation is in no figure."""


@dataclass(frozen=True)
class Sizes:
    """Of the data: images, variants of each, the teachers' widths D and E, pixels."""

    images: int
    variants: int = 4
    feature_width: int = 256
    clip_width: int = 512
    image_size: int = 32

    @property
    def task(self) -> TaskSpec:
        return TaskSpec(CLASS_NAMES, self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, 3)

    @property
    def layout(self) -> KnowledgeLayout:
        return KnowledgeLayout(
            VIEWS, self.variants, self.image_size, self.feature_width, self.clip_width, dtype="float16"
        )


def draw_knowledge(sizes: Sizes) -> KnowledgeArrays:
    """Return a split of a store, as it is read: float16 knowledge beside uint8 images."""
    generator = np.random.default_rng(0)
    ids = np.array([f"{row:08}" for row in range(sizes.images)])
    shape = (sizes.images, sizes.variants, len(VIEWS))

    def normal(width: int) -> np.ndarray:
        return generator.standard_normal((*shape, width), dtype=np.float32)

    clip = normal(sizes.clip_width)
    clip /= np.linalg.norm(clip, axis=-1, keepdims=True)
    return KnowledgeArrays(
        sizes.layout,
        ids=ids,
        labels=np.arange(sizes.images) % NUM_CLASSES,
        images=generator.integers(0, 256, (sizes.images, *sizes.image_shape), dtype=np.uint8),
        augmentation=draw_parameters(
            AUGMENTATION, sample_keys(ids, 0), np.arange(sizes.variants), sizes.image_size
        ),
        feature=np.maximum(normal(sizes.feature_width), 0).astype(np.float16),
        clip_embedding=clip.astype(np.float16),
    )


def draw_constants(sizes: Sizes) -> TeacherConstants:
    """Return a classifier and a text bank."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return TeacherConstants(
        VIEWS,
        normal(NUM_CLASSES, sizes.feature_width) / sizes.feature_width**0.5,
        torch.zeros(NUM_CLASSES),
        F.normalize(normal(len(VIEWS), NUM_CLASSES, sizes.clip_width), dim=2),
        clip_temperature=0.01,
    )


def training(batch_size: int, epochs: int = 1, num_workers: int = 1) -> TrainingConfig:
    """Return the configuration of a training in float32; everything else is the default."""
    return TrainingConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=0.01,
        num_workers=num_workers,
        use_gpu=False,
        checkpoint_every=epochs,
        loggers=(),
    )


def build_task(
    model: str,
    sizes: Sizes,
    source: BatchSource,
    distiller: str,
    config: TrainingConfig,
    constants: TeacherConstants | None = None,
    kind: type[StudentTask] = StudentTask,
) -> StudentTask:
    """Return a student with fresh weights and a preset's objective.

    Args:
        constants: of the teachers; None: made up.
    """
    section = DistillerConfig.model_validate(distiller)
    if section.teacher == "none":
        constants = None
    elif constants is None:
        constants = draw_constants(sizes)
    torch.manual_seed(0)
    return kind(
        build_model(model, sizes.task),
        source,
        sizes.layout,
        np.zeros((_NUM_VALIDATION, *sizes.image_shape), dtype=np.uint8),
        np.zeros(_NUM_VALIDATION, dtype=np.int64),
        constants,
        section,
        VIEWS,
        config,
        MEAN,
        STD,
    )


class TimedStudent(StudentTask):
    """Notes when it was made and when each step ended, by `time.time`; writes it beside the weights."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked = self.built = time.time()
        self.ended: list[float] = []

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        self.ended.append(time.time())

    def save(self, folder: str, weights: Mapping[str, Tensor]) -> None:
        super().save(folder, weights)
        facts = {
            "asked": self.asked,
            "built": self.built,
            "ended": self.ended,
            "threads": torch.get_num_threads(),
        }
        (Path(folder) / STEPS_FILE).write_text(json.dumps(facts))


def timed_task(model: str, sizes: Sizes, config: TrainingConfig, device: torch.device) -> TimedStudent:
    """Return a worker's TimedStudent, which learns cached TMKD."""
    asked = time.time()
    source = resident_source(draw_knowledge(sizes), config, AUGMENTATION, device, with_teacher=True)
    task = build_task(model, sizes, source, "tmkd", config, kind=TimedStudent)
    assert isinstance(task, TimedStudent)
    task.asked = asked
    return task


def mapped(arrays: KnowledgeArrays, folder: Path) -> KnowledgeArrays:
    """Return the same arrays as read-only files mapped into memory, as `map_store` does."""
    files = {}
    for name in ("images", "augmentation", "feature", "clip_embedding"):
        np.save(folder / f"{name}.npy", getattr(arrays, name))
        files[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return replace(arrays, **files)
