"""The store's files: whole or not there, the same however they came about, readable without this package."""

import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import threading
from dataclasses import fields, replace
from functools import partial
from multiprocessing.synchronize import Barrier
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
from tmkd_ray.augmentation import PARAMETERS
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import (
    ImageFormat,
    KnowledgeLayout,
    decode_images,
    encode_array,
    encode_images,
)
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore, ShardRecord, text_bank_key

NUM_SHARDS = 6


def assert_equal(found: KnowledgeArrays, expected: KnowledgeArrays) -> None:
    assert found.layout == expected.layout
    for field in fields(KnowledgeArrays):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def file_of(folder: Path, split: str, number: int) -> Path:
    """Return the file of a shard, as its record names it."""
    record = json.loads((folder / split / f"{number:05d}.json").read_text())
    return folder / split / record["file"]


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
    (uncommitted,) = (tmp_path / "train").glob("00001-*.parquet")
    assert set(killed.committed()) == {("train", 0)}
    # What lies there uncommitted may be anything, also under a name that no run will give again.
    uncommitted.write_bytes(b"half of a sha")
    (tmp_path / "train" / "00001-0123456789ab.parquet").write_bytes(b"another machine's bits")
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
        with pytest.raises(
            UserError, match=rf"cannot write {tmp_path}/train/00000-\w+\.parquet.*No space left"
        ):
            chain.compute(chain.plans()[:1], broken)
    assert contents(tmp_path) == {}


