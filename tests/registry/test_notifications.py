"""Others are notified of a new champion, with a signature, until they accept it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from eurosat.errors import ConfigError, TrackingError
from registry import event_queue, ledger, notifications
from registry.event_queue import EventQueue
from registry.notifications import Target, notify, redact
from registry.worker import Worker
from tests.support.http_server import listening
from tests.support.registry import REGISTRY, register_challenger, run_promote, run_rollback

pytestmark = REGISTRY


@dataclass
class Listener:
    """A real server that records its requests."""

    url: str = ""
    status: int = 200
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            listener.requests.append((self.path, headers, body))
            self.send_response(listener.status)
            self.end_headers()

    with listening(Handler) as listener.url:
        yield listener


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    monkeypatch.setenv(notifications.SECRET_VARIABLE, "ours")
    monkeypatch.setenv(notifications.TOKEN_VARIABLE, "token")
    monkeypatch.setenv(notifications.GITHUB_API_VARIABLE, listener.url)
    monkeypatch.setattr(event_queue, "FIRST_BACKOFF_S", 0.0)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[EventQueue]:
    queue = EventQueue(tmp_path / "queue.db")
    yield queue
    queue.close()


def process_all(worker: Worker, model: str, queue: EventQueue) -> None:
    worker.poll_registry()
    while event := queue.next(model, 0):
        worker.process(event)


def test_a_new_champion_is_notified_once_signed_and_again_if_it_was_not_accepted(
    store: Path, queue: EventQueue, listener: Listener
) -> None:
    model = "notified"
    register_challenger(store, model, wrong=30)
    assert run_promote(model, "--why", "the first") == 0
    second = register_challenger(store, model, wrong=10)
    assert run_promote(model, "--why", "better") == 0
    targets = [Target(address=f"{listener.url}/hook"), Target(address="github:team/maps")]
    worker = Worker(model, queue, targets=targets)
    listener.status = 503
    worker.poll_registry()
    for _ in range(4):
        event = queue.next(model, 0)
        assert event is not None
        worker.process(event)
    listener.status = 204
    process_all(worker, model, queue)
    assert queue.counts()["dead"] == 0
    before = len(listener.requests)
    process_all(worker, model, queue)
    assert len(listener.requests) == before, "nothing is sent twice"
    by_path = {path: (headers, body) for path, headers, body in listener.requests}
    headers, body = by_path["/hook"]
    payload = json.loads(body)
    assert (payload["version"], payload["previous"], payload["why"]) == (second, "1", "better")
    timestamp, id_ = headers["x-eurosat-timestamp"], headers["x-eurosat-delivery-id"]
    expected = notifications.signature("ours", id_, timestamp, body)
    assert headers["x-eurosat-signature"] == expected
    headers, body = by_path["/repos/team/maps/dispatches"]
    assert headers["authorization"] == "Bearer token"
    assert json.loads(body)["event_type"] == "eurosat-champion"
    assert json.loads(body)["client_payload"] == payload
    assert run_rollback(model, "--why", "no") == 0
    process_all(worker, model, queue)
    assert json.loads(listener.requests[-1][2])["client_payload"]["action"] == "rollback"


def test_a_target_that_never_accepts_is_given_up_and_listed(
    store: Path, queue: EventQueue, listener: Listener
) -> None:
    model = "never-accepted"
    register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    listener.status = 500
    worker = Worker(model, queue, targets=[Target(address=listener.url)])
    process_all(worker, model, queue)
    assert len(listener.requests) == event_queue.MAX_TRIES
    (dead,) = queue.dead()
    assert dead.message == f"{listener.url} was not notified: status 500"


def test_parts_of_a_url_that_may_be_secret_are_not_shown() -> None:
    assert redact("https://user:pass@hooks.example.org:8443/T0/secret") == (
        "https://hooks.example.org:8443"
    )
    assert redact("github:team/maps") == "github:team/maps"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("ftp://x", "takes a URL"), ("github:team", "takes a URL"), ("", "takes")],
)
def test_an_invalid_target_is_refused(address: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Target(address=address)


@pytest.mark.parametrize(
    ("address", "variable"),
    [("https://x", notifications.SECRET_VARIABLE), ("github:a/b", notifications.TOKEN_VARIABLE)],
)
def test_notifications_need_a_key(
    address: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=f"{variable} is not set"):
        Target(address=address)


def test_an_unreachable_target_is_one_line(store: Path) -> None:
    model = "away"
    register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    entry = ledger.entries(model)[-1]
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 was not notified: Connection"):
        notify(Target(address="http://127.0.0.1:9"), model, entry)
