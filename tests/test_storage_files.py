"""Reading and writing files, on this machine and in what behaves like an object store."""

import contextlib
import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
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
        assert re.fullmatch(
            rf"cannot write {path}: No space left on device, [\d,]+ MB free\. Make room and start again; .*",
            str(caught.value),
        )
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


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let writing fail, after this many bytes, as it does on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_is_cut_short_by_the_system(tmp_path: Path) -> None:
    path = f"{tmp_path}/file"
    storage.write_bytes(path, b"old")
    with files_of_at_most(1000), pytest.raises(UserError, match=f"^cannot write {path}: File too large$"):
        storage.write_bytes(path, b"n" * 1001)
    assert storage.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_no_room_for_a_local_copy(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"n" * 1001)
    uri = f"file://{tmp_path}/model"
    with (
        files_of_at_most(1000),
        pytest.raises(UserError, match=r"^cannot copy .*/model here, to /.*/model: File too large$"),
        storage.local_copy(uri),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.EROFS, "Read-only file system"), (errno.EDQUOT, r"quota exceeded, [\d,]+ MB free")],
)
def test_reasons_of_the_system(number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number), "a temporary name")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/new/file: .*{text}") as caught:
        storage.write_bytes(f"{tmp_path}/new/file", b"")
    assert "temporary" not in str(caught.value)


@pytest.mark.parametrize("call", [storage.exists, storage.is_folder, storage.list_names, storage.delete])
def test_no_bare_errors(call: Any, tmp_path: Path) -> None:
    path = f"{tmp_path}/{'n' * 300}"
    with pytest.raises(UserError, match=f"cannot [a-z ]+ {path}: File name too long"):
        call(path)


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"")
    assert storage.sizes(str(tmp_path)) == {"a": 3, "b": 0}
    assert storage.sizes(f"{tmp_path}/nothing") == {}


def test_delete(tmp_path: Path) -> None:
    path = f"{tmp_path}/file"
    storage.write_bytes(path, b"1")
    for _ in range(2):
        storage.delete(path)
        assert not storage.exists(path)
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(UserError, match=f"cannot delete {tmp_path}/folder: "):
        storage.delete(f"{tmp_path}/folder")
    assert (tmp_path / "folder" / "full").exists()


KILLED_WRITER = """
import os, signal, sys
from tmkd_ray import storage
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
storage.write_bytes(sys.argv[1], b"new")
"""


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = f"{tmp_path}/run/train/00000.parquet"
    storage.write_bytes(path, b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = set(os.listdir(f"{tmp_path}/run/train")) - {"00000.parquet"}
    for name in (".hidden", ".00000.parquet.1.2", "notes.0a1b2c3d.1", "x" + leftover):
        (tmp_path / "run" / name).write_text("another's")
    assert storage.remove_leftovers(str(tmp_path)) == [f"{tmp_path}/run/train/{leftover}"]
    assert os.listdir(f"{tmp_path}/run/train") == ["00000.parquet"]
    assert len(os.listdir(f"{tmp_path}/run")) == 5
    assert storage.read_bytes(path) == b"old"
    assert storage.remove_leftovers(f"{tmp_path}/nothing") == []


def test_what_is_being_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a live process of this machine, or, for a day, by one of another."""
    seen: list[str] = []

    def look(file: int) -> None:
        assert storage.remove_leftovers(str(tmp_path)) == []
        seen.extend(os.listdir(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", look)
        storage.write_bytes(f"{tmp_path}/file", b"new")
    assert storage.read_bytes(f"{tmp_path}/file") == b"new"
    (name,) = seen
    _, _, host, pid, number = name.split(".")
    assert pid == str(os.getpid())
    other = "00000000" if host != "00000000" else "11111111"
    foreign = tmp_path / f".file.{other}.{2**22 + 1}.{number}"
    foreign.write_bytes(b"ne")
    assert storage.remove_leftovers(str(tmp_path)) == []
    old = foreign.stat().st_mtime - 2 * 24 * 3600
    os.utime(foreign, (old, old))
    assert storage.remove_leftovers(f"file://{tmp_path}") == [str(foreign)]
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_of_fsspec(tmp_path: Path) -> None:
    folder = "memory://tests of storage/folder"
    try:
        assert storage.list_names(folder) == []
        storage.write_bytes(f"{folder}/deep/file.gz", b"old")
        storage.write_bytes(f"{folder}/deep/file.gz", b"new")
        assert storage.read_bytes(f"{folder}/deep/file.gz") == b"new"
        assert storage.is_folder(folder)
        assert storage.list_names(f"{folder}/deep") == ["file.gz"]
        assert storage.sizes(f"{folder}/deep/") == {"file.gz": 3}
        with storage.local_copy(f"{folder}/deep") as copy:
            assert (Path(copy) / "file.gz").read_bytes() == b"new"
        with pytest.raises(UserError, match=f"cannot read {folder}/nothing: "):
            storage.read_bytes(f"{folder}/nothing")
    finally:
        for _ in range(2):
            storage.delete(f"{folder}/deep/file.gz")
            assert not storage.exists(f"{folder}/deep/file.gz")
    storage.write_bytes(f"local://{tmp_path}/new folder/file", b"1")
    assert (tmp_path / "new folder" / "file").read_bytes() == b"1"


def test_a_package_that_is_missing_is_named() -> None:
    absent = "a_package_that_nobody_has.FileSystem"
    fsspec.register_implementation("rare", absent, clobber=True, errtxt="Install a-package to reach it")
    with pytest.raises(UserError, match="cannot open rare://host/folder: Install a-package to reach it"):
        storage.exists("rare://host/folder")


def test_outages_are_told_from_damage(tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises((OSError, pa.ArrowException)) as damaged:
        pq.ParquetFile(tmp_path / "damaged.parquet")
    for error in (damaged.value, FileNotFoundError(2, "AWS Error"), PermissionError(13, "Permission denied")):
        assert not storage.is_outage(error)
    outages = [
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.EMFILE, ""),
        OSError("AWS Error SLOW_DOWN during"),
    ]
    for error in outages:
        assert storage.is_outage(error)


@pytest.mark.parametrize("times", [0, 2, 3])
def test_answers_without_room_for_an_error_are_asked_again(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    monkeypatch.setattr(storage.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 3)
    errors = [OSError("AWS Error INTERNAL_FAILURE: Failed to flush response stream")] * times

    def read() -> str:
        if errors:
            raise errors.pop()
        return "content"

    if times == 3:
        with pytest.raises(OSError, match="flush"):
            storage.retried(read)
    else:
        assert storage.retried(read) == "content"
    assert pauses == [1, 2][:times]


def test_other_errors_are_not_asked_again() -> None:
    calls: list[int] = []

    def read() -> None:
        calls.append(1)
        raise FileNotFoundError("nothing there")

    with pytest.raises(FileNotFoundError):
        storage.retried(read)
    assert calls == [1]
