"""A closer look at the networks of a run, in one task on the cluster; the report is made from what it found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import ray
import torch

from tmkd_ray.analysis.closer_look import TEACHER, CloserLook, Explained, Subject, look_closely
from tmkd_ray.analysis.samples import rows_of_classes, spread_classes
from tmkd_ray.analysis.views import view_gallery, view_wins
from tmkd_ray.analysis_record import Analysis, NetworkFindings, ViewGallery, ViewWins
from tmkd_ray.config import ObjectiveConfig
from tmkd_ray.fusion import TeachingSignal
from tmkd_ray.knowledge import KnowledgeArrays
from tmkd_ray.results import CostRecord
from tmkd_ray.stages.distillation import TrainedStudent, with_images
from tmkd_ray.stages.evaluation import Classifier, Evaluation, Measured, Networks
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.knowledge import KnowledgeResult
from tmkd_ray.stages.pipeline import actors_errors
from tmkd_ray.stages.progress import lines_to, progress_channel
from tmkd_ray.stages.room import node_mark
from tmkd_ray.stages.session import num_gpus
from tmkd_ray.stages.training import device_name

_GALLERY_IMAGES = 9
"""Three rows, where there are three views."""


@dataclass(frozen=True)
class Findings:
    """What `analyse` found: the file, but for `created`, and what predictions cost by role."""

    analysis: Analysis
    costs: dict[str, CostRecord]


def analyse(
    experiment: Experiment,
    knowledge: KnowledgeResult,
    distiller: ObjectiveConfig,
    networks: Networks,
    students: Sequence[TrainedStudent],
    test: Evaluation,
    created: str,
) -> Findings:
    """Look closely at the teacher and the methods' first students.

    Args:
        distiller: whose fusion of the views is shown.
        networks, test: as measured on the test images, the students in the order of `students`.
        created: of the results that the analysis goes with.
    """
    options = experiment.config.report
    arrays = with_images(experiment, knowledge.store.read("validation"))
    weights_NV, fused_views = _weights(experiment, knowledge, distiller, arrays)
    assert arrays.images is not None
    analysis = Analysis(
        created=created,
        gallery=_gallery(experiment, arrays, weights_NV, fused_views),
        view_wins=_wins(experiment, arrays, weights_NV, fused_views),
        networks=_counted(students, test),
    )
    if options.num_images == 0:
        return Findings(analysis, {})
    subjects = _subjects(networks, students, options.max_methods)
    explained = _explained(experiment, arrays, weights_NV, fused_views, options.num_explained)
    with progress_channel() as channel, actors_errors():
        task = _look_closely.options(
            num_cpus=experiment.config.training.num_cpus_per_worker,
            num_gpus=float(experiment.config.training.use_gpu is not False and num_gpus() > 0),
            resources=node_mark("train"),
        )
        found: CloserLook = ray.get(task.remote(experiment, ray.put(subjects), explained, channel))
    networks_found = tuple(
        each.model_copy(update=found.networks.get(each.key, {})) for each in analysis.networks
    )
    shared = {**found.shared, "networks": networks_found}
    return Findings(analysis.model_copy(update=shared), found.costs)


def _weights(
    experiment: Experiment, knowledge: KnowledgeResult, distiller: ObjectiveConfig, arrays: KnowledgeArrays
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return [N, V] semantic weights of the fused views, and their names; None without a text teacher."""
    fused = experiment.config.taught_views(distiller)
    if arrays.clip_embedding is None:
        return None, fused
    signal = TeachingSignal(
        knowledge.constants(),
        fused,
        distiller.weighting,
        distiller.fusion_temperature,
        distiller.clip_temperature,
    )
    output = signal(arrays.knowledge(slice(None)), torch.from_numpy(arrays.labels.copy()))
    return output.view_weights.numpy(), fused


def _gallery(
    experiment: Experiment, arrays: KnowledgeArrays, weights_NV: np.ndarray | None, fused: tuple[str, ...]
) -> ViewGallery:
    """Show validation images of several classes through every view, with their semantic weights."""
    assert arrays.images is not None
    rows = rows_of_classes(arrays.labels, spread_classes(arrays.labels, _GALLERY_IMAGES), 1)
    views = experiment.views()
    all_weights = None
    if weights_NV is not None:
        all_weights = np.zeros((len(rows), len(views)), dtype=np.float32)
        all_weights[:, [list(views).index(view) for view in fused]] = weights_NV[rows]
    names = experiment.task.class_names
    return view_gallery(arrays.images[rows], arrays.labels[rows], views, names, all_weights)


