"""Webhooks of a real MLflow server lead to judgements, whatever is lost, forged or killed."""

import json
import sqlite3
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
from registry.event_queue import EventQueue, QueuedEvent
from tests.support.mlflow_server import free_port
from tests.support.receiver import MODEL, SECRET, WAIT_S, ReceiverProcess, signature_headers
from tests.support.registry import (
    MLFLOW_WARNS,
    aliases,
    exit_code,
    move_champion_by_hand,
    register_challenger,
)
from tests.support.serving import until

pytestmark = MLFLOW_WARNS
BURST, LONG_BURST = 100, 500


def body(event: str = worker.CREATED, version: str = "1", **data: str) -> bytes:
    entity, _, action = event.partition(".")
    data = {"name": MODEL, "version": version, **data}
    return json.dumps({"entity": entity, "action": action, "data": data}).encode()


def test_a_delivery_that_mlflow_signed_lately_is_accepted() -> None:
    payload = body()
    assert (
        receiver.verify_signature(SECRET, signature_headers(payload), payload, time.time()) == "d1"
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (lambda: {}, 401),
        (lambda: signature_headers(body(), key="another"), 401),
        (lambda: signature_headers(body(version="2")), 401),
        (lambda: signature_headers(body()) | {"x-mlflow-delivery-id": "d2"}, 401),
        (lambda: signature_headers(body()) | {"x-mlflow-signature": "v1,"}, 401),
        (lambda: signature_headers(body()) | {"x-mlflow-signature": "\u00e4"}, 401),
        (lambda: signature_headers(body(), id_=""), 401),
        (lambda: signature_headers(body(), age_s=400), 400),
        (lambda: signature_headers(body(), age_s=-400), 400),
    ],
)
def test_a_delivery_that_is_forged_or_stale_is_refused(
    headers: Callable[[], dict[str, str]], status: int
) -> None:
    with pytest.raises(receiver.DeliveryRejected) as rejected:
        receiver.verify_signature(SECRET, headers(), body(), time.time())
    assert rejected.value.status == status


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"entity": 1, "action": 2}']
)
def test_a_body_that_is_no_event_is_refused(payload: bytes) -> None:
    with pytest.raises(receiver.DeliveryRejected) as rejected:
        receiver.parse_event("d1", payload)
    assert rejected.value.status == 400


def test_irrelevant_events_are_not_queued() -> None:
    assert receiver.parse_event("d1", body(worker.TAG_SET, key="verdict")) is None
    approved = receiver.parse_event("d1", body(worker.TAG_SET, key="approval", value="{}"))
    assert approved is not None
    assert approved.detail == "approval"
    of_the_ledger = body().replace(MODEL.encode(), b"eurosat.ledger")
    assert receiver.parse_event("d1", of_the_ledger) is None
    moved = receiver.parse_event("d1", body(worker.ALIAS_SET, alias="champion"))
    assert moved is not None
    assert (moved.version, moved.detail) == ("1", "champion")


def make_event(id_: str) -> QueuedEvent:
    return QueuedEvent(id=id_, event=worker.CREATED, model=MODEL, version="1", detail="")


def test_the_queue_survives_a_restart_and_accepts_a_delivery_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_queue, "FIRST_BACKOFF_S", 0.0)
    queue = EventQueue(tmp_path / "queue.db")
    assert queue.accept(make_event("a"))
    assert queue.accept(make_event("b"))
    assert not queue.accept(make_event("a")), "replayed"
    queue.close()
    queue = EventQueue(tmp_path / "queue.db")
    first = queue.next(MODEL, 0)
    assert first is not None
    assert first.id == "a"
    queue.finish(first, "done")
    assert not queue.accept(make_event("a")), "replayed after it was done"
    for tries in range(event_queue.MAX_TRIES):
        second = queue.next(MODEL, 0)
        assert second is not None
        assert (second.id, second.tries) == ("b", tries)
        assert queue.fail(second, "no") == (tries + 1 < event_queue.MAX_TRIES)
    assert queue.next(MODEL, 0) is None
    assert [event.message for event in queue.dead()] == ["no"]
    assert queue.counts() == {"waiting": 0, "done": 1, "dead": 1}
    assert queue.retry_dead() == 1
    assert queue.next(MODEL, 0) is not None
    queue.prune(0, worker.CREATED)
    assert queue.counts()["done"] == 0


def test_a_queue_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "inbox.db"
    with sqlite3.connect(file) as database:
        database.execute(
            "CREATE TABLE deliveries (id TEXT PRIMARY KEY, received REAL NOT NULL, "
            "event TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL, told TEXT NOT NULL, "
            "state TEXT NOT NULL, tries INTEGER NOT NULL, due REAL NOT NULL, said TEXT NOT NULL)"
        )
        database.execute(
            "INSERT INTO deliveries VALUES "
            "('a', 1.0, 'tell', 'eurosat', '1', 'https://x', 'waiting', 2, 1.0, 'status 500')"
        )
    database.close()
    queue = EventQueue(file)
    event = queue.next(MODEL, 0)
    queue.close()
    assert event is not None
    assert (event.event, event.detail) == (worker.NOTIFY, "https://x")
    assert (event.tries, event.message) == (2, "status 500")


def test_events_of_another_model_are_left_alone(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path / "queue.db")
    queue.accept(make_event("a"))
    assert queue.next("another", 0) is None
    assert queue.next(MODEL, 0) is not None
    queue.close()


def test_a_queue_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        EventQueue(tmp_path / "file" / "queue.db")


