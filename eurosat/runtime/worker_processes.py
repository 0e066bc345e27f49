"""Worker processes, forked from one process that has imported the libraries they need."""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from typing import Any

PRELOAD = ("eurosat.training.fit", "mlflow")
"""Importing them takes ten seconds of a processor: once, instead of once for each worker."""


def create(
    target: Callable[..., None],
    args: tuple[Any, ...],
    *,
    name: str,
    daemon: bool = False,
    preload: Sequence[str] | None = None,
) -> ForkServerProcess:
    """Return a process that is not started yet, with the present environment variables.

    The first one that starts also starts the fork server, which keeps the variables of its start
    and imports ``preload``, by default PRELOAD.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD if preload is None else preload))
    return context.Process(
        target=_run, args=(dict(os.environ), target, args), name=name, daemon=daemon
    )


def _run(
    environment: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
