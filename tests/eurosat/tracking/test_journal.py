"""Runs survive every fault of a real tracking server: nothing is lost or sent twice."""

import contextlib
import hashlib
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from eurosat import tracking
from eurosat.errors import TrackingError
from eurosat.runtime import cli, exit_codes
from eurosat.tracking import __main__ as commands
from eurosat.tracking import journal_index, mlflow_client, uploader
from eurosat.tracking.journal import Journal, now_ms, root
from eurosat.tracking.journal_database import JournalDatabase
from eurosat.tracking.journal_runs import JOURNAL_TAG
from eurosat.tracking.outbox import Outbox
from tests.support.mlflow_server import Proxy, free_port, mlflow_server, proxy
from tests.support.paths import ROOT
from tests.support.postgres import create_database
from tests.support.recipes import TINY

STEPS = 400


SHORT_ON_POSTGRES = (
    "test_a_server_that_answers_500_to_every_third_call_gets_everything_once",
    "test_a_journal_whose_sync_is_killed_gives_one_run",
    "test_an_upload_that_dies_before_the_journal_records_it_sends_nothing_twice",
    "test_the_server_gets_the_true_status_of_a_run",
)
"""What depends on the database behind the server; on PostgreSQL the other tests are slow ones."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ports" in metafunc.fixturenames:
        is_short = metafunc.function.__name__ in SHORT_ON_POSTGRES
        marks = [pytest.mark.postgres, *([] if is_short else [pytest.mark.slow])]
        databases = ["sqlite", pytest.param("postgres", marks=marks)]
        metafunc.parametrize("ports", databases, indirect=True, scope="module")


@pytest.fixture(scope="module")
def ports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[int]]:
    """Start two servers; the second has an empty disk."""
    backends: list[str | None] = [None, None]
    if request.param == "postgres":
        url = request.getfixturevalue("postgres")
        backends = [create_database(url, f"journal_{name}") for name in ("first", "second")]
    with ExitStack() as stack:
        yield [
            stack.enter_context(mlflow_server(tmp_path_factory.mktemp("server"), backend))
            for backend in backends
        ]


@pytest.fixture
def server(ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Use a proxy before the first server, with journals of the test's own and quick retries."""
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(uploader, "UPLOAD_INTERVAL_S", 0.1)
    monkeypatch.setattr(uploader, "MIN_BACKOFF_S", 0.05)
    monkeypatch.setattr(uploader, "MAX_BACKOFF_S", 0.2)
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 60.0)
    with proxy(ports[0]) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server


@pytest.fixture
def gives_up_soon(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end a second after the server's last answer."""
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 1.0)


@pytest.fixture
def repeated_requests(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow repeat a request twice before it counts as failed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(mlflow_client.MAX_RETRIES))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0.1")


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def direct_client(server: Proxy) -> MlflowClient:
    """Return a client of the server itself, past the proxy."""
    return MlflowClient(f"http://127.0.0.1:{server.upstream}")


def runs_of(server: Proxy, experiment_name: str) -> list[Run]:
    client = direct_client(server)
    experiment = client.get_experiment_by_name(experiment_name)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def only_run(server: Proxy, experiment_name: str) -> Run:
    [run] = runs_of(server, experiment_name)
    return run


def points(server: Proxy, run: Run, key: str) -> list[tuple[int, float, int]]:
    """Return step, value and time of all points on the server, sorted."""
    history = direct_client(server).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in history)


def log_all(run: tracking.Run, folder: Path, steps: range = range(STEPS)) -> None:
    """Log metrics, params, tags and files, which `check_all` expects."""
    run.log_params({"optim": {"lr": 0.1}})
    run.set_tags({"kind": "first"})
    run.log_text("hello", "notes/hello.txt")
    for step in steps:
        run.log_metrics({"loss": 1 / (step + 1)}, step)
    run.log_metrics({"nan": math.nan, "infinity": math.inf})
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 4000)
    run.log_file(folder / "weights.bin", "model")
    run.set_tags({"kind": "last"})


def check_all(server: Proxy, run: Run, folder: Path, status: str = "FINISHED") -> None:
    """Assert that the server has everything that `log_all` logged, once."""
    assert run.info.status == status
    assert run.data.params == {"optim.lr": "0.1"}
    assert run.data.tags["kind"] == "last"
    losses = points(server, run, "loss")
    assert [step for step, *_ in losses] == list(range(STEPS))
    assert [value for _, value, _ in losses] == [1 / (step + 1) for step in range(STEPS)]
    times = [time_ms for *_, time_ms in losses]
    assert times == sorted(times)
    assert times[-1] <= (run.info.end_time or 0)
    assert math.isnan(run.data.metrics["nan"])
    assert run.data.metrics["infinity"] > 1e308, "how MLflow stores infinity"
    client = direct_client(server)
    for path, content in (
        ("notes/hello.txt", b"hello"),
        ("model/weights.bin", (folder / "weights.bin").read_bytes()),
    ):
        copy = client.download_artifacts(run.info.run_id, path, str(folder))
        assert Path(copy).read_bytes() == content


