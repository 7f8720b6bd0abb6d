"""Carry a trained student to a downstream task, on all workers of the cluster."""

import math
import os
from collections.abc import Callable
from typing import Any

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.config.transfer import (
    ClassificationConfig,
    DenseConfig,
    DetectConfig,
    KnnConfig,
    LinearConfig,
    SegmentConfig,
    TransferConfig,
    ZeroShotConfig,
)
from tmkd_ray.config_reading import dump_config
from tmkd_ray.downstream.opened import Opened, open_transfer
from tmkd_ray.downstream.table import TransferTable
from tmkd_ray.stages.session import cluster_session
from tmkd_ray.stages.transfer_features import knn, linear, zero_shot
from tmkd_ray.stages.transfer_training import detect, segment


def transfer(config: TransferConfig) -> TransferTable:
    """Run a downstream task: find the student, check the data, then the cluster's work; write the results.

    Raises:
        UserError: student or data is missing, damaged, or does not fit the task.
    """
    opened = open_transfer(config)
    runs: dict[type[TransferConfig], Callable[[Any, Opened], Callable[[], TransferTable]]] = {
        ZeroShotConfig: zero_shot,
        KnnConfig: knn,
        LinearConfig: linear,
        DetectConfig: detect,
        SegmentConfig: segment,
    }
    run = runs[type(config)](config, opened)  # checks all that can be checked without a cluster
    storage.write_bytes(storage.join(opened.folder, "config.yaml"), dump_config(config).encode())
    with cluster_session(config.cluster, _local_cpus(config)):
        table = run()
    table.details |= {
        "student": opened.source.checkpoint,
        "model": opened.source.model,
        "baseline": config.baseline,
        "config": config.model_dump(mode="json"),
    }
    table.save(opened.folder)
    return table


def _local_cpus(config: TransferConfig) -> int:
    """Return how many CPUs a local Ray counts; Ray Data's own tasks need one beside the workers."""
    workers = config.training if isinstance(config, DenseConfig) else config
    assert isinstance(workers, TrainingConfig | ClassificationConfig)
    asked = math.ceil(workers.num_workers * workers.num_cpus_per_worker)
    return max(4, 2 * (os.cpu_count() or 1), 2 + asked)
