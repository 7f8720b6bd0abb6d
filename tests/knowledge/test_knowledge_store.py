"""The store's files: what is in them, and that they are readable without this package."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from knowledge_chain import FINGERPRINT, SIZE, VARIANTS, Chain, assert_equal, contents, file_of

from tmkd_ray.augmentation import PARAMETERS
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import (
    ImageFormat,
    KnowledgeLayout,
    decode_images,
    encode_array,
    encode_images,
)
from tmkd_ray.knowledge.store import KnowledgeStore, ShardRecord, text_bank_key


def test_another_schema_version_is_refused(copied: KnowledgeStore) -> None:
    file = Path(copied.path) / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "schema_version": content["schema_version"] + 1}))
    with pytest.raises(UserError, match=r"schema version 3, this program reads 2; compute it anew"):
        copied.read("train")


def test_manifest(chain: Chain, store: KnowledgeStore) -> None:
    manifest = store.manifest()
    assert manifest.class_names == chain.dataset.class_names
    assert manifest.layouts == chain.layouts
    assert manifest.rows("train") == len(chain.train)
    assert manifest.rows("validation") == len(chain.validation)
    assert manifest.set_aside == []
    shards = list(Path(store.path).rglob("*.parquet"))
    assert len(manifest.shards) == len(shards) == 6
    assert manifest.total_bytes() == sum(file.stat().st_size for file in shards)
    assert manifest.fingerprint == json.loads(json.dumps(FINGERPRINT))
    assert store.committed() == {(shard.split, shard.number): shard for shard in manifest.shards}


def test_readable_without_this_package(chain: Chain, store: KnowledgeStore) -> None:
    """By the documented columns alone: pyarrow for the metadata, pandas for the rows, NumPy for the bytes."""
    files = sorted((Path(store.path) / "train").glob("*.parquet"))
    facts = json.loads(pq.read_schema(files[0]).metadata[b"tmkd"])
    assert facts == {
        "views": ["original", "edge", "high_frequency"],
        "num_variants": VARIANTS,
        "image_size": SIZE,
        "feature_width": 64,
        "clip_width": 24,
        "dtype": "float16",
        "image_format": "raw",
        "augmentation_parameters": list(PARAMETERS),
    }
    frame = pd.concat([pd.read_parquet(file) for file in files])
    assert list(frame.columns) == ["id", "label", "image", "augmentation", "feature", "clip_embedding"]
    per_view = (facts["num_variants"], len(facts["views"]))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "image": ("u1", (facts["image_size"], facts["image_size"], 3)),
        "augmentation": ("<i2", (facts["num_variants"], len(facts["augmentation_parameters"]))),
        "feature": ("<f2", (*per_view, facts["feature_width"])),
        "clip_embedding": ("<f2", (*per_view, facts["clip_width"])),
    }
    columns = {
        name: np.stack([np.frombuffer(value, dtype).reshape(shape) for value in frame[name]])
        for name, (dtype, shape) in shapes.items()
    }
    arrays = store.read("train")
    assert frame["id"].tolist() == arrays.ids.tolist() == chain.train.ids.tolist()
    assert frame["label"].tolist() == arrays.labels.tolist() == chain.train.labels.tolist()
    np.testing.assert_array_equal(columns["image"], arrays.images)
    np.testing.assert_array_equal(columns["augmentation"], arrays.augmentation)
    np.testing.assert_array_equal(columns["feature"], arrays.feature)
    np.testing.assert_array_equal(columns["clip_embedding"], arrays.clip_embedding)


def test_an_empty_split(chain: Chain, tmp_path: Path) -> None:
    """No shard at all: the arrays have their shapes, and no rows."""
    nothing = replace(chain, validation=chain.validation.take(np.arange(0)))
    arrays = nothing.write(tmp_path).read("validation")
    assert len(arrays) == len(arrays.ids) == 0
    assert arrays.labels.dtype == np.int64
    assert arrays.images is not None
    assert arrays.images.shape == (0, SIZE, SIZE, 3)
    assert arrays.augmentation.shape == (0, 1, len(PARAMETERS))
    assert arrays.feature is not None
    assert arrays.feature.shape == (0, 1, 3, 64)
    assert arrays.clip_embedding is not None
    assert arrays.clip_embedding.shape == (0, 1, 3, 24)


def test_a_shard_written_from_several_chunks(tmp_path: Path) -> None:
    """Ids keep their letters, rows their order."""
    layout = KnowledgeLayout(("original",), 1, 8, 3, None)
    rng = np.random.default_rng(0)
    values = {
        name: rng.integers(0, 100, (7, *shape)).astype(dtype)
        for name, (dtype, shape) in layout.arrays().items()
    }
    ids = [f"é{i}" for i in range(7)]
    columns = [pa.array(ids), pa.array(range(7)), *(encode_array(value) for value in values.values())]
    table = pa.Table.from_arrays(columns, schema=layout.schema())
    store = KnowledgeStore(str(tmp_path))
    store.begin({})
    store.write_shard("train", 0, pa.concat_tables([table.slice(0, 3), table.slice(3)]), [])
    store.finish(("a", "b"), {"train": layout}, {"train": 1})
    arrays = store.read("train")
    assert arrays.ids.tolist() == ids
    np.testing.assert_array_equal(arrays.images, values["image"])
    np.testing.assert_array_equal(arrays.feature, values["feature"])


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    """By number, whatever the order in which they came, and however slowly some are read."""
    layout = KnowledgeLayout(("original",), 1, 8, 2, None)
    store = KnowledgeStore(str(tmp_path))
    store.begin({})
    numbers = list(range(40))
    for number in np.random.default_rng(0).permutation(numbers).tolist():
        values = [
            encode_array(np.full((2, *shape), number, dtype)) for dtype, shape in layout.arrays().values()
        ]
        ids = pa.array([f"{number}a", f"{number}b"])
        table = pa.Table.from_arrays([ids, pa.array([number, number]), *values], schema=layout.schema())
        store.write_shard("train", number, table, [])
    store.finish(("a", "b"), {"train": layout}, {"train": 40})
    arrays = store.read("train")
    assert arrays.ids.tolist() == [f"{number}{letter}" for number in numbers for letter in "ab"]
    np.testing.assert_array_equal(arrays.labels, np.repeat(numbers, 2))
    assert arrays.feature is not None
    np.testing.assert_array_equal(arrays.feature[:, 0, 0, 1], np.repeat(numbers, 2))


def test_shards_are_listed_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100000 comes after 99999 and not after 10000."""
    store = KnowledgeStore(str(tmp_path))
    store.begin({})
    count = 100_002
    records = [ShardRecord("train", number, "", 1, 1, "", []) for number in reversed(range(count))]
    monkeypatch.setattr(store, "committed", lambda: {("train", record.number): record for record in records})
    manifest = store.finish((), {}, {"train": count})
    assert [record.number for record in manifest.shards] == list(range(count))


