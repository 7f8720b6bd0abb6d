"""The whole road: teachers, knowledge, students, evaluation, report."""

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import torch

from tmkd_ray import __version__, storage
from tmkd_ray.analysis_record import analysis_path
from tmkd_ray.config import ObjectiveConfig, resolve_objective
from tmkd_ray.datasets.splits import few_labels
from tmkd_ray.knowledge.quality import TeacherQuality, measure_quality
from tmkd_ray.pretraining import PretrainingConfig
from tmkd_ray.report.html import write_report
from tmkd_ray.report.table import format_table
from tmkd_ray.results import (
    ClipRecord,
    CostRecord,
    DatasetRecord,
    KnowledgeRecord,
    MethodRecord,
    RunResults,
    SetAsideImage,
    TeacherRecord,
    TrainingRecord,
)
from tmkd_ray.stages.analysis import analyse
from tmkd_ray.stages.distillation import TrainedStudent, distill
from tmkd_ray.stages.evaluation import Measured, Networks, measure, student_network, teacher_network
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.fitting import Fitted, fit_clip, fit_teacher
from tmkd_ray.stages.knowledge import KnowledgeResult, compute_knowledge
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.throughput import STAGE_NAMES

T = TypeVar("T")

_LABELS = {
    "alone": "student alone",
    "kd": "KD (plain teacher)",
    "tmkd": "TMKD (text-guided fused teacher)",
    "lgd": "LGD",
    "seed": "SEED",
    "embedding": "embedding MSE",
}
"""Of methods that are exactly a preset; others are called by their names."""


