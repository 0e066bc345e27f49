"""Two emulators of Google Cloud Storage, and faults between a server and its client."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests

from deploy.service import object_store_command
from tests.support.mlflow_server import free_port

START_S = 30.0


@contextmanager
def fake_gcs_server(folder: Path) -> Iterator[str]:
    """Run fake-gcs-server with its objects in ``folder``; yield its STORAGE_EMULATOR_HOST."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _running(url, *object_store_command(port, folder)):
        yield url


@contextmanager
def gcp_storage_emulator() -> Iterator[str]:
    """Run gcp-storage-emulator with its objects in memory; yield its STORAGE_EMULATOR_HOST."""
    port = free_port()
    with _running(
        url := f"http://127.0.0.1:{port}",
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--in-memory",
        "--quiet",
    ):
        yield url


@contextmanager
def _running(url: str, *command: str) -> Iterator[None]:
    environment = {name: value for name, value in os.environ.items() if "EMULATOR" not in name}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{url}/storage/v1/b", params={"project": "test"}, timeout=5)
                break
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} does not answer at {url}"
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


class Proxy:
    """A TCP proxy in front of a server. It counts bytes, cuts connections and changes bytes."""

    def __init__(self, server: str) -> None:
        self._server = server.removeprefix("http://").split(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.cuts = 0
        """Connections still to be cut, each after ``cut_after`` bytes in one direction."""
        self.cut_after = 1 << 20
        self.dead_after = math.inf
        """Bytes to the client after which every connection is cut."""
        self.spoil = (b"", b"")
        """Bytes that are replaced in the server's answers, and their replacement."""
        self.sent = self.received = 0
        """Bytes from the client, and to the client."""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Proxy":
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (self._listening, *tuple(self._open)):
            _hang_up(connection)
        for thread in self._threads:
            thread.join(10)
        self._listening.close()

    def _start(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the proxy is closing
            while True:
                self._start(self._connect, self._listening.accept()[0])

    def _connect(self, client: socket.socket) -> None:
        host, port = self._server
        with (
            contextlib.suppress(OSError),  # as when the server hung up first
            client,
            socket.create_connection((host, int(port))) as server,
        ):
            self._open |= {client, server}
            back = self._start(self._relay, server, client, False)
            self._relay(client, server, True)
            back.join()
            self._open -= {client, server}

    def _relay(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):  # the other direction has hung up
            while data := source.recv(1 << 16):
                passed += len(data)
                with self._lock:
                    if from_client:
                        self.sent += len(data)
                    else:
                        self.received += len(data)
                        data = data.replace(*self.spoil) if self.spoil[0] else data
                    if cut := self.cuts > 0 and passed > self.cut_after:
                        self.cuts -= 1
                    dead = self.received > self.dead_after
                if cut or dead:
                    break
                target.sendall(data)
        _hang_up(source)
        _hang_up(target)


def _hang_up(connection: socket.socket) -> None:
    """Shut a connection down, so that threads that wait for it wake up; closing would not do."""
    with contextlib.suppress(OSError):  # no longer connected
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def refusing_server(status: int, reason: str) -> Iterator[str]:
    """Run a server that answers every request with Google's JSON for refused credentials."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            error = {"code": status, "message": reason, "errors": []}
            body = json.dumps({"error": error}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # closing it waits for them

    with Server(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def make_bucket(url: str, name: str) -> str:
    """Create a bucket, and return its gs:// address."""
    response = requests.post(
        f"{url}/storage/v1/b", params={"project": "test"}, json={"name": name}, timeout=10
    )
    response.raise_for_status()
    return f"gs://{name}"
