"""The store in an object store: the same files, the same reading, the same claim of one writer."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from knowledge_chain import FINGERPRINT, Chain, contents
from s3_server import S3Server, s3_server

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.lease import FILE, Claim, WriterLease
from tmkd_ray.knowledge.store import SPLITS, KnowledgeStore
from tmkd_ray.knowledge.summary import describe_store
from tmkd_ray.knowledge.verification import verify_store

CLAIM = Claim("elsewhere", "another boot", 4711, 99, "theirs", "2026-01-31T12:00:00+00:00", "")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


def remote_contents(store: KnowledgeStore) -> dict[str, bytes]:
    found = {}
    for folder in ("", *SPLITS, "text_banks"):
        for name in storage.sizes(store.at(folder) if folder else store.path):
            path = f"{folder}/{name}" if folder else name
            found[path] = storage.read_bytes(store.at(path))
    return found


def test_a_store_from_begin_to_end(server: S3Server, chain: Chain, store: KnowledgeStore) -> None:
    """Interrupted, damaged, with a second writer's leavings: in the end the very files of a local run."""
    expected = contents(Path(store.path))
    remote = KnowledgeStore(server.uri("runs/a run/knowledge".replace(" ", "%20")))
    assert remote.fingerprint() is None
    assert remote.committed() == {}
    with WriterLease(remote.path) as lease:
        remote.begin(FINGERPRINT)
        chain.compute(chain.plans()[:3], remote)
        storage.write_bytes(remote.at("train", "00002-0123456789ab.parquet"), b"another machine's bits")
        storage.write_bytes(remote.at("train", "00001.json"), b'{"split": "tr')
        assert set(remote.committed()) == {("train", 0), ("train", 2)}
        with pytest.raises(UserError, match=r"lacks 4 of 6 shards: train/00001"):
            chain.finish(remote)
        missing = [plan for plan in chain.plans() if (plan.split, plan.number) not in remote.committed()]
        chain.compute(missing, remote)
        chain.finish(remote)
        lease.check()
    assert remote_contents(remote) == expected
    assert verify_store(remote) == []
    for split in SPLITS:
        found, wanted = remote.read(split), store.read(split)
        assert found.ids.tolist() == wanted.ids.tolist()
        np.testing.assert_array_equal(found.images, wanted.images)
        np.testing.assert_array_equal(found.feature, wanted.feature)
    assert chain.clip is not None
    bank = chain.clip.text_bank([["a photo of a {}."]] * 3, chain.dataset.class_names)
    remote.write_text_bank("bank", bank, chain.clip.temperature)
    assert describe_store(remote).text_bank == "bank"

    record = remote.committed()["train", 3]
    storage.write_bytes(remote.at("train", record.file), b"\0" * record.bytes)
    with pytest.raises(UserError, match=rf"train/{record.file} is damaged"):
        remote.read("train")
    storage.delete(remote.at("train", record.file))
    assert set(remote.committed()) == set(store.committed()) - {("train", 3)}


def test_one_writer_at_a_time(server: S3Server) -> None:
    path = server.uri("leased")
    with WriterLease(path) as lease:
        with (
            pytest.raises(UserError, match="another run writes the knowledge store at s3://"),
            WriterLease(path),
        ):
            pytest.fail("both write")
        lease.check()
    assert storage.sizes(path) == {}

    storage.write_bytes(storage.join(path, FILE), json.dumps(asdict(CLAIM)).encode())
    with (
        pytest.raises(UserError, match=r"process 4711 on elsewhere.*start this one again in \d+ s"),
        WriterLease(path),
    ):
        pytest.fail("it may live")
    assert list(storage.sizes(path)) == [FILE]
    with WriterLease(path, renew_s=1000, expiry_s=-3600) as lease:  # so old is a claim of now
        assert lease.took_over is not None
        storage.write_bytes(storage.join(path, FILE), json.dumps(asdict(replace(CLAIM, pid=12))).encode())
    assert list(storage.sizes(path)) == [FILE]
