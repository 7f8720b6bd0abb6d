"""Downstream tasks on a frozen student's features: zero-shot, nearest neighbours, linear probe.

Each function checks what can be checked without a cluster, and returns what is to be done on one. Features are
computed once, and stay on the cluster, as does all that is computed from them: the driver sees the figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ray import ObjectRef
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.config.transfer import ClassificationConfig, KnnConfig, LinearConfig, ZeroShotConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.base import ImageDataset, Split
from tmkd_ray.datasets.decode import SetAside, list_set_aside
from tmkd_ray.datasets.splits import split_train
from tmkd_ray.downstream.features import FeatureExtractor, FeatureTable, joined
from tmkd_ray.downstream.knn import knn_accuracy, top_accuracies
from tmkd_ray.downstream.linear_probe import ProbeResult, probe
from tmkd_ray.downstream.opened import BASELINE, RANDOM, STUDENT, Opened
from tmkd_ray.downstream.table import TransferTable, Value
from tmkd_ray.downstream.zero_shot import load_projector, random_projector, zero_shot_logits
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.stages.chunks import ChunkResults, finished, over_workers, task_device
from tmkd_ray.stages.progress import say
from tmkd_ray.teachers import ClipTeacher

Parts = dict[str, FeatureTable]
"""One network's features: of the splits, and `validation`, which is apart from `train`."""


