"""File systems by path or URI."""

from pathlib import Path

import pytest
from pyarrow.fs import FileType, LocalFileSystem

from tmkd_ray.errors import UserError
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


@pytest.mark.parametrize("path", ["nothing://bucket/folder", "s3:///folder", "http://example.com/data"])
def test_what_is_not_a_store(path: str) -> None:
    with pytest.raises(UserError, match="cannot open"):
        open_filesystem(path)
