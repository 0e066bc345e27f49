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
from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.progress import STYLE
from eurosat.training.checkpoints import CheckpointSlot
from experiments import objective
from experiments.objective import Job, Outcome, Task
from experiments.search import Search
from experiments.sweep_progress import View

log = logging.getLogger(__name__)

OTHERS_S = 5.0
"""Between two looks at trials that other drivers have in hand."""
NOTICED_S = 1.0
"""A worker that speaks with its driver has noticed its death so soon."""
LAST_WORDS_S = 30
"""A worker that is asked to end is given so long to send its run's status."""


def run_here(search: Search, data: PreparedData, view: View, *, wait_for_others: bool) -> None:
    """One trial after the other, in this process; then wait for those that other drivers have."""
    while True:
        if (task := search.next()) is None:
            if not (wait_for_others and search.goes_on()):
                return
            time.sleep(OTHERS_S)
            view.update()
            continue

        def report(epoch: int, metrics: Mapping[str, float], task: Task = task) -> str | None:
            view.heard(task.number, metrics["val_accuracy"])
            return search.epoch(task.number, epoch, metrics)

        def begun(run: tracking.Run, _: CheckpointSlot, task: Task = task) -> None:
            search.begun(task.number, run.journal)

        def ended(outcome: Outcome, task: Task = task) -> None:
            search.ended(task.number, outcome)

        objective.run(search.job, task, data, report, begun, ended=ended)
        view.update()


class Worker:
    """A process that runs the trials it is handed, and the near end of its line."""

    def __init__(self, job: Job, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, far = context.Pipe()
        level = logging.getLevelName(logging.getLogger().level).lower()
        self.process = context.Process(
            target=_work, args=(job, far, level), name=f"worker {number + 1}", daemon=True
        )
        self.process.start()
        far.close()  # so that its end shows here
        self.task: Task | None = None

    def hand(self, task: Task) -> None:
        self.task = task
        self.line.send(task)


def run_in_workers(search: Search, view: View, *, wait_for_others: bool) -> None:
    """Trials side by side; a worker that dies is replaced, and its trial taken up again.

    Raises:
        EuroSATError: a worker cannot work at all: it ended with an error of ours.
    """
    workers = [Worker(search.job, number) for number in range(search.job.sweep.workers)]
    started = len(workers)

    def replace(dead: Worker) -> None:
        nonlocal started
        workers.remove(dead)
        _bury(search, dead)
        workers.append(Worker(search.job, started))
        started += 1

    try:
        while True:
            idle = [worker for worker in workers if worker.task is None]
            for worker in idle:
                if (task := search.next()) is None:
                    break
                try:
                    worker.hand(task)
                except ConnectionError:  # it died while it was idle
                    replace(worker)
            busy = [worker for worker in workers if worker.task is not None]
            if not busy:
                if not (wait_for_others and search.goes_on()):
                    return
                time.sleep(OTHERS_S)
                continue
            for ready in wait([worker.line for worker in busy], timeout=1):
                worker = next(one for one in busy if one.line is ready)
                try:
                    _hear(search, worker, view)
                except (EOFError, ConnectionError):
                    replace(worker)
            view.update()
    except BaseException:
        for worker in workers:
            worker.process.terminate()  # its run ends as KILLED
        raise
    finally:
        for worker in workers:
            worker.line.close()  # one that has nothing to do ends
        deadline = time.monotonic() + LAST_WORDS_S
        for worker in workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()


def _hear(search: Search, worker: Worker, view: View) -> None:
    assert worker.task is not None
    number = worker.task.number
    match worker.line.recv():
        case ("begun", run):
            search.begun(number, run)
        case ("epoch", epoch, metrics):
            worker.line.send(search.epoch(number, epoch, metrics))
            view.heard(number, metrics["val_accuracy"])
        case (Outcome() as outcome,):
            worker.task = None
            search.ended(number, outcome)
            with contextlib.suppress(ConnectionError):  # it died: the next trial will find out
                worker.line.send("heard")  # now the worker drops the trial's state


def _bury(search: Search, worker: Worker) -> None:
    assert worker.task is not None
    worker.process.join()
    code = worker.process.exitcode
    if (
        code not in (None, exit_codes.TERMINATED, exit_codes.INTERRUPTED) and code > 0
    ):  # an error, told already: another one would meet it too
        search.ended(worker.task.number, Outcome(state="fail"))
        raise EuroSATError(f"{worker.process.name} of the sweep died: see the log above")
    how = f"killed by signal {-code}" if code and code < 0 else "told to end"
    search.died(worker.task.number, f"{worker.process.name} was {how}")


def _work(job: Job, line: Connection, level: str) -> None:
    """A worker process: exits 2 on an error of ours, told in one line."""
    os.environ[STYLE] = "lines"  # the terminal has one bar, the driver's
    logs.setup(level)
    told = threading.Event()
    threading.Thread(target=_follow, args=(told,), name="driver", daemon=True).start()
    cli.run_command(lambda _: _take_tasks(job, line, told), [])


def _follow(told: threading.Event) -> None:
    """Ends this process after its driver, in the middle of an epoch too: the trial is another's.

    Unless the line has ``told`` of it.
    """
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    if not told.wait(NOTICED_S):
        os.kill(os.getpid(), signal.SIGTERM)  # the run ends as KILLED


def _take_tasks(job: Job, line: Connection, told: threading.Event) -> int:
    data: PreparedData | None = None

    def end(gone: BaseException) -> NoReturn:
        """The driver is gone: its trials are kept for another one."""
        told.set()
        raise SystemExit(exit_codes.TERMINATED) from gone

    def say(*words: Any) -> None:
        try:
            line.send(words)
        except OSError as gone:
            end(gone)

    def hear() -> Any:
        try:
            return line.recv()
        except (EOFError, OSError) as gone:
            end(gone)

    def ask(epoch: int, metrics: Mapping[str, float]) -> str | None:
        say("epoch", epoch, dict(metrics))
        answer: str | None = hear()
        return answer

    def ended(outcome: Outcome) -> None:
        say(outcome)
        hear()

    while True:
        try:
            task = line.recv()
        except (EOFError, OSError):
            told.set()
            return exit_codes.OK
        data = data or prepare(compose(job.overrides))
        objective.run(job, task, data, ask, lambda run, _: say("begun", run.journal), ended=ended)
