"""Files on this machine or in an object store, by one interface.

A path is local, or a URI: of pyarrow's file systems (`file://`, `s3://`, `gs://`, `abfs://`, `hdfs://`), or of
any other that fsspec knows and whose package is installed (`sftp://`, `webdav://`, `oci://` …). In a URI, the
characters `%`, `#` and `?` of a name are written `%25`, `%23`, `%3F`.

Credentials come from the usual environment alone: for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile
or the machine's role; the region from AWS_REGION or AWS_DEFAULT_REGION, else it is asked of the bucket; another
server's address, `http://` too, from AWS_ENDPOINT_URL.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import os
import random
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import fsspec.core
import pyarrow as pa
from pyarrow.fs import (
    AwsStandardS3RetryStrategy,
    FileInfo,
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
    S3FileSystem,
    resolve_s3_region,
)

from tmkd_ray.errors import UserError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
"""To reach an object store."""

REQUEST_TIMEOUT_S = 30.0
"""Without a byte from an object store."""

MAX_ATTEMPTS = 6
"""Of a request that is throttled, answered by a 5xx, or not answered; the pauses between double."""

_PYARROW_SCHEMES = ("abfs", "abfss", "gcs", "gs", "hdfs", "s3", "viewfs")
_BUCKETS = ("abfs", "gcs", "s3")
"""pyarrow's names of the file systems whose paths begin with a bucket."""

_S3_OPTIONS = {"endpoint_override", "region", "scheme"}
_SECRET_OPTION = re.compile(r"secret|token|passw|(access|account)_?key|signature|^sig$", re.IGNORECASE)

_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{32}", re.DOTALL)
_FORSAKEN_S = 24 * 3600
"""Age at which another machine's temporary file has no writer any more."""


def open_filesystem(path: str) -> tuple[FileSystem, str]:
    """Return the file system that holds `path` and the path within it.

    What is connected is kept for the next call of this process with the same environment.

    Args:
        path: a local path (relative ones are resolved against the working directory, `~` expanded) or a URI.

    Raises:
        UserError: the URI's scheme or form is not known, its package is not installed, it holds credentials, or
            the bucket's region cannot be found.
    """
    if "://" not in path:
        return LocalFileSystem(), absolute(path)
    refuse_credentials(path)
    scheme = path.partition("://")[0]
    try:
        if scheme == "file":
            filesystem, inner = FileSystem.from_uri(path)
        elif scheme in _PYARROW_SCHEMES:
            parts = urlsplit(path)
            if parts.fragment:
                raise UserError(f"cannot open {path}: write '#' as %23 in a URI")
            filesystem, root = _connect(
                (scheme, parts.netloc, parts.query),
                (CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, MAX_ATTEMPTS),
                # A changed environment is honoured; a forked process shares no connection with its parent.
                (hash(frozenset(os.environ.items())), os.getpid()),
            )
            inner = root.rstrip("/") + unquote(parts.path)
        else:
            filesystem, inner = _by_fsspec(path)
    except UserError:
        raise
    except Exception as error:  # what fsspec's packages raise has no common base
        raise UserError(
            f"cannot open {path}: {reason(error, path)}. Give a local path or a URI such as s3://bucket/folder"
        ) from error
    return filesystem, inner.rstrip("/") or "/"


@functools.lru_cache(maxsize=8)
def _connect(
    location: tuple[str, str, str], limits: tuple[float, float, int], process: tuple[int, int]
) -> tuple[FileSystem, str]:
    """Return a file system and the path of its root within it.

    Args:
        location: scheme, bucket or host, query of the URI.
        limits: seconds to connect and to wait, attempts.
        process: tells environments and processes apart.
    """
    scheme, authority, query = location
    if scheme == "s3":
        return _connect_s3(authority, dict(parse_qsl(query)), limits), authority
    if scheme in ("gs", "gcs"):
        query = urlencode({"retry_limit_seconds": str(limits[1] * limits[2]), **dict(parse_qsl(query))})
    uri = f"{scheme}://{authority}/" + (f"?{query}" if query else "")
    try:
        filesystem, root = FileSystem.from_uri(uri)
    except pa.ArrowNotImplementedError:  # this pyarrow was built without it
        filesystem, root = _by_fsspec(uri)
    return filesystem, root


