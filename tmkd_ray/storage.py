"""Files on this machine or in an object store, by one interface."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from tmkd_ray.errors import UserError


def open_filesystem(path: str) -> tuple[FileSystem, str]:
    """Return the file system that holds `path` and the path within it.

    Args:
        path: a local path (relative ones are resolved against the working directory, `~` expanded) or a
            URI that pyarrow knows: `file://`, `s3://bucket/folder`, `gs://`, `abfs://`, `hdfs://`.

    Raises:
        UserError: the URI's scheme or form is not known.
    """
    if "://" not in path:
        return LocalFileSystem(), absolute(path)
    try:
        filesystem, inner = FileSystem.from_uri(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"cannot open {path}: {error}. Give a local path or a URI such as s3://bucket/folder"
        ) from error
    return filesystem, inner.rstrip("/") or "/"


def absolute(path: str) -> str:
    """Return a local path from the root, since workers have another working directory; a URI as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(path: str, *parts: str) -> str:
    """Return a path or URI below another."""
    return "/".join([path.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Return whether there is a file or folder at `path`."""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.get_file_info(inner).type != FileType.NotFound)


def is_folder(path: str) -> bool:
    """Return whether there is a folder at `path`."""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.get_file_info(inner).type == FileType.Directory)


def list_names(path: str) -> list[str]:
    """Return the names of the files and folders directly in a folder, sorted; none if it does not exist."""
    filesystem, inner = open_filesystem(path)
    infos = filesystem.get_file_info(FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def read_bytes(path: str) -> bytes:
    """Return a file's content.

    Raises:
        UserError: it cannot be read; names the path.
    """
    filesystem, inner = open_filesystem(path)
    try:
        with filesystem.open_input_file(inner) as file:
            content: bytes = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return content


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yield a local path of a file, or of a folder of files, for readers that know no URIs.

    A local path is yielded as it is (`~` expanded), whether there is anything or not; the file, or the files
    directly in the folder, behind a URI are copied to a temporary folder, which ends with the block.

    Raises:
        UserError: there is nothing at the URI, or it cannot be read.
    """
    if "://" not in path:
        yield os.path.expanduser(path)
        return
    with tempfile.TemporaryDirectory(prefix="tmkd-") as folder:
        target = os.path.join(folder, path.rstrip("/").rsplit("/", 1)[-1])
        if is_folder(path):
            os.mkdir(target)
            for name in list_names(path):
                if not is_folder(join(path, name)):
                    _copy(join(path, name), os.path.join(target, name))
        else:
            _copy(path, target)
        yield target


def _copy(path: str, target: str) -> None:
    with open(target, "wb") as file:
        file.write(read_bytes(path))


def write_bytes(path: str, content: bytes) -> None:
    """Write a file whole or not at all, making its folder: a reader sees the old content or the new.

    Raises:
        UserError: it cannot be written (disk full, no permission); names the path.
    """
    filesystem, inner = open_filesystem(path)
    try:
        if not isinstance(filesystem, LocalFileSystem):
            with filesystem.open_output_stream(inner) as file:  # object stores publish when it is closed
                file.write(content)
            return
        folder = os.path.dirname(inner)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{os.path.basename(inner)}.{os.getpid()}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, inner)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
