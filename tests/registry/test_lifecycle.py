"""Promotions, refusals and rollbacks with a real MLflow server, receiver and serving process."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from eurosat.runtime import exit_codes
from registry import history, ledger, versions, webhooks
from tests.support.images import encoded
from tests.support.mlflow_server import free_port
from tests.support.receiver import MODEL, WAIT_S, ReceiverProcess
from tests.support.registry import (
    MLFLOW_WARNS,
    aliases,
    move_champion_by_hand,
    register_challenger,
    run_promote,
    run_rollback,
)
from tests.support.serving import Server, running, until

pytestmark = MLFLOW_WARNS
TILE = encoded("River", "JPEG")
REQUEST_INTERVAL_S = 0.02
ROLLBACK_S = 5.0
"""How long the serving process may take to answer with the version after a rollback."""


@contextmanager
def constant_requests(server: Server) -> Iterator[list[str]]:
    """Send requests one after another; yield the list of the answering versions."""
    answered: list[str] = []
    stop = threading.Event()

    def send_requests() -> None:
        while not stop.wait(REQUEST_INTERVAL_S):
            response = requests.post(
                f"{server.url}/predict", TILE, headers={"Content-Type": "image/jpeg"}, timeout=10
            )
            answered.append(response.json().get("model_version", f"status {response.status_code}"))

    thread = threading.Thread(target=send_requests)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()


def entered() -> list[str | None]:
    return [entry.to_version for entry in ledger.entries(MODEL)]


def test_every_answer_came_from_the_version_that_the_ledger_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = register_challenger(folder, MODEL, wrong=30)
    assert run_promote(MODEL, "--why", "the first") == 0
    with running(folder, "--poll", "0.3") as server:
        receiver = ReceiverProcess(folder, free_port())
        receiver.start("--promote", "--serving", server.url)
        assert webhooks.main(["install", f"{receiver.url}/webhook"]) == exit_codes.OK
        with constant_requests(server) as answered:

            def answers(number: str) -> bool:
                return bool(answered) and answered[-1] == number

            until(lambda: answers(first), WAIT_S, "the first answers")
            worse = register_challenger(folder, MODEL, wrong=60)

            def refused() -> bool:
                return versions.get(MODEL, worse).tags.get("verdict", "").startswith("refused: ")

            until(refused, WAIT_S, "the worse one is refused")

            third = register_challenger(folder, MODEL, wrong=10)
            until(lambda: answers(third), WAIT_S, "the better one answers, by webhook alone")
            until(lambda: receiver.counts()["waiting"] == 0, WAIT_S, "all is done")

            started = time.monotonic()
            assert run_rollback(MODEL, "--why", "it lost the rivers") == 0
            until(lambda: answers(first), ROLLBACK_S, "the version after the rollback answers")
            print(f"rolled back and answering in {time.monotonic() - started:.1f} s")

            move_champion_by_hand(MODEL, worse)
            until(lambda: answers(worse), WAIT_S, "the version that was set by hand answers")
            until(lambda: entered()[-1] == worse, WAIT_S, "and the ledger records it")

            broken = register_challenger(folder, MODEL, wrong=20, validation="failed")
            network = next((folder / "artifacts").rglob(f"{run_of(broken)}/**/model/**/model.onnx"))
            network.write_bytes(b"no network")
            move_champion_by_hand(MODEL, broken)
            until(
                lambda: len(entered()) == 6,
                WAIT_S,
                "a version that cannot be served is rolled back",
            )
            until(lambda: receiver.counts()["waiting"] == 0, WAIT_S, "all is done")
        receiver.stop()
    assert entered() == [first, third, first, worse, broken, worse]
    last = ledger.entries(MODEL)[-1]
    assert (last.action, last.actor) == (ledger.ROLLBACK, "registry.receiver")
    assert "not served" in last.why
    assert aliases(MODEL)["champion"] == worse
    in_order = [number for number, _ in itertools.groupby(answered)]
    assert in_order == [first, third, first, worse], "and every request was answered"
    assert history.main(["--model", MODEL, "--verify"]) == 0
    assert "6 entries link up" in capsys.readouterr().out


def test_processes_that_set_the_same_tag_at_once_all_succeed(folder: Path) -> None:
    """As a command and the promoter do that complete the same entry."""
    numbers = [register_challenger(folder, "tagged", wrong=wrong) for wrong in (30, 20, 10)]
    at_once = threading.Barrier(8)

    def set_tags(value: int) -> None:
        for number in numbers:
            at_once.wait(30)
            versions.set_tag("tagged", number, "key", str(value))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(set_tags, range(8)))
    assert all("key" in versions.get("tagged", number).tags for number in numbers)


def run_of(number: str) -> str:
    return versions.run_of(versions.get(MODEL, number))
