"""Others are told of a new champion, signed, until they have taken it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from eurosat.errors import ConfigError, TrackingError
from registry import event_queue, ledger, notifications
from registry.event_queue import Inbox
from registry.notifications import Target, public, tell
from registry.worker import Worker
from tests.support.registry import REGISTRY, challenge, run_promote, run_rollback

pytestmark = REGISTRY


@dataclass
class Heard:
    url: str = ""
    status: int = 200
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def listener() -> Iterator[Heard]:
    """A real server that remembers what it is told."""
    heard = Heard()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            heard.requests.append((self.path, headers, body))
            self.send_response(heard.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    heard.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield heard
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, listener: Heard) -> None:
    monkeypatch.setenv(notifications.VARIABLE, "ours")
    monkeypatch.setenv(notifications.TOKEN, "token")
    monkeypatch.setenv(notifications.GITHUB, listener.url)
    monkeypatch.setattr(event_queue, "FIRST_PAUSE_S", 0.0)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Inbox]:
    box = Inbox(tmp_path / "inbox.db")
    yield box
    box.close()


def work_off(of: Worker, model: str, box: Inbox) -> None:
    of.look()
    while job := box.next(model, 0):
        of.do(job)


def test_a_new_champion_is_told_once_signed_and_again_where_it_was_not_taken(
    store: Path, box: Inbox, listener: Heard
) -> None:
    model = "told"
    challenge(store, model, wrong=30)
    assert run_promote(model, "--why", "the first") == 0
    second = challenge(store, model, wrong=10)
    assert run_promote(model, "--why", "better") == 0
    targets = [Target(to=f"{listener.url}/hook"), Target(to="github:team/maps")]
    watching = Worker(model, box, targets=targets)
    listener.status = 503
    watching.look()
    for _ in range(4):
        job = box.next(model, 0)
        assert job is not None
        watching.do(job)
    listener.status = 204
    work_off(watching, model, box)
    assert box.counts()["dead"] == 0
    before = len(listener.requests)
    work_off(watching, model, box)
    assert len(listener.requests) == before, "what was told is not told again"
    by_path = {path: (headers, body) for path, headers, body in listener.requests}
    headers, body = by_path["/hook"]
    told = json.loads(body)
    assert (told["version"], told["previous"], told["why"]) == (second, "1", "better")
    stamp = headers["x-eurosat-timestamp"]
    wanted = notifications.signature("ours", headers["x-eurosat-delivery-id"], stamp, body)
    assert headers["x-eurosat-signature"] == wanted
    headers, body = by_path["/repos/team/maps/dispatches"]
    assert headers["authorization"] == "Bearer token"
    assert json.loads(body)["event_type"] == "eurosat-champion"
    assert json.loads(body)["client_payload"] == told
    assert run_rollback(model, "--why", "no") == 0
    work_off(watching, model, box)
    assert json.loads(listener.requests[-1][2])["client_payload"]["action"] == "rollback"


def test_who_never_takes_it_is_given_up_and_listed(
    store: Path, box: Inbox, listener: Heard
) -> None:
    model = "untold"
    challenge(store, model, wrong=30)
    assert run_promote(model) == 0
    listener.status = 500
    watching = Worker(model, box, targets=[Target(to=listener.url)])
    work_off(watching, model, box)
    assert len(listener.requests) == event_queue.MOST_TRIES
    (dead,) = box.dead()
    assert dead.said == f"{listener.url} was not told: status 500"


def test_what_may_be_a_secret_of_a_url_is_not_shown() -> None:
    assert public("https://user:pass@hooks.example.org:8443/T0/secret") == (
        "https://hooks.example.org:8443"
    )
    assert public("github:team/maps") == "github:team/maps"


@pytest.mark.parametrize(
    ("to", "said"), [("ftp://x", "takes a URL"), ("github:team", "takes a URL"), ("", "takes")]
)
def test_a_target_that_is_none_is_refused(to: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Target(to=to)


@pytest.mark.parametrize(
    ("to", "variable"), [("https://x", notifications.VARIABLE), ("github:a/b", notifications.TOKEN)]
)
def test_nobody_is_told_unsigned(to: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=f"{variable} is not set"):
        Target(to=to)


def test_who_is_away_is_said_in_one_line(store: Path) -> None:
    model = "away"
    challenge(store, model, wrong=30)
    assert run_promote(model) == 0
    entry = ledger.entries(model)[-1]
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 was not told: Connection"):
        tell(Target(to="http://127.0.0.1:9"), model, entry)
