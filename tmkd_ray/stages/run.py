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
from tmkd_ray.datasets.splits import few_labels
from tmkd_ray.fusion import TeachingSignal
from tmkd_ray.knowledge.quality import TeacherQuality, measure_quality
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.report.html import ViewGallery, write_report
from tmkd_ray.report.table import format_table
from tmkd_ray.results import (
    ClipRecord,
    DatasetRecord,
    KnowledgeRecord,
    MethodRecord,
    RunResults,
    SetAsideImage,
    TeacherRecord,
    TrainingRecord,
)
from tmkd_ray.stages.distillation import TrainedStudent, distill, with_images
from tmkd_ray.stages.evaluation import Measured, Networks, measure, student_network, teacher_network
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.fitting import Fitted, fit_clip, fit_teacher
from tmkd_ray.stages.knowledge import STAGE_NAMES, KnowledgeResult, compute_knowledge
from tmkd_ray.stages.progress import say

T = TypeVar("T")

_LABELS = {
    "alone": "student alone",
    "kd": "KD, plain teacher",
    "tmkd": "TMKD, text-guided fused teacher",
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
    set_aside = [SetAsideImage(**entry) for entry in knowledge.manifest.set_aside]
    set_aside += [SetAsideImage(id=entry.id, reason=entry.reason) for entry in test.set_aside]
    results = RunResults(
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
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
        teacher=_teacher_record(experiment, teacher, test.teacher, quality),
        clip=None if clip is None else _clip_record(clip, knowledge, quality),
        knowledge=_knowledge_record(experiment, knowledge),
        methods=_method_records(experiment, students, test.others),
        semantic_weights=None if clip is None else quality.weights_per_class,
        stage_seconds=seconds,
        config=config.model_dump(mode="json"),
        versions=_versions(),
        hardware=_hardware(),
        notes=_notes(experiment, teacher),
    )
    results_path = storage.join(experiment.folder, f"{stem or 'results'}.json")
    report_path = storage.join(experiment.folder, f"{stem or 'report'}.html")
    results.save(results_path)
    write_report(report_path, results, _gallery(experiment, knowledge))
    say(f"results: {results_path}\nreport:  {report_path}")
    print(format_table(results), flush=True)
    return results


def _fused_distiller(experiment: Experiment) -> DistillerConfig:
    """Return the distiller whose fusion the report shows: the first one trained that fuses, if any."""
    trained = experiment.config.named_methods().values()
    fusing = (distiller for distiller in trained if distiller.teacher == "fused")
    return next(fusing, experiment.config.distiller)


def _label(method: str, distiller: DistillerConfig) -> str:
    if method in _LABELS and distiller == DistillerConfig.model_validate(method):
        return _LABELS[method]
    return method


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
    experiment: Experiment, teacher: Fitted, test: Measured, quality: TeacherQuality
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
    pieces = variants * manifest.rows("train") + manifest.rows("validation")
    times = knowledge.times
    return KnowledgeRecord(
        num_images=manifest.rows("train") + manifest.rows("validation"),
        num_variants=variants,
        views=manifest.layouts["train"].views,
        bytes_per_image_and_variant=manifest.total_bytes() / pieces,
        total_bytes=manifest.total_bytes(),
        seconds=knowledge.seconds,
        images_per_second=0.0 if times is None else times.variants / knowledge.seconds,
        stage_seconds={} if times is None else {STAGE_NAMES[name]: s for name, s in times.seconds.items() if s},
        reused=knowledge.computed == 0,
        fingerprint=manifest.fingerprint,
    )


def _method_records(
    experiment: Experiment, students: list[TrainedStudent], measured: list[Measured]
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
        MethodRecord(name=method, label=_label(method, distillers[method]), student=model, runs=runs)
        for method, runs in records.items()
    ]


def _gallery(experiment: Experiment, knowledge: KnowledgeResult, count: int = 8) -> ViewGallery:
    """Show validation images of several classes through every view, with their semantic weights."""
    arrays = with_images(experiment, knowledge.store.read("validation"))
    assert arrays.images is not None
    _, first = np.unique(arrays.labels, return_index=True)
    rows = first[np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]
    images_NHWC = np.ascontiguousarray(arrays.images[rows])
    views = experiment.views()
    names = experiment.task.class_names
    weights_NV = None
    if arrays.clip_embedding is not None:
        distiller = _fused_distiller(experiment)
        taught = experiment.config.taught_views(distiller)
        signal = TeachingSignal(
            knowledge.constants(),
            taught,
            distiller.weighting,
            distiller.fusion_temperature,
            distiller.clip_temperature,
        )
        output = signal(arrays.knowledge(rows), torch.from_numpy(arrays.labels[rows]))
        weights_NV = np.zeros((len(rows), len(views)), dtype=np.float32)
        weights_NV[:, [list(views).index(view) for view in taught]] = output.view_weights.numpy()
    return ViewGallery(
        images=np.stack([view(images_NHWC) for view in views.values()], axis=1),
        view_names=tuple(views),
        labels=tuple(names[label] for label in arrays.labels[rows]),
        weights=weights_NV,
    )


def _versions() -> dict[str, str]:
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


def _notes(experiment: Experiment, teacher: Fitted) -> list[str]:
    config = experiment.config
    notes = [
        "The epoch kept is chosen on the validation part of train; the test images are read once, at the end.",
    ]
    if teacher.outcome is None:
        notes.append(
            "The visual teacher was given: if it was trained on all of train, it has seen the validation "
            "images, and its figures on them, those of the views and their fusion too, flatter it."
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
