"""Fit the teachers, or load those that the configuration names."""

import functools
import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from tmkd_ray import storage
from tmkd_ray.config import VisualTeacherConfig
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.models import build_model
from tmkd_ray.models.view_batch_norm import use_view_statistics
from tmkd_ray.stages.experiment import Experiment, identity_key, locked_text_features, training_identity
from tmkd_ray.stages.pipeline import actors_errors
from tmkd_ray.stages.progress import lines_to, progress_channel, say
from tmkd_ray.stages.room import bundle, node_mark, wait_for_room
from tmkd_ray.stages.session import num_gpus
from tmkd_ray.stages.training import Outcome, TrainingJob, device_name, run_jobs
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.clip import ClipTask
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import TrainTask
from tmkd_ray.training.teacher import TeacherTask, adapt_statistics
from tmkd_ray.views.base import View


@dataclass(frozen=True)
class Fitted:
    """Where a teacher's weights lie, and how they were fitted (None: they were given).

    Attributes:
        given: what was fitted further here, path or name; None if that began with nothing.
    """

    path: str
    outcome: Outcome | None
    given: str | None = None

    @property
    def source(self) -> str:
        name = (self.given or self.path).rstrip("/").rsplit("/", 1)[-1]
        if self.outcome is None:
            return name
        return "fitted here" if self.given is None else f"{name}, adapted to the views here"


def fit_teacher(experiment: Experiment) -> Fitted:
    """Return the visual teacher's checkpoint: the configured one, or one fitted or adapted here (once)."""
    visual = experiment.config.teacher.visual
    if visual.adapt == "statistics":
        _estimate_once(experiment, teacher_job(experiment))
    elif visual.is_fitted:
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
    given = (visual.checkpoint or visual.model) if visual.is_given else None
    if not visual.is_fitted:
        assert given is not None
        return Fitted(given, None)
    job = teacher_job(experiment)
    outcome = job.outcome()
    return None if outcome is None else Fitted(storage.join(job.folder, "model.safetensors"), outcome, given)


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
    visual = experiment.config.teacher.visual
    mean, std = experiment.teacher_statistics()
    # A Python function's or an exported program's network has its weights when it is built.
    has_weights = fitted.outcome is None and fitted.path == visual.model
    checkpoint = None if has_weights else fitted.path
    num_views = len(experiment.config.views) if visual.has_view_statistics else None
    return VisualTeacher.load(visual.model, experiment.task, checkpoint, mean, std, num_views)


def _teacher_views(experiment: Experiment) -> dict[str, View]:
    views = experiment.views()
    visual = experiment.config.teacher.visual
    if visual.adapt != "none" or visual.fit_views:
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
        _statistics_identity(visual) if visual.adapt == "statistics" else training_identity(visual.fit),
        experiment.config.augmentation.model_dump(mode="json", exclude_none=True),
        experiment.view_identity(_teacher_views(experiment)),
        experiment.data_identity(),
        *([list(experiment.config.views)] if visual.has_view_statistics else []),
        *([given_teacher(experiment).fingerprint()] if visual.is_given else []),
    )
    return TrainingJob(
        key=key,
        label=f"visual teacher {visual.model}" + ("" if visual.adapt == "none" else ", adapted to the views"),
        folder=storage.join(experiment.folder, f"teacher-{key}"),
        training=visual.fit,
        build=functools.partial(_build_teacher, experiment),
    )


def _statistics_identity(visual: VisualTeacherConfig) -> dict[str, Any]:
    return {"adapt": "statistics", "images": visual.adapt_images, "seed": visual.fit.seed}


def given_teacher(experiment: Experiment) -> VisualTeacher:
    """Load the visual teacher that is given, before it is adapted to the views.

    Raises:
        UserError: its weights do not fit the model or the number of classes.
    """
    visual = experiment.config.teacher.visual
    assert visual.is_given
    mean, std = experiment.teacher_statistics()
    return VisualTeacher.load(visual.model, experiment.task, visual.checkpoint, mean, std)


def _estimate_once(experiment: Experiment, job: TrainingJob) -> None:
    """Estimate the given teacher's statistics of each view, unless that was done, on one worker."""
    if job.outcome() is not None:
        say(f"{job.label}: done before, kept ({job.folder})")
        return
    say(f"{job.label}: batch-norm statistics of {', '.join(experiment.config.views)}")
    use_gpu = num_gpus() >= 1 and experiment.config.teacher.visual.fit.use_gpu is not False

    def estimate(channel: Any) -> str:
        with lines_to(channel.put.remote):
            return _estimate(experiment, job, torch.device("cuda" if use_gpu else "cpu"))

    wait_for_room([(job.label, bundle("train", 1, float(use_gpu)))])
    remote = ray.remote(num_cpus=1, num_gpus=int(use_gpu), resources=node_mark("train"), max_retries=3)(
        estimate
    )
    with progress_channel() as channel, actors_errors():
        said = ray.get(remote.remote(channel))
    say(said)


def _estimate(experiment: Experiment, job: TrainingJob, device: torch.device) -> str:
    """Write weights and outcome of a teacher with statistics of each view; return a line for the user."""
    visual = experiment.config.teacher.visual
    started = time.monotonic()
    chosen = np.random.default_rng(visual.fit.seed).permutation(len(experiment.train))[: visual.adapt_images]
    train = load_images(experiment.dataset, "train", experiment.train.take(np.sort(chosen)))
    validation = load_images(experiment.dataset, "train", experiment.validation)
    mean, std = experiment.teacher_statistics()
    model = given_teacher(experiment).model.to(device)
    augmentation, views = experiment.config.augmentation, experiment.views()
    normalize = Normalize(mean, std).to(device)
    adapt_statistics(model, train, views, augmentation, normalize, visual.fit.seed, device)
    task = TeacherTask(model, train, validation, views, visual.fit, augmentation, mean, std)
    task.module.to(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        metrics = task.validate(PlainContext(Path(folder), device))
    task.save(job.folder, {name: value.cpu() for name, value in model.state_dict().items()})
    outcome = Outcome(
        key=job.key,
        best_epoch=0,
        validation_accuracy=metrics["accuracy"],
        parameters=task.num_parameters(),
        seconds=time.monotonic() - started,
        num_workers=1,
        device=device_name(device),
        history=[],
    )
    storage.write_bytes(storage.join(job.folder, "outcome.json"), outcome.model_dump_json(indent=1).encode())
    listed = ", ".join(f"{name} {100 * metrics[f'{name}_accuracy']:.1f} %" for name in views)
    return f"{job.label}: accuracy on validation: {listed}"


def clip_job(experiment: Experiment) -> TrainingJob:
    """Describe the fitting of CLIP."""
    text = experiment.config.teacher.text
    assert text is not None
    locked = locked_text_features(experiment)
    key = identity_key(
        "clip",
        text.architecture.model_dump(mode="json"),
        training_identity(text.fit),
        experiment.config.augmentation.model_dump(mode="json", exclude_none=True),
        experiment.view_identity(),
        experiment.prompts(),
        list(experiment.task.class_names),
        experiment.data_identity(),
        *([] if locked is None else [hashlib.sha256(locked.numpy().tobytes()).hexdigest()]),
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
    if visual.is_given:
        model = given_teacher(experiment).model.requires_grad_(True).train()
    else:
        model = build_model(visual.model, experiment.task)
    if visual.has_view_statistics:
        use_view_statistics(model, len(experiment.config.views))
    return TeacherTask(
        model,
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
        locked_text_features(experiment),
    )