def test_the_validation_split_alone(chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    validation = replace(chain, train=chain.train.take(np.arange(0)))
    found = validation.write(tmp_path)
    manifest = found.manifest()
    assert manifest.rows("train") == 0
    assert manifest.rows("validation") == len(chain.validation)
    assert set(manifest.layouts) == {"train", "validation"}
    assert_equal(found.read("validation"), store.read("validation"))
    assert len(found.read("train")) == 0
    assert found.constants(None).view_names == ("original", "edge", "high_frequency")


def test_columns_are_left_unread(store: KnowledgeStore) -> None:
    whole = store.read("train")
    images = store.read("train", with_teacher=False)
    assert_equal(images, replace(whole, feature=None, clip_embedding=None))
    teacher = store.read("train", with_images=False)
    assert_equal(teacher, replace(whole, images=None))


def test_knowledge_of_rows_and_variants(store: KnowledgeStore) -> None:
    arrays = store.read("train")
    assert arrays.feature is not None
    assert arrays.clip_embedding is not None
    rows, variants = np.array([5, 0, 5, 11]), np.array([2, 0, 1, 2])
    first, chosen = arrays.knowledge(rows), arrays.knowledge(rows, variants)
    for position, (row, variant) in enumerate(zip(rows, variants, strict=True)):
        np.testing.assert_array_equal(first.feature[position], arrays.feature[row, 0].astype(np.float32))
        np.testing.assert_array_equal(chosen.feature[position], arrays.feature[row, variant].astype(np.float32))
        assert chosen.clip_embedding is not None
        np.testing.assert_array_equal(
            chosen.clip_embedding[position], arrays.clip_embedding[row, variant].astype(np.float32)
        )
    assert chosen.feature.dtype == torch.float32
    assert torch.equal(arrays.knowledge(slice(2, 4)).feature, arrays.knowledge(np.array([2, 3])).feature)
    without = replace(arrays, clip_embedding=None).knowledge(rows)
    assert without.clip_embedding is None


def formatted(chain: Chain, **changes: Any) -> Chain:
    layouts = {split: replace(layout, **changes) for split, layout in chain.layouts.items()}
    return replace(chain, layouts=layouts)


def test_a_store_of_int8(chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    """Within half a step of a float32 store, and half the size of a float16 one."""
    exact = formatted(chain, dtype="float32").write(tmp_path / "float32").read("train")
    small = formatted(chain, dtype="int8").write(tmp_path / "int8")
    arrays = small.read("train")
    for name in ("feature", "clip_embedding"):
        stored, scale, wanted = (
            getattr(arrays, name),
            getattr(arrays, f"{name}_scale"),
            getattr(exact, name).astype(np.float64),
        )
        assert stored.dtype == np.int8
        assert scale.shape == stored.shape[:-1]
        error = np.abs(stored * scale[..., None].astype(np.float64) - wanted)
        assert (error <= scale[..., None] / 2 * (1 + 1e-9)).all()
        read = getattr(arrays.knowledge(slice(None)), name).numpy()
        np.testing.assert_allclose(read, wanted[:, 0], atol=scale.max() / 2 * 1.001, rtol=0)
    assert store.read("train").feature_scale is None
    assert small.manifest().total_bytes() < store.manifest().total_bytes()


@pytest.mark.parametrize("image_format", ["lossless", "jpeg", "reference"])
def test_stores_of_encoded_images(
    image_format: ImageFormat, chain: Chain, store: KnowledgeStore, tmp_path: Path
) -> None:
    """What is read back is what the teachers saw: their knowledge of it is in the same row."""
    written = formatted(chain, image_format=image_format).write(tmp_path)
    arrays, raw = written.read("train"), store.read("train")
    assert_equal(written.read("train", with_images=False), replace(arrays, images=None))
    np.testing.assert_array_equal(arrays.ids, raw.ids)
    np.testing.assert_array_equal(arrays.augmentation, raw.augmentation)
    if image_format == "reference":
        assert arrays.images is None
    elif image_format == "lossless":
        assert_equal(replace(arrays, layout=raw.layout), raw)
    else:
        assert arrays.images is not None
        assert raw.images is not None
        assert 0 < np.abs(arrays.images.astype(int) - raw.images).mean() < 10
        expected = decode_images(encode_images(raw.images, "jpeg"), SIZE)
        np.testing.assert_array_equal(arrays.images, expected)
        assert not np.array_equal(arrays.feature, raw.feature)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, {"feature", "clip_embedding"}),
        ({"dtype": "int8"}, set()),
        ({"image_format": "jpeg", "dtype": "float32"}, {"image", "feature", "clip_embedding"}),
    ],
)
def test_what_is_compressed(changes: dict[str, Any], plain: set[str], chain: Chain, tmp_path: Path) -> None:
    """Neither noise nor what is compressed already."""
    small = formatted(chain, **changes)
    small.compute(small.plans()[:1], KnowledgeStore(str(tmp_path)))
    group = pq.ParquetFile(file_of(tmp_path, "train", 0)).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {column.path_in_schema for column in columns if column.compression == "UNCOMPRESSED"} == plain
    assert {column.compression for column in columns} <= {"UNCOMPRESSED", "ZSTD"}


