"""A request that asks for another protocol is answered as HTTP/1.1, with its body."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import encoded
from tests.support.registry import REGISTRY
from tests.support.serving import Answer, Server, make_champion, read_answer, running

pytestmark = REGISTRY
TILE = encoded("River", "JPEG")
HOST = b"Host: localhost\r\n"
PING = b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n"
LAST = b"GET /ping HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
"""After its answer the server closes the connection."""
UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: keep-alive, upgrade\r\nX-Key: x\r\n",
    "two lines": b"Connection: upgrade\r\nUPGRADE: h2c\r\nConnection: HTTP2-Settings\r\n",
}


def post(upgrade: bytes, framing: str = "length") -> bytes:
    """Return a request for the tile."""
    head = b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Type: image/jpeg\r\n" + upgrade
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(TILE) + TILE
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(TILE), TILE)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    make_champion(store)
    with running(store) as started:
        yield started


def answers(server: Server, *parts: bytes) -> list[Answer]:
    """Send the parts one after another, then LAST; return the answers to those before it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (*parts[:-1], parts[-1] + LAST):
            connection.sendall(part)
            time.sleep(0.001)  # so that the server reads them apart
        with connection.makefile("rb") as file:
            *received, last = iter(lambda: read_answer(file), None)
    assert (last.status, b"connection: close" in last.head) == (200, True)
    return received


def assert_predicted(received: list[Answer]) -> None:
    """Assert that there is one answer, a prediction."""
    assert [answer.status for answer in received] == [200], received
    assert b'"River"' in received[0].body


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("name", UPGRADES)
def test_the_body_of_a_request_with_an_upgrade_is_read(
    server: Server, name: str, framing: str
) -> None:
    request = post(UPGRADES[name], framing)
    assert_predicted(answers(server, request))
    assert_predicted(answers(server, request, b""))
    several = answers(server, request + request)
    assert [answer.status for answer in several] == [200, 200]


def test_it_is_read_wherever_the_bytes_are_split(server: Server) -> None:
    request = post(UPGRADES["h2c"])
    head = request.index(b"\r\n\r\n") + 4
    for at in [*range(1, head + 8), len(request) - 1]:
        assert_predicted(answers(server, request[:at], request[at:]))


def test_it_is_read_byte_by_byte(server: Server) -> None:
    request = post(UPGRADES["websocket"], "chunked")
    head = request.index(b"\r\n\r\n") + 4
    bytes_of_head = [request[at : at + 1] for at in range(head)]
    assert_predicted(answers(server, *bytes_of_head, request[head:]))


def test_a_request_in_the_body_is_not_answered(server: Server) -> None:
    """What follows the head of an upgrade would be the next request."""
    upgrade = UPGRADES["h2c"] + b"Content-Length: %d\r\n\r\n" % len(PING)
    request = b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Type: image/jpeg\r\n" + upgrade
    received = answers(server, request, PING)
    assert [answer.status for answer in received] == [422], "the body is no image"


def test_a_get_with_an_upgrade_is_answered_and_the_connection_goes_on(server: Server) -> None:
    for upgrade in UPGRADES.values():
        request = b"GET /ping HTTP/1.1\r\n" + HOST + upgrade + b"\r\n"
        assert [answer.status for answer in answers(server, request, PING)] == [200, 200]


def test_other_options_of_the_connection_hold(server: Server) -> None:
    closing = b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\n" + HOST + closing + b"\r\n")
        with connection.makefile("rb") as file:
            (answer,) = iter(lambda: read_answer(file), None)
    assert b"connection: close" in answer.head
