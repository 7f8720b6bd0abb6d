"""Train students from the knowledge store: methods × seeds on one group of workers."""

import functools
from dataclasses import dataclass

import torch

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge import KnowledgeStore
from tmkd_ray.knowledge.store import text_bank_key
from tmkd_ray.models import build_model
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.stages.experiment import Experiment, identity_key, training_identity
from tmkd_ray.stages.fitting import found_clip, found_teacher
from tmkd_ray.stages.knowledge import check_store
from tmkd_ray.stages.training import Outcome, TrainingJob, run_jobs
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.training.loop import TrainTask
from tmkd_ray.training.student import StudentTask


@dataclass(frozen=True)
class TrainedStudent:
    """A student's weights and how it came to them."""

    method: str
    seed: int
    path: str
    outcome: Outcome


def distill(experiment: Experiment) -> list[TrainedStudent]:
    """Train every method with every seed, skipping what is finished.

    Raises:
        UserError: there is no knowledge store, it lacks what a method needs, or a training diverged.
    """
    jobs = student_jobs(experiment)
    folder = storage.join(experiment.folder, "students", identity_key(*(job.key for _, _, job in jobs)))
    outcomes = run_jobs([job for _, _, job in jobs], folder)
    return [
        TrainedStudent(method, seed, storage.join(job.folder, "model.safetensors"), outcome)
        for (method, seed, job), outcome in zip(jobs, outcomes, strict=True)
    ]


def found_students(experiment: Experiment) -> list[TrainedStudent]:
    """Return the students of this configuration that are trained already."""
    if not KnowledgeStore(experiment.store_path).is_finished():
        return []
    students = []
    for method, seed, job in student_jobs(experiment):
        outcome = job.outcome()
        if outcome is not None:
            path = storage.join(job.folder, "model.safetensors")
            students.append(TrainedStudent(method, seed, path, outcome))
    return students


def student_jobs(experiment: Experiment) -> list[tuple[str, int, TrainingJob]]:
    """Describe the trainings of all methods and seeds."""
    config = experiment.config
    store = KnowledgeStore(experiment.store_path)
    manifest = store.manifest()
    check_store(experiment, found_teacher(experiment), found_clip(experiment))
    if manifest.class_names != experiment.task.class_names:
        raise UserError(
            f"the knowledge store at {store.path} is of other classes than the dataset; run `tmkd knowledge`"
        )
    methods = config.named_methods()
    for method, distiller in methods.items():
        if distiller.needs_text_teacher and manifest.layouts["train"].clip_width is None:
            raise UserError(
                f"{method} reads the column clip_embedding, which the knowledge store at {store.path} lacks: "
                "it was computed with teacher.text null; give it a text teacher and run `tmkd knowledge` again"
            )
    bank = None
    if any(distiller.teacher != "none" for distiller in methods.values()):
        bank = _text_bank(experiment)
    seeds = config.seeds or (config.training.seed,)
    jobs = []
    for method, distiller in methods.items():
        for seed in seeds:
            training = config.training.model_copy(update={"seed": seed})
            key = identity_key(
                "student",
                config.student.model,
                training_identity(training),
                distiller.model_dump(mode="json"),
                config.taught_views(distiller) if distiller.teacher != "none" else (),
                config.augmentation.model_dump(mode="json"),
                (config.dataset.mean, config.dataset.std),
                bank if distiller.needs_text_teacher else None,
                manifest.fingerprint,
            )
            job = TrainingJob(
                key=key,
                label=f"{method} seed {seed}",
                folder=storage.join(experiment.folder, "students", f"{method}-seed{seed}-{key}"),
                training=training,
                build=functools.partial(_build_student, experiment, distiller, training, bank),
            )
            jobs.append((method, seed, job))
    return jobs


def _text_bank(experiment: Experiment) -> str | None:
    """Return the key of this configuration's prompts' text bank, if there is a text teacher."""
    clip = found_clip(experiment)
    if clip is None:
        if experiment.config.teacher.text is not None:
            raise UserError(
                "no CLIP is fitted for this configuration; run `tmkd fit-clip` and `tmkd knowledge`"
            )
        return None
    text_tower = ClipTeacher.load(clip.path).text_fingerprint()
    return text_bank_key(experiment.prompts(), experiment.task.class_names, text_tower)


def _build_student(
    experiment: Experiment,
    distiller: DistillerConfig,
    training: TrainingConfig,
    bank: str | None,
    device: torch.device,
) -> TrainTask:
    config = experiment.config
    store = KnowledgeStore(experiment.store_path)
    return StudentTask(
        build_model(config.student.model, experiment.task),
        store.read("train"),
        store.read("validation"),
        None if distiller.teacher == "none" else store.constants(bank),
        distiller,
        config.taught_views(distiller),
        training,
        config.augmentation,
        config.dataset.mean,
        config.dataset.std,
        device,
    )
