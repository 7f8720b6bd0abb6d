"""Downstream tasks on a frozen student's features: zero-shot, nearest neighbours, linear probe.

Each function checks what can be checked without a cluster, and returns what is to be done on one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tmkd_ray import storage
from tmkd_ray.config.transfer import ClassificationConfig, KnnConfig, LinearConfig, ZeroShotConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.base import ImageDataset, Split
from tmkd_ray.datasets.decode import list_set_aside
from tmkd_ray.datasets.splits import split_train
from tmkd_ray.downstream.features import FeatureExtractor, FeatureTable, joined
from tmkd_ray.downstream.knn import knn_accuracy, top_accuracies
from tmkd_ray.downstream.linear_probe import probe
from tmkd_ray.downstream.opened import BASELINE, RANDOM, STUDENT, Opened
from tmkd_ray.downstream.table import TransferTable, Value
from tmkd_ray.downstream.zero_shot import load_projector, random_projector, zero_shot_logits
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.stages.chunks import over_workers
from tmkd_ray.stages.progress import say
from tmkd_ray.teachers import ClipTeacher


@dataclass(frozen=True)
class _Labelled:
    """A labelled dataset, and the networks to look at it."""

    config: ClassificationConfig
    dataset: ImageDataset
    networks: dict[str, ImageClassifier]
    mean: ImageStatistics
    std: ImageStatistics

    @property
    def num_classes(self) -> int:
        return len(self.dataset.class_names)

    def features(self, *splits: Split) -> list[FeatureTable]:
        """Return the features of whole splits, in one pass; images that cannot be decoded are said."""
        parts = {split: self.dataset.index(split) for split in splits}
        work = FeatureExtractor(self.networks, self.dataset, parts, self.mean, self.std, self.config.batch_size)
        chunks: list[dict[Split, FeatureTable]] = over_workers(work, self.config, "features")
        return [self._checked(split, [chunk[split] for chunk in chunks], len(parts[split])) for split in splits]

    def _checked(self, split: Split, tables: list[FeatureTable], count: int) -> FeatureTable:
        set_aside = [entry for table in tables for entry in table.set_aside]
        if len(set_aside) == count:
            raise UserError(
                f"dataset {self.config.dataset.name}, {split} split: none of the {count} images can be "
                f"decoded; the first, {set_aside[0].id}: {set_aside[0].reason}"
            )
        for line in list_set_aside(split, set_aside):
            say(line)
        return joined(tables)


def _labelled(config: ClassificationConfig, opened: Opened) -> _Labelled:
    section, size = config.dataset, opened.source.image_size
    if size is not None and "image_size" not in section.model_fields_set:
        section = section.model_copy(update={"image_size": size})
    dataset = build_dataset(section)
    dataset.index("train")
    dataset.index("test")
    networks = {row: opened.build(row, section.image_size) for row in opened.weights}
    return _Labelled(config, dataset, networks, opened.mean, opened.std)


def zero_shot(config: ZeroShotConfig, opened: Opened) -> Callable[[], TransferTable]:
    data = _labelled(config, opened)
    data.networks.pop(BASELINE, None)  # no projector was ever trained on it
    beside = opened.source.checkpoint.rpartition("/")[0]
    path = storage.absolute(config.projector or storage.join(beside, "projector.safetensors"))
    projector = load_projector(path, data.networks[STUDENT].feature_width)
    name = config.clip or projector.clip
    if name is None:
        raise UserError(f"{path} does not say which CLIP it projects to; give it, as clip=PATH")
    clip = ClipTeacher.load(name)
    last = projector.network[2]
    assert isinstance(last, nn.Linear)
    if clip.embedding_width != last.out_features:
        raise UserError(
            f"the projector {path} projects to {last.out_features} dimensions, the CLIP {name} has "
            f"{clip.embedding_width}; give the one the student was taught by, as clip=PATH"
        )
    bank_CE = clip.text_bank([config.prompts], data.dataset.class_names)[0]
    projectors = {
        STUDENT: projector.network,
        RANDOM: random_projector(projector.network),
    }

    def run() -> TransferTable:
        (test,) = data.features("test")
        rows: list[dict[str, Value]] = []
        for row in data.networks:
            logits_NC = zero_shot_logits(test.features[row], projectors[row], bank_CE, config.scale)
            top1, top5 = top_accuracies(logits_NC, torch.from_numpy(test.labels))
            rows.append({"backbone": row, "top-1": top1, "top-5": top5})
        notes = [f"{len(test):,} test images, {data.num_classes} classes, prompts: {'; '.join(config.prompts)}"]
        return TransferTable("zero-shot", rows, ("top-1", "top-5"), notes)

    return run


def knn(config: KnnConfig, opened: Opened) -> Callable[[], TransferTable]:
    data = _labelled(config, opened)

    def run() -> TransferTable:
        train, test = data.features("train", "test")
        rows: list[dict[str, Value]] = []
        for row in data.networks:
            bank, queries = train.features[row], test.features[row]
            top1, top5 = knn_accuracy(
                bank, train.labels, queries, test.labels, data.num_classes, config.k, config.temperature
            )
            rows.append({"backbone": row, "top-1": top1, "top-5": top5})
        notes = [
            f"weighted k-NN, k = {config.k}, T = {config.temperature:g}: {len(test):,} test images among "
            f"{len(train):,} training images"
        ]
        return TransferTable("knn", rows, ("top-1", "top-5"), notes)

    return run


def linear(config: LinearConfig, opened: Opened) -> Callable[[], TransferTable]:
    data = _labelled(config, opened)
    index = data.dataset.index("train")
    _, validation_index = split_train(index, config.dataset.validation_fraction, config.dataset.split_seed)
    if len(validation_index) == 0:
        raise UserError(
            f"dataset {config.dataset.name}: no class has two images: none to choose the learning rate on"
        )

    def run() -> TransferTable:
        whole, test = data.features("train", "test")
        is_validation = np.isin(whole.ids, validation_index.ids)
        train, validation = (
            whole.take(np.flatnonzero(~is_validation)),
            whole.take(np.flatnonzero(is_validation)),
        )
        rows: list[dict[str, Value]] = []
        percent: dict[str, None] = {}
        details: dict[str, Any] = {}
        for row in data.networks:
            results = probe(train, validation, test, row, data.num_classes, config)
            figures: dict[str, Value] = {"backbone": row}
            for result in results:
                column = f"{100 * result.fraction:g} % of labels"
                figures[column] = result.accuracy
                figures[f"lr ({100 * result.fraction:g} %)"] = result.learning_rate
                percent[column] = None
            rows.append(figures)
            details[row] = [asdict(result) for result in results]
        notes = [
            f"top-1 on {len(test):,} test images; {len(train):,} training images; learning rate chosen on "
            f"{len(validation):,} validation images"
        ]
        return TransferTable("linear", rows, tuple(percent), notes, {"probes": details})

    return run