def _connect_s3(bucket: str, options: dict[str, str], limits: tuple[float, float, int]) -> FileSystem:
    if not bucket or not options.keys() <= _S3_OPTIONS:
        raise UserError(
            f"cannot open s3://{bucket}: expected s3://BUCKET/FOLDER, then at most "
            f"?{'&'.join(f'{name}=…' for name in sorted(_S3_OPTIONS))}"
        )
    endpoint = _s3_endpoint(options)
    scheme = options.get("scheme", "https")
    if endpoint and "://" in endpoint:
        scheme, endpoint = endpoint.rstrip("/").split("://", 1)
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not endpoint:
        try:
            region = resolve_s3_region(bucket)
        except OSError as error:
            text = f"cannot find the region of s3://{bucket}: {reason(error, f's3://{bucket}')}; set AWS_REGION"
            raise UserError(text) from error
    connect_timeout_s, request_timeout_s, max_attempts = limits
    return S3FileSystem(
        region=region or "us-east-1",
        scheme=scheme,
        endpoint_override=endpoint,
        connect_timeout=connect_timeout_s,
        request_timeout=request_timeout_s,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=max_attempts),
        background_writes=True,  # without it, closing a stream publishes it though a part of it failed
    )


def _s3_endpoint(options: dict[str, str]) -> str | None:
    return (
        options.get("endpoint_override")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
    )


def _by_fsspec(uri: str) -> tuple[FileSystem, str]:
    filesystem, inner = fsspec.core.url_to_fs(uri)
    return PyFileSystem(FSSpecHandler(filesystem)), inner


def refuse_credentials(path: str) -> None:
    """Check that a path is no URI with credentials in it.

    Raises:
        UserError: it is; does not repeat it.
    """
    for uri in re.sub(r"\[[^]]*\]", "", path).split("::"):  # fsspec chains URIs; [::1] is an address
        scheme, separator, rest = uri.partition("://")
        authority = re.split("[/?#]", rest, maxsplit=1)[0]
        # Secret keys often hold slashes, which end the authority early; only a port may follow a colon.
        refused = bool(re.search(r":(?!\d*$)", authority)) or (
            scheme == "s3" and bool(re.search("[@:]", authority))
        )
        names = re.findall(r"[?&]([^=&]*)=", rest)
        if separator and (refused or any(_SECRET_OPTION.search(name) for name in names)):
            raise UserError(
                f"a URI {scheme}://… has credentials in it (not shown), which would lie open in logs and saved "
                "configs. Leave them out and set them in the environment: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY for s3, GOOGLE_APPLICATION_CREDENTIALS for gs"
            )


def absolute(path: str) -> str:
    """Return a local path from the root, since workers have another working directory; a URI as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(path: str, *parts: str) -> str:
    """Return a path or URI below another."""
    return "/".join([path.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Return whether there is a file or folder at `path`.

    Raises:
        UserError: the storage cannot tell (no such bucket, no access, no answer); names the path.
    """
    return bool(_info(path).type != FileType.NotFound)


def is_folder(path: str) -> bool:
    """Return whether there is a folder at `path`.

    Raises:
        UserError: as for `exists`.
    """
    return bool(_info(path).type == FileType.Directory)


def list_names(path: str) -> list[str]:
    """Return the names of the files and folders directly in a folder, sorted; none if it does not exist.

    Raises:
        UserError: it cannot be listed; names the path.
    """
    return sorted(info.base_name for info in _list(path))


def sizes(path: str) -> dict[str, int]:
    """Return the bytes of each file directly in a folder, by name; none if it does not exist.

    Raises:
        UserError: it cannot be listed; names the path.
    """
    return {info.base_name: info.size for info in _list(path) if info.type == FileType.File}


def modified_s(path: str) -> float | None:
    """Return when a file was written, in seconds by the storage's clock; None where that does not say.

    Raises:
        UserError: as for `exists`.
    """
    written_ns = _info(path).mtime_ns
    return None if written_ns is None else written_ns / 1e9


