"""The store's files: whole or not there, the same however they came about, readable without this package."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from knowledge_chain import FINGERPRINT, SIZE, VARIANTS, Chain, contents

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import KnowledgeLayout, encode_array
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore, text_bank_key

NUM_SHARDS = 6


def assert_equal(found: KnowledgeArrays, expected: KnowledgeArrays) -> None:
    assert found.layout == expected.layout
    for name in ("ids", "labels", "images", "augmentation", "feature", "clip_embedding"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def resume(chain: Chain, folder: Path) -> list[tuple[str, int]]:
    """Do what the knowledge stage does when it is started again; return what was left to do."""
    store = KnowledgeStore(str(folder))
    store.begin(FINGERPRINT)
    done = store.committed()
    missing = [plan for plan in chain.plans() if (plan.split, plan.number) not in done]
    chain.compute(missing, store)
    chain.finish(store)
    return [(plan.split, plan.number) for plan in missing]


@pytest.mark.parametrize("num_done", range(NUM_SHARDS + 1))
def test_interrupted_after_any_shard(
    num_done: int, chain: Chain, store: KnowledgeStore, tmp_path: Path
) -> None:
    plans = chain.plans()
    assert len(plans) == NUM_SHARDS
    first = KnowledgeStore(str(tmp_path))
    first.begin(FINGERPRINT)
    chain.compute(plans[:num_done], first)
    assert not first.is_finished()
    left = resume(chain, tmp_path)
    assert left == [(plan.split, plan.number) for plan in plans[num_done:]]
    assert contents(tmp_path) == contents(Path(store.path))
    assert resume(chain, tmp_path) == []


def test_killed_between_a_shard_and_its_record(
    chain: Chain, store: KnowledgeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write_bytes

    def stop_at_record(path: str, content: bytes) -> None:
        if path.endswith("train/00001.json"):
            raise KeyboardInterrupt
        write(path, content)

    killed = KnowledgeStore(str(tmp_path))
    killed.begin(FINGERPRINT)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", stop_at_record)
        with pytest.raises(KeyboardInterrupt):
            chain.compute(chain.plans(), killed)
    assert (tmp_path / "train" / "00001.parquet").exists()
    assert set(killed.committed()) == {("train", 0)}
    # What lies there uncommitted may be anything.
    (tmp_path / "train" / "00001.parquet").write_bytes(b"another program's")
    assert ("train", 1) in resume(chain, tmp_path)
    assert contents(tmp_path) == contents(Path(store.path))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_while_a_shard_is_written(
    step: str, chain: Chain, store: KnowledgeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = KnowledgeStore(str(tmp_path))
    killed.begin(FINGERPRINT)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, stop)
        with pytest.raises(KeyboardInterrupt):
            chain.compute(chain.plans(), killed)
    assert killed.committed() == {}
    assert set(contents(tmp_path)) == {"fingerprint.json"}
    resume(chain, tmp_path)
    assert contents(tmp_path) == contents(Path(store.path))


def test_a_full_disk_is_a_clear_error(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    broken = KnowledgeStore(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"cannot write {tmp_path}/train/00000\.parquet.*No space left"):
            chain.compute(chain.plans()[:1], broken)
    assert contents(tmp_path) == {}


def test_a_folder_that_cannot_be_written(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside_a_file = KnowledgeStore(str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/store/fingerprint\.json"):
        inside_a_file.begin(FINGERPRINT)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/store/train/00000\.parquet"):
        chain.compute(chain.plans()[:1], inside_a_file)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(chain: Chain, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write .*Permission denied"):
        KnowledgeStore(str(tmp_path)).begin(FINGERPRINT)


@pytest.fixture
def copied(store: KnowledgeStore, tmp_path: Path) -> KnowledgeStore:
    for name, content in contents(Path(store.path)).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return KnowledgeStore(str(tmp_path))


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda content: content[:-100], lambda content: b"", lambda content: content + b"\0"]
)
def test_a_damaged_shard_is_named(
    damage: Any, copied: KnowledgeStore, chain: Chain, store: KnowledgeStore
) -> None:
    file = Path(copied.path) / "train" / "00002.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=rf"{file} is damaged.*delete it and run `tmkd knowledge` again"):
        copied.read("train")
    assert_equal(copied.read("validation"), store.read("validation"))
    # Doing what the message says mends it.
    file.unlink()
    assert resume(chain, Path(copied.path)) == [("train", 2)]
    assert_equal(copied.read("train"), store.read("train"))


def test_a_missing_shard_is_named(copied: KnowledgeStore, chain: Chain, store: KnowledgeStore) -> None:
    file = Path(copied.path) / "validation" / "00000.parquet"
    file.unlink()
    with pytest.raises(UserError, match=rf"{file} is missing.*run `tmkd knowledge` again"):
        copied.read("validation")
    # Doing what the message says mends it.
    assert resume(chain, Path(copied.path)) == [("validation", 0)]
    assert contents(Path(copied.path)) == contents(Path(store.path))


def test_an_unfinished_store_is_not_read(chain: Chain, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=rf"no finished knowledge store at {path}; run `tmkd knowledge`"):
            KnowledgeStore(str(path)).read("train")
    store = KnowledgeStore(str(tmp_path))
    store.begin(FINGERPRINT)
    chain.compute(chain.plans(), store)
    with pytest.raises(UserError, match="no finished knowledge store"):
        store.read("train")


def test_another_schema_version_is_refused(copied: KnowledgeStore) -> None:
    file = Path(copied.path) / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "schema_version": content["schema_version"] + 1}))
    with pytest.raises(UserError, match=r"schema version 2, this program reads 1; compute it anew"):
        copied.read("train")


def test_manifest(chain: Chain, store: KnowledgeStore) -> None:
    manifest = store.manifest()
    assert manifest.class_names == chain.dataset.class_names
    assert manifest.layouts == chain.layouts
    assert manifest.rows("train") == len(chain.train)
    assert manifest.rows("validation") == len(chain.validation)
    assert manifest.set_aside == []
    shards = list(Path(store.path).rglob("*.parquet"))
    assert len(manifest.shards) == len(shards) == NUM_SHARDS
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
    }
    frame = pd.concat([pd.read_parquet(file) for file in files])
    assert list(frame.columns) == ["id", "label", "image", "augmentation", "feature", "clip_embedding"]
    per_view = (facts["num_variants"], len(facts["views"]))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "image": ("u1", (facts["image_size"], facts["image_size"], 3)),
        "augmentation": ("<i2", (facts["num_variants"], 5)),
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
    assert arrays.images.shape == (0, SIZE, SIZE, 3)
    assert arrays.augmentation.shape == (0, 1, 5)
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
    store.finish(("a", "b"), {"train": layout})
    arrays = store.read("train")
    assert arrays.ids.tolist() == ids
    np.testing.assert_array_equal(arrays.images, values["image"])
    np.testing.assert_array_equal(arrays.feature, values["feature"])


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    """By number, not by name: 100000 comes after 99999."""
    layout = KnowledgeLayout(("original",), 1, 8, 2, None)
    store = KnowledgeStore(str(tmp_path))
    store.begin({})
    for number in (100_000, 2, 99_999, 10):
        values = [encode_array(np.zeros((1, *shape), dtype)) for dtype, shape in list(layout.arrays().values())]
        table = pa.Table.from_arrays([pa.array([str(number)]), pa.array([0]), *values], schema=layout.schema())
        store.write_shard("train", number, table, [])
    store.finish(("a", "b"), {"train": layout})
    assert store.read("train").ids.tolist() == ["2", "10", "99999", "100000"]


def test_writers_of_the_same_shard(chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    """As when a slow actor is given up and its shard computed twice; readers meanwhile see whole files."""
    shard = pq.read_table(Path(store.path) / "train" / "00000.parquet")
    several = [KnowledgeStore(str(tmp_path)) for _ in range(4)]
    start, done = threading.Barrier(5), threading.Event()
    failures: list[BaseException] = []
    expected = contents(Path(store.path))

    def write(own: KnowledgeStore) -> None:
        try:
            start.wait()
            for _ in range(8):
                own.write_shard("train", 0, shard, [])
        except BaseException as error:
            failures.append(error)

    def watch() -> None:
        try:
            start.wait()
            while not done.is_set():
                for name in ("train/00000.parquet", "train/00000.json"):
                    file = tmp_path / name
                    if file.exists():
                        assert file.read_bytes() == expected[name]
        except BaseException as error:
            failures.append(error)

    watcher = threading.Thread(target=watch)
    writers = [threading.Thread(target=write, args=(own,)) for own in several]
    for thread in [watcher, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert failures == []
    assert contents(tmp_path) == {name: expected[name] for name in ("train/00000.parquet", "train/00000.json")}


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
