"""Files in an S3 server on loopback, and what becomes of them when the server fails."""

import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import (
    ACCESS_KEY,
    HANG,
    SECRET_KEY,
    FaultyProxy,
    S3Server,
    aws_environment,
    faulty_proxy,
    s3_server,
)

from tmkd_ray import storage
from tmkd_ray.errors import UserError

LARGE = bytes(range(256)) * 50_000
"""12.8 MB: pyarrow uploads it in parts."""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def folder(server: S3Server, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own."""
    return server.uri(f"{abs(hash(request.node.name))}")


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 2)
    with faulty_proxy(server) as proxy:
        yield proxy


def test_round_trip(folder: str) -> None:
    path = f"{folder}/deep/file.bin"
    assert not storage.exists(path)
    assert not storage.exists(folder)
    assert storage.list_names(folder) == []
    storage.write_bytes(path, b"\0one\xff")
    assert storage.exists(path)
    assert not storage.is_folder(path)
    assert storage.is_folder(folder)
    assert storage.read_bytes(path) == b"\0one\xff"
    storage.write_bytes(path, b"")
    assert storage.read_bytes(path) == b""
    storage.write_bytes(f"{folder}/a.gz", b"as it is")
    assert storage.read_bytes(f"{folder}/a.gz") == b"as it is"
    assert storage.list_names(f"{folder}/") == ["a.gz", "deep"]
    assert storage.sizes(folder) == {"a.gz": 8}
    assert storage.remove_leftovers(folder) == []
    for _ in range(2):
        storage.delete(path)
        assert not storage.exists(path)


def test_what_is_stored_is_what_was_given(server: S3Server, folder: str) -> None:
    """Looked at by other means."""
    storage.write_bytes(f"{folder}/file", LARGE)
    assert server.request("GET", f"/{folder.removeprefix('s3://')}/file") == LARGE
    assert storage.read_bytes(f"{folder}/file") == LARGE
    assert storage.sizes(folder) == {"file": len(LARGE)}


def test_unusual_names(folder: str) -> None:
    names = {"with space": "with space", "100%25": "100%", "a%23b": "a#b", "ä%3F": "ä?", "a+b=c": "a+b=c"}
    for name in names:
        storage.write_bytes(f"{folder}/{name}", name.encode())
        assert storage.read_bytes(f"{folder}/{name}") == name.encode()
    assert storage.list_names(folder) == sorted(names.values())
    with pytest.raises(UserError, match="write '#' as %23"):
        storage.read_bytes(f"{folder}/a#b")


def test_more_than_a_page_of_names(server: S3Server, folder: str) -> None:
    """A server lists a thousand at a time."""
    names = [f"{i:04d}" for i in range(1005)]
    for name in names:
        server.request("PUT", f"/{folder.removeprefix('s3://')}/{name}", name.encode())
    assert storage.list_names(folder) == names
    assert storage.sizes(folder) == dict.fromkeys(names, 4)


def test_local_copies(folder: str) -> None:
    storage.write_bytes(f"{folder}/model/config.json", b"{}")
    storage.write_bytes(f"{folder}/model/the weights%23.bin", LARGE)
    storage.write_bytes(f"{folder}/model/checkpoints/1", b"not directly in it")
    with storage.local_copy(f"{folder}/model") as local:
        copied = Path(local)
        assert copied.name == "model"
        assert {file.name: file.read_bytes() for file in copied.iterdir()} == {
            "config.json": b"{}",
            "the weights#.bin": LARGE,
        }
    assert not copied.exists()
    with storage.local_copy(f"{folder}/model/config.json") as local:
        assert Path(local).read_bytes() == b"{}"


CALLS: dict[str, Callable[[str], object]] = {
    "look for": storage.exists,
    "list": storage.list_names,
    "read": storage.read_bytes,
    "write": lambda path: storage.write_bytes(path, b"new"),
    "delete": storage.delete,
}
"""What can fail, by what the message says of it."""

WITH_A_BUCKET = {action: call for action, call in CALLS.items() if action != "delete"}


@pytest.mark.parametrize("action", WITH_A_BUCKET)
def test_there_is_no_such_bucket(server: S3Server, action: str) -> None:
    path = "s3://other-bucket/folder/file"
    with pytest.raises(UserError, match=rf"^cannot {action} {path}: there is no bucket 'other-bucket'$"):
        CALLS[action](path)
    storage.delete(path)  # there is none


def test_there_is_no_such_file(folder: str) -> None:
    with pytest.raises(UserError, match=f"^cannot read {folder}/nothing: No such file or directory$"):
        storage.read_bytes(f"{folder}/nothing")
    with (
        pytest.raises(UserError, match=f"^cannot read {folder}/nothing: "),
        storage.local_copy(f"{folder}/nothing"),
    ):
        pass


@pytest.mark.parametrize("part", [1, 2, 3])
def test_an_upload_that_fails_half_way_leaves_the_old_content(
    proxy: FaultyProxy, folder: str, part: int
) -> None:
    path = f"{folder}/file"
    storage.write_bytes(path, b"old")
    proxy.fault = lambda request: 400 if f"partNumber={part}" in request else None
    with pytest.raises(UserError, match=f"cannot write {path}: .*injected"):
        storage.write_bytes(path, LARGE * 2)
    assert storage.read_bytes(path) == b"old"
    with pytest.raises(UserError, match="injected"):
        storage.write_bytes(f"{folder}/another", LARGE * 2)
    assert not storage.exists(f"{folder}/another")


@pytest.mark.parametrize("at", ["POST", "PUT"])
def test_an_interrupt_does_not_publish_a_part(proxy: FaultyProxy, folder: str, at: str) -> None:
    """Ctrl-C while the upload is begun, or while it runs: the file is the old or, sooner or later, the new."""
    path = f"{folder}/file"
    storage.write_bytes(path, b"old")
    interrupted = threading.Event()

    def interrupt(request: str) -> None:
        if request.startswith(at) and not interrupted.is_set():
            interrupted.set()
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)

    proxy.fault = interrupt
    # A shell's background jobs, and so some continuous integration, start with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            storage.write_bytes(path, LARGE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted.is_set()
    assert storage.read_bytes(path) in (b"old", LARGE)


def failing(times: int, status: int, start: str) -> Callable[[str], int | None]:
    """Return a fault for the first requests that start so."""
    left = [status] * times
    return lambda request: left.pop() if left and request.startswith(start) else None


@pytest.mark.parametrize(
    ("action", "start", "status"),
    [
        ("read", "HEAD", 503),
        ("read", "GET", 503),
        ("read", "GET", 500),
        ("write", "PUT", 503),
        ("write", "POST", 500),
        ("list", "GET", 503),
    ],
)
def test_throttling_and_server_errors_are_retried(
    proxy: FaultyProxy, folder: str, action: str, start: str, status: int
) -> None:
    path = f"{folder}/file"
    storage.write_bytes(path, b"old")
    proxy.requests.clear()
    proxy.fault = failing(1, status, start)
    CALLS[action](path)
    again = [request for request in proxy.requests if request.startswith(start)]
    assert again[0] == again[1], "the same was asked twice"
    assert storage.read_bytes(path) == (b"new" if action == "write" else b"old")


def test_a_request_is_retried_until_it_is_too_often(proxy: FaultyProxy, folder: str) -> None:
    path = f"{folder}/file"
    storage.write_bytes(path, b"old")
    proxy.requests.clear()
    proxy.fault = failing(1, 503, "HEAD")
    assert storage.read_bytes(path) == b"old"
    assert len(proxy.requests) == 3
    proxy.requests.clear()
    proxy.fault = lambda request: 503
    with pytest.raises(
        UserError, match=f"cannot write {path}: storage at {proxy.address} is overloaded .*2 times"
    ):
        storage.write_bytes(path, b"new")
    assert len(proxy.requests) == 2
    proxy.fault = lambda request: None
    assert storage.read_bytes(path) == b"old"


def test_nothing_is_waited_for_without_end(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CONNECT_TIMEOUT_S", 2.5)
    _, (options,) = storage.open_filesystem(folder)[0].__reduce__()
    assert (options["connect_timeout"], options["request_timeout"]) == (2.5, storage.REQUEST_TIMEOUT_S)


@pytest.mark.parametrize("action", CALLS)
def test_a_server_that_does_not_answer(
    proxy: FaultyProxy, folder: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{folder}/file"
    storage.write_bytes(path, b"old")
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    proxy.fault = lambda request: HANG
    with pytest.raises(
        UserError, match=f"^cannot {action} {path}: storage at {proxy.address} did not answer within 1 s"
    ):
        CALLS[action](path)
    proxy.fault = lambda request: None
    assert storage.read_bytes(path) == b"old"


def test_there_is_no_server(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(UserError, match=f"cannot read {folder}/file: storage at {address} cannot be reached"):
        storage.read_bytes(f"{folder}/file")


def test_google_cloud_storage_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
    path = f"gs://anonymous@bucket/file?scheme=http&endpoint_override={endpoint}"
    with pytest.raises(UserError, match="cannot read gs://anonymous@bucket/file"):
        storage.read_bytes(path)


@pytest.mark.parametrize("action", CALLS)
def test_access_denied(proxy: FaultyProxy, folder: str, action: str) -> None:
    proxy.fault = lambda request: 403
    with pytest.raises(
        UserError, match=rf"^cannot {action} {folder}: access to bucket-\w+ denied; check the cred"
    ):
        CALLS[action](folder)
    assert len(proxy.requests) <= 2, "which is not retried"


def test_credentials_stay_in_the_environment(
    proxy: FaultyProxy, folder: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    filesystem, _ = storage.open_filesystem(folder)
    seen = [pickle.dumps(filesystem).decode("latin-1"), repr(filesystem)]
    for status in (400, 403, 503):
        proxy.fault = lambda request, status=status: status  # type: ignore[misc]
        with pytest.raises(UserError) as caught:
            storage.read_bytes(folder)
        seen.append("".join(traceback.format_exception(caught.value)))
    seen += [*capfd.readouterr(), caplog.text]
    assert not any(secret in text for text in seen for secret in (ACCESS_KEY, SECRET_KEY))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://NAME:HIDDEN@bucket/folder",
        "s3://HIDDEN@bucket/folder",
        "s3://NAME:HID/DEN@bucket/folder",
        "s3://NAME:%48IDDEN@bucket",
        "s3://bucket/folder?access_key=NAME&secret_key=HIDDEN",
        "s3://bucket/folder?region=eu-west-1&session_token=HIDDEN",
        "s3://bucket/file?X-Amz-Algorithm=AWS4&X-Amz-Signature=HIDDEN",
        "abfs://container@account.dfs.core.windows.net/folder?sig=HIDDEN",
        "abfs://:HIDDEN@account.dfs.core.windows.net/container",
        "sftp://user:HIDDEN@host/folder",
        "simplecache::s3://NAME:HIDDEN@bucket/folder",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    for call in (storage.refuse_credentials, *CALLS.values()):
        with pytest.raises(UserError, match="environment: AWS_ACCESS_KEY_ID") as caught:
            call(uri)
        shown = "".join(traceback.format_exception(caught.value))
        assert not any(part in shown.replace(repr(uri), "") for part in ("HID", "%48", "NAME"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a:b@c",
        "s3://bucket/token/secret_key",
        "s3://bucket?endpoint_override=localhost:9000",
        "gs://anonymous@bucket/folder",
        "abfs://container@account.dfs.core.windows.net/folder",
        "sftp://user@host:22/folder",
        "hdfs://[::1]:8020/folder",
        "zip://a.csv::s3://bucket/a.zip",
        "a local:path@with/?secret_key=",
    ],
)
def test_what_is_no_credential(uri: str) -> None:
    storage.refuse_credentials(uri)


def test_region_and_address_come_from_the_environment(
    server: S3Server, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def region(query: str = "") -> str:
        opened: str = storage.open_filesystem(f"{folder}{query}")[0].region
        return opened

    assert region() == "us-east-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert region() == "eu-west-1"
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    assert region() == "eu-west-2"
    assert region("?region=eu-west-3") == "eu-west-3"
    with pytest.raises(UserError, match=r"then at most .*region=…"):
        region("?regions=eu-west-3")

    storage.write_bytes(f"{folder}/file", b"1")
    assert storage.open_filesystem(folder)[0] is storage.open_filesystem(f"{folder}/file")[0]
    with faulty_proxy(server) as proxy:
        assert storage.read_bytes(f"{folder}/file") == b"1"
        assert proxy.requests
        proxy.requests.clear()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
        assert storage.read_bytes(f"{folder}/file") == b"1"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
        override = server.address.removeprefix("http://")
        assert storage.read_bytes(f"{folder}/file?scheme=http&endpoint_override={override}") == b"1"
        assert not proxy.requests
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")


def test_the_environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tools of these tests."""
    monkeypatch.setenv("AWS_PROFILE", "own")
    before = dict(os.environ)
    with aws_environment("http://127.0.0.1:1"):
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
        assert "AWS_PROFILE" not in os.environ
    assert dict(os.environ) == before
