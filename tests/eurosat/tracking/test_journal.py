"""Runs through every mood of a real tracking server: nothing is lost, and nothing comes twice."""

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
from eurosat.tracking import __main__ as verbs
from eurosat.tracking import journal_index, mlflow_client, uploader
from eurosat.tracking.journal import Journal, now_ms, root
from tests.support.mlflow_server import Proxy, free_port, mlflow_server, proxy
from tests.support.paths import ROOT
from tests.support.postgres import create_database
from tests.support.recipes import TINY

STEPS = 400


ON_POSTGRES = pytest.param("postgres", marks=pytest.mark.postgres)


@pytest.fixture(scope="module", params=["sqlite", ON_POSTGRES])
def ports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[int]]:
    """Two servers; the second one's disk is empty."""
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
    """The way to the first server, for a test with journals of its own and little patience."""
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(uploader, "UPLOAD_INTERVAL_S", 0.1)
    monkeypatch.setattr(uploader, "MIN_BACKOFF_S", 0.05)
    monkeypatch.setattr(uploader, "MAX_BACKOFF_S", 0.2)
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 1.0)
    with proxy(ports[0]) as way:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", way.uri)
        yield way


@pytest.fixture
def patient(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in use: MLflow repeats a request twice before it counts as failed."""
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 60.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(mlflow_client.MAX_RETRIES))


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def runs(way: Proxy, experiment: str) -> list[Run]:
    client = MlflowClient(f"http://127.0.0.1:{way.upstream}")
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def only(way: Proxy, experiment: str) -> Run:
    found = runs(way, experiment)
    assert len(found) == 1
    return found[0]


def points(way: Proxy, run: Run, key: str) -> list[tuple[int, float, int]]:
    """Step, value and time of all that the server holds, sorted."""
    client = MlflowClient(f"http://127.0.0.1:{way.upstream}")
    return sorted(
        (p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, key)
    )


def log_all(run: tracking.Run, folder: Path, steps: range = range(STEPS)) -> None:
    """Metrics, params, tags and files; what `holds_all` looks for."""
    run.log_params({"optim": {"lr": 0.1}})
    run.set_tags({"kind": "first"})
    run.log_text("hello", "notes/hello.txt")
    for step in steps:
        run.log_metrics({"loss": 1 / (step + 1)}, step)
    run.log_metrics({"never": math.nan, "most": math.inf})
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 4000)
    run.log_file(folder / "weights.bin", "model")
    run.set_tags({"kind": "last"})


def check_all(way: Proxy, held: Run, folder: Path, status: str = "FINISHED") -> None:
    assert held.info.status == status
    assert held.data.params == {"optim.lr": "0.1"}
    assert held.data.tags["kind"] == "last"
    got = points(way, held, "loss")
    assert [step for step, *_ in got] == list(range(STEPS))
    assert [value for _, value, _ in got] == [1 / (step + 1) for step in range(STEPS)]
    times = [time_ms for *_, time_ms in got]
    assert times == sorted(times)
    assert times[-1] <= (held.info.end_time or 0)
    assert math.isnan(held.data.metrics["never"])
    assert held.data.metrics["most"] > 1e308, "how MLflow keeps what is infinite"
    client = MlflowClient(f"http://127.0.0.1:{way.upstream}")
    for path, content in (
        ("notes/hello.txt", b"hello"),
        ("model/weights.bin", (folder / "weights.bin").read_bytes()),
    ):
        copy = client.download_artifacts(held.info.run_id, path, str(folder))
        assert Path(copy).read_bytes() == content


def in_journal(directory: Path, key: str) -> list[tuple[int, float, int]]:
    """Step, value and time, as `points` gives them."""
    with contextlib.closing(sqlite3.connect(directory / "journal.db")) as opened:
        asked = "SELECT step, value, time FROM entries WHERE kind = 'metric' AND name = ?"
        return sorted(opened.execute(asked, (key,)).fetchall())


def every_third(number: int, *_: str) -> int | None:
    return 500 if number % 3 == 0 else None


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.usefixtures("patient")
def test_a_server_that_answers_500_to_every_third_call_gets_all_once(
    server: Proxy, experiment: str, tmp_path: Path, forward_first: bool
) -> None:
    server.status_for, server.forward_before_status = every_third, forward_first
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
    held = only(server, experiment)
    assert held.info.run_id == run.run_id
    check_all(server, held, tmp_path)
    assert not list(journal_index.all_journals()), "what was delivered is not kept"


@pytest.mark.usefixtures("patient")
def test_a_server_that_is_stopped_for_a_while_gets_all(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"before": 1})
        until(lambda: "before" in only(server, experiment).data.metrics)
        server.is_down = True
        log_all(run, tmp_path)
        until(lambda: run._uploader.last_error)
        assert "loss" not in only(server, experiment).data.metrics
        server.is_down = False
    check_all(server, only(server, experiment), tmp_path)


def test_a_run_that_never_saw_its_server_is_sent_later_once(
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
    said = [r.message for r in caplog.records]
    assert sum("is kept in" in line for line in said) == 2, "at the start and at the end"
    assert not runs(server, experiment)
    with pytest.raises(TrackingError, match=r"journal:\w+"):
        tracking.get(run.run_id)

    assert verbs.main(["status"]) == exit_codes.NEGATIVE
    listed = capsys.readouterr().out
    assert run.run_id in listed
    assert "entries, 2 files (1.0 MB), its status" in listed
    assert verbs.main(["sync"]) == exit_codes.NEGATIVE
    assert f"{run.run_id}: not sent:" in capsys.readouterr().out

    server.is_down = False
    with pytest.raises(TrackingError, match="eurosat.tracking sync"):
        tracking.get(run.run_id)
    assert verbs.main(["sync"]) == exit_codes.OK
    held = only(server, experiment)
    check_all(server, held, tmp_path)
    assert held.info.start_time <= started, "it carries its own times"
    assert tracking.get(run.run_id).run_id == held.info.run_id
    capsys.readouterr()
    assert verbs.main(["status"]) == exit_codes.OK
    assert capsys.readouterr().out == "the tracking server has everything\n"


def test_a_server_restarted_with_an_empty_disk_gets_the_run_anew(
    server: Proxy, ports: list[int], experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path, range(STEPS // 2))
        until(lambda: not run._journal.backlog())
        first = run.run_id
        server.upstream = ports[1]
        for step in range(STEPS // 2, STEPS):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
    held = only(server, experiment)
    assert held.info.run_id == run.run_id != first
    check_all(server, held, tmp_path)


def test_a_run_that_somebody_deletes_meanwhile_is_made_anew(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"before": 1})
        until(lambda: "before" in only(server, experiment).data.metrics)
        MlflowClient().delete_run(run.run_id)
        log_all(run, tmp_path)
    held = only(server, experiment)
    assert held.data.metrics["before"] == 1
    check_all(server, held, tmp_path)


def test_refused_credentials_are_told_at_the_start_and_training_goes_on(
    server: Proxy, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.status_for = lambda *_: 401
    with tracking.run(experiment, "r", system_metrics=False) as run:
        assert "MLFLOW_TRACKING_USERNAME" in caplog.text, "not after an hour"
        log_all(run, tmp_path)
    server.status_for = lambda *_: None
    assert verbs.main(["sync"]) == exit_codes.OK
    check_all(server, only(server, experiment), tmp_path)


def test_a_slow_server_does_not_hold_up_the_start(
    server: Proxy, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "START_TIMEOUT_S", 0.1)
    server.delay_s = 2.0
    with tracking.run(experiment, "r", system_metrics=False) as run:
        assert run.run_id.startswith("journal:"), "it has begun before the server answered"
        log_all(run, tmp_path)
    assert verbs.main(["status"]) == exit_codes.NEGATIVE
    server.delay_s = 0
    until(lambda: verbs.main(["sync"]) == exit_codes.OK)
    check_all(server, only(server, experiment), tmp_path)


def unsent(server: Proxy, experiment: str, folder: Path) -> tuple[tracking.Run, Path]:
    """A whole run that ended while the server was away, and its journal."""
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, folder)
    server.is_down = False
    [directory] = journal_index.all_journals()
    return run, directory


def test_a_journal_that_is_sent_twice_gives_the_same_run(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    run, directory = unsent(server, experiment, tmp_path)
    shutil.copytree(directory, tmp_path / "copy")
    assert verbs.main(["sync"]) == exit_codes.OK
    first = points(server, only(server, experiment), "loss")
    shutil.copytree(tmp_path / "copy", directory)
    assert verbs.main(["sync", run.run_id]) == exit_codes.OK
    held = only(server, experiment)
    check_all(server, held, tmp_path)
    assert points(server, held, "loss") == first


def sync_slowly(batch: int) -> None:
    uploader.MAX_ENTRIES = batch
    cli.run_command(verbs.main, ["sync"])


def test_a_journal_whose_sending_is_killed_gives_the_same_run(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
    server.is_down = False
    server.delay_s = 0.02
    [directory] = journal_index.all_journals()
    told = in_journal(directory, "loss")
    for batches in (1, 3, 5):
        sending = multiprocessing.get_context("spawn").Process(target=sync_slowly, args=(30,))
        seen = sent(server)
        sending.start()
        until(partial(has_sent, server, seen + batches))
        os.kill(sending.pid or 0, signal.SIGKILL)
        sending.join()
    assert run._journal.directory.exists()
    assert verbs.main(["sync"]) == exit_codes.OK
    held = only(server, experiment)
    check_all(server, held, tmp_path)
    assert points(server, held, "loss") == told, "every point, with its own time"


def has_sent(way: Proxy, batches: int) -> bool:
    return sent(way) >= batches


def sent(way: Proxy) -> int:
    return sum(path.endswith("runs/log-batch") for _, path in way.requests)


@pytest.mark.parametrize("fault", ["cut", "garbled"])
@pytest.mark.usefixtures("patient")
def test_an_upload_that_breaks_is_repeated_until_its_checksum_is_right(
    server: Proxy, experiment: str, tmp_path: Path, fault: str
) -> None:
    broken: list[str] = []

    def breaks(path: str, body: bytes) -> bytes | None:
        if "weights.bin" not in path or len(broken) == 2:
            return body
        broken.append(path)
        return None if fault == "cut" else body[:-1] + b"?"

    server.alter_body = breaks
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
    assert len(broken) == 2
    uploads = [path for method, path in server.requests if method == "PUT"]
    assert sum("hello.txt" in path for path in uploads) == 1, "what arrived is not sent again"
    check_all(server, only(server, experiment), tmp_path)
    assert run.run_id == only(server, experiment).info.run_id


@pytest.mark.usefixtures("patient")
def test_an_entry_that_the_server_refuses_does_not_hold_back_the_others(
    server: Proxy,
    experiment: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.set_tags({"x" * 300: "a name too long for MLflow"})
        log_all(run, tmp_path)
    check_all(server, only(server, experiment), tmp_path)
    assert "the tracking server refused 1 entries" in caplog.text
    for _ in range(2):
        assert verbs.main(["sync"]) == exit_codes.NEGATIVE
        said = capsys.readouterr().out
        assert "the server refused 1, the first: tag xxx" in said
        assert f"delete {run._journal.directory} to give that up" in said
        assert "everything" not in said
    check_all(server, only(server, experiment), tmp_path)


@pytest.mark.parametrize("when", ["while it ran", "when it was sent later"])
def test_a_file_that_the_server_refuses_is_kept_until_it_takes_it(
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
    assert verbs.main(["sync"]) == exit_codes.NEGATIVE
    assert "the server refused 1, the first: artifact huge.bin" in capsys.readouterr().out
    check_all(server, only(server, experiment), tmp_path)
    assert verbs.main(["status"]) == exit_codes.NEGATIVE
    assert "the server refused 1, the first: artifact huge.bin" in capsys.readouterr().out
    server.status_for = lambda *_: None
    assert verbs.main(["sync"]) == exit_codes.OK
    with tracking.artifact(run.run_id, "huge.bin") as file:
        assert file.read_text() == "x"
    assert not list(journal_index.all_journals())


def test_what_was_refused_comes_after_nothing_that_was_said_later(
    server: Proxy, experiment: str
) -> None:
    journal = Journal.create(
        server=mlflow_client.tracking_uri(), experiment=experiment, run_name="r"
    )
    journal.set_tags({"kind": "refused", "other": "refused"})
    for entry in journal.pending_entries(2):
        journal.mark_entry_refused(entry.seq, "too long")
    journal.set_tags({"kind": "taken"})
    journal.requeue_rejected()
    assert [(one.name, one.value) for one in journal.pending_entries(9)] == [
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
def test_the_server_hears_how_a_run_ended(
    server: Proxy, experiment: str, tmp_path: Path, ending: type[BaseException], status: str
) -> None:
    with (
        pytest.raises(ending),
        tracking.run(experiment, "r", system_metrics=False, killed_by=(PrunedError,)) as run,
    ):
        log_all(run, tmp_path)
        raise ending
    check_all(server, only(server, experiment), tmp_path, status)


def test_a_run_that_goes_on_on_another_machine_knows_what_it_was_told(
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
        [before] = [r for r in runs(server, experiment) if r.info.run_id == run.run_id]
        shutil.rmtree(root() / run.journal.removeprefix("journal:"))
        with tracking.run(experiment, "r", resume=run.journal, system_metrics=False) as again:
            assert again.tag("kind") == "trial"
            assert again._journal.get_meta("start_ms") == str(before.info.start_time)
            again.log_params({"lr": 0.1})
            again.log_metrics({"loss": 0.25}, 1)
            until(lambda: not again._journal.backlog())
            server.upstream = ports[1]  # and now the server loses its disk
            again.log_metrics({"loss": 0.125}, 2)
            parent.log_metrics({"a": 1})
            until(lambda: not (parent._journal.backlog() or again._journal.backlog()))
    by_name = {one.info.run_name: one for one in runs(server, experiment)}
    held = by_name["r"]
    assert held.data.tags[tracking.PARENT] == by_name["parent"].info.run_id
    assert (held.info.status, held.info.start_time) == ("FINISHED", before.info.start_time)
    assert (held.data.params, held.data.tags["kind"]) == ({"lr": "0.1"}, "trial")
    assert held.data.tags["killed.why"] == "its node was lost; then continued"
    got = [(step, value) for step, value, _ in points(server, held, "loss")]
    assert got == [(0, 0.5), (1, 0.25), (2, 0.125)]


def test_of_runs_made_twice_the_one_that_was_written_to_is_kept(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        log_all(run, tmp_path)
        until(lambda: not run._journal.backlog())
        first = run.run_id
        late = MlflowClient().create_run(
            only(server, experiment).info.experiment_id,
            1,
            {mlflow_client.JOURNAL_TAG: run.journal.removeprefix("journal:")},
        )
        assert late.info.run_id != first
    held = only(server, experiment)
    assert held.info.run_id == first
    check_all(server, held, tmp_path)


def test_a_server_that_was_waited_for_in_vain_holds_up_no_later_run(
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
    assert only(server, experiment).info.run_name == "third"
    assert mlflow_client.tracking_uri() not in uploader.BackgroundUploader.unreachable_servers, (
        "it is waited for again"
    )
    assert verbs.main(["sync"]) == exit_codes.OK
    assert len(runs(server, experiment)) == 3


def test_logging_waits_for_no_answer(server: Proxy, experiment: str, tmp_path: Path) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        until(lambda: not run._journal.backlog())
        asked = len(server.requests)
        server.delay_s = 30.0
        run.log_metrics({"first": 1})
        until(lambda: len(server.requests) > asked)
        log_all(run, tmp_path)
        assert run.backlog().entries > STEPS, "no request was answered since"
        server.delay_s = 0.0
    until(lambda: verbs.main(["sync"]) == exit_codes.OK)
    check_all(server, only(server, experiment), tmp_path)


def test_pauses_between_repetitions_grow_up_to_a_cap_and_differ() -> None:
    for failures in range(12):
        whole = min(uploader.MIN_BACKOFF_S * 2**failures, uploader.MAX_BACKOFF_S)
        drawn = [uploader.backoff_s(failures, uploader.MAX_BACKOFF_S) for _ in range(50)]
        assert all(whole / 2 <= pause <= whole for pause in drawn)
        assert len(set(drawn)) > 1
    assert uploader.backoff_s(10**6, uploader.MAX_BACKOFF_S) <= uploader.MAX_BACKOFF_S


def test_what_a_living_process_sends_is_not_claimed(
    server: Proxy, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False) as run:
        run.log_metrics({"a": 1})
        assert verbs.main(["sync"]) == exit_codes.OK
        said = capsys.readouterr().out
        assert "its process is alive and sends it itself" in said
        assert "everything" not in said
    assert verbs.main(["sync", "0123"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("nothing of these waits here")


class Killed(Exception):
    """Where a process might have been killed."""


@pytest.mark.parametrize("method", ["set_meta", "mark_file_sent"])
def test_a_delivery_cut_before_the_journal_hears_of_it_sends_nothing_twice(
    server: Proxy, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Each word to the journal is cut off once: of the run, of each batch, file and status."""
    _, directory = unsent(server, experiment, tmp_path)
    real, calls = getattr(Journal, method), 0

    def cut(self: Journal, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise Killed
        real(self, *args, **kwargs)

    monkeypatch.setattr(Journal, method, cut)
    journal, whole = Journal(directory), False
    while not whole:
        carried = uploader.JournalUploader(journal, mlflow_client.client())
        with contextlib.suppress(Killed):
            while carried.step():
                pass
            whole = True
    journal.close()
    assert calls >= 4
    check_all(server, only(server, experiment), tmp_path)


def test_a_journal_that_is_not_made_yet_is_none(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    server.is_down = True
    with tracking.run(experiment, "r", system_metrics=False):
        pass
    [directory] = journal_index.all_journals()
    unmade = directory.rename(directory.with_name(f".{directory.name}-1"))
    assert not list(journal_index.all_journals())
    assert verbs.main(["status"]) == exit_codes.OK
    journal_index.prune_old()
    assert unmade.exists(), "its process may be at it"
    os.utime(unmade, (0, 0))
    journal_index.prune_old()
    assert not unmade.exists()


BEFORE_FOLDERS = """
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
    file = "INSERT INTO files VALUES (?, ?, ?, ?, ?)"
    with contextlib.closing(sqlite3.connect(directory / "journal.db")) as old, old:
        old.execute("PRAGMA journal_mode=WAL")
        old.executescript(BEFORE_FOLDERS)
        old.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        old.execute("INSERT INTO entries VALUES (1, 'metric', 'loss', 0.5, 1, 0, NULL)")
        old.execute(file, (1, "torn.txt", "", 0, 1))
        for seq, path, content in ((2, "a/note.txt", b"hello"), (3, "b/note.txt", b"unsent")):
            old.execute(file, (seq, path, hashlib.sha256(content).hexdigest(), len(content), 0))
    for _ in range(2):  # it is brought up to date once
        journal = Journal(directory)
        assert journal.backlog().files == 2
        journal.add_file(b"later", "b/note.txt")
        journal.close()
    assert not (directory / "files" / "3").exists(), "what was replaced is gone"
    assert verbs.main(["sync"]) == exit_codes.OK
    held = only(server, experiment)
    assert (held.info.status, held.data.metrics) == ("FINISHED", {"loss": 0.5})
    for path, text in (("a/note.txt", "hello"), ("b/note.txt", "later")):
        with tracking.artifact(held.info.run_id, path) as copy:
            assert copy.read_text() == text


def test_a_child_waits_for_its_parent_to_be_on_the_server(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    server.is_down = True
    with tracking.run(experiment, "parent", system_metrics=False) as parent:
        with tracking.run("other", "child", parent=parent.run_id, system_metrics=False) as child:
            child.log_metrics({"a": 1})
        server.is_down = False
    assert verbs.main(["sync"]) == exit_codes.OK
    by_name = {run.info.run_name: run for run in runs(server, experiment)}
    assert by_name["child"].data.tags[tracking.PARENT] == by_name["parent"].info.run_id
    assert {run.info.status for run in by_name.values()} == {"FINISHED"}


def die_in_a_run(experiment: str) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        for step in range(STEPS):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_whose_process_was_killed_is_ended_truly_and_can_go_on(
    server: Proxy, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dying = multiprocessing.get_context("spawn").Process(target=die_in_a_run, args=(experiment,))
    dying.start()
    dying.join()
    assert verbs.main(["status"]) == exit_codes.NEGATIVE
    assert "its process has ended" in capsys.readouterr().out
    assert verbs.main(["sync"]) == exit_codes.OK
    held = only(server, experiment)
    assert held.info.status == "KILLED"
    assert [step for step, *_ in points(server, held, "loss")] == list(range(STEPS))
    [directory] = journal_index.all_journals()
    journal = f"journal:{directory.name}"
    assert tracking.can_continue(journal)
    with tracking.run(experiment, "r", resume=journal, system_metrics=False) as run:
        until(lambda: only(server, experiment).info.status == "RUNNING")
        run.log_metrics({"loss": 0.0}, STEPS)
    held = only(server, experiment)
    assert held.info.status == "FINISHED"
    assert held.info.run_id == run.run_id
    assert len(points(server, held, "loss")) == STEPS + 1
    assert not tracking.can_continue(journal)


def test_a_run_that_another_process_could_not_end_is_ended_for_it(
    server: Proxy, experiment: str
) -> None:
    dying = multiprocessing.get_context("spawn").Process(target=die_in_a_run, args=(experiment,))
    dying.start()
    dying.join()
    [directory] = journal_index.all_journals()
    tracking.fail(f"journal:{directory.name}", "its worker died")
    held = only(server, experiment)
    assert held.info.status == "FAILED"
    assert held.data.tags["failed.why"] == "its worker died"
    assert len(points(server, held, "loss")) == STEPS


def test_files_are_added_to_a_run_that_has_ended(
    server: Proxy, experiment: str, tmp_path: Path
) -> None:
    with tracking.run(experiment, "r", system_metrics=False) as run:
        pass
    with tracking.append_to(run.run_id) as again:
        again.log_text("later", "evaluation/report.md")
    assert only(server, experiment).info.status == "FINISHED"
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
    got = points(server, only(server, experiment), "loss")
    assert [step for step, *_ in got] == list(range(STEPS * 5))


def test_a_disk_that_stays_full_fails_the_run_and_the_server_hears_it(
    server: Proxy, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 5.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(TrackingError, match="make room there"),
            tracking.run(experiment, "r", system_metrics=False) as run,
        ):
            until(lambda: not run._journal.backlog())
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
            for step in range(STEPS * 10):
                run.log_metrics({"loss": 1.0, "accuracy": 0.5}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert only(server, experiment).info.status == "FAILED"
    assert verbs.main(["sync"]) == exit_codes.OK
    assert only(server, experiment).info.status == "FAILED", "not as if it had been killed"


def test_a_journal_that_cannot_be_made_is_one_line(
    server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "file"))
    with (
        pytest.raises(TrackingError, match="EUROSAT_CACHE name another folder") as caught,
        tracking.run("e", "r"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_password_in_the_address_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as caught:
        tracking.get("0" * 32)
    assert "secret" not in str(caught.value)


def until(condition: Callable[[], object], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


MINUTE, ALWAYS = "for a minute", "from beginning to end"


def answer_401(way: Proxy, on: bool) -> None:
    way.status_for = lambda *_: 401 if on else None


def answer_500_to_every_third(way: Proxy, on: bool) -> None:
    way.status_for = every_third if on else lambda *_: None


FAULTS: dict[str, Callable[[Proxy, bool], None]] = {
    "stopped": lambda way, on: setattr(way, "is_down", on),
    "500 to every third call": answer_500_to_every_third,
    "answers after 30 s": lambda way, on: setattr(way, "delay_s", 30.0 if on else 0.0),
    "credentials refused": answer_401,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "fault"),
    [
        *((when, fault) for when in (MINUTE, ALWAYS) for fault in FAULTS),
        ("half way", "an empty disk"),
    ],
)
@pytest.mark.usefixtures("tiny_pack")
def test_a_whole_training_behind_a_server_with_a_fault(
    ports: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experiment: str,
    fault: str,
    when: str,
) -> None:
    epochs, label = 1000, experiment.replace("[", "-").rstrip("]")
    with proxy(ports[0]) as way, (tmp_path / "said").open("w") as said:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", way.uri)
        if when == ALWAYS:
            FAULTS[fault](way, True)
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
            stderr=said,
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        if when != ALWAYS:
            until(lambda: runs(way, label) and only(way, label).data.metrics.get("val_loss"), 120)
        if when == "half way":
            way.upstream = ports[1]
        if when == MINUTE:
            FAULTS[fault](way, True)
            time.sleep(60)
            assert training.poll() is None, "the minute was in the middle of it"
            FAULTS[fault](way, False)
        assert training.wait(timeout=600) == exit_codes.OK, (tmp_path / "said").read_text()[-3000:]
        unsent = any(journal.get_meta("server") == way.uri for journal, _ in verbs.unsent())
        told = (tmp_path / "said").read_text().count("`python -m eurosat.tracking sync` sends it")
        assert told == unsent, "one line says what the server does not have"
        if when == ALWAYS:
            assert unsent == (fault != "500 to every third call")
            FAULTS[fault](way, False)
        until(lambda: verbs.main(["sync"]) == exit_codes.OK, 120)
        held = only(way, label)
        assert held.info.status == "FINISHED"
        assert [step for step, *_ in points(way, held, "val_accuracy")] == list(range(epochs))
        assert held.data.metrics["test_accuracy"] > 0
        assert held.data.params["trainer.epochs"] == str(epochs)
        assert held.data.tags["kind"] == "train"
        with tracking.artifact(held.info.run_id, "weights.safetensors") as file:
            assert file.stat().st_size > 0
        assert "Traceback" not in (tmp_path / "said").read_text()
