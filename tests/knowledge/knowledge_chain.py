"""The road from images to a store in a plain loop, on a few digits and small random teachers."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.base import ImageDataset, SampleIndex
from tmkd_ray.datasets.digits import DigitsConfig
from tmkd_ray.datasets.splits import split_train
from tmkd_ray.knowledge.compute import ClipStage, ShardPlan, ShardWriter, ViewStage, VisualStage, plan_shards
from tmkd_ray.knowledge.fingerprint import Fingerprint
from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore, Manifest
from tmkd_ray.models import build_model
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.types import TaskSpec
from tmkd_ray.views import build_view
from tmkd_ray.views.base import View

SIZE = 16
VARIANTS = 3
SHARD_ROWS = 8
SEED = 5
VISUAL_BATCH, CLIP_BATCH = 7, 50
"""Neither divides a shard's pixels: batches cut across images."""

MEAN, STD = (0.3, 0.32, 0.28), (0.35, 0.36, 0.34)
CIFAR = AugmentationConfig(recipe="cifar", padding=3)
FINGERPRINT: Fingerprint = {
    "version": 1,
    "views": {"edge": {"strength": 0.5}},
    "view_order": ("original", "edge"),
}


@dataclass(frozen=True)
class Chain:
    """Everything the stages are built from; `stages` makes new ones, as another actor would."""

    dataset: ImageDataset
    train: SampleIndex
    validation: SampleIndex
    views: dict[str, View]
    visual: VisualTeacher
    clip: ClipTeacher | None
    layouts: dict[str, KnowledgeLayout]

    def plans(self) -> list[ShardPlan]:
        return [
            *plan_shards("train", self.train, SHARD_ROWS, VARIANTS),
            *plan_shards("validation", self.validation, SHARD_ROWS, 1),
        ]

    def stages(self) -> list[Callable[[pa.Table], pa.Table]]:
        stages: list[Callable[[pa.Table], pa.Table]] = [
            ViewStage(self.dataset, self.views, self.layouts, CIFAR, SEED),
            VisualStage(self.visual, self.layouts, "cpu", VISUAL_BATCH),
        ]
        if self.clip is not None:
            stages.append(ClipStage(self.clip, self.layouts, "cpu", CLIP_BATCH))
        return stages

    def compute(self, plans: Iterable[ShardPlan], store: KnowledgeStore) -> list[dict[str, object]]:
        """Run some shards through new stages and commit them; return what the writer reports."""
        stages = [*self.stages(), ShardWriter(store, self.layouts)]
        reports = []
        for plan in plans:
            table = plan.to_table()
            for stage in stages:
                table = stage(table)
            reports += table.to_pylist()
        return reports

    def finish(self, store: KnowledgeStore) -> Manifest:
        store.write_head(self.visual.head_weight, self.visual.head_bias)
        plans = self.plans()
        expected = {split: sum(plan.split == split for plan in plans) for split in self.layouts}
        return store.finish(self.dataset.class_names, self.layouts, expected)

    def write(self, folder: Path, order: Callable[[list[ShardPlan]], list[ShardPlan]] = list) -> KnowledgeStore:
        """Compute a whole store."""
        store = KnowledgeStore(str(folder))
        store.begin(FINGERPRINT)
        self.compute(order(self.plans()), store)
        self.finish(store)
        return store


def build_visual_teacher() -> VisualTeacher:
    torch.manual_seed(0)
    return VisualTeacher(build_model("resnet8", TaskSpec(tuple("0123456789"), SIZE)), MEAN, STD)


def build_clip() -> ClipTeacher:
    torch.manual_seed(1)
    clip = ClipTeacher.new(
        [f"a photo of a {name}." for name in ("zero", "one", "two", "three")],
        image_size=SIZE,
        patch_size=4,
        embedding_width=24,
        vision_width=32,
        vision_layers=2,
        text_width=32,
        text_layers=1,
        head_width=16,
        vocabulary_size=600,
        mean=MEAN,
        std=STD,
    )
    return clip.eval().requires_grad_(False)


def build_chain(dataset: ImageDataset, visual: VisualTeacher, clip: ClipTeacher | None) -> Chain:
    views = {name: build_view(name, {}) for name in ("original", "edge", "high_frequency")}
    train, validation = split_train(dataset.index("train"), 0.2, seed=0)
    layout = KnowledgeLayout(
        views=tuple(views),
        num_variants=VARIANTS,
        image_size=SIZE,
        feature_width=visual.feature_width,
        clip_width=None if clip is None else clip.embedding_width,
    )
    layouts = {"train": layout, "validation": replace(layout, num_variants=1)}
    return Chain(dataset, train, validation, views, visual, clip, layouts)


def digits_chain(clip: ClipTeacher | None) -> Chain:
    dataset = build_dataset(DigitsConfig(image_size=SIZE, limit=40))
    return build_chain(dataset, build_visual_teacher(), clip)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_with_bank(chain: Chain, folder: Path, **changes: Any) -> KnowledgeStore:
    """Compute a whole store with a text bank, of layouts changed so."""
    layouts = {split: replace(layout, **changes) for split, layout in chain.layouts.items()}
    store = replace(chain, layouts=layouts).write(folder)
    if chain.clip is not None:
        bank = chain.clip.text_bank([["a photo of a {}."]] * 3, chain.dataset.class_names)
        store.write_text_bank("bank", bank, chain.clip.temperature)
    return store


def shard_file(store: KnowledgeStore, split: str, number: int) -> Path:
    return file_of(Path(store.path), split, number)


def assert_equal(found: KnowledgeArrays, expected: KnowledgeArrays) -> None:
    assert found.layout == expected.layout
    for field in fields(KnowledgeArrays):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def file_of(folder: Path, split: str, number: int) -> Path:
    """Return the file of a shard, as its record names it."""
    record = json.loads((folder / split / f"{number:05d}.json").read_text())
    return folder / split / record["file"]