def points_in_journal(directory: Path, key: str) -> list[tuple[int, float, int]]:
    """Return step, value and time, as `points` does."""
    query = "SELECT step, value, time FROM entries WHERE kind = 'metric' AND name = ?"
    with contextlib.closing(sqlite3.connect(directory / "journal.db")) as connection:
        return sorted(connection.execute(query, (key,)).fetchall())


def status_for_every_third(number: int, *_: str) -> int | None:
    return 500 if number % 3 == 0 else None


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.usefixtures("repeated_requests")
def test_a_server_that_answers_500_to_every_third_call_gets_everything_once(
    server: Proxy, experiment: str, tmp_path: Path, forward_first: bool
) -> None:
    server.status_for, server.forward_before_status = status_for_every_third, forward_first
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
    stored = only_run(server, experiment)
    assert stored.info.run_id == run.run_id
    check_all(server, stored, tmp_path)
    assert not list(journal_index.all_journals()), "a journal that was sent in full is removed"


@pytest.mark.usefixtures("repeated_requests")
def test_a_server_that_is_down_for_a_while_gets_everything(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"before": 1})
        until(lambda: "before" in only_run(server, experiment).data.metrics)
        server.is_down = True
        log_all(run, tmp_path)
        until(lambda: run._uploader.last_error)
        assert "loss" not in only_run(server, experiment).data.metrics
        server.is_down = False
    check_all(server, only_run(server, experiment), tmp_path)


