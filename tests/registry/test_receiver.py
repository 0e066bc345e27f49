"""Webhooks of a real MLflow server judge what is registered, whatever is lost, forged or killed."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from registry import event_queue, history, ledger, receiver, versions, webhooks, worker
from registry.event_queue import Inbox, Job
from tests.support.mlflow_server import free_port
from tests.support.receiver import MODEL, SECRET, WAIT_S, Service, signed
from tests.support.registry import MLFLOW_WARNS, aliases, challenge, exit_code, point
from tests.support.serving import until

pytestmark = MLFLOW_WARNS
BURST, LONG_BURST = 100, 500


def body(event: str = worker.CREATED, version: str = "1", **data: str) -> bytes:
    entity, _, action = event.partition(".")
    told = {"name": MODEL, "version": version, **data}
    return json.dumps({"entity": entity, "action": action, "data": told}).encode()


def test_a_delivery_that_mlflow_signed_lately_is_taken() -> None:
    payload = body()
    assert receiver.check(SECRET, signed(payload), payload, time.time()) == "d1"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (lambda: {}, 401),
        (lambda: signed(body(), key="another"), 401),
        (lambda: signed(body(version="2")), 401),
        (lambda: signed(body()) | {"x-mlflow-delivery-id": "d2"}, 401),
        (lambda: signed(body()) | {"x-mlflow-signature": "v1,"}, 401),
        (lambda: signed(body()) | {"x-mlflow-signature": "\u00e4"}, 401),
        (lambda: signed(body(), id_=""), 401),
        (lambda: signed(body(), age_s=400), 400),
        (lambda: signed(body(), age_s=-400), 400),
    ],
)
def test_a_delivery_that_is_forged_or_stale_is_refused(
    headers: Callable[[], dict[str, str]], status: int
) -> None:
    with pytest.raises(receiver.Refused) as refused:
        receiver.check(SECRET, headers(), body(), time.time())
    assert refused.value.status == status


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"entity": 1, "action": 2}']
)
def test_what_is_no_event_is_refused(payload: bytes) -> None:
    with pytest.raises(receiver.Refused) as refused:
        receiver.read("d1", payload)
    assert refused.value.status == 400


def test_events_that_ask_for_nothing_are_let_pass() -> None:
    assert receiver.read("d1", body(worker.SAID, key="verdict")) is None
    said = receiver.read("d1", body(worker.SAID, key="approval", value="{}"))
    assert said is not None
    assert said.told == "approval"
    of_the_ledger = body().replace(MODEL.encode(), b"eurosat.ledger")
    assert receiver.read("d1", of_the_ledger) is None
    moved = receiver.read("d1", body(worker.MOVED, alias="champion"))
    assert moved is not None
    assert (moved.version, moved.told) == ("1", "champion")


def job(id_: str) -> Job:
    return Job(id=id_, event=worker.CREATED, model=MODEL, version="1", told="")


def test_the_inbox_outlives_its_process_and_takes_a_delivery_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_queue, "FIRST_PAUSE_S", 0.0)
    box = Inbox(tmp_path / "inbox.db")
    assert box.accept(job("a"))
    assert box.accept(job("b"))
    assert not box.accept(job("a")), "replayed"
    box.close()
    box = Inbox(tmp_path / "inbox.db")
    first = box.next(MODEL, 0)
    assert first is not None
    assert first.id == "a"
    box.finish(first, "done")
    assert not box.accept(job("a")), "replayed after it was done"
    for tries in range(event_queue.MOST_TRIES):
        second = box.next(MODEL, 0)
        assert second is not None
        assert (second.id, second.tries) == ("b", tries)
        assert box.fail(second, "no") == (tries + 1 < event_queue.MOST_TRIES)
    assert box.next(MODEL, 0) is None
    assert [one.said for one in box.dead()] == ["no"]
    assert box.counts() == {"waiting": 0, "done": 1, "dead": 1}
    assert box.revive() == 1
    assert box.next(MODEL, 0) is not None
    box.forget(0, worker.CREATED)
    assert box.counts()["done"] == 0


def test_jobs_of_another_model_are_left_alone(tmp_path: Path) -> None:
    box = Inbox(tmp_path / "inbox.db")
    box.accept(job("a"))
    assert box.next("another", 0) is None
    assert box.next(MODEL, 0) is not None
    box.close()


def test_an_inbox_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Inbox(tmp_path / "file" / "inbox.db")


def test_without_a_secret_nobody_is_listened_to(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv(receiver.VARIABLE, raising=False)
    assert exit_code(receiver.main, "--inbox", str(tmp_path / "inbox.db")) == exit_codes.BAD_INPUT
    assert f"{receiver.VARIABLE} is not set" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gates", "none.toml"], "none.toml cannot be read"),
        (["--tell", "ftp://x"], "--tell takes a URL"),
        (["--port", "1"], "port 1 of"),
    ],
)
def test_what_is_said_to_the_receiver_is_looked_at_before_it_works(
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(receiver.VARIABLE, SECRET)
    if "--port" in flags:
        flags = [*flags, "--host", "203.0.113.1"]  # TEST-NET-3: no address of this machine
    arguments = ("--inbox", str(tmp_path / "inbox.db"), *flags)
    assert exit_code(receiver.main, *arguments) == exit_codes.BAD_INPUT
    assert said in capfd.readouterr().err


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    service = Service(folder, free_port())
    service.start("--promote")
    assert webhooks.main(["install", f"{service.url}/webhook"]) == exit_codes.OK
    yield service
    assert service.stop() == exit_codes.TERMINATED


def champion_is(number: str) -> bool:
    return versions.holds(MODEL, versions.CHAMPION, number)


def settled(service: Service) -> bool:
    return service.counts()["waiting"] == 0


def test_a_life_by_webhooks_alone(folder: Path, service: Service) -> None:
    first = challenge(folder, MODEL, wrong=30)
    until(lambda: champion_is(first), WAIT_S, "the first is champion")
    worse = challenge(folder, MODEL, wrong=60)

    def refused() -> bool:
        return versions.get(MODEL, worse).tags.get("verdict", "").startswith("refused: accuracy")

    until(refused, WAIT_S, "the worse one is refused with its reasons")
    until(lambda: settled(service), WAIT_S, "all is done")
    assert aliases(MODEL) == {"champion": first}, "who is refused challenges nobody"

    service.kill()  # what happens now is told to nobody
    missed = challenge(folder, MODEL, wrong=20)
    service.start("--promote")
    until(lambda: champion_is(missed), WAIT_S, "a lost delivery is only late")
    assert [one.to_version for one in ledger.entries(MODEL)] == [first, missed]
    assert ledger.entries(MODEL)[-1].actor == worker.ACTOR

    point(MODEL, worse)
    until(lambda: ledger.entries(MODEL)[-1].action == ledger.BY_HAND, WAIT_S, "a hand is noticed")
    until(lambda: settled(service), WAIT_S, "all is done")
    assert aliases(MODEL) == {"champion": worse, "previous": missed}
    assert history.verify(MODEL) == []
    assert requests.get(f"{service.url}/dead", timeout=5).json() == []


def test_a_second_receiver_leaves_the_inbox_to_the_first(
    folder: Path, service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--inbox", str(folder / "inbox.db"), "--port", "0")
    assert exit_code(receiver.main, *arguments) == exit_codes.BAD_INPUT
    assert "another receiver works on" in capfd.readouterr().err


def test_forged_replayed_and_oversized_deliveries_change_nothing(service: Service) -> None:
    entered = len(ledger.entries(MODEL))
    taken = service.send(body(version="1"), "replayed")
    assert taken.json() == {"taken": True}
    assert service.send(body(version="1"), "replayed").json() == {"taken": False}
    payload = body()
    forged = requests.post(
        f"{service.url}/webhook", payload, headers=signed(payload, key="guessed"), timeout=10
    )
    assert forged.status_code == 401
    assert service.send(b"x" * 70_000, "large").status_code == 413
    assert service.send(body(version="999"), "deleted").json() == {"taken": True}
    until(lambda: settled(service), WAIT_S, "all is done")
    assert len(ledger.entries(MODEL)) == entered


@pytest.mark.parametrize("burst", [BURST, pytest.param(LONG_BURST, marks=pytest.mark.slow)])
def test_a_burst_is_taken_at_once_and_worked_off_though_the_receiver_is_killed(
    service: Service, burst: int
) -> None:
    before = service.counts()["done"]
    started = time.monotonic()
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(
                lambda n: service.send(body(version="1"), f"burst-{burst}-{n}"), range(burst)
            )
        )
    spent_ms = (time.monotonic() - started) / burst * 1e3
    assert all(answer.json() == {"taken": True} for answer in answers)
    print(f"{burst} deliveries, {spent_ms:.1f} ms each")
    service.kill()
    service.start("--promote")
    until(lambda: service.counts()["done"] >= before + burst, 4 * WAIT_S, "the burst is done")
    assert service.counts()["dead"] == 0
    assert history.verify(MODEL) == []


def test_webhooks_are_installed_once_listed_tried_and_removed(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert webhooks.main(["install", f"{service.url}/webhook"]) == exit_codes.OK
    capsys.readouterr()
    assert webhooks.main(["list"]) == exit_codes.OK
    (hook,) = json.loads(capsys.readouterr().out)
    assert hook["url"] == f"{service.url}/webhook"
    assert webhooks.main(["test"]) == exit_codes.OK
    assert capsys.readouterr().out.count(": taken") == len(worker.EVENTS)
    assert webhooks.main(["remove"]) == exit_codes.OK
    assert MlflowClient().list_webhooks() == []
