"""Progress on anything longer than two seconds: a bar on a terminal, lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
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
    started = told = time.monotonic()
    with bar() as shown:
        task = shown.add_task(label, total=total, note="")
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            rate = done / max(now - started, 1e-9)
            shown.update(task, advance=1, note=f"{rate:,.0f} {unit}/s")
            if shown.disable and now - told > LINE_EVERY_S:
                told = now
                log.info("%s: %d of %d, %.0f s left", label, done, total, (total - done) / rate)
