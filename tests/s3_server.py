"""A real S3 server on loopback (moto), and a proxy before it that answers with faults.

with s3_server() as server:                 # every AWS_* variable is set for the block
    storage.write_bytes(server.uri("folder/file"), b"…")

with s3_server() as server, faulty_proxy(server) as proxy:
    proxy.fault = lambda request: 503 if request.startswith("PUT") else None
"""

import contextlib
import http.client
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from moto.server import ThreadedMotoServer

ACCESS_KEY, SECRET_KEY = "AKIALOOPBACK", "a-secret-of-the-tests"


@dataclass(frozen=True)
class S3Server:
    """A running server with a bucket; `address` is `http://127.0.0.1:PORT`."""

    address: str
    bucket: str

    def uri(self, path: str = "") -> str:
        """Return the URI of a path in the bucket."""
        return f"s3://{self.bucket}/{path}"

    def request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """Ask the server by plain HTTP, past everything that is tested; return its answer."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, content)
            answer = connection.getresponse()
            body = answer.read()
        assert answer.status < 300, (method, path, answer.status, body)
        return body


@contextlib.contextmanager
def aws_environment(address: str) -> Iterator[None]:
    """Set the usual variables, and no other AWS_* one, for the block."""
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in before:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=address,
        AWS_EC2_METADATA_DISABLED="true",
    )
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run an S3 server with one empty bucket on a free port of loopback; the environment leads there.

    Servers in one process share their content, so each has a bucket with a name of its own.
    """
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    requests = logging.getLogger("werkzeug")
    level = requests.level
    requests.setLevel(logging.ERROR)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        server = S3Server(f"http://{host}:{port}", f"bucket-{uuid.uuid4().hex}")
        server.request("PUT", f"/{server.bucket}")
        with aws_environment(server.address):
            yield server
    finally:
        moto.stop()
        requests.setLevel(level)


HANG = -1
"""A fault: take the request and never answer."""

_HOP_HEADERS = ("connection", "content-length", "expect", "transfer-encoding")
"""Concern one connection, not what is passed on."""

_FAULTS = {
    400: "InvalidRequest",
    403: "AccessDenied",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass
class FaultyProxy:
    """Passes requests on, save those that `fault` has an HTTP status, or HANG, for.

    Attributes:
        fault: given `METHOD /path?query`; returns None to pass it on. May be replaced at any time.
        requests: all that came, in order.
    """

    address: str = ""
    fault: Callable[[str], int | None] = lambda request: None
    requests: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def faulty_proxy(server: S3Server) -> Iterator[FaultyProxy]:
    """Run a proxy before the server on a free port of loopback; the environment leads to the proxy."""
    proxy = FaultyProxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

        def handle_one(self) -> None:
            body = self.read_body()
            request = f"{self.command} {self.path}"
            proxy.requests.append(request)
            status = proxy.fault(request)
            if status == HANG:
                proxy.closing.wait()
                self.close_connection = True
                return
            if status is not None:
                code = _FAULTS[status]
                # Longer than the small files of tests: pyarrow has no room for such an answer.
                host = "0" * 9999
                text = f"<Error><Code>{code}</Code><Message>injected</Message><HostId>{host}</HostId></Error>"
                self.answer(status, [("Content-Type", "application/xml")], text.encode())
                return
            connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=30)
            with contextlib.closing(connection):
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_HEADERS}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                self.answer(answer.status, answer.getheaders(), answer.read())

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                """Trailing headers."""
            return b"".join(chunks)

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _HOP_HEADERS:
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    proxy.address = f"http://127.0.0.1:{web.server_address[1]}"
    try:
        with aws_environment(proxy.address):
            yield proxy
    finally:
        proxy.closing.set()
        web.shutdown()
        web.server_close()
        thread.join()
