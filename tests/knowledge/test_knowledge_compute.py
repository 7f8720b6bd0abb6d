"""What the chain of stages writes, against the same thing computed image by image."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from knowledge_chain import (
    CIFAR,
    CLIP_BATCH,
    MEAN,
    SEED,
    SHARD_ROWS,
    SIZE,
    STD,
    VARIANTS,
    VISUAL_BATCH,
    Chain,
    build_chain,
    build_clip,
    build_visual_teacher,
    contents,
    digits_chain,
)
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from tmkd_ray.augmentation import PARAMETERS, draw_parameters, sample_keys, variant_offsets
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.image_folder import ImageFolderConfig
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.compute import ClipStage, ShardPlan, VisualStage, plan_shards
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.settings import Precision
from tmkd_ray.teachers import VisualTeacher
from tmkd_ray.training.loader import ResidentKnowledge
from tmkd_ray.types import ModelOutput


def digit(sample: str) -> np.ndarray:
    """Return one digit as scikit-learn has it, 8×8 grey values of 0 to 16, as RGB of SIZE pixels."""
    grey = load_digits().images[int(sample.removeprefix("digits/"))]
    image = Image.fromarray(np.floor(grey * 255 / 16 + 0.5).astype(np.uint8)).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def crop(image: np.ndarray, top: int, left: int, height: int, width: int, flip: int) -> np.ndarray:
    padded = np.pad(image, ((SIZE, SIZE), (SIZE, SIZE), (0, 0)))
    cut = padded[SIZE + top : SIZE + top + height, SIZE + left : SIZE + left + width]
    return np.ascontiguousarray(cut[:, ::-1] if flip else cut)


def pixels_of_views(chain: Chain, arrays: KnowledgeArrays) -> np.ndarray:
    """Return uint8 [N, K, V, H, W, 3], every view of every variant, each image by itself."""
    return np.array(
        [
            [
                [view(crop(image, *parameters[:5])[None])[0] for view in chain.views.values()]
                for parameters in augmentation
            ]
            for image, augmentation in zip(arrays.images, arrays.augmentation.tolist(), strict=True)
        ]
    )


def in_batches(model: torch.nn.Module | object, pixels: np.ndarray, batch: int, width: int) -> np.ndarray:
    """Call a model on the flattened pixels of each shard, `batch` images at a time, as float16."""
    shards = []
    for start in range(0, len(pixels), SHARD_ROWS):
        flat = torch.from_numpy(pixels[start : start + SHARD_ROWS].reshape(-1, SIZE, SIZE, 3))
        with torch.inference_mode():
            output = torch.cat([model(part) for part in flat.split(batch)])  # type: ignore[operator]
        shards.append(output.half().numpy().reshape(-1, *pixels.shape[1:3], width))
    return np.concatenate(shards)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_store_equals_the_straightforward_computation(chain: Chain, store: KnowledgeStore, split: str) -> None:
    assert chain.clip is not None
    arrays = store.read(split)
    index = getattr(chain, split)
    assert arrays.ids.tolist() == index.ids.tolist()
    assert arrays.labels.tolist() == index.labels.tolist()
    assert arrays.labels.tolist() == [
        int(load_digits().target[int(i.removeprefix("digits/"))]) for i in arrays.ids
    ]
    np.testing.assert_array_equal(arrays.images, [digit(sample) for sample in arrays.ids])

    pixels = pixels_of_views(chain, arrays)
    width = chain.visual.feature_width
    expected = in_batches(chain.visual, pixels, VISUAL_BATCH, width)
    assert arrays.feature.dtype == np.float16
    assert arrays.feature.tobytes() == expected.tobytes()
    assert arrays.clip_embedding is not None
    expected = in_batches(chain.clip.encode_images, pixels, CLIP_BATCH, chain.clip.embedding_width)
    assert arrays.clip_embedding.tobytes() == expected.tobytes()
    assert arrays.feature[:, 0].std(axis=1).max() > 0.01, "the views' features differ"


def test_features_by_the_formulas_of_the_models(chain: Chain, store: KnowledgeStore) -> None:
    """Normalisation and models without the teachers' own code; equal up to the rounding to float16."""
    assert chain.clip is not None
    arrays = store.read("train")
    pixels = pixels_of_views(chain, arrays).reshape(-1, SIZE, SIZE, 3)
    normalised = torch.from_numpy(((pixels / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        feature = chain.visual.model(normalised).feature.numpy()
        embedding = chain.clip.model.get_image_features(pixel_values=normalised)
        embedding = getattr(embedding, "pooler_output", embedding).numpy()
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    shape = (len(arrays), VARIANTS, 3, -1)
    np.testing.assert_allclose(arrays.feature, feature.reshape(shape), rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(arrays.clip_embedding, embedding.reshape(shape), rtol=2**-10, atol=1e-6)


def test_augmentation(chain: Chain, store: KnowledgeStore) -> None:
    """Drawn by id and seed: the same whatever shard an image lies in. Validation keeps its images."""
    train = store.read("train")
    for row, sample in enumerate(train.ids):
        alone = draw_parameters(CIFAR, sample_keys(np.array([sample]), SEED), np.arange(VARIANTS), SIZE)
        np.testing.assert_array_equal(train.augmentation[row], alone[0])
    assert len(np.unique(train.augmentation.reshape(-1, len(PARAMETERS)), axis=0)) > 20
    validation = store.read("validation")
    assert validation.augmentation.shape == (len(chain.validation), 1, len(PARAMETERS))
    kept = [0, 0, SIZE, SIZE] + [0] * (len(PARAMETERS) - 4)
    assert np.unique(validation.augmentation.reshape(-1, len(PARAMETERS)), axis=0).tolist() == [kept]


def test_student_sees_what_the_teacher_saw(chain: Chain, store: KnowledgeStore) -> None:
    """Over the epochs every stored variant is shown, its pixels those of the teacher's first view."""
    arrays = store.read("train")
    seen_by_teacher = pixels_of_views(chain, arrays)[:, :, 0]
    seed = 3
    resident = ResidentKnowledge(arrays, torch.device("cpu"), CIFAR, seed=seed)
    offsets = variant_offsets(sample_keys(arrays.ids, seed), VARIANTS)
    rows = {feature.tobytes(): row for row, variants in enumerate(arrays.feature) for feature in variants}
    shown = np.zeros((len(arrays), VARIANTS), dtype=int)
    for epoch in range(VARIANTS):
        for batch in resident.batches(epoch, 10, seed=seed, rank=0, world_size=1):
            images = batch.images.permute(0, 2, 3, 1).numpy()
            assert images.dtype == np.uint8
            assert batch.knowledge is not None
            assert batch.knowledge.clip_embedding is not None
            assert arrays.clip_embedding is not None
            for position, image in enumerate(images):
                row = rows[batch.knowledge.feature[position].numpy().tobytes()]
                variant = int((epoch + offsets[row]) % VARIANTS)
                shown[row, variant] += 1
                np.testing.assert_array_equal(image, seen_by_teacher[row, variant])
                np.testing.assert_array_equal(batch.knowledge.feature[position], arrays.feature[row, variant])
                np.testing.assert_array_equal(
                    batch.knowledge.clip_embedding[position], arrays.clip_embedding[row, variant]
                )
                assert batch.labels[position] == arrays.labels[row]
    assert (shown == 1).all()


def test_plans_cover_the_index_once(chain: Chain) -> None:
    plans = plan_shards("train", chain.train, SHARD_ROWS, VARIANTS)
    assert [plan.number for plan in plans] == list(range(len(plans)))
    assert [len(plan.index) for plan in plans] == [8] * (len(chain.train) // 8) + [len(chain.train) % 8]
    assert np.concatenate([plan.index.ids for plan in plans]).tolist() == chain.train.ids.tolist()
    assert plan_shards("train", chain.train.take(np.arange(0)), SHARD_ROWS, VARIANTS) == []


def test_plan_survives_the_journey(chain: Chain) -> None:
    for plan in chain.plans():
        back = ShardPlan.from_table(plan.to_table())
        assert (back.split, back.number) == (plan.split, plan.number)
        for name in ("ids", "labels", "part", "row"):
            np.testing.assert_array_equal(getattr(back.index, name), getattr(plan.index, name))


def test_pixels_do_not_enter_the_store(chain: Chain, store: KnowledgeStore) -> None:
    table = chain.plans()[0].to_table()
    for stage in chain.stages():
        table = stage(table)
    assert "pixels" in table.column_names
    assert store.read("train").layout.schema().names == [
        "id",
        "label",
        "image",
        "augmentation",
        "feature",
        "clip_embedding",
    ]


@pytest.mark.parametrize("order", [lambda plans: plans[::-1], lambda plans: plans[1::2] + plans[::2]])
def test_order_of_shards_leaves_no_trace(chain: Chain, store: KnowledgeStore, tmp_path: Path, order) -> None:  # type: ignore[no-untyped-def]
    chain.write(tmp_path, order)
    assert contents(tmp_path) == contents(Path(store.path))


def test_without_clip(tmp_path: Path, store: KnowledgeStore) -> None:
    plain = digits_chain(clip=None)
    arrays = plain.write(tmp_path).read("train")
    assert arrays.clip_embedding is None
    assert arrays.feature.tobytes() == store.read("train").feature.tobytes()


def test_float32(chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    layouts = {split: replace(layout, dtype="float32") for split, layout in chain.layouts.items()}
    arrays = replace(chain, layouts=layouts).write(tmp_path).read("train")
    assert arrays.feature.dtype == np.float32
    rounded = arrays.feature.astype(np.float16)
    assert rounded.tobytes() == store.read("train").feature.tobytes()
    assert (rounded != arrays.feature).any()


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    """24 digits as PNG files in two classes, three of them no images."""
    folder = tmp_path / "images"
    digits = load_digits()
    for label in (0, 1):
        rows = np.flatnonzero(digits.target == label)
        for split, chosen in {"train": rows[:12], "test": rows[12:13]}.items():
            (folder / split / f"class {label}").mkdir(parents=True)
            for position, row in enumerate(chosen):
                image = Image.fromarray((digits.images[row] * 15).astype(np.uint8)).resize((SIZE, SIZE))
                image.save(folder / split / f"class {label}" / f"{position:02d}.png")
    cut, text, empty = (folder / name for name in BAD)
    cut.write_bytes(cut.read_bytes()[:60])
    text.write_text("not an image")
    empty.write_bytes(b"")
    return folder


BAD = ("train/class 0/03.png", "train/class 1/05.png", "train/class 1/06.png")


def folder_chain(folder: Path, whole: Chain) -> Chain:
    dataset = build_dataset(ImageFolderConfig(path=str(folder), image_size=SIZE))
    return build_chain(dataset, whole.visual, whole.clip)


def test_unreadable_images_are_set_aside(damaged_folder: Path, tmp_path: Path, chain: Chain) -> None:
    damaged = folder_chain(damaged_folder, chain)
    num_images = len(damaged.train) + len(damaged.validation)
    assert num_images == 24
    store = KnowledgeStore(str(tmp_path / "store"))
    store.begin({})
    reports = damaged.compute(damaged.plans(), store)
    manifest = damaged.finish(store)

    reasons = {entry["id"]: entry["reason"] for entry in manifest.set_aside}
    assert sorted(reasons) == sorted(BAD)
    assert "empty" in reasons[BAD[2]]
    assert "not an image" in reasons[BAD[1]]
    assert reasons[BAD[0]]
    assert store.manifest() == manifest
    assert sum(int(str(report["set_aside"])) for report in reports) == 3
    assert sum(int(str(report["rows"])) for report in reports) == num_images - 3
    assert manifest.rows("train") + manifest.rows("validation") == num_images - 3
    for split in ("train", "validation"):
        index = getattr(damaged, split)
        arrays = store.read(split)
        assert arrays.ids.tolist() == [i for i in index.ids if i not in BAD]
        assert arrays.labels.tolist() == [
            label for i, label in zip(index.ids, index.labels, strict=True) if i not in BAD
        ]
        for image, sample in zip(arrays.images, arrays.ids, strict=True):
            np.testing.assert_array_equal(image, np.asarray(Image.open(damaged_folder / sample).convert("RGB")))


def test_bad_images_leave_the_others_alone(damaged_folder: Path, tmp_path: Path, chain: Chain) -> None:
    """The same images without the damage: all others' knowledge is bitwise the same."""
    damaged = folder_chain(damaged_folder, chain)
    with_bad = damaged.write(tmp_path / "damaged").read("train")
    good = next(iter(set(damaged.train.ids.tolist()) - set(BAD)))
    for sample in BAD:
        (damaged_folder / sample).write_bytes((damaged_folder / good).read_bytes())
    mended = folder_chain(damaged_folder, chain).write(tmp_path / "mended").read("train")
    rows = np.isin(mended.ids, with_bad.ids)
    assert 0 < rows.sum() < len(rows)
    for name in ("images", "augmentation", "feature", "clip_embedding"):
        assert getattr(with_bad, name).tobytes() == getattr(mended, name)[rows].tobytes()


def test_a_shard_of_nothing_but_bad_images(damaged_folder: Path, tmp_path: Path, chain: Chain) -> None:
    damaged = folder_chain(damaged_folder, chain)
    bad = damaged.train.take(np.flatnonzero(np.isin(damaged.train.ids, BAD)))
    alone = replace(damaged, train=bad, validation=bad.take(np.arange(0)))
    store = alone.write(tmp_path / "store")
    assert store.manifest().rows("train") == 0
    assert {entry["id"] for entry in store.manifest().set_aside} == set(bad.ids.tolist())
    arrays = store.read("train")
    assert (len(arrays), arrays.feature.shape) == (0, (0, VARIANTS, 3, 64))


class Constant(ImageClassifier):
    """Its features are all `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.fc = nn.Linear(4, 10)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, images_BCHW: torch.Tensor) -> ModelOutput:
        feature = torch.full((len(images_BCHW), 4), self.value)
        return ModelOutput(self.fc(feature), feature)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_too_large_for_float16(dtype: str, chain: Chain) -> None:
    """An infinite value in the store would teach NaN; the way out is named."""
    layouts = {s: replace(layout, feature_width=4, dtype=dtype) for s, layout in chain.layouts.items()}
    stage = VisualStage(VisualTeacher(Constant(1e5), MEAN, STD), layouts, "cpu", 64)
    table = chain.stages()[0](chain.plans()[0].to_table())
    if dtype == "float16":
        with pytest.raises(UserError, match=r"knowledge\.dtype"):
            stage(table)
    else:
        stage(table)


class Poisoned(VisualTeacher):
    """NaN, or another value, in one feature of one call's third image."""

    value = float("nan")

    def forward(self, images_BHWC: torch.Tensor, first_view: int = 0) -> torch.Tensor:
        feature_BD = super().forward(images_BHWC, first_view)
        feature_BD[2, 5] = self.value
        return feature_BD


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_image_of_which_a_teacher_says_nan_is_named(chain: Chain, value: float) -> None:
    teacher = Poisoned(chain.visual.model, MEAN, STD)
    teacher.value = value
    plan = chain.plans()[1]
    table = chain.stages()[0](plan.to_table())
    # Each batch is the nine views of one image: the first bad one is the first image's third.
    stage = VisualStage(teacher, chain.layouts, "cpu", 9)
    first = re.escape(f"the image {plan.index.ids[0]} (view high_frequency, variant 0)")
    with pytest.raises(UserError, match=rf"teacher\.visual\) returned NaN or infinite values for {first}"):
        stage(table)


def test_channels_first_and_compiled_say_the_same_up_to_rounding(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, not optimised: of an optimiser's rounding nothing could be said beforehand."""
    compile_eagerly, compiled = torch.compile, []

    def trace(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        compiled.append(function)
        traced: Callable[..., torch.Tensor] = compile_eagerly(function, backend="eager")
        return traced

    monkeypatch.setattr(torch, "compile", trace)
    table = chain.stages()[0](chain.plans()[0].to_table())
    layouts = {split: replace(layout, dtype="float32") for split, layout in chain.layouts.items()}
    for build, kind, column in (
        (build_visual_teacher, VisualStage, "feature"),
        (build_clip, ClipStage, "clip_embedding"),
    ):
        outputs = []
        for options in ({}, {"channels_last": False}, {"compile": True}):
            stage = kind(build(), layouts, "cpu", 16, **options)
            outputs.append(np.frombuffer(stage(table).column(column)[0].as_buffer(), np.float32))
            kernel = next(p for p in stage.model.parameters() if p.ndim == 4)
            channels_last = options.get("channels_last", True)
            assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        for output in outputs[1:]:
            np.testing.assert_allclose(output, outputs[0], rtol=1e-4, atol=1e-5)
    assert [function.__self__.column for function in compiled] == ["feature", "clip_embedding"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision(precision: Precision, chain: Chain, store: KnowledgeStore) -> None:
    assert chain.clip is not None
    table = chain.stages()[0](chain.plans()[0].to_table())
    table = VisualStage(chain.visual, chain.layouts, "cpu", 64, precision)(table)
    table = ClipStage(chain.clip, chain.layouts, "cpu", 64, precision)(table)
    arrays = store.read("train")
    assert arrays.clip_embedding is not None
    for column, exact in {"feature": arrays.feature, "clip_embedding": arrays.clip_embedding}.items():
        found = np.frombuffer(table.column(column)[0].as_buffer(), np.float16).reshape(
            SHARD_ROWS, *exact.shape[1:]
        )
        assert (found != exact[:SHARD_ROWS]).any(), "it was computed in reduced precision"
        np.testing.assert_allclose(found, exact[:SHARD_ROWS], atol=0.05 * np.abs(exact).max())
    length = np.linalg.norm(found.astype(np.float64), axis=-1)
    np.testing.assert_allclose(length, 1.0, atol=2e-3)


def test_model_is_left_in_evaluation_mode() -> None:
    """Batch-norm statistics that moved would make the store depend on the shards' order."""
    visual = build_visual_teacher()
    before = visual.fingerprint()
    visual(torch.zeros(4, SIZE, SIZE, 3, dtype=torch.uint8))
    assert visual.fingerprint() == before
