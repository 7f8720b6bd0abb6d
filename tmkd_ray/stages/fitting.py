"""Fit the teachers, or load those that the configuration names."""

import functools
from dataclasses import dataclass

import torch

from tmkd_ray import storage
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.models import build_model
from tmkd_ray.stages.experiment import Experiment, identity_key, training_identity
from tmkd_ray.stages.training import Outcome, TrainingJob, run_jobs
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.training.clip import ClipTask
from tmkd_ray.training.loop import TrainTask
from tmkd_ray.training.teacher import TeacherTask
from tmkd_ray.views.base import View


@dataclass(frozen=True)
class Fitted:
    """Where a teacher's weights lie, and how they were fitted (None: they were given)."""

    path: str
    outcome: Outcome | None

    @property
    def source(self) -> str:
        return "fitted here" if self.outcome is not None else self.path.rstrip("/").rsplit("/", 1)[-1]


def fit_teacher(experiment: Experiment) -> Fitted:
    """Return the visual teacher's checkpoint: the configured one, or one fitted here (once)."""
    if experiment.config.teacher.visual.checkpoint is None:
        job = teacher_job(experiment)
        run_jobs([job], job.folder)
    teacher = found_teacher(experiment)
    assert teacher is not None
    return teacher


def fit_clip(experiment: Experiment) -> Fitted | None:
    """Return CLIP's folder or name: the configured one, or one fitted here (once); None without CLIP."""
    text = experiment.config.teacher.text
    if text is not None and text.model is None:
        job = clip_job(experiment)
        run_jobs([job], job.folder)
    return found_clip(experiment)


def found_teacher(experiment: Experiment) -> Fitted | None:
    """Return the visual teacher if it is there, without fitting one."""
    visual = experiment.config.teacher.visual
    if visual.checkpoint is not None:
        return Fitted(visual.checkpoint, None)
    job = teacher_job(experiment)
    outcome = job.outcome()
    return None if outcome is None else Fitted(storage.join(job.folder, "model.safetensors"), outcome)


def found_clip(experiment: Experiment) -> Fitted | None:
    """Return CLIP if it is there, without fitting one."""
    text = experiment.config.teacher.text
    if text is None:
        return None
    if text.model is not None:
        return Fitted(text.model, None)
    job = clip_job(experiment)
    outcome = job.outcome()
    return None if outcome is None else Fitted(job.folder, outcome)


def load_teacher(experiment: Experiment, fitted: Fitted) -> VisualTeacher:
    """Load the visual teacher's weights.

    Raises:
        UserError: they do not fit the model or the number of classes.
    """
    mean, std = experiment.teacher_statistics()
    return VisualTeacher.load(experiment.config.teacher.visual.model, experiment.task, fitted.path, mean, std)


def _teacher_views(experiment: Experiment) -> dict[str, View]:
    views = experiment.views()
    if experiment.config.teacher.visual.fit_views:
        return views
    first = next(iter(views))
    return {first: views[first]}


def teacher_job(experiment: Experiment) -> TrainingJob:
    """Describe the fitting of the visual teacher."""
    visual = experiment.config.teacher.visual
    key = identity_key(
        "teacher",
        visual.model,
        experiment.teacher_statistics(),
        training_identity(visual.fit),
        experiment.config.augmentation.model_dump(mode="json", exclude_none=True),
        experiment.view_identity(_teacher_views(experiment)),
        experiment.data_identity(),
    )
    return TrainingJob(
        key=key,
        label=f"visual teacher {visual.model}",
        folder=storage.join(experiment.folder, f"teacher-{key}"),
        training=visual.fit,
        build=functools.partial(_build_teacher, experiment),
    )


def clip_job(experiment: Experiment) -> TrainingJob:
    """Describe the fitting of CLIP."""
    text = experiment.config.teacher.text
    assert text is not None
    key = identity_key(
        "clip",
        text.architecture.model_dump(mode="json"),
        training_identity(text.fit),
        experiment.config.augmentation.model_dump(mode="json", exclude_none=True),
        experiment.view_identity(),
        experiment.prompts(),
        list(experiment.task.class_names),
        experiment.data_identity(),
    )
    return TrainingJob(
        key=key,
        label="CLIP",
        folder=storage.join(experiment.folder, f"clip-{key}"),
        training=text.fit,
        build=functools.partial(_build_clip, experiment),
    )


def _build_teacher(experiment: Experiment, device: torch.device) -> TrainTask:
    visual = experiment.config.teacher.visual
    mean, std = experiment.teacher_statistics()
    return TeacherTask(
        build_model(visual.model, experiment.task),
        load_images(experiment.dataset, "train", experiment.train),
        load_images(experiment.dataset, "train", experiment.validation),
        _teacher_views(experiment),
        visual.fit,
        experiment.config.augmentation,
        mean,
        std,
    )


def _build_clip(experiment: Experiment, device: torch.device) -> TrainTask:
    text = experiment.config.teacher.text
    assert text is not None
    prompts = list(experiment.prompts().values())
    names = experiment.task.class_names
    architecture = text.architecture
    clip = ClipTeacher.new(
        [template.format(name) for templates in prompts for template in templates for name in names],
        image_size=architecture.image_size or experiment.config.dataset.image_size,
        patch_size=architecture.patch_size,
        embedding_width=architecture.embedding_width,
        vision_width=architecture.vision_width,
        vision_layers=architecture.vision_layers,
        text_width=architecture.text_width,
        text_layers=architecture.text_layers,
        head_width=architecture.head_width,
        vocabulary_size=architecture.vocabulary_size,
        mean=experiment.config.dataset.mean,
        std=experiment.config.dataset.std,
    )
    return ClipTask(
        clip,
        load_images(experiment.dataset, "train", experiment.train),
        load_images(experiment.dataset, "train", experiment.validation),
        experiment.views(),
        prompts,
        names,
        text.fit,
        experiment.config.augmentation,
    )
