"""Worker processes, forked from one process that has imported the libraries they need."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

PRELOAD = ("eurosat.training.fit", "mlflow")
"""Importing them takes ten seconds of a processor: once, instead of once for each worker."""


def context() -> ForkServerContext:
    """Return the context of all workers; the first one that is started starts the fork server."""
    shared = multiprocessing.get_context("forkserver")
    shared.set_forkserver_preload(list(PRELOAD))
    return shared


def pipe() -> tuple[Connection, Connection]:
    """Return the two ends of a pipe between this process and a worker."""
    return context().Pipe()


def create(
    target: Callable[..., None], args: tuple[Any, ...], *, name: str, daemon: bool = False
) -> ForkServerProcess:
    """Return a process that is not started yet, with the present environment variables.

    The fork server itself keeps those of its own start.
    """
    return context().Process(
        target=_run, args=(dict(os.environ), target, args), name=name, daemon=daemon
    )


def _run(
    environment: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