def test_without_a_secret_the_receiver_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv(receiver.SECRET_VARIABLE, raising=False)
    assert exit_code(receiver.main, "--queue", str(tmp_path / "queue.db")) == exit_codes.BAD_INPUT
    assert f"{receiver.SECRET_VARIABLE} is not set" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--gates", "none.toml"], "none.toml cannot be read"),
        (["--notify", "ftp://x"], "--notify takes a URL"),
        (["--port", "1"], "port 1 of"),
    ],
)
def test_the_receivers_arguments_are_checked_at_its_start(
    flags: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(receiver.SECRET_VARIABLE, SECRET)
    if "--port" in flags:
        flags = [*flags, "--host", "203.0.113.1"]  # TEST-NET-3: no address of this machine
    arguments = ("--queue", str(tmp_path / "queue.db"), *flags)
    assert exit_code(receiver.main, *arguments) == exit_codes.BAD_INPUT
    assert reason in capfd.readouterr().err


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[ReceiverProcess]:
    service = ReceiverProcess(folder, free_port())
    service.start("--promote")
    assert webhooks.main(["install", f"{service.url}/webhook"]) == exit_codes.OK
    yield service
    assert service.stop() == exit_codes.TERMINATED


def champion_is(number: str) -> bool:
    return versions.has_alias(MODEL, versions.CHAMPION, number)


def is_idle(service: ReceiverProcess) -> bool:
    return service.counts()["waiting"] == 0


def test_webhooks_alone_promote_refuse_and_reconcile(
    folder: Path, service: ReceiverProcess
) -> None:
    first = register_challenger(folder, MODEL, wrong=30)
    until(lambda: champion_is(first), WAIT_S, "the first is champion")
    worse = register_challenger(folder, MODEL, wrong=60)

    def refused() -> bool:
        return versions.get(MODEL, worse).tags.get("verdict", "").startswith("refused: accuracy")

    until(refused, WAIT_S, "the worse one is refused with its reasons")
    until(lambda: is_idle(service), WAIT_S, "all is done")
    assert aliases(MODEL) == {"champion": first}, "a refused version is no challenger"
    counted = requests.get(f"{service.url}/metrics", timeout=10).text
    assert 'eurosat_registry_events{state="dead"} 0.0' in counted

    service.kill()  # events are lost from here on
    missed = register_challenger(folder, MODEL, wrong=20)
    service.start("--promote")
    until(lambda: champion_is(missed), WAIT_S, "a lost delivery is only late")
    assert [entry.to_version for entry in ledger.entries(MODEL)] == [first, missed]
    assert ledger.entries(MODEL)[-1].actor == worker.ACTOR

    move_champion_by_hand(MODEL, worse)
    until(
        lambda: ledger.entries(MODEL)[-1].action == ledger.BY_HAND,
        WAIT_S,
        "a move by hand is recorded",
    )
    until(lambda: is_idle(service), WAIT_S, "all is done")
    assert aliases(MODEL) == {"champion": worse, "previous": missed}
    assert history.verify(MODEL) == []
    assert requests.get(f"{service.url}/dead", timeout=5).json() == []


def test_a_second_receiver_leaves_the_queue_to_the_first(
    folder: Path, service: ReceiverProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--queue", str(folder / "queue.db"), "--port", "0")
    assert exit_code(receiver.main, *arguments) == exit_codes.BAD_INPUT
    assert "another receiver works on" in capfd.readouterr().err


def test_forged_replayed_and_oversized_deliveries_change_nothing(service: ReceiverProcess) -> None:
    entered = len(ledger.entries(MODEL))
    accepted = service.send(body(version="1"), "replayed")
    assert accepted.json() == {"accepted": True}
    assert service.send(body(version="1"), "replayed").json() == {"accepted": False}
    payload = body()
    forged = requests.post(
        f"{service.url}/webhook",
        payload,
        headers=signature_headers(payload, key="guessed"),
        timeout=10,
    )
    assert forged.status_code == 401
    assert service.send(b"x" * 70_000, "large").status_code == 413
    assert service.send(body(version="999"), "deleted").json() == {"accepted": True}
    until(lambda: is_idle(service), WAIT_S, "all is done")
    assert len(ledger.entries(MODEL)) == entered


@pytest.mark.parametrize("burst", [BURST, pytest.param(LONG_BURST, marks=pytest.mark.slow)])
def test_a_burst_is_accepted_at_once_and_processed_although_the_receiver_is_killed(
    service: ReceiverProcess, burst: int
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
    assert all(answer.json() == {"accepted": True} for answer in answers)
    print(f"{burst} deliveries, {spent_ms:.1f} ms each")
    service.kill()
    service.start("--promote")
    until(lambda: service.counts()["done"] >= before + burst, 4 * WAIT_S, "the burst is done")
    assert service.counts()["dead"] == 0
    assert history.verify(MODEL) == []


def test_webhooks_are_installed_once_listed_tested_and_removed(
    service: ReceiverProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert webhooks.main(["install", f"{service.url}/webhook"]) == exit_codes.OK
    capsys.readouterr()
    assert webhooks.main(["list"]) == exit_codes.OK
    (hook,) = json.loads(capsys.readouterr().out)
    assert hook["url"] == f"{service.url}/webhook"
    assert webhooks.main(["test"]) == exit_codes.OK
    assert capsys.readouterr().out.count(": accepted") == len(worker.EVENTS)
    assert webhooks.main(["remove"]) == exit_codes.OK
    assert MlflowClient().list_webhooks() == []
