"""A real MLflow server, and a proxy before it that can be slow or faulty.

For tests and benchmarks; both listen on loopback only.
"""

import atexit
import contextlib
import functools
import http.client
import os
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.processes import CommandProcess, start, start_function

READY_TIMEOUT_S = 240
"""Limit for the start of `mlflow_server`."""
START_TIMEOUT_S = 180.0
"""Limit for a model server: it imports MLflow three times, some seconds each."""

OWN_HEADERS = ("connection", "transfer-encoding", "content-length")
"""Headers that the proxy sets itself."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@functools.cache
def blank_database() -> Path:
    """Return an MLflow database with its tables: creating them takes seconds, copying does not."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = Path(tempfile.mkdtemp(prefix="blank"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "mlflow.db"
    SqlAlchemyStore(f"sqlite:///{file}", str(folder / "artifacts")).engine.dispose()
    return file


@contextmanager
def mlflow_server(folder: Path, backend: str | None = None, *flags: str) -> Iterator[int]:
    """Start a server on a free port, and yield the port.

    Its artifacts are in ``folder``, and so is its SQLite database unless ``backend`` is the URL of
    another. With ``flags`` of `mlflow server` it is started by that command, else as that command
    does, without its import.
    """
    port, log = free_port(), folder / "server.log"
    log.unlink(missing_ok=True)
    if backend is None:
        backend = f"sqlite:///{folder}/server.db"
        if not (folder / "server.db").exists():
            shutil.copy(blank_database(), folder / "server.db")
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    artifacts = str(folder / "artifacts")
    if flags:
        command = ["server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
        command += [f"--backend-store-uri={backend}", f"--artifacts-destination={artifacts}"]
        command += ["--serve-artifacts", *flags]
        process = start("mlflow", *command, folder=folder, log=log, env=environment)
    else:
        arguments = (port, backend, artifacts)
        process = start_function(_serve, arguments, folder=folder, log=log, env=environment)
    try:
        _wait_until_ready(port, process, log)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def _serve(port: int, backend: str, artifacts: str) -> None:
    import uvicorn
    from mlflow.server import constants

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: backend,
        constants.REGISTRY_STORE_URI_ENV_VAR: backend,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: artifacts,
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    uvicorn.run("mlflow.server.fastapi_app:app", host="127.0.0.1", port=port)


def _wait_until_ready(port: int, process: CommandProcess, log_file: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"the server exited with {process.returncode}: {log_file.read_text()}"
            )
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"no server after {READY_TIMEOUT_S} s: {log_file.read_text()}")


class Proxy(ThreadingHTTPServer):
    """Forwards requests to ``upstream``, a port of this machine, with faults set as attributes."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream = upstream
        self.is_down = False
        """Whether connections are cut without an answer."""
        self.delay_s = 0.0
        """Delay before each request is forwarded."""
        self.status_for: Callable[[int, str, str], int | None] = lambda number, method, path: None
        """Return a status to answer instead, given the request's number, method and path."""
        self.forward_before_status = False
        """Whether requests with such a status are forwarded all the same."""
        self.alter_body: Callable[[str, bytes], bytes | None] = lambda path, body: body
        """Return the body to forward, given path and body; None cuts the connection."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.requests_lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that have disconnected."""


@contextmanager
def proxy(upstream: int) -> Iterator[Proxy]:
    """Run a proxy in a thread, on a free port."""
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
        self._forward()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _forward(self) -> None:
        proxy, path = self.server, self.path
        body: bytes | None = self._body()
        if proxy.is_down:
            self.close_connection = True
            return
        with proxy.requests_lock:
            proxy.requests.append((self.command, path))
            number = len(proxy.requests)
        time.sleep(proxy.delay_s)
        status = proxy.status_for(number, self.command, path)
        if status and not proxy.forward_before_status:
            self._answer(status, {"Content-Type": "text/plain"}, b"")
            return
        if body:
            body = proxy.alter_body(path, body)
        if body is None:
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
        try:
            headers_out = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in (*OWN_HEADERS, "host")
            }
            upstream.request(self.command, path, body, headers_out)
            response = upstream.getresponse()
            content, headers = response.read(), dict(response.getheaders())
        except OSError:
            self._answer(502, {"Content-Type": "text/plain"}, b"")
            return
        finally:
            upstream.close()
        if status:
            self._answer(status, {"Content-Type": "text/plain"}, b"")
        else:
            self._answer(response.status, headers, content)

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
            if name.lower() not in OWN_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
