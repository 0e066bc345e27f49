"""Progress of long jobs: a bar on a terminal, log lines elsewhere."""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
LOG_INTERVAL_S = 10.0
"""Time between two log lines of a long job, if standard error is not a terminal."""

STYLE = "EUROSAT_PROGRESS"
"""Variable; ``lines`` requests log lines on a terminal too, for processes that share one."""

log = logging.getLogger(__name__)


def bar() -> Progress:
    """Return a rich progress bar on standard error; its text column shows the task's ``note``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty() or os.environ.get(STYLE) == "lines",
    )


def track(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """Yield ``items`` and show how many are done, the rate, and the time left."""
    with counter(total, label, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def counter(total: int, label: str, unit: str) -> Iterator[Callable[[float], None]]:
    """Show progress; yields a function to call with the number of units just done."""
    started = last_logged = time.monotonic()
    done = 0.0
    with bar() as shown:
        task = shown.add_task(label, total=total, note="")

        def advance(more: float) -> None:
            nonlocal last_logged, done
            done += more
            now = time.monotonic()
            rate = max(done, 1e-9) / max(now - started, 1e-9)
            shown.update(task, completed=int(done), note=f"{rate:,.0f} {unit}/s")
            if shown.disable and now - last_logged > LOG_INTERVAL_S:
                last_logged = now
                left = (total - done) / rate
                log.info("%s: %.0f of %d %s, %.0f s left", label, done, total, unit, left)

        yield advance


@contextmanager
def moving(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` bytes were transferred; threads may call what it yields."""
    lock = threading.Lock()
    with counter(math.ceil(total / 1e6), label, "MB") as count:

        def advance(size: int) -> None:
            with lock:
                count(size / 1e6)

        yield advance
