"""Bodies that stall and answers that nobody takes: how much memory they take, and how long."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from serving.protocol import MAX_PIPELINED
from tests.support.images import encoded
from tests.support.registry import REGISTRY
from tests.support.serving import Server, make_champion, running, until

pytestmark = REGISTRY
TILE = encoded("River", "JPEG")
BODIES_MB, BODY_BYTES = 32, 12_000_000
ANSWER_S = 1.0
STALLED = 24
"""Requests that send all but the last byte; together they have nine times the limit."""
GROWTH_MB = 3 * BODIES_MB
"""A body is joined from its chunks, and the allocator keeps what was freed."""
BODY_S = 4
WAIT_S = 30.0


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    make_champion(store)
    flags = (f"--max-bodies-mb={BODIES_MB}", f"--max-answer-s={ANSWER_S}", f"--max-body-s={BODY_S}")
    with running(store, *flags) as started:
        yield started


def memory_mb(server: Server) -> float:
    supervisor = psutil.Process(server.process.pid)
    tree = [supervisor, *supervisor.children(recursive=True)]
    return sum(process.memory_info().rss for process in tree) / 1e6


def predicts(server: Server) -> bool:
    response = requests.post(f"{server.url}/predict", TILE, timeout=WAIT_S)
    return response.status_code == 200


def head(path: str, media_type: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {media_type}")
    return "\r\n".join([*lines, f"Content-Length: {BODY_BYTES}", "", ""]).encode()


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/predict", "image/jpeg"),
        ("/predict/batch", "application/json"),
        ("/predict/batch", "multipart/form-data; boundary=x"),
        ("/invocations", "application/json"),
    ],
)
def test_stalled_bodies_take_no_more_than_their_limit(
    server: Server, path: str, media_type: str
) -> None:
    assert predicts(server)
    before = memory_mb(server)
    statuses: list[int] = []
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), WAIT_S))
            for _ in range(STALLED)
        ]
        for connection in opened:
            with contextlib.suppress(ConnectionError):  # it is rejected while it sends
                connection.settimeout(2.0)
                connection.sendall(head(path, media_type))
                connection.sendall(bytes(BODY_BYTES - 1))
            connection.settimeout(WAIT_S)
        assert server.metric("eurosat_request_bytes") <= BODIES_MB * 1e6
        assert memory_mb(server) - before < GROWTH_MB
        for connection in opened:
            with contextlib.suppress(ConnectionError):
                statuses.append(int(connection.recv(1024).split()[1]))
    assert set(statuses) == {408, 429}, "the first are cut off for their time, the others rejected"
    until(lambda: server.metric("eurosat_request_bytes") == 0, WAIT_S, "the limit is free again")
    assert predicts(server)


def test_a_client_that_takes_no_answers_is_cut_off(server: Server) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        deadline = time.monotonic() + WAIT_S
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:  # the system's own buffers are filled first
                connection.sendall(request * (MAX_PIPELINED // 2))
                time.sleep(0.1)
    until(lambda: server.metric("eurosat_request_bytes") == 0, WAIT_S, "the answer is let go")
    assert predicts(server)


def test_a_client_that_sends_many_requests_at_once_gets_the_first_answers(server: Server) -> None:
    """Uvicorn would read on, and keep them all in memory."""
    request = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    before, received = memory_mb(server), b""
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                connection.sendall(request * 1000)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(1 << 20):
                received += chunk
    assert received.count(b"HTTP/1.1 200 ") <= MAX_PIPELINED + 1
    assert memory_mb(server) - before < 10
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        connection.sendall(request * (MAX_PIPELINED - 1) + last)
        with connection.makefile("rb") as file:
            assert file.read().count(b"HTTP/1.1 200 ") == MAX_PIPELINED


def test_a_client_that_takes_its_answers_slowly_gets_them_all(server: Server) -> None:
    """It takes longer than the limit for all of them, but not for each."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    received, begin = b"", time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        for number in range(12):
            connection.sendall(last if number == 11 else request)
            time.sleep(ANSWER_S / 4)
            received += connection.recv(1 << 20)
        while chunk := connection.recv(1 << 20):
            received += chunk
    assert time.monotonic() - begin > 2 * ANSWER_S
    assert received.count(b"HTTP/1.1 200 ") == 12
