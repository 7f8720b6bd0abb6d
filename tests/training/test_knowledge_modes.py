"""Cached, streaming, online: one expression, so the same batches, pixels and losses; without a cluster."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from training_samples import CIFAR, MEAN, SIZE, STD, build_clip, training

from tmkd_ray.augmentation import AugmentationConfig, ColorJitterConfig
from tmkd_ray.config import TrainingConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.base import ImageDataset, SampleIndex
from tmkd_ray.datasets.decode import LoadedImages, load_images
from tmkd_ray.datasets.digits import CLASS_NAMES, DigitsConfig
from tmkd_ray.datasets.image_folder import ImageFolderConfig
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge import KnowledgeLayout, KnowledgeStore, node_copy
from tmkd_ray.knowledge.compute import ClipStage, ShardWriter, ViewStage, VisualStage, plan_shards
from tmkd_ray.knowledge.node_copy import map_store
from tmkd_ray.models import build_model
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.teachers import ClipTeacher, FrozenTeachers, VisualTeacher
from tmkd_ray.training import streamed
from tmkd_ray.training.loader import Batch, BatchSource, ResidentImages, ResidentKnowledge
from tmkd_ray.training.mapped import MappedImages, MappedKnowledge, StoredRows
from tmkd_ray.training.online import OnlineKnowledge
from tmkd_ray.training.streamed import Piece, StoredPieceStage, StreamedViewStage, StreamPlan, piece_batches
from tmkd_ray.training.student import StudentTask
from tmkd_ray.types import TaskSpec
from tmkd_ray.views import build_view
from tmkd_ray.views.base import View

N, BATCH, AUGMENTATION_SEED, SEED = 50, 8, 11, 2
CPU = torch.device("cpu")
JITTERED = AugmentationConfig(recipe="imagenet", color_jitter=ColorJitterConfig())


class Streamed(BatchSource):
    """What a cluster does, in a loop: pieces through the stages, one after another."""

    def __init__(self, bed: "Bed") -> None:
        self.bed = bed
        self.ids = bed.index.ids
        self.class_labels = bed.index.labels
        self.said: list[str] = []

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        bed = self.bed
        plan = StreamPlan(bed.index, seed, batch_size, world_size, bed.layout.image_size**2 * 3 * 2)
        views = ViewStage(bed.dataset, bed.views, bed.layouts, bed.augmentation, AUGMENTATION_SEED, "crops")
        stages = [
            StreamedViewStage(plan, views),
            VisualStage(bed.visual, bed.layouts, "cpu", 16),
            ClipStage(bed.clip, bed.layouts, "cpu", 16, last=True),
        ]
        for piece in plan.pieces(epoch, first_step):
            if piece.rank == rank:
                table = piece.to_table()
                for stage in stages:
                    table = stage(table)
                yield from piece_batches(table, bed.layout, CPU, self.said.append, first_step)


class StreamedRows(BatchSource):
    """A store's rows through pieces, in a loop."""

    def __init__(self, bed: "Bed", rows: StoredRows) -> None:
        self.bed, self.rows = bed, rows
        self.ids, self.class_labels = rows.ids, rows.labels

    def batches(
        self, epoch: int, batch_size: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        index = self.bed.index.take(self.rows.positions)
        plan = StreamPlan(index, seed, batch_size, world_size, 1000)
        stage = StoredPieceStage(plan, self.rows)
        for piece in plan.pieces(epoch, first_step):
            if piece.rank == rank:
                table = stage(piece.to_table())
                yield from piece_batches(table, self.bed.layout, CPU, self.say, first_step)


class Bed:
    """Digits, two small teachers, and a source of batches for each mode."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        images: str = "raw",
        num_variants: int = 1,
        augmentation: AugmentationConfig = CIFAR,
    ) -> None:
        self.augmentation = augmentation
        self.dataset: ImageDataset = build_dataset(DigitsConfig(image_size=SIZE))
        self.index: SampleIndex = self.dataset.index("train").take(np.arange(N))
        self.views: dict[str, View] = {name: build_view(name, {}) for name in ("original", "edge")}
        torch.manual_seed(0)
        self.visual = VisualTeacher(build_model("resnet8", TaskSpec(CLASS_NAMES, SIZE)), MEAN, STD)
        self.clip: ClipTeacher = build_clip().eval().requires_grad_(False)
        self.layout = KnowledgeLayout(
            tuple(self.views),
            num_variants,
            SIZE,
            self.visual.feature_width,
            self.clip.embedding_width,
            dtype=dtype,
            image_format=images,
        )
        self.layouts = {"train": self.layout, "validation": replace(self.layout, num_variants=1)}
        self.folder = folder

    def cached(self) -> ResidentKnowledge:
        store = KnowledgeStore(str(self.folder / "store"))
        store.begin({"version": 1})
        stages = [
            ViewStage(self.dataset, self.views, self.layouts, self.augmentation, AUGMENTATION_SEED),
            VisualStage(self.visual, self.layouts, "cpu", 16),
            ClipStage(self.clip, self.layouts, "cpu", 16),
            ShardWriter(store, self.layouts),
        ]
        plans = plan_shards("train", self.index, 16, self.layout.num_variants)
        for plan in plans:
            table: pa.Table = plan.to_table()
            for stage in stages:
                table = stage(table)
        store.finish(CLASS_NAMES, self.layouts, {"train": len(plans)})
        return ResidentKnowledge(store.read("train"), CPU, self.augmentation, SEED)

    def images(self) -> LoadedImages:
        return load_images(self.dataset, "train", self.index)

    def online(self, with_maps: bool = False) -> OnlineKnowledge:
        loaded = self.images()
        teachers = FrozenTeachers(self.visual, self.clip, CPU, 16, 16, with_maps=with_maps)
        return OnlineKnowledge(
            loaded.images,
            loaded.labels,
            loaded.ids,
            self.views,
            teachers,
            CPU,
            self.augmentation,
            AUGMENTATION_SEED,
        )

    def sources(self) -> dict[str, BatchSource]:
        return {"cached": self.cached(), "streaming": Streamed(self), "online": self.online()}

    def task(self, source: BatchSource, config: TrainingConfig) -> StudentTask:
        prompts = [view.config.prompts for view in self.views.values()]
        constants = TeacherConstants(
            tuple(self.views),
            self.visual.head_weight,
            self.visual.head_bias,
            self.clip.text_bank(prompts, CLASS_NAMES),
            self.clip.temperature,
        )
        loaded = self.images()
        torch.manual_seed(7)
        return StudentTask(
            build_model("resnet8", TaskSpec(CLASS_NAMES, SIZE)),
            source,
            self.layout,
            loaded.images,
            loaded.labels,
            constants,
            DistillerConfig.model_validate("tmkd"),
            tuple(self.views),
            config,
            MEAN,
            STD,
        )


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


@pytest.mark.parametrize(
    ("augmentation", "world_size"),
    [(CIFAR, 2), (JITTERED, 1), (AugmentationConfig(recipe="moco_v2"), 1)],
    ids=["cifar", "imagenet", "moco_v2"],
)
def test_same_batches_and_pixels_in_all_modes(
    augmentation: AugmentationConfig, world_size: int, tmp_path: Path
) -> None:
    bed = Bed(tmp_path, augmentation=augmentation)
    for rank in range(world_size):
        batches = {
            mode: list(source.batches(0, BATCH, SEED, rank, world_size))
            for mode, source in bed.sources().items()
        }
        assert {len(found) for found in batches.values()} == {N // BATCH}
        for cached, streaming, online in zip(*batches.values(), strict=True):
            for other in (streaming, online):
                assert torch.equal(other.images, cached.images), "the same pixels"
                assert torch.equal(other.indices, cached.indices)
                assert torch.equal(other.labels, cached.labels)
                torch.testing.assert_close(other.knowledge.feature, cached.knowledge.feature)
                torch.testing.assert_close(other.knowledge.clip_embedding, cached.knowledge.clip_embedding)


def test_same_losses_in_all_modes(bed: Bed) -> None:
    config = training(batch_size=BATCH, seed=SEED)
    losses: dict[str, list[dict[str, float]]] = {}
    for mode, source in bed.sources().items():
        task = bed.task(source, config)
        task.module.train()
        losses[mode] = []
        for batch in source.batches(0, BATCH, SEED, 0, 1):
            output = task.module(batch).loss
            output.loss.backward()
            terms = {name: value.item() for name, value in output.terms.items()}
            losses[mode].append(terms | {"loss": output.loss.item()})
    assert len(losses["cached"]) == N // BATCH
    assert set(losses["cached"][0]) == {"ce", "kd", "feature", "text", "contrastive", "loss"}
    for mode in ("streaming", "online"):
        for found, wanted in zip(losses[mode], losses["cached"], strict=True):
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5), mode


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("int8", 2e-2)])
def test_streamed_values_are_those_of_the_configured_type(tmp_path: Path, dtype: str, bound: float) -> None:
    bed = Bed(tmp_path, dtype)
    for streaming, cached, online in zip(
        *(list(source.batches(0, BATCH, SEED, 0, 1)) for source in (Streamed(bed), bed.cached(), bed.online())),
        strict=True,
    ):
        assert torch.equal(streaming.knowledge.feature, cached.knowledge.feature)
        assert torch.equal(streaming.knowledge.clip_embedding, cached.knowledge.clip_embedding)
        error = (streaming.knowledge.feature.float() - online.knowledge.feature).abs().max()
        assert 0 < error < bound * online.knowledge.feature.abs().max()


def test_augmentation_is_fresh_every_epoch(bed: Bed) -> None:
    for source in (Streamed(bed), bed.online()):
        seen = []
        for epoch in (0, 1, 5):
            by_row = {}
            for batch in source.batches(epoch, BATCH, SEED, 0, 1):
                by_row |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
            seen.append(by_row)
        common = set(seen[0]) & set(seen[1]) & set(seen[2])
        assert len(common) > N // 2
        assert sum(torch.equal(seen[0][row], seen[1][row]) for row in common) < len(common) / 4
        assert sum(torch.equal(seen[1][row], seen[2][row]) for row in common) < len(common) / 4


@pytest.mark.parametrize("first_step", [1, 4])
def test_an_epoch_can_be_entered_at_any_step(bed: Bed, first_step: int) -> None:
    for source in (Streamed(bed), bed.online()):
        whole = list(source.batches(3, BATCH, SEED, 0, 1))[first_step:]
        rest = list(source.batches(3, BATCH, SEED, 0, 1, first_step))
        assert len(whole) == len(rest) == N // BATCH - first_step
        for left, right in zip(rest, whole, strict=True):
            assert torch.equal(left.indices, right.indices)
            assert torch.equal(left.images, right.images)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pieces_are_the_batches_of_the_workers_in_turn(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    bytes_per_image = 1000
    monkeypatch.setattr(streamed, "_PIECE_BYTES", 2 * (BATCH // world_size) * bytes_per_image)
    plan = StreamPlan(bed.index, SEED, BATCH, world_size, bytes_per_image)
    pieces = plan.pieces(epoch=1)
    assert [piece.rank for piece in pieces] == list(range(world_size)) * 3
    assert [piece.num_steps for piece in pieces[::world_size]] == [2, 2, 2]
    assert plan.pieces(1, first_step=3)[0] == Piece(1, 2, 2, 0), "cut as the whole epoch is"
    for rank in range(world_size):
        rows = np.concatenate([plan.rows(piece) for piece in pieces if piece.rank == rank])
        expected = [batch.indices for batch in bed.online().batches(1, BATCH, SEED, rank, world_size)]
        assert rows.tolist() == torch.cat(expected).tolist()


def test_a_teacher_that_returns_nan_is_named_with_the_image(bed: Bed) -> None:
    with torch.no_grad():
        bed.clip.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"teacher\.text returned NaN.*image digits/\d+"):
        next(bed.online().batches(0, BATCH, SEED, 0, 1))
    with pytest.raises(UserError, match=r"teacher\.text\) returned NaN.*image digits/\d+ \(view original"):
        next(Streamed(bed).batches(0, BATCH, SEED, 0, 1))


def test_unreadable_images_are_replaced_and_said(bed: Bed, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "images" / "train" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "images" / "train" / "dog" / "5.png").write_bytes(b"not an image")
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "test")
    bed.dataset = build_dataset(ImageFolderConfig(path=str(tmp_path / "images"), image_size=SIZE))
    bed.index = bed.dataset.index("train")
    source = Streamed(bed)
    (batch,) = source.batches(0, 6, SEED, 0, 1)
    assert len(batch.images) == 6, "the batch keeps its size"
    broken = bed.index.ids.tolist().index("train/dog/5.png")
    assert broken not in batch.indices
    assert len(set(batch.indices.tolist())) == 5
    assert len(source.said) == 1
    assert "train/dog/5.png" in source.said[0]


def test_feature_maps_come_with_the_teacher_online(bed: Bed) -> None:
    batch = next(bed.online(with_maps=True).batches(0, BATCH, SEED, 0, 1))
    assert batch.knowledge is not None
    maps = batch.knowledge.feature_maps
    assert maps is not None
    with torch.no_grad():
        expected = bed.visual.outputs(batch.images.permute(0, 2, 3, 1)).feature_maps
    assert len(maps) == len(expected)
    for found, wanted in zip(maps, expected, strict=True):
        assert found.shape == (BATCH, 2, *wanted.shape[1:])
        torch.testing.assert_close(found[:, 0], wanted)
        assert not found.is_inference()


@pytest.mark.parametrize(("dtype", "images"), [("float16", "raw"), ("int8", "lossless")])
def test_a_mapped_and_a_streamed_store_are_the_resident_one(tmp_path: Path, dtype: str, images: str) -> None:
    """The same batches to the bit, of all rows and of some, in every epoch."""
    bed = Bed(tmp_path, dtype, images=images, num_variants=3)
    resident_bed = bed.cached()
    store = KnowledgeStore(str(tmp_path / "store"))
    arrays = map_store(store, "train", str(tmp_path / "copies"))
    assert isinstance(arrays.feature, np.memmap)
    some = np.array([3, 4, 9, 11, 20, 21, 22, 30, 41, 42, 47, 49])
    for positions in (None, some):
        rows = StoredRows(arrays, SEED, positions)
        resident = ResidentKnowledge(store.read("train"), CPU, CIFAR, SEED, positions)
        sources = {"mapped": MappedKnowledge(rows, CPU), "streamed": StreamedRows(bed, rows)}
        for epoch in (0, 1, 4):
            wanted = list(resident.batches(epoch, BATCH, SEED, 1, 2, first_step=1))
            for name, source in sources.items():
                found = list(source.batches(epoch, BATCH, SEED, 1, 2, first_step=1))
                assert len(found) == len(wanted), name
                for left, right in zip(found, wanted, strict=True):
                    for field in ("images", "labels", "indices"):
                        assert torch.equal(getattr(left, field), getattr(right, field)), (name, field)
                    assert torch.equal(left.knowledge.feature, right.knowledge.feature)
                    assert torch.equal(left.knowledge.clip_embedding, right.knowledge.clip_embedding)
    assert len(resident_bed) == N


def test_one_copy_is_made_and_used_again(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.cached()
    store = KnowledgeStore(str(tmp_path / "store"))
    map_store(store, "train", str(tmp_path / "copies"))
    (copy,) = (path for path in (tmp_path / "copies" / "knowledge").iterdir() if path.is_dir())
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    shutil.rmtree(tmp_path / "store" / "train")  # not read again
    arrays = map_store(store, "train", str(tmp_path / "copies"))
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    with pytest.raises(ValueError, match="read-only"):
        arrays.feature[0] = 0


def test_copies_that_nobody_opens_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two weeks, or at once where a full disk leaves no room for the next one."""
    Bed(tmp_path).cached()
    store = KnowledgeStore(str(tmp_path / "store"))
    copies = tmp_path / "copies" / "knowledge"
    arrays = map_store(store, "train", str(tmp_path / "copies"))
    kept = np.array(arrays.feature)
    (copy,) = (path for path in copies.iterdir() if path.is_dir())
    recent, forgotten, in_use = (copies / name for name in ("recent-train", "forgotten-train", "used-train"))
    for folder in (recent, forgotten, in_use):
        shutil.copytree(copy, folder)
    weeks_ago = time.time() - node_copy.UNUSED_S - 60
    os.utime(forgotten, (weeks_ago, weeks_ago))
    os.utime(in_use, (weeks_ago, weeks_ago))
    with open(copies / "used-train.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        map_store(store, "validation", str(tmp_path / "copies"))
        assert recent.is_dir()
        assert in_use.is_dir()
        assert not forgotten.exists()

    def full_once(*arguments: object) -> None:
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, "No space left on device")

    (validation,) = copies.glob("*-validation")
    shutil.rmtree(validation)
    monkeypatch.setattr(node_copy, "_make", full_once)
    map_store(store, "validation", str(tmp_path / "copies"))
    assert [path.name for path in copies.iterdir() if path.is_dir()] == [validation.name]
    assert np.array_equal(arrays.feature, kept), "what is mapped stays"
    assert isinstance(map_store(store, "train", str(tmp_path / "copies")).feature, np.memmap)


def test_a_copy_of_a_damaged_store_is_not_made(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.cached()
    shard = next((tmp_path / "store" / "train").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-10])
    store = KnowledgeStore(str(tmp_path / "store"))
    for _ in range(2):
        with pytest.raises(UserError, match=shard.name):
            map_store(store, "train", str(tmp_path / "copies"))


def test_mapped_images_alone_are_the_resident_ones(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.cached()
    store = KnowledgeStore(str(tmp_path / "store"))
    arrays = store.read("train")
    assert arrays.images is not None
    some = np.arange(3, 40, 2)
    resident = ResidentImages(arrays.images[some], arrays.labels[some], arrays.ids[some], CPU, CIFAR, SEED)
    rows = StoredRows(map_store(store, "train", str(tmp_path / "copies")), SEED, some)
    mapped = MappedImages(rows, CPU, CIFAR, SEED)
    assert mapped.class_labels.tolist() == arrays.labels[some].tolist()
    for epoch in (0, 3):
        wanted = list(resident.batches(epoch, BATCH, SEED, 1, 2, first_step=1))
        found = list(mapped.batches(epoch, BATCH, SEED, 1, 2, first_step=1))
        assert len(found) == len(wanted) == 1
        for left, right in zip(found, wanted, strict=True):
            assert left.knowledge is None
            for field in ("images", "labels", "indices"):
                assert torch.equal(getattr(left, field), getattr(right, field)), field