def run(experiment: Experiment, stem: str | None = None) -> RunResults:
    """Go the whole road and write `results.json` and `report.html` into the run's folder.

    Args:
        stem: of other file names, `STEM.json` and `STEM.html`.

    What is finished is kept: run again after an interruption, only what is missing is done.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        say(f"── {stage}")
        started = time.monotonic()
        result = work()
        seconds[stage] = round(time.monotonic() - started, 3)
        return result

    experiment.save_config()
    teacher = timed("visual teacher", lambda: fit_teacher(experiment))
    clip = timed("text teacher (CLIP)", lambda: fit_clip(experiment))
    knowledge = timed("knowledge", lambda: compute_knowledge(experiment, teacher, clip))
    quality = _quality(experiment, knowledge)
    students = timed("students", lambda: distill(experiment))
    networks = Networks(
        teacher_network(experiment, teacher), tuple(student_network(experiment, each) for each in students)
    )
    test = timed("evaluation", lambda: measure(experiment, networks, "test"))
    assert test.teacher is not None

    config = experiment.config
    created = datetime.now(UTC).isoformat(timespec="seconds")
    fused = _fused_distiller(experiment)
    findings = timed(
        "analysis", lambda: analyse(experiment, knowledge, fused, networks, students, test, created)
    )
    set_aside = [SetAsideImage(**entry) for entry in knowledge.manifest.set_aside]
    set_aside += [SetAsideImage(id=entry.id, reason=entry.reason) for entry in test.set_aside]
    results = RunResults(
        name=config.name,
        created=created,
        dataset=DatasetRecord(
            name=config.dataset.name,
            class_names=list(experiment.task.class_names),
            num_train=_num_train(experiment, knowledge),
            num_labelled_for_students=_num_labelled(experiment, knowledge),
            num_validation=knowledge.manifest.rows("validation"),
            num_test=test.num_images,
            image_size=config.dataset.image_size,
            set_aside=set_aside,
        ),
        teacher=_teacher_record(experiment, teacher, test.teacher, quality, findings.costs.get("teacher")),
        clip=None if clip is None else _clip_record(clip, knowledge, quality),
        knowledge=_knowledge_record(experiment, knowledge),
        methods=_method_records(experiment, students, test.others, findings.costs.get("student")),
        semantic_weights=None if clip is None else quality.weights_per_class,
        stage_seconds=seconds,
        config=config.model_dump(mode="json"),
        versions=versions(),
        hardware=_hardware(),
        notes=_notes(experiment),
    )
    results_path = storage.join(experiment.folder, f"{stem or 'results'}.json")
    report_path = storage.join(experiment.folder, f"{stem or 'report'}.html")
    findings.analysis.save(analysis_path(results_path))
    results.save(results_path)
    write_report(report_path, results, findings.analysis)
    say(f"results: {results_path}\nreport:  {report_path}")
    print(format_table(results), flush=True)
    return results


def _fused_distiller(experiment: Experiment) -> ObjectiveConfig:
    """Return the distiller whose fusion the report shows: the first one trained that fuses, if any."""
    trained = experiment.config.named_methods().values()
    fusing = (distiller for distiller in trained if distiller.teacher == "fused")
    return next(fusing, experiment.config.distiller)


def _label(method: str, distiller: ObjectiveConfig) -> str:
    is_preset = method in _LABELS and distiller == resolve_objective(method)
    label = _LABELS[method] if is_preset else method
    return f"{label}, zero-shot" if isinstance(distiller, PretrainingConfig) else label


def _quality(experiment: Experiment, knowledge: KnowledgeResult) -> TeacherQuality:
    distiller = _fused_distiller(experiment)
    quality = measure_quality(
        knowledge.store.read("validation", with_images=False),
        knowledge.constants(),
        distiller.weighting,
        distiller.fusion_temperature,
        distiller.clip_temperature,
        experiment.config.taught_views(distiller),
    )

    def listing(values: dict[str, float]) -> str:
        return "  ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())

    say(f"teacher on validation: views: {listing(quality.views)}; fused: {listing(quality.fused)}")
    if quality.zero_shot:
        say(f"CLIP zero-shot on validation: {listing(quality.zero_shot)}")
    return quality


def _teacher_record(
    experiment: Experiment,
    teacher: Fitted,
    test: Measured,
    quality: TeacherQuality,
    cost: CostRecord | None,
) -> TeacherRecord:
    outcome = teacher.outcome
    return TeacherRecord.model_validate(
        {
            "model": experiment.config.teacher.visual.model,
            "parameters": test.parameters,
            "source": teacher.source,
            "validation_accuracy": next(iter(quality.views.values())),
            "test_accuracy": test.metrics.accuracy,
            "test_ece": test.metrics.ece,
            "per_class_accuracy": test.metrics.per_class_accuracy,
            "view_validation_accuracy": quality.views,
            "fused_validation_accuracy": quality.fused,
            "history": [] if outcome is None else outcome.history,
            "seconds": None if outcome is None else outcome.seconds,
            "cost": cost,
        }
    )


def _clip_record(clip: Fitted, knowledge: KnowledgeResult, quality: TeacherQuality) -> ClipRecord:
    width = knowledge.manifest.layouts["train"].clip_width
    assert width is not None
    return ClipRecord(
        source=clip.source,
        embedding_width=width,
        parameters=knowledge.clip_parameters,
        zero_shot_validation_accuracy=quality.zero_shot,
        history=[] if clip.outcome is None else clip.outcome.history,
        seconds=None if clip.outcome is None else clip.outcome.seconds,
    )


def _knowledge_record(experiment: Experiment, knowledge: KnowledgeResult) -> KnowledgeRecord:
    manifest = knowledge.manifest
    variants = experiment.config.knowledge.num_variants
    times = knowledge.times
    return KnowledgeRecord(
        num_images=manifest.rows("train") + manifest.rows("validation"),
        num_variants=variants,
        views=manifest.layouts["train"].views,
        bytes_per_image_and_variant=manifest.bytes_per_image_and_variant(),
        total_bytes=manifest.total_bytes(),
        seconds=knowledge.seconds,
        images_per_second=0.0 if times is None else times.variants / knowledge.seconds,
        stage_seconds={} if times is None else {STAGE_NAMES[name]: s for name, s in times.seconds.items() if s},
        reused=knowledge.computed == 0,
        fingerprint=manifest.fingerprint,
    )


def _method_records(
    experiment: Experiment, students: list[TrainedStudent], measured: list[Measured], cost: CostRecord | None
) -> list[MethodRecord]:
    records: dict[str, list[TrainingRecord]] = {}
    for student, test in zip(students, measured, strict=True):
        outcome = student.outcome
        records.setdefault(student.method, []).append(
            TrainingRecord(
                seed=student.seed,
                parameters=outcome.parameters,
                best_epoch=outcome.best_epoch,
                validation_accuracy=outcome.validation_accuracy,
                test_accuracy=test.metrics.accuracy,
                test_top5_accuracy=test.metrics.top5_accuracy,
                test_ece=test.metrics.ece,
                teacher_agreement=test.metrics.agreement,
                teacher_kl=test.metrics.teacher_kl,
                per_class_accuracy=list(test.metrics.per_class_accuracy),
                seconds=outcome.seconds,
                num_workers=outcome.num_workers,
                device=outcome.device,
                history=outcome.history,
            )
        )
    distillers = experiment.config.named_methods()
    model = experiment.config.student.model
    return [
        MethodRecord(
            name=method,
            label=_label(method, distillers[method]),
            student=model,
            measured_by="zero-shot" if isinstance(distillers[method], PretrainingConfig) else "classifier",
            runs=runs,
            cost=cost,
        )
        for method, runs in records.items()
    ]


def versions() -> dict[str, str]:
    packages = ("ray", "torch", "torchvision", "transformers", "numpy", "opencv-python-headless", "pyarrow")
    return {"tmkd-ray": __version__, "python": platform.python_version()} | {
        name: version(name) for name in packages
    }


def _hardware() -> dict[str, str | int]:
    hardware: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["gpus"] = torch.cuda.device_count()
    return hardware


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.machine()
    return platform.machine()


def _num_train(experiment: Experiment, knowledge: KnowledgeResult) -> int:
    """Return the number of training images: those in the store, where it holds them."""
    cached = experiment.config.knowledge.mode == "cached"
    return knowledge.manifest.rows("train") if cached else len(experiment.train)


def _num_labelled(experiment: Experiment, knowledge: KnowledgeResult) -> int | None:
    per_class = experiment.config.training.labels_per_class
    if per_class is None:
        return None
    unreadable = [entry["id"] for entry in knowledge.manifest.set_aside]
    readable = experiment.train.take(np.flatnonzero(~np.isin(experiment.train.ids, unreadable)))
    return len(few_labels(readable, per_class, experiment.config.training.seed))


def _notes(experiment: Experiment) -> list[str]:
    config = experiment.config
    notes = [
        "The epoch kept is chosen on the validation part of train; the test images are read once, at the end.",
    ]
    if config.teacher.visual.is_given:
        notes.append(
            "The visual teacher was given: if it was trained on all of train, it has seen the validation "
            "images, and its figures on them, those of the views and their fusion too, flatter it."
        )
    if any(isinstance(method, PretrainingConfig) for method in config.named_methods().values()):
        notes.append(
            "Methods marked zero-shot have no trained classifier: their accuracy, on every split, is that of "
            "the student's embedding compared with the class names' text embeddings. Labels took part in "
            "choosing the epoch on the validation part alone."
        )
        if config.teacher.text is not None and config.teacher.text.model is None:
            notes.append(
                "The CLIP was fitted here, on the training images with captions made of their labels: what "
                "zero-shot students learn from it is label-free at second hand only."
            )
    if config.training.labels_per_class is not None:
        notes.append(
            f"Students see {config.training.labels_per_class} labelled images a class, drawn anew for each "
            "seed and the same for every method; the teachers were fitted on all training images."
        )
    weighting = _fused_distiller(experiment).weighting
    if config.teacher.text is not None and weighting in ("label", "margin"):
        notes.append(
            f"The weighting `{weighting}` looks at the label, so the accuracy of the semantic "
            "fusion is that of a teacher who is told the answer's text; it is not a test-time accuracy."
        )
    return notes
