"""File systems by path or URI, and datasets in an S3 server on loopback."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from dataset_samples import SAMPLES, build
from pyarrow.fs import FileType, LocalFileSystem
from s3_server import ACCESS_KEY, HANG, SECRET_KEY, S3Server, faulty_proxy, s3_server

from tmkd_ray import storage
from tmkd_ray.datasets import ImageDataset, build_dataset
from tmkd_ray.datasets.base import read_class_names
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.storage import open_filesystem


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b").mkdir()
    for path in ("a b", "a b/", f"{tmp_path}/a b", "~/a b", f"file://{tmp_path}/a%20b/"):
        filesystem, inner = open_filesystem(path)
        assert isinstance(filesystem, LocalFileSystem)
        assert inner == f"{tmp_path}/a b"
        assert filesystem.get_file_info(inner).type == FileType.Directory


def test_object_store() -> None:
    filesystem, inner = open_filesystem("s3://bucket/some/folder/?region=eu-west-1")
    assert filesystem.type_name == "s3"
    assert inner == "bucket/some/folder"


@pytest.mark.parametrize(
    "path", ["nothing://bucket/folder", "s3:///folder", "file://host/folder", "s3://[bucket/"]
)
def test_what_is_not_a_store(path: str) -> None:
    with pytest.raises(UserError, match="cannot open"):
        open_filesystem(path)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["parquet", "image_folder"])
def datasets(
    request: pytest.FixtureRequest, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ImageDataset, ImageDataset]:
    """The same data on disk and in a folder of the server."""
    config = SAMPLES[request.param](tmp_path, monkeypatch)
    folder = server.uri(f"{tmp_path.name}/data")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            storage.write_bytes(f"{folder}/{file.relative_to(tmp_path)}", file.read_bytes())
    return build_dataset(config), build_dataset(config.model_copy(update={"path": folder}))


def test_a_dataset_in_a_store_is_the_one_on_disk(datasets: tuple[ImageDataset, ImageDataset]) -> None:
    on_disk, in_store = datasets
    assert in_store.class_names == on_disk.class_names
    packed = pickle.dumps(in_store)
    assert SECRET_KEY.encode() not in packed
    assert ACCESS_KEY.encode() not in packed
    for dataset in (in_store, pickle.loads(packed)):
        for split in ("train", "test"):
            index, expected = dataset.index(split), on_disk.index(split)
            assert index.ids.tolist() == expected.ids.tolist()
            assert index.labels.tolist() == expected.labels.tolist()
            contents = dataset.read(split, index)
            assert contents == on_disk.read(split, expected)
            assert all(isinstance(content, bytes) for content in contents)
            assert dataset.fingerprint(split) == on_disk.fingerprint(split)


def test_a_store_that_fails_is_no_damage(
    datasets: tuple[ImageDataset, ImageDataset], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are not set aside for it: what was finished stays, the rest is read when the store is back."""
    _, dataset = datasets
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    index = dataset.index("test")
    path = dataset.config.path  # type: ignore[attr-defined]
    with faulty_proxy(server) as proxy:
        for fault, text in ((403, "denied"), (503, "overloaded"), (HANG, "did not answer within 1 s")):
            proxy.fault = lambda request, fault=fault: fault  # type: ignore[misc]
            with pytest.raises(UserError, match=rf"dataset\.path: cannot read {path}/.*{text}"):
                dataset.read("test", index)
        proxy.fault = lambda request: 403
        for fails in (
            lambda: dataset.index("test"),
            lambda: dataset.fingerprint("test"),
            lambda: build_dataset(dataset.config),
        ):
            with pytest.raises(UserError, match=rf"dataset\.path: cannot (read|list) {path}.*denied"):
                fails()


def test_a_store_that_is_throttled_is_asked_again(
    datasets: tuple[ImageDataset, ImageDataset], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk, dataset = datasets
    monkeypatch.setattr(storage.random, "uniform", lambda low, high: 0.0)
    index = dataset.index("test")
    with faulty_proxy(server) as proxy:
        answers = [503, None, 503]  # opening a shard reads its end, then come its images
        proxy.fault = lambda request: answers.pop(0) if answers and request.startswith("GET") else None
        assert dataset.read("test", index) == on_disk.read("test", index)
        assert not answers


def test_an_image_that_is_not_in_the_store_any_more(server: S3Server) -> None:
    folder = server.uri("going")
    hidden = [".hidden/1.png", "bee/.hidden/3.png", "bee/deep/.4.png"]
    for name in ["notes.txt", "ant/1.png", "ant/2.png", "bee/1.png", "bee/deep/2.png", *hidden]:
        storage.write_bytes(f"{folder}/{name}", name.encode())
    dataset = build("image_folder", path=f"{folder}/", test_fraction=0.5)
    assert dataset.class_names == ("ant", "bee")
    index = dataset.index("train")
    assert len(index) + len(dataset.index("test")) == 4
    storage.delete(f"{folder}/{index.ids[0]}")
    missing, there = dataset.read("train", index)
    assert isinstance(missing, UnreadableImageError)
    assert str(missing) == "cannot read the file: No such file or directory"
    assert there == index.ids[1].encode()


def test_what_is_not_in_the_store(server: S3Server) -> None:
    for name in ("parquet", "image_folder"):
        with pytest.raises(UserError, match=f"dataset.path: no folder {server.uri('nothing')}"):
            build(name, path=server.uri("nothing"))


def test_class_names_in_a_store(server: S3Server) -> None:
    names = server.uri("classes.txt")
    with pytest.raises(UserError, match=f"dataset.class_names: cannot read {names}: No such file"):
        read_class_names(names)
    storage.write_bytes(names, b"ant\nbee\n")
    assert read_class_names(names) == ["ant", "bee"]
