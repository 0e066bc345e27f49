"""Progress on anything longer than two seconds: a bar on a terminal, lines elsewhere."""

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
LINE_EVERY_S = 10.0
"""How often a log that is not a terminal hears from a long job."""

STYLE = "EUROSAT_PROGRESS"
"""``lines`` asks for log lines on a terminal too, as two processes that share one need."""

log = logging.getLogger(__name__)


def bar() -> Progress:
    """A rich progress bar on standard error; the text column shows the task's ``note``."""
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
    """Yield ``items``, showing how many are done, how fast, and the time left."""
    with counter(total, label, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def counter(total: int, label: str, unit: str) -> Iterator[Callable[[float], None]]:
    """The same for work that tells itself how much more is done."""
    started = told = time.monotonic()
    done = 0.0
    with bar() as shown:
        task = shown.add_task(label, total=total, note="")

        def advance(more: float) -> None:
            nonlocal told, done
            done += more
            now = time.monotonic()
            rate = max(done, 1e-9) / max(now - started, 1e-9)
            shown.update(task, completed=int(done), note=f"{rate:,.0f} {unit}/s")
            if shown.disable and now - told > LINE_EVERY_S:
                told = now
                left = (total - done) / rate
                log.info("%s: %.0f of %d %s, %.0f s left", label, done, total, unit, left)

        yield advance


@contextmanager
def moving(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` bytes have moved; yields what threads tell of each piece."""
    lock = threading.Lock()
    with counter(math.ceil(total / 1e6), label, "MB") as count:

        def advance(size: int) -> None:
            with lock:
                count(size / 1e6)

        yield advance
