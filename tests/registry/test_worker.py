"""No version stops the promoter: tries are counted, judging has limits, and others go on."""

import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eurosat.errors import TrackingError
from registry import event_queue, gates, judge_process, versions, worker
from registry.event_queue import EventQueue, QueuedEvent
from registry.worker import Worker
from tests.support.processes import start_function
from tests.support.registry import REGISTRY, register_challenger

pytestmark = REGISTRY
MODEL = "poisoned"
KILL_TIMEOUT_S = 60.0


def created(number: str) -> QueuedEvent:
    return QueuedEvent(
        id=f"created-{number}", event=worker.CREATED, model=MODEL, version=number, detail=""
    )


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[EventQueue]:
    queue = EventQueue(tmp_path / "queue.db")
    yield queue
    queue.close()


def work_on_next(file: str) -> None:
    """Process the event that is due, as the receiver's thread does."""
    queue = EventQueue(Path(file))
    event = queue.next(MODEL, 0)
    assert event is not None
    Worker(MODEL, queue).process(event)


def kill_while_working(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a process by SIGKILL while it waits for a registry that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as registry:
        registry.settimeout(KILL_TIMEOUT_S)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{registry.getsockname()[1]}")
        process = start_function(work_on_next, (str(file),))
        connection, _ = registry.accept()
        with connection:
            process.kill()
            process.wait(KILL_TIMEOUT_S)


def edit(file: Path, assignment: str) -> None:
    with sqlite3.connect(file) as database:
        database.execute(f"UPDATE deliveries SET {assignment} WHERE id = 'created-1'")
    database.close()


def test_a_try_counts_although_its_process_is_killed(
    queue: EventQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "queue.db"
    queue.accept(created("1"))
    queue.accept(created("2"))
    kill_while_working(file, monkeypatch)
    other = queue.next(MODEL, 0)
    assert other is not None
    assert other.version == "2", "the one that kills its process must wait"
    queue.finish(other, "judged")
    edit(file, f"due = 0, tries = {event_queue.MAX_TRIES - 1}")
    kill_while_working(file, monkeypatch)
    assert queue.next(MODEL, 0) is None
    (dead,) = queue.dead()
    assert dead.tries == event_queue.MAX_TRIES
    assert dead.message == event_queue.NOT_ENDED


def test_an_event_is_tried_for_hours_with_growing_pauses(queue: EventQueue, tmp_path: Path) -> None:
    queue.accept(created("1"))
    pauses_s = []
    for tries in range(event_queue.MAX_TRIES):
        event = queue.next(MODEL, 0)
        assert event is not None
        assert event.tries == tries
        queue.begin(event)
        started = time.time()
        if not queue.fail(event, "no"):
            break
        with sqlite3.connect(tmp_path / "queue.db") as database:
            ((due,),) = database.execute("SELECT due FROM deliveries")
        database.close()
        pauses_s.append(round(due - started))
        edit(tmp_path / "queue.db", "due = 0")
    assert pauses_s[0] < 5
    assert pauses_s == sorted(pauses_s)
    assert max(pauses_s) == pytest.approx(event_queue.MAX_BACKOFF_S, abs=5)
    assert 6 * 3600 < sum(pauses_s) < 24 * 3600
    assert queue.counts()["dead"] == 1


def test_a_version_is_judged_in_a_process_of_its_own(store: Path, model: str) -> None:
    number = register_challenger(store, model, wrong=30)
    assert judge_process.judge_apart(model, number, None, gates.FILE).passed
    with pytest.raises(TrackingError, match="version=9"):
        judge_process.judge_apart(model, "9", None, gates.FILE)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("MAX_MEMORY_MB", 1, "takes over 1 MB of memory|ended with exit code"),
        ("MAX_SECONDS", 0.0, "took over 0 s"),
    ],
)
def test_a_version_that_takes_too_much_ends_its_own_process_and_others_are_judged(
    store: Path,
    model: str,
    queue: EventQueue,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: float,
    reason: str,
) -> None:
    poisonous = register_challenger(store, model, wrong=30)
    promoter = Worker(model, queue)
    promoter.poll_registry()
    event = queue.next(model, 0)
    assert event is not None
    with monkeypatch.context() as patch:
        patch.setattr(event_queue, "FIRST_BACKOFF_S", 3600.0)
        patch.setattr(judge_process, limit, value)
        promoter.process(event)
    (waiting,) = queue._select("id = ?", event.id)
    assert waiting.tries == 1
    assert re.search(reason, waiting.message), waiting.message
    assert versions.VERDICT_TAG not in versions.get(model, poisonous).tags
    other = register_challenger(store, model, wrong=20)
    promoter.poll_registry()
    event = queue.next(model, 0)
    assert event is not None
    assert event.version == other
    promoter.process(event)
    assert versions.get(model, other).tags[versions.VERDICT_TAG].startswith("passed")
