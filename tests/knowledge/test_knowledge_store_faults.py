"""A store that is interrupted, damaged, or written by several: whole or not there, and the same in the end."""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import threading
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from knowledge_chain import FINGERPRINT, Chain, assert_equal, contents, file_of

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import (
    KnowledgeLayout,
    encode_array,
)
from tmkd_ray.knowledge.store import KnowledgeStore

NUM_SHARDS = 6


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