def _info(path: str) -> FileInfo:
    filesystem, inner = open_filesystem(path)
    with _told("look for", path):
        info = filesystem.get_file_info(inner)
        if info.type == FileType.NotFound:
            _check_bucket(filesystem, inner)
    return info


def _list(path: str) -> list[FileInfo]:
    filesystem, inner = open_filesystem(path)
    with _told("list", path):
        infos: list[FileInfo] = filesystem.get_file_info(FileSelector(inner, allow_not_found=True))
        if not infos:
            _check_bucket(filesystem, inner)
    return infos


def read_bytes(path: str) -> bytes:
    """Return a file's content.

    Raises:
        UserError: it cannot be read; names the path.
    """
    filesystem, inner = open_filesystem(path)
    with _told("read", path):
        return _read(filesystem, inner)


def _read(filesystem: FileSystem, inner: str) -> bytes:
    try:
        return read_file(filesystem, inner)
    except FileNotFoundError:
        _check_bucket(filesystem, inner)
        raise


def read_file(filesystem: FileSystem, inner: str) -> bytes:
    """Return the content of a file by its path in a file system; raises what the file system raises."""

    def read() -> bytes:
        with filesystem.open_input_file(inner) as file:
            content: bytes = file.read()
        return content

    return retried(read)


def retried(read: Callable[[], T]) -> T:
    """Return what `read` returns; call it again, after growing pauses, while S3 is throttled or out of order.

    pyarrow does so by itself, save where the text of the S3 server's error is longer than what was to be read:
    it finds no room for it and gives up. Raises what `read` raises.
    """
    for attempt in range(1, MAX_ATTEMPTS):
        try:
            return read()
        except OSError as error:
            if "Failed to flush response stream" not in str(error):
                raise
            time.sleep(random.uniform(0, min(2 ** (attempt - 1), 20)))
    return read()


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yield a local path of a file, or of a folder of files, for readers that know no URIs.

    A local path is yielded as it is (`~` expanded), whether there is anything or not; the file, or the files
    directly in the folder, behind a URI are copied to a temporary folder, which ends with the block.

    Raises:
        UserError: there is nothing at the URI, it cannot be read, or the temporary folder is full.
    """
    if "://" not in path:
        yield os.path.expanduser(path)
        return
    filesystem, inner = open_filesystem(path)
    with tempfile.TemporaryDirectory(prefix="tmkd-") as folder:
        target = os.path.join(folder, os.path.basename(inner))
        copies = {inner: target}
        if is_folder(path):
            files = [info for info in _list(path) if info.type == FileType.File]
            copies = {info.path: os.path.join(target, info.base_name) for info in files}
            os.mkdir(target)
        for source, copy in copies.items():
            with _told("read", path):
                content = _read(filesystem, source)
            with _told(f"copy {path} here, to", copy), open(copy, "wb") as file:
                file.write(content)
        yield target


def write_bytes(path: str, content: bytes) -> None:
    """Write a file whole or not at all, making its folder: a reader sees the old content or the new.

    That holds for local files, S3 and Google Cloud Storage; others publish as their packages do. What a killed
    process leaves is a temporary file (see `remove_leftovers`), or on S3 an unfinished upload, which no reader
    sees and which a lifecycle rule of the bucket can end.

    Raises:
        UserError: it cannot be written (disk full, no permission, no such bucket, no answer); names the path.
    """
    filesystem, inner = open_filesystem(path)
    with _told("write", path):
        if isinstance(filesystem, LocalFileSystem):
            _write_local(inner, content)
        else:
            # pyarrow's streams know no abort: closed or dropped they publish what they hold, at first nothing.
            # What interrupts this thread (Ctrl-C, a cancelled task) must not end one; another thread fills it.
            with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
                pool.submit(_upload, filesystem, inner, content).result()


def _write_local(path: str, content: bytes) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _upload(filesystem: FileSystem, inner: str, content: bytes) -> None:
    if isinstance(filesystem, PyFileSystem):
        store = filesystem.handler.fs
        try:
            store.pipe_file(inner, content)
        except FileNotFoundError:  # its folder is missing
            store.makedirs(os.path.dirname(inner), exist_ok=True)
            store.pipe_file(inner, content)
        return
    stream = filesystem.open_output_stream(inner, compression=None)  # else a name in .gz would compress
    try:
        stream.write(content)
    finally:
        stream.close()  # fails, and publishes nothing, if any part of the content failed


def delete(path: str) -> None:
    """Delete a file; that there is none is fine.

    Raises:
        UserError: it cannot be deleted; names the path.
    """
    filesystem, inner = open_filesystem(path)
    with _told("delete", path), contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(inner)


def remove_leftovers(path: str) -> list[str]:
    """Delete the temporary files that killed writers of `write_bytes` left in a local folder and below.

    What a live process of this machine writes stays; so does what another machine that shares the folder wrote,
    for a day. Object stores keep no such files.

    Returns:
        Their paths.

    Raises:
        UserError: one cannot be deleted; names it.
    """
    filesystem, inner = open_filesystem(path)
    leftovers = []
    if isinstance(filesystem, LocalFileSystem):
        for folder, _, names in os.walk(inner):
            for name in names:
                match = _TEMPORARY.fullmatch(name)
                file = os.path.join(folder, name)
                if match and _is_forsaken(file, match["host"], int(match["pid"])):
                    delete(file)
                    leftovers.append(file)
    return leftovers


def _is_forsaken(file: str, host: str, pid: int) -> bool:
    if host != _host():
        try:
            return time.time() - os.stat(file).st_mtime > _FORSAKEN_S
        except FileNotFoundError:  # its writer has just finished
            return False
    try:
        os.kill(pid, 0)  # only asks
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_outage(error: BaseException) -> bool:
    """Return whether an error lies with the storage or this machine, rather than with the file that was read.

    Such a file is not damaged and must not be passed over: no answer, throttling, no access, no network, too
    many open files.
    """
    if isinstance(error, FileNotFoundError):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE):
        return True
    return any(name in str(error) for name in ("AWS Error", "google::cloud::Status", "Azure Error"))


def reason(error: BaseException, path: str) -> str:
    """Return in words for people why something at `path` failed."""
    text = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    authority = re.split("[/?]", path.partition("://")[2], maxsplit=1)[0]
    endpoint = _s3_endpoint(dict(parse_qsl(path.partition("?")[2]))) if path.startswith("s3://") else None
    place = f"storage at {endpoint or authority}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{os.strerror(number)}{_free_space(path)}. Make room and start again; what is finished is kept"
    if "curlCode: 28" in text or isinstance(error, TimeoutError):
        return (
            f"{place} did not answer within {REQUEST_TIMEOUT_S:g} s, asked up to {MAX_ATTEMPTS} times ({text})"
        )
    if number is not None:
        return os.strerror(number)  # the text may name a temporary file
    if "NO_SUCH_BUCKET" in text:
        return f"there is no bucket {authority!r}"
    if "NETWORK_CONNECTION" in text:
        return f"{place} cannot be reached ({text})"
    if re.search("ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|EXPIRED|status 403", text):
        return f"access to {authority} denied; check the credentials in the environment ({text})"
    if "status 301" in text:
        return f"{authority} lies in another region; set AWS_REGION to it ({text})"
    if re.search("SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|status (429|5..)", text):
        return f"{place} is overloaded or out of order, asked {MAX_ATTEMPTS} times ({text})"
    return text


def _free_space(path: str) -> str:
    filesystem, folder = open_filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        return ""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return f", {shutil.disk_usage(folder).free / 1e6:,.0f} MB free"


def _check_bucket(filesystem: FileSystem, inner: str) -> None:
    """Raise FileNotFoundError if the reason that nothing is found is that there is no bucket."""
    if filesystem.type_name in _BUCKETS:
        bucket, found = inner.partition("/")[0], None
        with contextlib.suppress(OSError):  # one may have access to a folder, and none to its bucket
            found = filesystem.get_file_info(bucket).type
        if found == FileType.NotFound:
            raise FileNotFoundError(f"there is no bucket {bucket!r}")


@contextlib.contextmanager
def _told(action: str, path: str) -> Iterator[None]:
    """Turn the errors of file systems into ones for people."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot {action} {path}: {reason(error, path)}") from error