def test_a_folder_that_cannot_be_written(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside_a_file = KnowledgeStore(str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/store/fingerprint\.json"):
        inside_a_file.begin(FINGERPRINT)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/store/train/00000-\w+\.parquet"):
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
    file = file_of(Path(copied.path), "train", 2)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=rf"{file} is damaged.*delete it and run `tmkd knowledge` again"):
        copied.read("train")
    assert_equal(copied.read("validation"), store.read("validation"))
    # Doing what the message says mends it.
    file.unlink()
    assert resume(chain, Path(copied.path)) == [("train", 2)]
    assert_equal(copied.read("train"), store.read("train"))


def test_a_missing_shard_is_named(copied: KnowledgeStore, chain: Chain, store: KnowledgeStore) -> None:
    file = file_of(Path(copied.path), "validation", 0)
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


def test_writers_of_the_same_shard(chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    """As when a slow actor is given up and its shard computed twice; readers meanwhile see whole files."""
    file = file_of(Path(store.path), "train", 0)
    shard = pq.read_table(file)
    several = [KnowledgeStore(str(tmp_path)) for _ in range(4)]
    start, done = threading.Barrier(5), threading.Event()
    failures: list[BaseException] = []
    expected = contents(Path(store.path))
    names = (f"train/{file.name}", "train/00000.json")

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
                for name in names:
                    if (tmp_path / name).exists():
                        assert (tmp_path / name).read_bytes() == expected[name]
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
    assert contents(tmp_path) == {name: expected[name] for name in names}


def write_many(path: str, own: int, start: Barrier) -> None:
    layout = KnowledgeLayout(("original",), 1, 8, 2, None)
    store = KnowledgeStore(path)
    start.wait()
    for _ in range(10):
        for number in range(4):
            values = [
                encode_array(np.full((1, *shape), own, dtype)) for dtype, shape in layout.arrays().values()
            ]
            columns = [pa.array([str(number)]), pa.array([0]), *values]
            table = pa.Table.from_arrays(columns, schema=layout.schema())
            store.write_shard("train", number, table, [])


def test_two_processes_whose_bits_differ(tmp_path: Path) -> None:
    """Whoever writes last: each record fits its file, and nothing of the other one's stays."""
    layout = KnowledgeLayout(("original",), 1, 8, 2, None)
    store = KnowledgeStore(str(tmp_path))
    store.begin({})
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [context.Process(target=write_many, args=(str(tmp_path), own, start)) for own in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list((tmp_path / "train").glob("*.parquet"))) == 8
    store.finish(("a",), {"train": layout}, {"train": 4})
    assert sorted(path.suffix for path in (tmp_path / "train").iterdir()) == [".json"] * 4 + [".parquet"] * 4
    arrays = store.read("train")
    assert arrays.ids.tolist() == ["0", "1", "2", "3"]
    assert arrays.feature is not None
    assert set(arrays.feature.reshape(-1).tolist()) <= {1.0, 2.0}


def test_what_nothing_names_is_deleted(chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    """Of a killed or a second writer; a file of another name is not ours to delete."""
    chain.write(tmp_path)
    for name in ("train/00000-0123456789ab.parquet", "train/00099.json", "validation/00007.parquet"):
        (tmp_path / name).write_bytes(b"left over")
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    (tmp_path / "train" / f".00001.json.{host}.{ended.pid}.{'0' * 32}").write_bytes(b"left over")
    (tmp_path / "train" / "notes.txt").write_text("mine")
    chain.finish(KnowledgeStore(str(tmp_path)))
    found = contents(tmp_path)
    assert found.pop("train/notes.txt") == b"mine"
    assert found == contents(Path(store.path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\0" * len(text),
        lambda text: text.replace('"rows": 8', '"rows": "eight"'),
        lambda text: text.replace('"bytes": ', '"bytes": 1'),
        lambda text: text.replace('"file": "00001-', '"file": "00002-'),
        lambda text: text.replace('"number": 1', '"number": 2'),
        lambda text: text.replace('"split": "train"', '"split": "validation"'),
        lambda text: text.replace('"file"', '"fil"'),
    ],
)
def test_a_record_that_says_nothing_true(
    damage: Any, chain: Chain, store: KnowledgeStore, copied: KnowledgeStore
) -> None:
    """Its shard counts as not computed, and is mended."""
    file = Path(copied.path) / "train" / "00001.json"
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    assert set(copied.committed()) == set(store.committed()) - {("train", 1)}
    assert resume(chain, Path(copied.path)) == [("train", 1)]
    assert contents(Path(copied.path)) == contents(Path(store.path))


def test_a_shard_of_another_size_is_computed_again(
    chain: Chain, store: KnowledgeStore, copied: KnowledgeStore
) -> None:
    file = file_of(Path(copied.path), "train", 1)
    file.write_bytes(file.read_bytes()[:-1])
    assert resume(chain, Path(copied.path)) == [("train", 1)]
    assert contents(Path(copied.path)) == contents(Path(store.path))


def test_a_store_that_lacks_shards_is_not_finished(chain: Chain, tmp_path: Path) -> None:
    store = KnowledgeStore(str(tmp_path))
    store.begin(FINGERPRINT)
    chain.compute(chain.plans()[1:-1], store)
    before = contents(tmp_path)
    message = rf"{tmp_path} lacks 2 of 6 shards: train/00000, validation/00001; run `tmkd knowledge` again"
    with pytest.raises(UserError, match=message):
        store.finish(chain.dataset.class_names, chain.layouts, {"train": 4, "validation": 2})
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match=r"lacks 97 of 100 shards: train/00000, train/00004, .* … and 87 more"):
        store.finish(chain.dataset.class_names, chain.layouts, {"train": 100})


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


@pytest.mark.parametrize(
    "name", ["manifest.json", "fingerprint.json", "head.safetensors", "text_banks/a.safetensors"]
)
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_small_file_is_named(
    name: str, damage: Any, chain: Chain, copied: KnowledgeStore, store: KnowledgeStore
) -> None:
    copied.write_text_bank("a", torch.ones(3, 10, 24), 0.1)
    file = Path(copied.path) / name
    file.write_bytes(damage(file.read_bytes()))
    step = partial(copied.begin, FINGERPRINT) if name == "fingerprint.json" else partial(copied.constants, "a")
    with pytest.raises(UserError, match=rf"{file} is damaged"):
        step()
    # Doing what the message says mends it.
    if name == "manifest.json":
        file.unlink()
        assert resume(chain, Path(copied.path)) == []
        assert_equal(copied.read("train"), store.read("train"))


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
