"""A real MLflow server on SQLite, and a proxy before it that is slow or faulty when asked to be.

Benchmarks and tests put a run behind it; both stay on loopback.
"""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

READY_TIMEOUT_S = 240
START_TIMEOUT_S = 180.0
"""MLflow is imported three times on the way: seconds each, more on a busy machine."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, backend: str | None = None, *flags: str) -> Iterator[int]:
    """Started on a free port, its artifacts in ``folder``, and its database where ``backend`` is
    not the URL of another; yields the port. ``flags`` are further ones of `mlflow server`.
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        backend or f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--serve-artifacts",
        *flags,
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "server.log").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        try:
            _wait_until_ready(port, process, folder / "server.log")
            yield port
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_ready(port: int, process: "subprocess.Popen[bytes]", said: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {said.read_text()}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {READY_TIMEOUT_S} s: {said.read_text()}")


class Proxy(ThreadingHTTPServer):
    """Forwards to ``upstream``, a port of this machine, and does what its attributes say."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream = upstream
        self.is_down = False
        """Connections are cut."""
        self.delay_s = 0.0
        """Before each answer."""
        self.status_for: Callable[[int, str, str], int | None] = lambda number, method, path: None
        """Answered instead of forwarding, by the request's number, method and path."""
        self.forward_before_status = False
        """Whether what `status` answers for was forwarded all the same."""
        self.alter_body: Callable[[str, bytes], bytes | None] = lambda path, body: body
        """What becomes of a body on its way; None cuts the connection in the middle of it."""
        self.requests: list[tuple[str, str]] = []
        self.requests_lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Clients that went away are part of the game."""


@contextmanager
def proxy(upstream: int) -> Iterator[Proxy]:
    server = Proxy(upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or two small writes wait for the client's delayed ACK
    server: Proxy

    def do_GET(self) -> None:
        self._pass_on()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _pass_on(self) -> None:
        proxy, path = self.server, self.path
        body: bytes | None = self._body()
        if proxy.is_down:
            self.close_connection = True
            return
        with proxy.requests_lock:
            proxy.requests.append((self.command, path))
            number = len(proxy.requests)
        time.sleep(proxy.delay_s)
        refusal = proxy.status_for(number, self.command, path)
        if refusal and not proxy.forward_before_status:
            self._answer(refusal, {"Content-Type": "text/plain"}, b"")
            return
        if body:
            body = proxy.alter_body(path, body)
        if body is None:
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
        try:
            kept = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("host", "connection", "transfer-encoding", "content-length")
            }
            upstream.request(self.command, path, body, kept)
            answer = upstream.getresponse()
            content, headers = answer.read(), dict(answer.getheaders())
        except OSError:
            self._answer(502, {"Content-Type": "text/plain"}, b"")
            return
        finally:
            upstream.close()
        if refusal:
            self._answer(refusal, {"Content-Type": "text/plain"}, b"")
        else:
            self._answer(answer.status, headers, content)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