def test_head_and_text_banks(chain: Chain, copied: KnowledgeStore) -> None:
    """Banks are added to a finished store without touching a shard."""
    before = contents(Path(copied.path))
    plain = copied.constants(None)
    torch.testing.assert_close(plain.head_weight, chain.visual.model.head.weight, rtol=0, atol=0)
    torch.testing.assert_close(plain.head_bias, chain.visual.model.head.bias, rtol=0, atol=0)
    assert (plain.view_names, plain.text_bank) == (("original", "edge", "high_frequency"), None)

    rng = torch.Generator().manual_seed(0)
    banks = {key: torch.randn(3, 10, 24, generator=rng) for key in "ab"}
    with pytest.raises(UserError, match="no text bank for these prompts; run `tmkd knowledge`"):
        copied.constants("a")
    for (key, bank), temperature in zip(banks.items(), (0.01, 0.07), strict=True):
        copied.write_text_bank(key, bank, temperature)
    for (key, bank), temperature in zip(banks.items(), (0.01, 0.07), strict=True):
        assert copied.has_text_bank(key)
        constants = copied.constants(key)
        assert constants.text_bank is not None
        assert torch.equal(constants.text_bank, bank)
        assert constants.clip_temperature == pytest.approx(temperature)
    assert {name: contents(Path(copied.path))[name] for name in before} == before


def test_text_bank_keys() -> None:
    names = ("zero", "one")
    prompts: dict[str, tuple[str, ...]] = {"original": ("a {}", "the {}"), "edge": ("sharp {}",)}
    others = [
        text_bank_key({**prompts, "edge": ("sharp {}", "edgy {}")}, names, "clip"),
        text_bank_key({"edge": prompts["edge"], "original": prompts["original"]}, names, "clip"),
        text_bank_key({**prompts, "original": prompts["original"][::-1]}, names, "clip"),
        text_bank_key({"original": prompts["original"]}, names, "clip"),
        text_bank_key(prompts, ("zero", "two"), "clip"),
        text_bank_key(prompts, names[::-1], "clip"),
        text_bank_key(prompts, names, "another clip"),
    ]
    keys = [text_bank_key(prompts, names, "clip"), *others]
    assert len(set(keys)) == len(keys)
    assert text_bank_key(dict(prompts), tuple(names), "clip") == keys[0]
