"""A whole life on a real MLflow server, with a receiver behind its webhooks and a server."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from eurosat.runtime import exit_codes
from registry import history, ledger, versions, webhooks
from tests.support.images import encoded
from tests.support.mlflow_server import free_port
from tests.support.receiver import MODEL, WAIT_S, Service, folder
from tests.support.registry import (
    MLFLOW_WARNS,
    aliases,
    challenge,
    point,
    run_promote,
    run_rollback,
)
from tests.support.serving import Server, running, until

__all__ = ["folder"]  # the fixture
pytestmark = MLFLOW_WARNS
TILE = encoded("River", "JPEG")
EVERY_S = 0.02
SOON_S = 5.0
"""After which a serving process answers with the version that was rolled back to."""


@contextmanager
def asked(server: Server) -> Iterator[list[str]]:
    """The version of each answer, one after another."""
    answered: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(EVERY_S):
            told = requests.post(
                f"{server.url}/predict", TILE, headers={"Content-Type": "image/jpeg"}, timeout=10
            )
            answered.append(told.json().get("model_version", f"status {told.status_code}"))

    thread = threading.Thread(target=ask)
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
    first = challenge(folder, MODEL, wrong=30)
    assert run_promote(MODEL, "--why", "the first") == 0
    with running(folder, "--poll", "0.3") as server:
        receiver = Service(folder, free_port())
        receiver.start("--promote", "--serving", server.url)
        assert webhooks.main(["install", f"{receiver.url}/webhook"]) == exit_codes.OK
        with asked(server) as answered:

            def answers(number: str) -> bool:
                return bool(answered) and answered[-1] == number

            until(lambda: answers(first), WAIT_S, "the first answers")
            worse = challenge(folder, MODEL, wrong=60)

            def refused() -> bool:
                return versions.get(MODEL, worse).tags.get("verdict", "").startswith("refused: ")

            until(refused, WAIT_S, "the worse one is refused")

            third = challenge(folder, MODEL, wrong=10)
            until(lambda: answers(third), WAIT_S, "the better one answers, by webhook alone")
            until(lambda: receiver.counts()["waiting"] == 0, WAIT_S, "all is done")

            started = time.monotonic()
            assert run_rollback(MODEL, "--why", "it lost the rivers") == 0
            until(lambda: answers(first), SOON_S, "who was rolled back to answers")
            print(f"rolled back and answering in {time.monotonic() - started:.1f} s")

            point(MODEL, worse)
            until(lambda: answers(worse), WAIT_S, "who was set by hand answers")
            until(lambda: entered()[-1] == worse, WAIT_S, "and is entered")

            broken = challenge(folder, MODEL, wrong=20, validation="failed")
            network = next((folder / "artifacts").rglob(f"{run_of(broken)}/**/model/**/model.onnx"))
            network.write_bytes(b"no network")
            point(MODEL, broken)
            until(lambda: len(entered()) == 6, WAIT_S, "one that cannot be served is rolled back")
            until(lambda: receiver.counts()["waiting"] == 0, WAIT_S, "all is done")
        receiver.stop()
    assert entered() == [first, third, first, worse, broken, worse]
    last = ledger.entries(MODEL)[-1]
    assert (last.action, last.actor) == (ledger.ROLLBACK, "registry.receiver")
    assert "not served" in last.why
    assert aliases(MODEL)["champion"] == worse
    told = [number for number, _ in itertools.groupby(answered)]
    assert told == [first, third, first, worse], "and every request was answered"
    assert history.main(["--model", MODEL, "--verify"]) == 0
    assert "6 entries link up" in capsys.readouterr().out


def run_of(number: str) -> str:
    return versions.run_of(versions.get(MODEL, number))
