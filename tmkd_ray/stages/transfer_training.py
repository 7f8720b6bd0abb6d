"""Downstream tasks for which the student is trained on: detection and segmentation.

Each function checks what can be checked without a cluster, and returns what is to be done on one.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from tmkd_ray import storage
from tmkd_ray.config.transfer import DenseConfig, DetectConfig, SegmentConfig
from tmkd_ray.downstream.annotated import validation_part
from tmkd_ray.downstream.coco import CocoData, average_precision, read_coco, require_pycocotools
from tmkd_ray.downstream.detection import DetectionPredictor, DetectionTask
from tmkd_ray.downstream.detectors import build_detector
from tmkd_ray.downstream.masks import MaskData, read_class_list, read_masks
from tmkd_ray.downstream.opened import Opened
from tmkd_ray.downstream.pyramid import FeatureMaps
from tmkd_ray.downstream.segmentation import (
    ConfusionMeter,
    SegmentationTask,
    Segmenter,
    segmentation_metrics,
)
from tmkd_ray.downstream.table import TransferTable, Value
from tmkd_ray.errors import UserError
from tmkd_ray.stages.chunks import over_workers
from tmkd_ray.stages.experiment import identity_key, training_identity
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.training import Outcome, TrainingJob, run_jobs
from tmkd_ray.training.loop import TrainTask


def _jobs(
    config: DenseConfig,
    opened: Opened,
    data_identity: list[str],
    build: Callable[[str, torch.device], TrainTask],
) -> dict[str, TrainingJob]:
    """Describe one training for each row of the table."""
    elsewhere = {
        "name",
        "output",
        "student",
        "model",
        "baseline",
        "random_baseline",
        "cluster",
        "training",
        "data",
    }
    jobs = {}
    for row, checkpoint in opened.weights.items():
        content = None if checkpoint is None else hashlib.sha256(storage.read_bytes(checkpoint)).hexdigest()
        key = identity_key(
            config.task,
            opened.source.model,
            content,
            (opened.mean, opened.std),
            config.model_dump(mode="json", exclude=elsewhere),
            training_identity(config.training),
            data_identity,
        )
        jobs[row] = TrainingJob(
            key=key,
            label=f"{config.task}, {row}",
            folder=storage.join(opened.folder, "trained", f"{row.replace(' ', '-')}-{key}"),
            training=config.training,
            build=functools.partial(build, row),
        )
    return jobs


def _train(config: DenseConfig, opened: Opened, jobs: Mapping[str, TrainingJob]) -> dict[str, Outcome]:
    """Train the jobs that are not finished, all on one group of workers."""
    folder = storage.join(opened.folder, "trained", identity_key(*(job.key for job in jobs.values())))
    return dict(zip(jobs, run_jobs(list(jobs.values()), folder), strict=True))


def _load(network: nn.Module, job: TrainingJob) -> nn.Module:
    content = storage.read_bytes(storage.join(job.folder, "model.safetensors"))
    network.load_state_dict(safetensors.torch.load(content))
    return network.eval()


def _check_worker_share(config: DenseConfig, num_train: int) -> None:
    if num_train < config.training.num_workers:
        raise UserError(
            f"training.num_workers is {config.training.num_workers}, but there are {num_train} training images"
        )


@dataclass(frozen=True)
class _DetectData:
    train: CocoData
    validation: CocoData
    test: CocoData


def _detect_data(config: DetectConfig) -> _DetectData:
    root = storage.absolute(config.data)
    folder = storage.join(root, config.images)

    def read(name: str, images: str | None) -> CocoData:
        data = read_coco(
            storage.join(root, name),
            folder if images is None else storage.join(root, images),
            config.bad_boxes,
        )
        if data.num_dropped:
            say(f"{data.source}: {data.num_dropped} boxes without area or beyond their image are left out")
        return data

    train, test = read(config.train, None), read(config.test, config.test_images)
    if config.validation is None:
        paths = [image.path for image in train.images]
        rows, validation_rows = validation_part(paths, config.validation_fraction, config.split_seed)
        train, validation = train.take(rows), train.take(validation_rows)
    else:
        validation = read(config.validation, config.validation_images)
    for data in (validation, test):
        if data.class_names != train.class_names:
            raise UserError(
                f"{data.source} has other categories than {train.source}: {', '.join(data.class_names)} and "
                f"{', '.join(train.class_names)}, in the order of their ids"
            )
    if not any(len(image.boxes) for image in train.images):
        raise UserError(f"{train.source} has no boxes")
    _check_worker_share(config, len(train))
    return _DetectData(train, validation, test)


def _build_detector(opened: Opened, config: DetectConfig, num_classes: int, row: str) -> nn.Module:
    maps = FeatureMaps(opened.build(row, _building_size(config.image_size)))
    return build_detector(maps, num_classes, config, opened.mean, opened.std)


def _building_size(image_size: int) -> int:
    """Return the image size that a network is built for; it sees images of many."""
    return max(128, image_size)


def _detection_task(
    opened: Opened, config: DetectConfig, data: _DetectData, row: str, device: torch.device
) -> TrainTask:
    detector = _build_detector(opened, config, len(data.train.class_names), row)
    return DetectionTask(detector, data.train, data.validation, config)


def detect(config: DetectConfig, opened: Opened) -> Callable[[], TransferTable]:
    require_pycocotools()
    data = _detect_data(config)
    num_classes = len(data.train.class_names)
    for row in opened.weights:
        _build_detector(opened, config, num_classes, row)
    identity = [part.fingerprint for part in (data.train, data.validation)]
    jobs = _jobs(config, opened, identity, functools.partial(_detection_task, opened, config, data))

    def run() -> TransferTable:
        outcomes = _train(config, opened, jobs)
        detectors = {
            row: _load(_build_detector(opened, config, num_classes, row), job) for row, job in jobs.items()
        }
        work = DetectionPredictor(detectors, data.test, config)
        chunks = over_workers(work, config.training, "detection, test")
        rows: list[dict[str, Value]] = []
        percent: dict[str, None] = {}
        for row, outcome in outcomes.items():
            found = [detections for chunk in chunks for detections in chunk[row]]
            metrics = average_precision(data.test, found)
            percent |= dict.fromkeys(metrics)
            rows.append({"backbone": row, **metrics, **_cost(outcome)})
        notes = [
            f"{config.detector}, {config.image_size} px, {config.training.epochs} epochs on "
            f"{len(data.train):,} images; epoch kept by {len(data.validation):,} validation images; "
            f"test: {len(data.test):,} images"
        ]
        return TransferTable("detect", rows, tuple(percent), notes)

    return run


def _cost(outcome: Outcome) -> dict[str, Value]:
    return {
        "epoch kept": outcome.best_epoch,
        "parameters": outcome.parameters,
        "seconds": round(outcome.seconds, 1),
    }


@dataclass(frozen=True)
class _SegmentData:
    train: MaskData
    validation: MaskData
    test: MaskData


def _segment_data(config: SegmentConfig) -> _SegmentData:
    root = storage.absolute(config.data)
    names = read_class_list(storage.join(root, config.classes))

    def read(split: str) -> MaskData:
        return read_masks(
            storage.join(root, config.images, split), storage.join(root, config.masks, split), names
        )

    train, test = read(config.train), read(config.test)
    if config.validation is None:
        rows, validation_rows = validation_part(
            train.image_paths, config.validation_fraction, config.split_seed
        )
        train, validation = train.take(rows), train.take(validation_rows)
    else:
        validation = read(config.validation)
    _check_worker_share(config, len(train))
    return _SegmentData(train, validation, test)


def _build_segmenter(opened: Opened, config: SegmentConfig, num_classes: int, row: str) -> Segmenter:
    maps = FeatureMaps(opened.build(row, _building_size(config.image_size)), config.output_stride)
    return Segmenter(maps, num_classes, config.head, opened.mean, opened.std)


def _segmentation_task(
    opened: Opened, config: SegmentConfig, data: _SegmentData, row: str, device: torch.device
) -> TrainTask:
    segmenter = _build_segmenter(opened, config, len(data.train.class_names), row)
    return SegmentationTask(segmenter, data.train, data.validation, config, opened.mean)


def segment(config: SegmentConfig, opened: Opened) -> Callable[[], TransferTable]:
    data = _segment_data(config)
    class_names = data.train.class_names
    for row in opened.weights:
        _build_segmenter(opened, config, len(class_names), row)
    identity = [part.fingerprint for part in (data.train, data.validation)]
    jobs = _jobs(config, opened, identity, functools.partial(_segmentation_task, opened, config, data))

    def run() -> TransferTable:
        outcomes = _train(config, opened, jobs)
        segmenters: dict[str, Segmenter] = {}
        for row, job in jobs.items():
            segmenters[row] = _build_segmenter(opened, config, len(class_names), row)
            _load(segmenters[row], job)
        chunks = over_workers(
            ConfusionMeter(segmenters, data.test, config), config.training, "segmentation, test"
        )
        rows: list[dict[str, Value]] = []
        iou: dict[str, Any] = {}
        for row, outcome in outcomes.items():
            metrics = segmentation_metrics(np.sum([chunk[row] for chunk in chunks], axis=0))
            iou[row] = dict(zip(class_names, metrics.iou, strict=True))
            figures: dict[str, Value] = {"mIoU": metrics.mean_iou, "pixel accuracy": metrics.pixel_accuracy}
            rows.append({"backbone": row, **figures, **_cost(outcome)})
        notes = [
            f"{config.head}, {config.image_size} px, {config.training.epochs} epochs on "
            f"{len(data.train):,} images; epoch kept by {len(data.validation):,} validation images; "
            f"test: {len(data.test):,} images"
        ]
        return TransferTable("segment", rows, ("mIoU", "pixel accuracy"), notes, {"iou": iou})

    return run
