"""A road whose files are all on s3://, from data to results, and a storage that falls silent on the way."""

import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from run_processes import Answer, Commands, commands
from s3_server import HANG, S3Server, faulty_proxy, s3_server
from sklearn.datasets import load_digits

from tmkd_ray import storage
from tmkd_ray.cli import main
from tmkd_ray.knowledge.compute import ShardWriter
from tmkd_ray.teachers import ClipTeacher

pytestmark = pytest.mark.ray

CLASS_NAMES = tuple("0123456789")

NUM_SHARDS = 14 + 2
"""Of 216 training and 24 validation images, 16 to each."""


def write_digits(path: Path, rows: range) -> None:
    """Write a Parquet file as the Hugging Face hub does."""
    digits = load_digits()
    images = []
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray((digits.images[row] * 15.9).astype("uint8")).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{row}.png"})
    table = pa.table({"image": images, "label": digits.target[rows]})
    features = {"label": {"names": CLASS_NAMES, "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=40)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and `clip`, which has learnt nothing."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "data").mkdir()
    write_digits(folder / "data" / "train-0.parquet", range(160))
    write_digits(folder / "data" / "train-1.parquet", range(160, 240))
    write_digits(folder / "data" / "test-0.parquet", range(240, 300))
    torch.manual_seed(0)
    ClipTeacher.new(
        [f"a photo of a {name}." for name in CLASS_NAMES],
        image_size=32,
        patch_size=8,
        embedding_width=16,
        vision_width=32,
        vision_layers=1,
        text_width=32,
        text_layers=1,
        head_width=32,
        vocabulary_size=600,
        mean=(0.3, 0.3, 0.3),
        std=(0.3, 0.3, 0.3),
    ).save(str(folder / "clip"))
    return folder


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[S3Server]:
    """Holds what the local folder does."""
    with s3_server() as server:
        for file in local.rglob("*"):
            if file.is_file():
                storage.write_bytes(server.uri(str(file.relative_to(local))), file.read_bytes())
        yield server


@pytest.fixture(scope="module")
def tmkd(server: S3Server) -> Iterator[Commands]:
    with commands() as run:
        yield run


def overrides(root: str) -> list[str]:
    """A road whose files are all below a folder or URI."""
    return [
        "name=tiny",
        f"output={root}/runs",
        "dataset=parquet",
        f"dataset.path={root}/data",
        "teacher.visual.model=resnet8",
        "teacher.visual.fit={epochs: 1, num_workers: 1}",
        f"teacher.text.model={root}/clip",
        "knowledge.num_variants=2",
        "knowledge.shard_rows=16",
        "knowledge.views.max_size=1",
        "knowledge.visual.batch_size=64",
        "knowledge.text.batch_size=64",
        "training={epochs: 1, num_workers: 1}",
    ]


@dataclass(frozen=True)
class Road:
    """A run on s3://: its overrides, folder, and what it said."""

    options: list[str]
    folder: str
    answer: Answer

    def only(self, kind: str) -> str:
        """Return the folder of the run whose name begins so."""
        (name,) = [name for name in storage.list_names(self.folder) if name.startswith(kind)]
        return storage.join(self.folder, name)


@pytest.fixture(scope="module")
def road(server: S3Server, tmkd: Commands) -> Road:
    options = overrides(server.uri().rstrip("/"))
    return Road(options, server.uri("runs/tiny"), tmkd("run", *options))


def contents(store: str) -> dict[str, bytes]:
    """Return every file of a store, which has one level of folders."""
    found = {}
    for name in storage.list_names(store):
        path = storage.join(store, name)
        below = storage.list_names(path) if storage.is_folder(path) else [None]
        for inner in below:
            key = name if inner is None else f"{name}/{inner}"
            found[key] = storage.read_bytes(storage.join(store, key))
    return found


@pytest.fixture(scope="module")
def local_store(ray_cluster: Any, local: Path, road: Road) -> dict[str, bytes]:
    """The store of the same teachers and images, all of them on this machine."""
    teacher = local / "teacher.safetensors"
    teacher.write_bytes(storage.read_bytes(f"{road.only('teacher-')}/model.safetensors"))
    assert main(["knowledge", *overrides(str(local)), f"teacher.visual.checkpoint={teacher}"]) == 0
    files = contents(str(local / "runs" / "tiny" / "knowledge"))
    assert len(files) == 2 * NUM_SHARDS + 4
    return files


def test_the_whole_road(road: Road, local_store: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    assert road.answer.code == 0, road.answer.err
    store = f"{road.folder}/knowledge"
    assert contents(store) == local_store
    results = json.loads(storage.read_bytes(f"{road.folder}/results.json"))
    assert results["dataset"]["num_test"] == 60
    assert [record["epoch"] for record in results["methods"][0]["runs"][0]["history"]] == [1]
    assert b"<html" in storage.read_bytes(f"{road.folder}/report.html")
    assert main(["knowledge", "verify", "--store", store]) == 0
    assert capsys.readouterr().out == f"{store}: sound\n"
    assert main(["knowledge", "show", *road.options]) == 0
    assert f"knowledge store {store}: finished" in capsys.readouterr().out


def test_a_training_resumes_from_its_checkpoint(road: Road, tmkd: Commands) -> None:
    teacher = road.only("teacher-")
    assert "checkpoint_00000000" in storage.list_names(f"{teacher}/checkpoints")
    weights = storage.read_bytes(f"{teacher}/model.safetensors")
    for name in ("outcome.json", "model.safetensors"):
        storage.delete(f"{teacher}/{name}")
    answer = tmkd("fit-teacher", *road.options)
    assert answer.code == 0, answer.err
    assert "resuming after epoch 1" in answer.err
    assert storage.read_bytes(f"{teacher}/model.safetensors") == weights


class _Impatient(ShardWriter):
    """Does not wait long for storage."""

    def __call__(self, table: pa.Table) -> pa.Table:
        _be_impatient()
        return super().__call__(table)


def _be_impatient() -> None:
    storage.REQUEST_TIMEOUT_S, storage.MAX_ATTEMPTS = 3.0, 1


def _prepare() -> None:
    import ray
    import test_knowledge_s3

    import tmkd_ray.stages.knowledge as stage

    _be_impatient()
    ray.cloudpickle.register_pickle_by_value(test_knowledge_s3)  # workers cannot import a test
    stage.ShardWriter = _Impatient


def test_a_storage_that_falls_silent(
    server: S3Server, road: Road, tmkd: Commands, local_store: dict[str, bytes]
) -> None:
    store = server.uri("silent/knowledge")
    options = [*road.options, f"output={server.uri('silent')}", f"knowledge.path={store}"]
    options += [f"teacher.visual.checkpoint={road.only('teacher-')}/model.safetensors"]
    records = itertools.count(1)

    def fault(request: str) -> int | None:
        """Answer nothing any more when the fifth shard is to be committed."""
        if silent or (re.match(r"PUT .*/\d{5}\.json", request) and next(records) >= 5):
            silent.append(request)
            return HANG
        return None

    silent: list[str] = []
    with faulty_proxy(server) as proxy, commands(_prepare) as impatient:
        proxy.fault = fault
        answer = impatient("knowledge", *options)
    assert answer.code == 2, answer.err
    said = (
        rf"error: cannot write {store}/train/\d{{5}}\S+: storage at {proxy.address} did not answer within 3 s"
    )
    assert re.search(said, answer.err), answer.err
    assert "Traceback" not in answer.err

    before = contents(store)
    assert "manifest.json" not in before
    assert before.items() <= local_store.items() | {("writer.json", before["writer.json"])}
    answer = tmkd("knowledge", *options)
    assert answer.code == 0, answer.err
    left, kept = map(int, re.search(r"in (\d+) shards \((\d+) done\)", answer.err).groups())
    assert (left, kept) == (NUM_SHARDS - 4, 4)
    assert contents(store) == local_store
