"""The engine ``optuna``: trials in this process, or in several worker processes of this machine."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from eurosat import tracking
from eurosat.config import compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import EuroSATError
from eurosat.runtime import cli, exit_codes, logs, worker_processes
from eurosat.runtime.progress import STYLE
from eurosat.training.checkpoints import CheckpointSlot
from experiments import objective
from experiments.objective import SweepJob, TrialResult, TrialSpec
from experiments.study_driver import StudyDriver
from experiments.sweep_progress import SweepProgress

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 5.0
"""Between two looks at the trials of other drivers."""
DRIVER_EXIT_GRACE_S = 1.0
"""Time in which a worker that talks to its driver notices the driver's death by itself."""
ERROR_GRACE_S = 10
"""Time in which a worker may send that its run FAILED, as that of another worker has."""
SHUTDOWN_GRACE_S = 30
"""Time in which a worker that must stop can send its run's status; then it is killed."""


def run_in_process(
    driver: StudyDriver, data: PreparedData, progress: SweepProgress, *, wait_for_others: bool
) -> None:
    """Run trials one after the other in this process, until none is left.

    ``wait_for_others``: then wait for the trials of other drivers, which may come back.
    """
    while True:
        if (spec := driver.next_trial()) is None:
            if not (wait_for_others and driver.others_are_running()):
                return
            time.sleep(POLL_INTERVAL_S)
            progress.update()
            continue
        _run_one(driver, spec, data, progress)
        progress.update()


def _run_one(
    driver: StudyDriver, spec: TrialSpec, data: PreparedData, progress: SweepProgress
) -> None:
    number = spec.number

    def report_epoch(epoch: int, metrics: Mapping[str, float]) -> str | None:
        progress.record_accuracy(number, metrics["val_accuracy"])
        return driver.report_epoch(number, epoch, metrics)

    def on_start(run: tracking.Run, _: CheckpointSlot) -> None:
        driver.trial_started(number, run.journal)

    def on_end(result: TrialResult) -> None:
        driver.trial_ended(number, result)

    objective.train_trial(driver.job, spec, data, report_epoch, on_start, on_end=on_end)


class Worker:
    """A worker process, the driver's end of the pipe to it, and the trial that it runs."""

    def __init__(self, job: SweepJob, number: int) -> None:
        self.connection, worker_end = multiprocessing.Pipe()
        level = logging.getLevelName(logging.getLogger().level).lower()
        self.process = worker_processes.create(
            _worker_main, (job, worker_end, level), name=f"worker {number + 1}", daemon=True
        )
        self.process.start()
        worker_end.close()  # else the worker's death would not end the connection
        self.trial: TrialSpec | None = None

    def assign(self, spec: TrialSpec) -> None:
        self.trial = spec
        self.connection.send(spec)


def run_in_workers(driver: StudyDriver, progress: SweepProgress, *, wait_for_others: bool) -> None:
    """Run trials side by side; a worker that dies is replaced and its trial is run again.

    Raises:
        EuroSATError: a worker ended with an error that every other worker would meet too.
    """
    workers = [Worker(driver.job, number) for number in range(driver.job.sweep.workers)]
    try:
        _run_workers(driver, workers, progress, wait_for_others)
    except BaseException as error:
        if isinstance(error, EuroSATError):  # the others meet it too: let them end by themselves
            deadline = time.monotonic() + ERROR_GRACE_S
            for worker in workers:
                worker.process.join(max(0, deadline - time.monotonic()))
        for worker in workers:
            worker.process.terminate()  # its run ends as KILLED
        raise
    finally:
        for worker in workers:
            worker.connection.close()  # an idle worker ends then
        deadline = time.monotonic() + SHUTDOWN_GRACE_S
        for worker in workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()


def _run_workers(
    driver: StudyDriver, workers: list[Worker], progress: SweepProgress, wait_for_others: bool
) -> None:
    """Assign trials and handle messages until nothing is left; replaces dead ``workers``."""
    num_started = len(workers)

    def replace(dead: Worker) -> None:
        nonlocal num_started
        workers.remove(dead)
        _handle_worker_death(driver, dead)
        workers.append(Worker(driver.job, num_started))
        num_started += 1

    while True:
        idle = [worker for worker in workers if worker.trial is None]
        for worker in idle:
            if (spec := driver.next_trial()) is None:
                break
            try:
                worker.assign(spec)
            except ConnectionError:  # it died while it was idle
                replace(worker)
        busy = {worker.connection: worker for worker in workers if worker.trial is not None}
        if not busy:
            if not (wait_for_others and driver.others_are_running()):
                return
            time.sleep(POLL_INTERVAL_S)
            continue
        for connection in wait(list(busy), timeout=1):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            try:
                _handle_message(driver, worker, progress)
            except (EOFError, ConnectionError):
                replace(worker)
        progress.update()


