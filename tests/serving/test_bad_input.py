"""Malformed requests to a real server: each gets an error, and none costs the server anything."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry import register, versions
from serving import client
from serving.app import openapi_schema
from serving.errors import CODES, RequestRejected
from serving.hot_swap import load
from serving.invocations import forward
from tests.support.images import GOOD, files
from tests.support.malformed_requests import (
    CASES,
    JPEG,
    JSON,
    SECRET,
    TIMEOUT_S,
    WRONG,
    Case,
    request,
)
from tests.support.mlflow_server import START_TIMEOUT_S, free_port
from tests.support.processes import CommandProcess, start
from tests.support.registry import MLFLOW_WARNS, make_run
from tests.support.serving import Answer, headers_of, read_answer

pytestmark = MLFLOW_WARNS

HANG_S = 15.0
CONCURRENCY = 16
GROWTH_MB, LARGE_GROWTH_MB = 2.0, 24.0
"""Allowed growth of the server's memory, in the best of `PASSES`: without large bodies, and with
them, of whose 100 MB an allocator may keep some.
"""
PASSES = 9


class Server:
    """A server of one process."""

    def __init__(self, port: int, process: CommandProcess) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        (child,) = psutil.Process(process.pid).children()
        self.worker = child

    def send(self, case: Case) -> Answer | None:
        """Return the first answer; None if the connection is closed without one.

        Raises:
            TimeoutError: the connection is neither answered nor closed.
        """
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, HANG_S) as sent, ThreadPoolExecutor(1) as pool:
            pool.submit(write, sent, case.wire())
            try:
                with sent.makefile("rb") as file:
                    return read_answer(file, to_head=case.to_head)
            except ConnectionError:
                return None
            finally:
                shut(sent)

    def descriptors(self) -> int:
        """Return the open files, once there is no connection."""
        until = time.monotonic() + HANG_S
        while any(
            connection.status == "ESTABLISHED" for connection in self.worker.net_connections("tcp")
        ):
            assert time.monotonic() < until, "connections stay open"
            time.sleep(0.05)
        return int(self.worker.num_fds())

    def memory_mb(self) -> float:
        return float(self.worker.memory_info().rss) / 1e6


def shut(sent: socket.socket) -> None:
    """Close a connection, which also ends a thread that writes to it."""
    with contextlib.suppress(OSError):  # the server was quicker
        sent.shutdown(socket.SHUT_RDWR)


def write(sent: socket.socket, wire: Sequence[bytes | float]) -> None:
    try:
        for piece in wire:
            if isinstance(piece, bytes):
                sent.sendall(piece)
            else:
                time.sleep(piece)
    except OSError:
        pass  # answered before it was complete


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    number = register.register(make_run(store), "eurosat", "challenger")
    versions.client().set_registered_model_alias("eurosat", "champion", number)
    port, patience = free_port(), str(TIMEOUT_S)
    command = ["serving.server", "--port", str(port), "--processes", "1"]
    command += ["--max-head-s", patience, "--max-body-s", patience]
    process = start(*command, folder=store, log=store / "server.log")
    try:
        client.wait_ready(f"http://127.0.0.1:{port}", process, START_TIMEOUT_S)
        yield Server(port, process)
    finally:
        process.terminate()
        process.wait(timeout=30)
        print((store / "server.log").read_text()[-20_000:])


Outcome = Answer | Exception | None


def send_all(server: Server, cases: Mapping[str, Case] = CASES) -> dict[str, Outcome]:
    def outcome(case: Case) -> Outcome:
        try:
            return server.send(case)
        except (OSError, ValueError, KeyError, IndexError) as error:  # not HTTP, or too late
            return error

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return dict(zip(cases, pool.map(outcome, cases.values()), strict=True))


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, Outcome]:
    return send_all(server)


def test_the_corpus_is_large(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{len(CASES)} malformed requests")
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", list(CASES))
def test_a_malformed_request_gets_an_error_of_our_shape(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    case, answer = CASES[name], outcomes[name]
    if answer is None and case.closes:
        return
    assert isinstance(answer, Answer), f"no answer, but {answer!r}"
    assert answer.status in (case.statuses or WRONG), answer.body
    assert answer.kind == JSON
    response = answer.head + answer.body
    for never in (SECRET.encode(), b"Traceback", b'File "', b".py", b"mlflow.", b"server:"):
        assert never not in response
    if answer.status == 200 or case.to_head:
        return
    error = json.loads(answer.body)
    assert set(error) == {"error_code", "message"}
    assert error["error_code"] == CODES[answer.status]
    assert 0 < len(error["message"]) < 300
    assert "\n" not in error["message"]
    if answer.status == 405:
        assert "allow" in headers_of(answer.head)


def test_the_server_is_unchanged_by_the_corpus(
    server: Server, outcomes: dict[str, Outcome]
) -> None:
    good = Case(lambda: [request("/predict", JPEG, {"Content-Type": "image/jpeg"})])
    small = {name: case for name, case in CASES.items() if not case.large}
    open_before = server.descriptors()
    grown = growth_mb(server, small, PASSES)
    assert min(grown) < GROWTH_MB, grown
    grown = growth_mb(server, CASES, PASSES // 3)
    assert min(grown) < LARGE_GROWTH_MB, grown
    again = send_all(server)
    changed = [
        name
        for name, answer in again.items()
        if len(CASES[name].statuses) == 1 and status(answer) != status(outcomes[name])
    ]
    assert not changed, "another status the second time"
    assert server.descriptors() <= open_before
    answer = server.send(good)
    assert answer is not None
    assert json.loads(answer.body)["label"] == "River"


def growth_mb(server: Server, cases: Mapping[str, Case], max_passes: int) -> list[float]:
    """Return the growth of each pass, up to a small one; a leak would grow in every pass."""
    growth: list[float] = []
    bound = GROWTH_MB if cases is not CASES else LARGE_GROWTH_MB
    while len(growth) < max_passes and (not growth or growth[-1] >= bound):
        before = server.memory_mb()
        send_all(server, cases)
        growth.append(round(server.memory_mb() - before, 1))
    return growth


def test_a_rejected_request_with_an_endless_body_is_cut_off(server: Server) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), HANG_S) as sent:
        sent.sendall(head)
        assert sent.recv(9999).startswith(b"HTTP/1.1 404 ")
        until = time.monotonic() + HANG_S
        with contextlib.suppress(ConnectionError):
            sent.settimeout(TIMEOUT_S / 10)
            while time.monotonic() < until:
                sent.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if not sent.recv(1):
                        return
            pytest.fail("the connection stays open")


def status(answer: Outcome) -> int | None:
    return answer.status if isinstance(answer, Answer) else None


OPERATIONS = [
    (path, method) for path, methods in openapi_schema()["paths"].items() for method in methods
]
EXAMPLES = 12
"""Valid requests, and invalid ones, that Schemathesis makes for an operation."""


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_answers_match_the_openapi_document(path: str, method: str, server: Server) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_dict(openapi_schema())
    schema.config.update(base_url=server.url)
    operation = schema[path][method]
    validated = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]
    num_requests = 0

    def send(case: Any) -> None:
        nonlocal num_requests
        num_requests += 1
        case.validate_response(case.call(), checks=validated)

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        if mode == GenerationMode.NEGATIVE and method == "get":
            continue  # it has no input
        checked = given(operation.as_strategy(mode))(send)
        settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )(checked)()
    assert num_requests


def test_an_internal_error_of_the_model_is_distinct_from_a_malformed_request(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    version = load("models:/eurosat@champion", {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/invocations",
        "raw_path": b"/invocations",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", JSON.encode())],
        "server": ("127.0.0.1", 1),
        "client": ("127.0.0.1", 2),
    }
    good = json.dumps(files(GOOD)).encode()

    def status_of(body: bytes) -> int:
        try:
            return asyncio.run(forward(version, scope, body)).status_code
        except RequestRejected as error:
            return error.status

    assert status_of(good) == 200
    assert status_of(b"[" * 100_000) == 400
    assert status_of(json.dumps(files(b"SECRET")).encode()) == 422
    version.classifier.session = None
    assert status_of(good) == 500
    assert "the prediction of row 0 failed" in caplog.text
    version.files.close()