@dataclass(frozen=True)
class _Features:
    """The features of all networks, on the cluster.

    Attributes:
        results: as the workers left them.
        parts: references to one network's `Parts`, by row of the table.
        sizes: images in each part.
    """

    results: ChunkResults
    parts: dict[str, ObjectRef]
    sizes: dict[str, int]

    def each(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Return what `function(parts, row, *arguments)` returns for each row; each is a task."""
        return finished(
            {row: self.results.start(function, part, row, *arguments) for row, part in self.parts.items()}
        )


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

    def features(self, *splits: Split, validation_ids: Sequence[str] = ()) -> _Features:
        """Return the features of whole splits, in one pass; images that cannot be decoded are said.

        Args:
            validation_ids: of the images of train that make the part `validation`.
        """
        indices = {split: self.dataset.index(split) for split in splits}
        work = FeatureExtractor(
            self.networks, self.dataset, indices, self.mean, self.std, self.config.batch_size
        )
        results = over_workers(work, self.config, "features")
        (set_aside,) = finished({"": results.reduce(_set_aside)}).values()
        sizes: dict[str, int] = {split: len(index) for split, index in indices.items()}
        for split, entries in set_aside.items():
            if len(entries) == len(indices[split]):
                raise UserError(
                    f"dataset {self.config.dataset.name}, {split} split: none of the {len(entries)} images can "
                    f"be decoded; the first, {entries[0].id}: {entries[0].reason}"
                )
            for line in list_set_aside(split, entries):
                say(line)
            sizes[split] -= len(entries)
        if "train" in indices:
            lost = {entry.id for entry in set_aside["train"]}
            sizes["validation"] = len(set(validation_ids) - lost)
            sizes["train"] -= sizes["validation"]
        ids = np.array(validation_ids, dtype=np.str_)
        parts = {row: results.reduce(_parts, row, ids) for row in self.networks}
        return _Features(results, parts, sizes)


def _set_aside(chunks: list[dict[Split, FeatureTable]]) -> dict[Split, list[SetAside]]:
    return {split: [entry for chunk in chunks for entry in chunk[split].set_aside] for split in chunks[0]}


def _parts(chunks: list[dict[Split, FeatureTable]], row: str, validation_ids: np.ndarray) -> Parts:
    parts: Parts = {split: joined([chunk[split] for chunk in chunks], [row]) for split in chunks[0]}
    if "train" in parts:
        is_validation = np.isin(parts["train"].ids, validation_ids)
        parts["validation"] = parts["train"].take(np.flatnonzero(is_validation))
        parts["train"] = parts["train"].take(np.flatnonzero(~is_validation))
    return parts


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
    left_out = data.networks.pop(BASELINE, None) is not None  # no projector was ever trained on it
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
    projectors = {
        STUDENT: projector.network,
        RANDOM: random_projector(projector.network),
    }

    def run() -> TransferTable:
        features = data.features("test")
        bank = features.results.start(_text_bank, clip, config.prompts, data.dataset.class_names)
        figures = features.each(_zero_shot, projectors, bank, config.scale)
        notes = [
            f"{features.sizes['test']:,} test images, {data.num_classes} classes, "
            f"prompts: {'; '.join(config.prompts)}"
        ]
        if left_out:
            notes.append("the baseline's weights have no projector into the CLIP's space: left out")
        return _top_table("zero-shot", figures, notes)

    return run


def _text_bank(clip: ClipTeacher, prompts: Sequence[str], class_names: Sequence[str]) -> Tensor:
    return clip.to(task_device()).text_bank([prompts], class_names)[0].cpu()


def _zero_shot(
    parts: Parts, row: str, projectors: dict[str, nn.Sequential], bank_CE: Tensor, scale: float
) -> tuple[float, float]:
    test, device = parts["test"], task_device()
    projector = projectors[row].to(device)
    logits_NC = zero_shot_logits(test.features[row], projector, bank_CE.to(device), scale)
    return top_accuracies(logits_NC, torch.tensor(test.labels, device=device))


def _top_table(task: str, figures: dict[str, tuple[float, float]], notes: list[str]) -> TransferTable:
    rows: list[dict[str, Value]] = [
        {"backbone": row, "top-1": top1, "top-5": top5} for row, (top1, top5) in figures.items()
    ]
    return TransferTable(task, rows, ("top-1", "top-5"), notes)


def knn(config: KnnConfig, opened: Opened) -> Callable[[], TransferTable]:
    data = _labelled(config, opened)

    def run() -> TransferTable:
        features = data.features("train", "test")
        figures = features.each(_knn, data.num_classes, config)
        sizes = features.sizes
        notes = [
            f"weighted k-NN, k = {config.k}, T = {config.temperature:g}: {sizes['test']:,} test images among "
            f"{sizes['train']:,} training images"
        ]
        return _top_table("knn", figures, notes)

    return run


def _knn(parts: Parts, row: str, num_classes: int, config: KnnConfig) -> tuple[float, float]:
    train, test = parts["train"], parts["test"]
    return knn_accuracy(
        train.features[row],
        train.labels,
        test.features[row],
        test.labels,
        num_classes,
        config.k,
        config.temperature,
        task_device(),
    )


def linear(config: LinearConfig, opened: Opened) -> Callable[[], TransferTable]:
    data = _labelled(config, opened)
    index = data.dataset.index("train")
    _, validation_index = split_train(index, config.dataset.validation_fraction, config.dataset.split_seed)
    if len(validation_index) == 0:
        raise UserError(
            f"dataset {config.dataset.name}: no class has two images: none to choose the learning rate on"
        )

    def run() -> TransferTable:
        features = data.features("train", "test", validation_ids=validation_index.ids.tolist())
        results = finished(
            {
                (row, fraction): features.results.start(_probe, part, row, data.num_classes, fraction, config)
                for row, part in features.parts.items()
                for fraction in config.fractions
            }
        )
        rows: list[dict[str, Value]] = []
        details: dict[str, Any] = {}
        for row in features.parts:
            figures: dict[str, Value] = {"backbone": row}
            probes = [results[row, fraction] for fraction in config.fractions]
            for result in probes:
                figures[_column(result.fraction)] = result.accuracy
                figures[f"lr ({100 * result.fraction:g} %)"] = result.learning_rate
            rows.append(figures)
            details[row] = [asdict(result) for result in probes]
        sizes = features.sizes
        notes = [
            f"top-1 on {sizes['test']:,} test images; {sizes['train']:,} training images; learning rate chosen "
            f"on {sizes['validation']:,} validation images"
        ]
        percent = tuple(map(_column, config.fractions))
        return TransferTable("linear", rows, percent, notes, {"probes": details})

    return run


def _column(fraction: float) -> str:
    return f"{100 * fraction:g} % of labels"


def _probe(parts: Parts, row: str, num_classes: int, fraction: float, config: LinearConfig) -> ProbeResult:
    train, validation, test = parts["train"], parts["validation"], parts["test"]
    return probe(train, validation, test, row, num_classes, fraction, config, task_device())