def _wins(
    experiment: Experiment, arrays: KnowledgeArrays, weights_NV: np.ndarray | None, fused: tuple[str, ...]
) -> ViewWins | None:
    if weights_NV is None or len(fused) < 2:
        return None
    assert arrays.images is not None
    views = experiment.views()
    return view_wins(
        arrays.images,
        arrays.labels,
        weights_NV,
        {name: views[name] for name in fused},
        experiment.task.class_names,
    )


def _counted(students: Sequence[TrainedStudent], test: Evaluation) -> tuple[NetworkFindings, ...]:
    """Return confusion and calibration of the teacher and of each method, its seeds together."""

    def counted(key: str, role: Literal["teacher", "student"], measured: Sequence[Measured]) -> NetworkFindings:
        pairs: dict[tuple[int, int], int] = {}
        for label, predicted, count in (entry for each in measured for entry in each.confusion):
            pairs[label, predicted] = pairs.get((label, predicted), 0) + count
        bins = np.array([each.calibration for each in measured]).sum(axis=0)
        return NetworkFindings(
            key=key,
            role=role,
            seeds=len(measured),
            confusion=np.array([(*pair, count) for pair, count in sorted(pairs.items())], dtype=np.int64),
            bin_counts=bins[:, 0].astype(np.int64),
            bin_hits=bins[:, 1].astype(np.int64),
            bin_confidences=bins[:, 2],
        )

    by_method: dict[str, list[Measured]] = {}
    for student, measured in zip(students, test.others, strict=True):
        by_method.setdefault(student.method, []).append(measured)
    teacher = [] if test.teacher is None else [counted(TEACHER, "teacher", [test.teacher])]
    return (*teacher, *(counted(method, "student", each) for method, each in by_method.items()))


def _subjects(networks: Networks, students: Sequence[TrainedStudent], max_methods: int) -> list[Subject]:
    subjects = []
    if networks.teacher is not None:
        assert isinstance(networks.teacher.module, Classifier)
        subjects.append(_subject(TEACHER, "teacher", networks.teacher.module))
    first: dict[str, Classifier] = {}
    for student, network in zip(students, networks.others, strict=True):
        assert isinstance(network.module, Classifier)
        first.setdefault(student.method, network.module)
    chosen = list(first.items())[:max_methods]
    return subjects + [_subject(method, "student", classifier) for method, classifier in chosen]


def _explained(
    experiment: Experiment,
    arrays: KnowledgeArrays,
    weights_NV: np.ndarray | None,
    fused: tuple[str, ...],
    number: int,
) -> Explained:
    assert arrays.images is not None
    classes = spread_classes(arrays.labels, number) if number else np.zeros(0, dtype=np.int64)
    rows = rows_of_classes(arrays.labels, classes, 1) if number else classes
    images = np.ascontiguousarray(arrays.images[rows])
    views = experiment.views()
    is_fused = weights_NV is not None and len(fused) > 1
    return Explained(
        images=images,
        labels=arrays.labels[rows],
        label_names=tuple(experiment.task.class_names[label] for label in arrays.labels[rows]),
        views=np.stack([views[name](images) for name in fused], axis=1) if is_fused else None,
        weights=weights_NV[rows] if is_fused and weights_NV is not None else None,
    )


def _subject(key: str, role: Literal["teacher", "student"], classifier: Classifier) -> Subject:
    return Subject(key, role, classifier.model, classifier.normalize)


@ray.remote  # type: ignore[untyped-decorator]
def _look_closely(
    experiment: Experiment, subjects: list[Subject], explained: Explained, channel: Any
) -> CloserLook:
    cv2.setNumThreads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    with lines_to(lambda line: channel.put.remote(f"analysis: {line}")):
        return look_closely(
            subjects,
            experiment.dataset,
            explained,
            experiment.config.report.num_images,
            experiment.config.training.evaluation_batch_size,
            device,
            device_name(device),
        )