def _handle_message(driver: StudyDriver, worker: Worker, progress: SweepProgress) -> None:
    assert worker.trial is not None
    number = worker.trial.number
    match worker.connection.recv():
        case ("started", journal):
            driver.trial_started(number, journal)
        case ("epoch", epoch, metrics):
            worker.connection.send(driver.report_epoch(number, epoch, metrics))
            progress.record_accuracy(number, metrics["val_accuracy"])
        case ("ended", result):
            worker.trial = None
            driver.trial_ended(number, result)
            with contextlib.suppress(ConnectionError):  # it died: assigning a trial will show it
                worker.connection.send("recorded")  # now the worker deletes the checkpoint


def _handle_worker_death(driver: StudyDriver, worker: Worker) -> None:
    """Queue the trial again.

    Raises:
        EuroSATError: the worker ended with an error, which another worker would meet too.
    """
    assert worker.trial is not None
    worker.process.join()
    code, name = worker.process.exitcode, worker.process.name
    stopped = (None, exit_codes.OK, exit_codes.TERMINATED, exit_codes.INTERRUPTED)
    if code is not None and code < 0:
        reason = f"{name} was killed by signal {-code}"
    elif code in stopped:
        reason = f"{name} was stopped"
    else:
        driver.trial_ended(worker.trial.number, TrialResult(state="fail"))
        raise EuroSATError(f"{name} of the sweep ended with code {code}: see the log above")
    driver.worker_died(worker.trial.number, reason)


def _worker_main(job: SweepJob, connection: Connection, level: str) -> None:
    """Run a worker process; an error of ours is one line on standard error and exit code 2."""
    os.environ[STYLE] = "lines"  # the driver draws the only progress bar
    logs.setup(level)
    driver_exit_noticed = threading.Event()
    threading.Thread(
        target=_exit_with_driver, args=(driver_exit_noticed,), name="driver", daemon=True
    ).start()
    cli.run_command(lambda _: _run_assigned_trials(job, connection, driver_exit_noticed), [])


def _exit_with_driver(noticed: threading.Event) -> None:
    """Stop this process when its driver dies, also in the middle of an epoch.

    Another driver may continue the trial. Does nothing if the connection has shown the death:
    ``noticed`` is set then.
    """
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    if not noticed.wait(DRIVER_EXIT_GRACE_S):
        os.kill(os.getpid(), signal.SIGTERM)  # the run ends as KILLED


class _DriverConnection:
    """The worker's end of the pipe; ends this process if the driver is gone."""

    def __init__(self, connection: Connection, driver_exit_noticed: threading.Event) -> None:
        self._connection, self._noticed = connection, driver_exit_noticed

    def next_trial(self) -> TrialSpec | None:
        """Return the next trial, or None after the driver has closed the connection."""
        try:
            spec: TrialSpec = self._connection.recv()
        except (EOFError, OSError):
            self._noticed.set()
            return None
        return spec

    def on_start(self, run: tracking.Run, _: CheckpointSlot) -> None:
        self._send("started", run.journal)

    def report_epoch(self, epoch: int, metrics: Mapping[str, float]) -> str | None:
        self._send("epoch", epoch, dict(metrics))
        reason: str | None = self._receive()
        return reason

    def on_end(self, result: TrialResult) -> None:
        """Send the result and wait until the driver has recorded it."""
        self._send("ended", result)
        self._receive()

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            self._exit(error)

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._exit(error)

    def _exit(self, error: Exception) -> NoReturn:
        """Exit and keep the trial's checkpoint for another driver."""
        self._noticed.set()
        raise SystemExit(exit_codes.TERMINATED) from error


def _run_assigned_trials(
    job: SweepJob, connection: Connection, driver_exit_noticed: threading.Event
) -> int:
    """Run trials as the driver assigns them; return the exit code when the driver is done."""
    driver = _DriverConnection(connection, driver_exit_noticed)
    data: PreparedData | None = None
    while spec := driver.next_trial():
        data = data or prepare(compose(job.overrides))
        objective.train_trial(
            job, spec, data, driver.report_epoch, driver.on_start, on_end=driver.on_end
        )
    return exit_codes.OK
