"""Reading and writing files, on this machine and in what behaves like an object store."""

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

from tmkd_ray import storage
from tmkd_ray.errors import UserError


def test_write_and_read(tmp_path: Path) -> None:
    path = f"{tmp_path}/new folder/ä/file.bin"
    assert not storage.exists(path)
    storage.write_bytes(path, b"\0one\xff")
    assert storage.exists(path)
    assert storage.exists(os.path.dirname(path))
    assert storage.read_bytes(path) == b"\0one\xff"
    storage.write_bytes(path, b"")
    assert storage.read_bytes(path) == b""
    assert storage.list_names(os.path.dirname(path)) == ["file.bin"], "no temporary file is left"


def test_by_uri(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/a"
    storage.write_bytes(f"{uri}/b.txt", b"text")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"text"
    assert storage.read_bytes(f"{uri}/b.txt") == b"text"
    assert storage.exists(uri)
    assert storage.list_names(uri) == ["b.txt"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    storage.write_bytes("here.txt", b"1")
    storage.write_bytes("~/there.txt", b"2")
    assert (tmp_path / "here.txt").read_bytes() == b"1"
    assert (tmp_path / "home" / "there.txt").read_bytes() == b"2"
    assert storage.absolute("a/../b") == f"{tmp_path}/b"
    assert storage.absolute("~/b") == f"{tmp_path}/home/b"
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


def test_join() -> None:
    assert storage.join("a", "b", "c") == "a/b/c"
    assert storage.join("a/", "b") == "a/b"
    assert storage.join("s3://bucket/", "b") == "s3://bucket/b"
    assert storage.join("a") == "a"


def test_list_names(tmp_path: Path) -> None:
    for name in ("10", "9", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    assert storage.list_names(str(tmp_path)) == [".hidden", "10", "9", "folder"]
    assert storage.list_names(f"{tmp_path}/nothing") == []


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/nothing", str(tmp_path)):
        with pytest.raises(UserError, match=f"cannot read {path}: "):
            storage.read_bytes(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path in (f"{tmp_path}/file/below", f"{tmp_path}/folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            storage.write_bytes(path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_content_stays_when_writing_fails(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{tmp_path}/file"
    storage.write_bytes(path, b"old")

    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            storage.write_bytes(path, b"new")
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: [Errno 28] No space left on device"
    assert storage.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_see_the_old_or_the_new(tmp_path: Path) -> None:
    """While several threads replace a file, it is never missing, never partial."""
    path = f"{tmp_path}/file"
    versions = [bytes([version]) * 200_000 for version in range(4)]
    storage.write_bytes(path, versions[0])
    done = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                assert storage.read_bytes(path) in versions
        except BaseException as error:
            failures.append(error)

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                storage.write_bytes(path, content)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(version,)) for version in versions]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    """A temporary file's narrow permissions would lock out the other users of a shared folder."""
    mask = os.umask(0o022)
    try:
        storage.write_bytes(f"{tmp_path}/file", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.fixture
def object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that is not the local one, below which there are folders as on one."""
    (tmp_path / "folder").mkdir()
    filesystem = SubTreeFileSystem(str(tmp_path), LocalFileSystem())

    def open_filesystem(path: str) -> tuple[FileSystem, str]:
        return filesystem, path.removeprefix("store://")

    monkeypatch.setattr(storage, "open_filesystem", open_filesystem)
    return "store://folder"


def test_an_object_store(object_store: str, tmp_path: Path) -> None:
    path = storage.join(object_store, "file")
    assert not storage.exists(path)
    storage.write_bytes(path, b"one")
    assert (tmp_path / "folder" / "file").read_bytes() == b"one"
    storage.write_bytes(path, b"two")
    assert storage.read_bytes(path) == b"two"
    assert storage.list_names(object_store) == ["file"]
    assert storage.list_names("store://nothing") == []
    with pytest.raises(UserError, match="cannot read store://folder/other: "):
        storage.read_bytes("store://folder/other")
    with pytest.raises(UserError, match="cannot write store://folder/file/below: "):
        storage.write_bytes("store://folder/file/below", b"")


def test_a_local_copy_of_a_uri_is_read_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "weights.bin").write_bytes(b"\x00" * 100)
    (folder / "checkpoints").mkdir()
    with storage.local_copy(f"file://{folder}") as local:
        copy = Path(local)
        assert copy != folder
        assert copy.name == "model"
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
            "config.json": b"{}",
            "weights.bin": b"\x00" * 100,
        }
    assert not copy.exists()
    with storage.local_copy(f"file://{folder / 'weights.bin'}") as local:
        assert Path(local).read_bytes() == b"\x00" * 100
        assert local.endswith("weights.bin")
    with pytest.raises(UserError, match="nothing"), storage.local_copy(f"file://{tmp_path}/nothing"):
        pass


def test_a_local_path_needs_no_copy(tmp_path: Path) -> None:
    with storage.local_copy(str(tmp_path / "anything")) as local:
        assert local == str(tmp_path / "anything")
