"""Downstream tasks for which the student is trained on: detection and segmentation.

Each function checks what can be checked without a cluster, and returns what is to be done on one.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import nn

from tmkd_ray import storage
from tmkd_ray.config.transfer import DetectConfig, SegmentConfig
from tmkd_ray.downstream.coco import require_pycocotools
from tmkd_ray.downstream.dense import DenseData, DenseKind, DenseMetrics, DenseTask, Meter, total
from tmkd_ray.downstream.detection import Detection
from tmkd_ray.downstream.opened import Opened
from tmkd_ray.downstream.segmentation import Segmentation
from tmkd_ray.downstream.table import TransferTable, Value
from tmkd_ray.errors import UserError
from tmkd_ray.stages.chunks import finished, over_workers
from tmkd_ray.stages.experiment import identity_key, training_identity
from tmkd_ray.stages.training import Outcome, TrainingJob, run_jobs
from tmkd_ray.training.loop import TrainTask


def detect(config: DetectConfig, opened: Opened) -> Callable[[], TransferTable]:
    require_pycocotools()
    return _trained(Detection(config, opened.mean, opened.std), opened)


def segment(config: SegmentConfig, opened: Opened) -> Callable[[], TransferTable]:
    return _trained(Segmentation(config, opened.mean, opened.std), opened)


def _trained(kind: DenseKind[Any, Any], opened: Opened) -> Callable[[], TransferTable]:
    """Train a network on each row's weights, all by one schedule, and measure them on test."""
    config = kind.config
    data = kind.read()
    if len(data.train) < config.training.num_workers:
        raise UserError(
            f"training.num_workers is {config.training.num_workers}, but there are {len(data.train)} training "
            "images"
        )
    for row in opened.weights:
        _network(kind, opened, data, row)
    jobs = {row: _job(kind, opened, data, row) for row in opened.weights}

    def run() -> TransferTable:
        folder = storage.join(opened.folder, "trained", identity_key(*(job.key for job in jobs.values())))
        outcomes = dict(zip(jobs, run_jobs(list(jobs.values()), folder), strict=True))
        networks = {row: _load(_network(kind, opened, data, row), job) for row, job in jobs.items()}
        found = over_workers(Meter(kind, networks, data.test), config.training, f"{config.task}, test")
        metrics: dict[str, DenseMetrics] = finished(
            {row: found.reduce(_measured, kind, data.test, row) for row in jobs}
        )
        rows: list[dict[str, Value]] = [
            {"backbone": row, **metrics[row].figures, **_cost(outcome)} for row, outcome in outcomes.items()
        ]
        notes = [
            f"{kind.head}, {config.image_size} px, {config.training.epochs} epochs on "
            f"{len(data.train):,} images; epoch kept by {len(data.validation):,} validation images; "
            f"test: {len(data.test):,} images"
        ]
        first = next(iter(metrics.values()))
        details = {name: {row: each.details[name] for row, each in metrics.items()} for name in first.details}
        return TransferTable(config.task, rows, tuple(first.figures), notes, details)

    return run


def _measured(chunks: list[dict[str, Any]], kind: DenseKind[Any, Any], data: Any, row: str) -> DenseMetrics:
    return kind.metrics(data, total([chunk[row] for chunk in chunks]))


def _job(kind: DenseKind[Any, Any], opened: Opened, data: DenseData[Any], row: str) -> TrainingJob:
    config, checkpoint = kind.config, opened.weights[row]
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
    content = None if checkpoint is None else hashlib.sha256(storage.read_bytes(checkpoint)).hexdigest()
    key = identity_key(
        config.task,
        opened.source.model,
        content,
        (opened.mean, opened.std),
        config.model_dump(mode="json", exclude=elsewhere),
        training_identity(config.training),
        [data.train.fingerprint, data.validation.fingerprint],
    )
    return TrainingJob(
        key=key,
        label=f"{config.task}, {row}",
        folder=storage.join(opened.folder, "trained", f"{row.replace(' ', '-')}-{key}"),
        training=config.training,
        build=functools.partial(_task, kind, opened, data, row),
    )


def _task(
    kind: DenseKind[Any, Any], opened: Opened, data: DenseData[Any], row: str, device: torch.device
) -> TrainTask:
    return DenseTask(kind, _network(kind, opened, data, row), data.train, data.validation)


def _network(kind: DenseKind[Any, Any], opened: Opened, data: DenseData[Any], row: str) -> nn.Module:
    # It sees images of many sizes; small ones would not show all strides.
    model = opened.build(row, max(128, kind.config.image_size), kind.config.training.seed)
    return kind.build(model, len(data.train.class_names))


def _load(network: nn.Module, job: TrainingJob) -> nn.Module:
    content = storage.read_bytes(storage.join(job.folder, "model.safetensors"))
    network.load_state_dict(safetensors.torch.load(content))
    return network.eval()


def _cost(outcome: Outcome) -> dict[str, Value]:
    return {
        "epoch kept": outcome.best_epoch,
        "parameters": outcome.parameters,
        "seconds": round(outcome.seconds, 1),
    }