@pytest.mark.usefixtures("gives_up_soon")
def test_a_run_whose_server_was_never_up_is_sent_later_once(
    server: Proxy,
    experiment: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        assert run.run_id.startswith("journal:")
        log_all(run, tmp_path)
        started = now_ms()
    messages = [record.message for record in caplog.records]
    assert sum("is kept in" in message for message in messages) == 2, "at the start and at the end"
    assert not runs_of(server, experiment)
    with pytest.raises(TrackingError, match=r"journal:\w+"):
        tracking.get(run.run_id)

    assert commands.main(["status"]) == exit_codes.NEGATIVE
    listing = capsys.readouterr().out
    assert run.run_id in listing
    assert "entries, 2 files (1.0 MB), its status" in listing
    assert commands.main(["sync"]) == exit_codes.NEGATIVE
    assert f"{run.run_id}: not sent:" in capsys.readouterr().out

    server.is_down = False
    with pytest.raises(TrackingError, match="eurosat.tracking sync"):
        tracking.get(run.run_id)
    assert commands.main(["sync"]) == exit_codes.OK
    stored = only_run(server, experiment)
    check_all(server, stored, tmp_path)
    assert stored.info.start_time <= started, "it carries its own times"
    assert tracking.get(run.run_id).run_id == stored.info.run_id
    capsys.readouterr()
    assert commands.main(["status"]) == exit_codes.OK
    assert capsys.readouterr().out == "the tracking server has everything\n"


@pytest.mark.usefixtures("repeated_requests")
def test_a_server_restarted_with_an_empty_disk_gets_the_whole_run_again(
    server: Proxy, ports: list[int], experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path, range(STEPS // 2))
        until(lambda: not run._journal.outbox.backlog())
        first_id = run.run_id
        server.upstream = ports[1]
        for step in range(STEPS // 2, STEPS):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
    stored = only_run(server, experiment)
    assert stored.info.run_id == run.run_id != first_id
    check_all(server, stored, tmp_path)


def test_a_run_that_somebody_deletes_meanwhile_is_created_again(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"before": 1})
        until(lambda: "before" in only_run(server, experiment).data.metrics)
        MlflowClient().delete_run(run.run_id)
        log_all(run, tmp_path)
    stored = only_run(server, experiment)
    assert stored.data.metrics["before"] == 1
    check_all(server, stored, tmp_path)


@pytest.mark.usefixtures("gives_up_soon")
def test_refused_credentials_are_reported_at_the_start_and_training_goes_on(
    server: Proxy, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.status_for = lambda *_: 401
    with tracking.run(experiment, "r", system_metrics=False) as run:
        assert "MLFLOW_TRACKING_USERNAME" in caplog.text, "not after an hour"
        log_all(run, tmp_path)
    server.status_for = lambda *_: None
    assert commands.main(["sync"]) == exit_codes.OK
    check_all(server, only_run(server, experiment), tmp_path)


@pytest.mark.usefixtures("gives_up_soon")
def test_a_slow_server_does_not_delay_the_start(
    server: Proxy, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "START_TIMEOUT_S", 0.1)
    server.delay_s = 2.0
    with tracking.run(experiment, "r", system_metrics=False) as run:
        assert run.run_id.startswith("journal:"), "it has begun before the server answered"
        log_all(run, tmp_path)
    assert commands.main(["status"]) == exit_codes.NEGATIVE
    server.delay_s = 0
    until(all_is_sent)
    check_all(server, only_run(server, experiment), tmp_path)


def all_is_sent() -> bool:
    """Send what is left; return whether the server has everything."""
    return (commands.main(["sync"]), commands.main(["status"])) == (exit_codes.OK, exit_codes.OK)


@pytest.mark.usefixtures("gives_up_soon")
def test_a_request_that_hangs_at_the_end_of_a_run_cannot_split_the_run(
    server: Proxy, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It creates the run at last: until then, nobody else may send the journal."""
    is_reached, may_go_on = threading.Event(), threading.Event()

    def hold_the_first(_: int, __: str, path: str) -> None:
        if path.endswith("runs/create") and not is_reached.is_set():
            is_reached.set()
            may_go_on.wait(60)

    server.status_for = hold_the_first
    monkeypatch.setattr(uploader, "START_TIMEOUT_S", 0.1)
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
        assert is_reached.wait(60)
    for _ in range(2):
        commands.main(["sync"])
        assert not runs_of(server, experiment)
    may_go_on.set()
    until(all_is_sent)
    check_all(server, only_run(server, experiment), tmp_path)


def unsent_run(server: Proxy, experiment: str, folder: Path) -> tuple[tracking.Run, Path]:
    """Return a run that ended while the server was down, and its journal."""
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, folder)
    server.is_down = False
    [directory] = journal_index.all_journals()
    return run, directory


@pytest.mark.usefixtures("gives_up_soon")
def test_a_journal_that_is_sent_twice_gives_one_run(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    run, directory = unsent_run(server, experiment, tmp_path)
    shutil.copytree(directory, tmp_path / "copy")
    assert commands.main(["sync"]) == exit_codes.OK
    first = points(server, only_run(server, experiment), "loss")
    shutil.copytree(tmp_path / "copy", directory)
    assert commands.main(["sync", run.run_id]) == exit_codes.OK
    stored = only_run(server, experiment)
    check_all(server, stored, tmp_path)
    assert points(server, stored, "loss") == first


def sync_slowly(batch: int) -> None:
    uploader.MAX_ENTRIES = batch
    cli.run_command(commands.main, ["sync"])


@pytest.mark.usefixtures("gives_up_soon")
def test_a_journal_whose_sync_is_killed_gives_one_run(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
    server.is_down = False
    server.delay_s = 0.02
    [directory] = journal_index.all_journals()
    logged = points_in_journal(directory, "loss")
    for batches in (1, 3, 5):
        sending = multiprocessing.get_context("spawn").Process(target=sync_slowly, args=(30,))
        target = batches_sent(server) + batches
        sending.start()
        until(partial(has_sent, server, target))
        os.kill(sending.pid or 0, signal.SIGKILL)
        sending.join()
    assert run._journal.directory.exists()
    assert commands.main(["sync"]) == exit_codes.OK
    stored = only_run(server, experiment)
    check_all(server, stored, tmp_path)
    assert points(server, stored, "loss") == logged, "every point, with its own time"


def has_sent(server: Proxy, batches: int) -> bool:
    return batches_sent(server) >= batches


def batches_sent(server: Proxy) -> int:
    return sum(path.endswith("runs/log-batch") for _, path in server.requests)


@pytest.mark.parametrize("fault", ["cut", "garbled"])
@pytest.mark.usefixtures("repeated_requests")
def test_a_damaged_upload_is_repeated_until_its_checksum_is_right(
    server: Proxy, experiment: str, tmp_path: Path, fault: str
) -> None:
    damaged: list[str] = []

    def damage(path: str, body: bytes) -> bytes | None:
        if "weights.bin" not in path or len(damaged) == 2:
            return body
        damaged.append(path)
        return None if fault == "cut" else body[:-1] + b"?"

    server.alter_body = damage
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
    assert len(damaged) == 2
    uploads = [path for method, path in server.requests if method == "PUT"]
    assert sum("hello.txt" in path for path in uploads) == 1, "what arrived is not sent again"
    check_all(server, only_run(server, experiment), tmp_path)
    assert run.run_id == only_run(server, experiment).info.run_id


@pytest.mark.usefixtures("repeated_requests")
def test_an_entry_that_the_server_refuses_does_not_block_the_others(
    server: Proxy,
    experiment: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.set_tags({"x" * 300: "a name too long for MLflow"})
        log_all(run, tmp_path)
    check_all(server, only_run(server, experiment), tmp_path)
    assert "the tracking server refused 1 entries" in caplog.text
    for _ in range(2):
        assert commands.main(["sync"]) == exit_codes.NEGATIVE
        output = capsys.readouterr().out
        assert "the server refused 1, the first: tag xxx" in output
        assert f"to give that up, delete {run._journal.directory}" in output
        assert "everything" not in output
    check_all(server, only_run(server, experiment), tmp_path)


@pytest.mark.parametrize("when", ["while it ran", "when it was sent later"])
@pytest.mark.usefixtures("gives_up_soon")
def test_a_file_that_the_server_refuses_is_kept_until_it_accepts_it(
    server: Proxy,
    experiment: str,
    tmp_path: Path,
    when: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.status_for = lambda _, method, path: (
        413 if (method, "huge" in path) == ("PUT", True) else None
    )
    server.is_down = when == "when it was sent later"
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_text("x", "huge.bin")
        log_all(run, tmp_path)
    server.is_down = False
    assert commands.main(["sync"]) == exit_codes.NEGATIVE
    assert "the server refused 1, the first: artifact huge.bin" in capsys.readouterr().out
    check_all(server, only_run(server, experiment), tmp_path)
    assert commands.main(["status"]) == exit_codes.NEGATIVE
    assert "the server refused 1, the first: artifact huge.bin" in capsys.readouterr().out
    server.status_for = lambda *_: None
    assert commands.main(["sync"]) == exit_codes.OK
    with tracking.artifact(run.run_id, "huge.bin") as file:
        assert file.read_text() == "x"
    assert not list(journal_index.all_journals())


def test_a_refused_tag_is_not_sent_again_after_a_later_value(
    server: Proxy, experiment: str
) -> None:
    journal = Journal.create(
        server=mlflow_client.tracking_uri(), experiment=experiment, run_name="r"
    )
    journal.set_tags({"kind": "refused", "other": "refused"})
    for entry in journal.outbox.entries(2):
        journal.outbox.mark_entry_refused(entry.seq, "too long")
    journal.set_tags({"kind": "taken"})
    journal.outbox.requeue_refused()
    assert [(entry.name, entry.value) for entry in journal.outbox.entries(9)] == [
        ("kind", "taken"),
        ("other", "refused"),
    ]
    assert journal.tag("kind") == "taken"
    journal.close()


class PrunedError(Exception):
    """A trial is stopped."""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (ValueError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
        (PrunedError, "KILLED"),
    ],
)
def test_the_server_gets_the_true_status_of_a_run(
    server: Proxy, experiment: str, tmp_path: Path, ending: type[BaseException], status: str
) -> None:
    with (
        pytest.raises(ending),
        tracking.run(experiment, "r", system_metrics=False, killed_by=(PrunedError,)) as run,
    ):
        log_all(run, tmp_path)
        raise ending
    check_all(server, only_run(server, experiment), tmp_path, status)


def test_a_run_continued_on_another_machine_has_all_that_was_logged_before(
    server: Proxy, ports: list[int], experiment: str
) -> None:
    with tracking.run(experiment, "parent", system_metrics=False) as parent:
        with (
            pytest.raises(SystemExit),
            tracking.run(experiment, "r", parent=parent.journal, system_metrics=False) as run,
        ):
            run.log_params({"lr": 0.1})
            run.set_tags({"kind": "trial", "killed.why": "its node was lost"})
            run.log_metrics({"loss": 0.5})
            raise SystemExit
        [before] = [r for r in runs_of(server, experiment) if r.info.run_id == run.run_id]
        shutil.rmtree(root() / run.journal.removeprefix("journal:"))
        with tracking.run(experiment, "r", resume=run.journal, system_metrics=False) as again:
            assert again.tag("kind") == "trial"
            assert again._journal.get_meta("start_ms") == str(before.info.start_time)
            again.log_params({"lr": 0.1})
            again.log_metrics({"loss": 0.25}, 1)
            until(lambda: not again._journal.outbox.backlog())
            server.upstream = ports[1]  # and now the server loses its disk
            again.log_metrics({"loss": 0.125}, 2)
            parent.log_metrics({"a": 1})
            until(lambda: not (parent._journal.outbox.backlog() or again._journal.outbox.backlog()))
    by_name = {run.info.run_name: run for run in runs_of(server, experiment)}
    stored = by_name["r"]
    assert stored.data.tags[tracking.PARENT] == by_name["parent"].info.run_id
    assert (stored.info.status, stored.info.start_time) == ("FINISHED", before.info.start_time)
    assert (stored.data.params, stored.data.tags["kind"]) == ({"lr": "0.1"}, "trial")
    assert stored.data.tags["killed.why"] == "its node was lost; then continued"
    losses = [(step, value) for step, value, _ in points(server, stored, "loss")]
    assert losses == [(0, 0.5), (1, 0.25), (2, 0.125)]


def test_of_runs_created_twice_the_one_that_was_written_to_is_kept(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
        until(lambda: not run._journal.outbox.backlog())
        first = only_run(server, experiment)
        second_id = create_tagged_run(run, experiment, start_ms=first.info.start_time)
        assert second_id != first.info.run_id == run.run_id
    stored = only_run(server, experiment)
    assert stored.info.run_id == first.info.run_id
    check_all(server, stored, tmp_path)


def create_tagged_run(
    run: tracking.Run, experiment: str, *, user: str = "", start_ms: int = 1
) -> str:
    """Create a run with the journal's tag, as every writer can; return its id."""
    journal_id = run.journal.removeprefix("journal:")
    tags = {JOURNAL_TAG: journal_id, "mlflow.user": user or tracking.user()}
    client = MlflowClient()
    experiment_id = mlflow_client.get_or_create_experiment(client, experiment)
    return str(client.create_run(experiment_id, start_ms, tags).info.run_id)


def write_metric(run_id: str) -> None:
    MlflowClient().log_metric(run_id, "accuracy", 0.9)


def write_param(run_id: str) -> None:
    MlflowClient().log_param(run_id, "lr", 0.1)


def write_tag(run_id: str) -> None:
    MlflowClient().set_tag(run_id, "reviewed.by", "ann")


def write_artifact(run_id: str) -> None:
    MlflowClient().log_text(run_id, "weeks of work", "notes.txt")


def end_run(run_id: str) -> None:
    MlflowClient().set_terminated(run_id)


def write_nothing(run_id: str) -> None: ...


@pytest.mark.parametrize(
    ("write", "differs"),
    [
        (write_metric, ""),
        (write_param, ""),
        (write_tag, ""),
        (write_artifact, ""),
        (end_run, ""),
        (write_nothing, "user"),
        (write_nothing, "start"),
        (write_nothing, "experiment"),
        (write_metric, "user"),
    ],
)
def test_a_run_of_others_with_the_journals_tag_is_not_deleted(
    server: Proxy,
    experiment: str,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[str], None],
    differs: str,
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"loss": 1})
        until(lambda: not run._journal.outbox.backlog())
        own = only_run(server, experiment)
        other_id = create_tagged_run(
            run,
            f"{experiment} of others" if differs == "experiment" else experiment,
            user="mallory" if differs == "user" else "",
            start_ms=own.info.start_time + (differs == "start"),
        )
        write(other_id)
    client = direct_client(server)
    assert client.get_run(other_id).info.lifecycle_stage == "active"
    assert client.get_run(own.info.run_id).info.status == "FINISHED"
    [warning] = [record.message for record in caplog.records if other_id in record.message]
    assert "left as they are" in warning
    assert run.run_id == own.info.run_id


@pytest.mark.parametrize("differs", ["user", "start", "experiment"])
@pytest.mark.usefixtures("gives_up_soon")
def test_a_run_of_others_with_the_journals_tag_is_not_written_to(
    server: Proxy, experiment: str, tmp_path: Path, differs: str
) -> None:
    """The journal has no run yet when it finds theirs."""
    run, directory = unsent_run(server, experiment, tmp_path)
    journal = Journal(directory)
    start_ms = int(journal.get_meta("start_ms") or 0)
    journal.close()
    other_id = create_tagged_run(
        run,
        f"{experiment} of others" if differs == "experiment" else experiment,
        user="mallory" if differs == "user" else "",
        start_ms=start_ms - (differs == "start"),
    )
    assert commands.main(["sync"]) == exit_codes.OK
    client = direct_client(server)
    other = client.get_run(other_id)
    assert (other.data.params, other.data.metrics) == ({}, {})
    assert (other.info.status, other.info.lifecycle_stage) == ("RUNNING", "active")
    [stored] = [r for r in runs_of(server, experiment) if r.info.run_id != other_id]
    check_all(server, stored, tmp_path)


def test_of_several_runs_with_the_journals_tag_none_is_guessed(
    server: Proxy, experiment: str
) -> None:
    """The earliest start says nothing: whoever creates a run chooses it."""
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"loss": 1})
        until(lambda: not run._journal.outbox.backlog())
        other_id = create_tagged_run(run, experiment, user="mallory")
        write_metric(other_id)
        assert tracking.get(run.journal).run_id == run.run_id, "its journal here knows its run"
    with pytest.raises(TrackingError, match=rf"2 runs.*{other_id}.*give the id") as caught:
        tracking.get(run.journal)
    assert run.run_id in str(caught.value)
    with (
        pytest.raises(TrackingError, match="2 runs"),
        tracking.run(experiment, "r", resume=run.journal, system_metrics=False),
    ):
        pass
    assert direct_client(server).get_run(other_id).data.metrics == {"accuracy": 0.9}


@pytest.mark.parametrize("differs", ["user", "experiment"])
def test_a_run_of_others_is_not_continued_on_another_machine(
    server: Proxy, experiment: str, differs: str
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        until(lambda: not run._journal.outbox.backlog())
    direct_client(server).delete_run(run.run_id)
    assert not list(journal_index.all_journals())
    other_id = create_tagged_run(
        run,
        f"{experiment} of others" if differs == "experiment" else experiment,
        user="mallory" if differs == "user" else "",
    )
    with (
        pytest.raises(TrackingError, match=rf"{other_id}.*is of {differs}"),
        tracking.run(experiment, "r", resume=run.journal, system_metrics=False),
    ):
        pass
    assert set(direct_client(server).get_run(other_id).data.tags) == {
        JOURNAL_TAG,
        "mlflow.user",
        "mlflow.runName",
    }


@pytest.mark.usefixtures("gives_up_soon")
def test_later_runs_wait_only_briefly_for_an_unreachable_server(
    server: Proxy, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "UNREACHABLE_TIMEOUT_S", 0.1)
    server.is_down = True
    with tracking.run(experiment, "first", system_metrics=False):
        pass
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 3600.0)
    with tracking.run(experiment, "second", system_metrics=False):
        pass
    server.is_down = False
    monkeypatch.setattr(
        uploader, "UNREACHABLE_TIMEOUT_S", 60.0
    )  # as long as its first answer may take
    with tracking.run(experiment, "third", system_metrics=False):
        pass
    assert only_run(server, experiment).info.run_name == "third"
    assert mlflow_client.tracking_uri() not in uploader.BackgroundUploader.unreachable_servers, (
        "it is waited for again"
    )
    assert commands.main(["sync"]) == exit_codes.OK
    assert len(runs_of(server, experiment)) == 3


@pytest.mark.usefixtures("gives_up_soon")
def test_logging_waits_for_no_answer(server: Proxy, experiment: str, tmp_path: Path) -> None:
    may_answer = threading.Event()

    def hold(*_: object) -> None:
        may_answer.wait(60)

    with tracking.run(experiment, "r", system_metrics=False) as run:
        until(lambda: not run._journal.outbox.backlog())
        num_requests = len(server.requests)
        server.status_for = hold
        run.log_metrics({"first": 1})
        until(lambda: len(server.requests) > num_requests)
        log_all(run, tmp_path)
        assert run.backlog().entries > STEPS, "no request was answered since"
    may_answer.set()
    until(all_is_sent)
    check_all(server, only_run(server, experiment), tmp_path)


def test_delays_between_retries_grow_up_to_a_cap_and_have_jitter() -> None:
    for failures in range(12):
        longest = min(uploader.MIN_BACKOFF_S * 2**failures, uploader.MAX_BACKOFF_S)
        delays = [uploader.backoff_s(failures, uploader.MAX_BACKOFF_S) for _ in range(50)]
        assert all(longest / 2 <= delay <= longest for delay in delays)
        assert len(set(delays)) > 1
    assert uploader.backoff_s(10**6, uploader.MAX_BACKOFF_S) <= uploader.MAX_BACKOFF_S


@pytest.mark.usefixtures("gives_up_soon")
def test_sync_leaves_a_journal_to_its_living_process(
    server: Proxy, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"a": 1})
        assert commands.main(["sync"]) == exit_codes.OK
        output = capsys.readouterr().out
        assert "its process is running and sends it itself" in output
        assert "everything" not in output
    assert commands.main(["sync", "0123"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("nothing left to send of these runs")


class Killed(Exception):
    """Raised where a process might be killed."""


@pytest.mark.parametrize(
    ("owner", "method"), [(JournalDatabase, "set_meta"), (Outbox, "mark_file_sent")]
)
@pytest.mark.usefixtures("gives_up_soon")
def test_an_upload_that_dies_before_the_journal_records_it_sends_nothing_twice(
    server: Proxy,
    experiment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
) -> None:
    """Every first call fails: for the run, for each batch, for each file and for the status."""
    _, directory = unsent_run(server, experiment, tmp_path)
    original, calls = getattr(owner, method), 0

    def fail_every_first_time(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise Killed
        original(self, *args, **kwargs)

    journal, is_sent = Journal(directory), False
    monkeypatch.setattr(owner, method, fail_every_first_time)
    while not is_sent:
        interrupted = uploader.JournalUploader(journal, mlflow_client.client())
        with contextlib.suppress(Killed):
            while interrupted.step():
                pass
            is_sent = True
    journal.close()
    assert calls >= 4
    check_all(server, only_run(server, experiment), tmp_path)


@pytest.mark.usefixtures("gives_up_soon")
def test_an_unfinished_journal_is_ignored_and_removed_when_old(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False):
        pass
    [directory] = journal_index.all_journals()
    unfinished = directory.rename(directory.with_name(f".{directory.name}-1"))
    assert not list(journal_index.all_journals())
    assert commands.main(["status"]) == exit_codes.OK
    journal_index.prune_old()
    assert unfinished.exists(), "its process may still be creating it"
    os.utime(unfinished, (0, 0))
    journal_index.prune_old()
    assert not unfinished.exists()


SCHEMA_WITHOUT_FOLDERS = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL,
    name TEXT NOT NULL, value, time INTEGER, step INTEGER, refused TEXT);
CREATE INDEX named ON entries (name) WHERE kind <> 'metric';
CREATE TABLE files (seq INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT UNIQUE NOT NULL,
    sha256 TEXT NOT NULL, size INTEGER NOT NULL, sent INTEGER NOT NULL DEFAULT 0);
"""
"""The schema of commits ffa2fdc to 759e512."""


def test_a_journal_from_before_its_files_had_folders_arrives_in_full(
    server: Proxy, experiment: str
) -> None:
    directory = root() / "0123456789abcdef"
    for number, content in (("2", b"hello"), ("3", b"unsent")):
        (directory / "files" / number).mkdir(parents=True)
        (directory / "files" / number / "note.txt").write_bytes(content)
    about = {
        "start_ms": str(now_ms()),
        "end_ms": str(now_ms()),
        "status": "FINISHED",
        "server": mlflow_client.tracking_uri(),
        "experiment": experiment,
        "run_name": "r",
    }
    insert_file = "INSERT INTO files VALUES (?, ?, ?, ?, ?)"
    with contextlib.closing(sqlite3.connect(directory / "journal.db")) as old, old:
        old.execute("PRAGMA journal_mode=WAL")
        old.executescript(SCHEMA_WITHOUT_FOLDERS)
        old.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        old.execute("INSERT INTO entries VALUES (1, 'metric', 'loss', 0.5, 1, 0, NULL)")
        old.execute(insert_file, (1, "torn.txt", "", 0, 1))
        for seq, path, content in ((2, "a/note.txt", b"hello"), (3, "b/note.txt", b"unsent")):
            old.execute(
                insert_file, (seq, path, hashlib.sha256(content).hexdigest(), len(content), 0)
            )
    for _ in range(2):  # it is migrated once
        journal = Journal(directory)
        assert journal.outbox.backlog().files == 2
        journal.add_file(b"later", "b/note.txt")
        journal.close()
    assert not (directory / "files" / "3").exists(), "the replaced copy is removed"
    assert commands.main(["sync"]) == exit_codes.OK
    stored = only_run(server, experiment)
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"loss": 0.5})
    for path, text in (("a/note.txt", "hello"), ("b/note.txt", "later")):
        with tracking.artifact(stored.info.run_id, path) as copy:
            assert copy.read_text() == text


@pytest.mark.usefixtures("gives_up_soon")
def test_a_child_waits_for_its_parent_to_be_on_the_server(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    server.is_down = True
    with tracking.run(experiment, "parent", system_metrics=False) as parent:
        with tracking.run("other", "child", parent=parent.run_id, system_metrics=False) as child:
            child.log_metrics({"a": 1})
        server.is_down = False
    assert commands.main(["sync"]) == exit_codes.OK
    by_name = {run.info.run_name: run for run in runs_of(server, experiment)}
    assert by_name["child"].data.tags[tracking.PARENT] == by_name["parent"].info.run_id
    assert {run.info.status for run in by_name.values()} == {"FINISHED"}


def die_in_a_run(experiment: str) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        for step in range(STEPS):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_whose_process_was_killed_ends_as_killed_and_can_be_continued(
    server: Proxy, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dying = multiprocessing.get_context("spawn").Process(target=die_in_a_run, args=(experiment,))
    dying.start()
    dying.join()
    assert commands.main(["status"]) == exit_codes.NEGATIVE
    assert "its process has ended" in capsys.readouterr().out
    assert commands.main(["sync"]) == exit_codes.OK
    stored = only_run(server, experiment)
    assert stored.info.status == "KILLED"
    assert [step for step, *_ in points(server, stored, "loss")] == list(range(STEPS))
    [directory] = journal_index.all_journals()
    journal = f"journal:{directory.name}"
    assert tracking.can_continue(journal)
    with tracking.run(experiment, "r", resume=journal, system_metrics=False) as run:
        until(lambda: only_run(server, experiment).info.status == "RUNNING")
        run.log_metrics({"loss": 0.0}, STEPS)
    stored = only_run(server, experiment)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_id == run.run_id
    assert len(points(server, stored, "loss")) == STEPS + 1
    assert not tracking.can_continue(journal)


def test_a_run_can_be_ended_for_its_dead_process(server: Proxy, experiment: str) -> None:
    dying = multiprocessing.get_context("spawn").Process(target=die_in_a_run, args=(experiment,))
    dying.start()
    dying.join()
    [directory] = journal_index.all_journals()
    tracking.fail(f"journal:{directory.name}", "its worker died")
    stored = only_run(server, experiment)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["failed.why"] == "its worker died"
    assert len(points(server, stored, "loss")) == STEPS


def test_files_can_be_added_to_a_run_that_has_ended(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        pass
    with tracking.append_to(run.run_id) as later:
        later.log_text("later", "evaluation/report.md")
    assert only_run(server, experiment).info.status == "FINISHED"
    with tracking.artifact(run.run_id, "evaluation/report.md") as file:
        assert file.read_text() == "later"


def test_metrics_wait_in_memory_while_the_disk_is_full(
    server: Proxy, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        try:
            for step in range(STEPS * 5):
                run.log_metrics({"loss": 1.0, "accuracy": 0.5}, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("metrics wait in memory") >= 1
    losses = points(server, only_run(server, experiment), "loss")
    assert [step for step, *_ in losses] == list(range(STEPS * 5))


def test_a_disk_that_stays_full_fails_the_run_on_the_server_too(
    server: Proxy, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 5.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(TrackingError, match="free space on its disk"),
            tracking.run(experiment, "r", system_metrics=False) as run,
        ):
            until(lambda: not run._journal.outbox.backlog())
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
            for step in range(STEPS * 10):
                run.log_metrics({"loss": 1.0, "accuracy": 0.5}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert only_run(server, experiment).info.status == "FAILED"
    assert commands.main(["sync"]) == exit_codes.OK
    assert only_run(server, experiment).info.status == "FAILED", "not as if it had been killed"


def test_a_journal_that_cannot_be_created_is_a_one_line_error(
    server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "file"))
    with (
        pytest.raises(TrackingError, match="set EUROSAT_CACHE to another folder") as caught,
        tracking.run("e", "r"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_password_in_the_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as caught:
        tracking.get("0" * 32)
    assert "secret" not in str(caught.value)


def until(condition: Callable[[], object], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not true after {limit_s} s"
        time.sleep(0.02)


MINUTE, ALWAYS, HALF_WAY = "for a minute", "from beginning to end", "half server"


def answer_401(server: Proxy, on: bool) -> None:
    server.status_for = lambda *_: 401 if on else None


def answer_500_to_every_third(server: Proxy, on: bool) -> None:
    server.status_for = status_for_every_third if on else lambda *_: None


FAULTS: dict[str, Callable[[Proxy, bool], None]] = {
    "stopped": lambda server, on: setattr(server, "is_down", on),
    "500 to every third call": answer_500_to_every_third,
    "answers after 30 s": lambda server, on: setattr(server, "delay_s", 30.0 if on else 0.0),
    "credentials refused": answer_401,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "fault"),
    [
        *((when, fault) for when in (MINUTE, ALWAYS) for fault in FAULTS),
        (HALF_WAY, "an empty disk"),
    ],
)
@pytest.mark.usefixtures("tiny_pack")
def test_a_whole_training_survives_a_fault_of_the_server(
    ports: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experiment: str,
    fault: str,
    when: str,
) -> None:
    epochs, label = 1000, experiment.replace("[", "-").rstrip("]")
    with proxy(ports[0]) as server, (tmp_path / "stderr").open("w") as stderr:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        if when == ALWAYS:
            FAULTS[fault](server, True)
        path = f"{ROOT}:{os.environ['PYTHONPATH']}"
        training = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "eurosat.train",
                *TINY,
                f"trainer.epochs={epochs}",
                f"experiment={label}",
            ],
            env=os.environ | {"PYTHONPATH": path},
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        if when != ALWAYS:
            until(
                lambda: (
                    runs_of(server, label) and only_run(server, label).data.metrics.get("val_loss")
                ),
                120,
            )
        if when == HALF_WAY:
            server.upstream = ports[1]
        if when == MINUTE:
            FAULTS[fault](server, True)
            time.sleep(60)
            assert training.poll() is None, "the minute was in the middle of it"
            FAULTS[fault](server, False)
        assert training.wait(timeout=600) == exit_codes.OK, (tmp_path / "stderr").read_text()[
            -3000:
        ]
        is_unsent = any(
            journal.get_meta("server") == server.uri for journal, _ in commands.unsent()
        )
        hints = (
            (tmp_path / "stderr").read_text().count("`python -m eurosat.tracking sync` sends it")
        )
        assert hints == is_unsent, "one line says what the server does not have"
        if when == ALWAYS:
            assert is_unsent == (fault != "500 to every third call")
            FAULTS[fault](server, False)
        until(lambda: commands.main(["sync"]) == exit_codes.OK, 120)
        stored = only_run(server, label)
        assert stored.info.status == "FINISHED"
        assert [step for step, *_ in points(server, stored, "val_accuracy")] == list(range(epochs))
        assert stored.data.metrics["test_accuracy"] > 0
        assert stored.data.params["trainer.epochs"] == str(epochs)
        assert stored.data.tags["kind"] == "train"
        with tracking.artifact(stored.info.run_id, "weights.safetensors") as file:
            assert file.stat().st_size > 0
        assert "Traceback" not in (tmp_path / "stderr").read_text()
