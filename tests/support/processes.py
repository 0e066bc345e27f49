"""Start our commands as processes, forked from one that has imported their libraries.

Importing them takes each command some ten seconds of a processor. Everything else is as with
``python -m``: the process has its own id, signals, output, environment and exit code.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import coverage
import pytest

from tests.support.paths import ROOT

PRELOAD = (
    "eurosat.training.fit",
    "matplotlib.pyplot",
    "mlflow.server.fastapi_app",
    "onnxruntime.quantization",
    "optuna",
    "sklearn.metrics",
    "torch.onnx._internal.exporter._core",
    "uvicorn",
)
"""What our commands and MLflow's server import."""


COVERAGE_VARIABLE = "COVERAGE_PROCESS_CONFIG"
"""With it, coverage counts the lines that a process runs."""
_servers_coverage: dict[str, str] = {}
"""The variable for the processes of `_is_traced`, if others do not get it."""


class CommandProcess:
    """A command that runs; its methods and attributes are those of `subprocess.Popen`."""

    def __init__(self, process: ForkServerProcess, name: str, output: Path, errors: Path) -> None:
        assert process.pid is not None
        self._process, self.args, self.pid = process, name, process.pid
        self._output, self._errors = output, errors

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote to standard output and to standard error."""
        self.wait(timeout)
        return self._output.read_text(), self._errors.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def trace_servers_alone(patch: pytest.MonkeyPatch) -> None:
    """Count the lines of no process but our servers.

    Without `sys.monitoring`, before Python 3.12, coverage slows each process by half.
    """
    if config := os.environ.get(COVERAGE_VARIABLE):
        _servers_coverage[COVERAGE_VARIABLE] = config
        patch.delenv(COVERAGE_VARIABLE)


def _is_traced(module: str) -> bool:
    return module.startswith(("serving.", "registry.")) and module != "serving.ray_app"


def start(
    module: str,
    *arguments: str,
    folder: Path | None = None,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> CommandProcess:
    """Start ``python -m module arguments`` in ``folder``, as the leader of a process group.

    ``log`` gets what it prints, after what the file holds; else `CommandProcess.communicate`
    returns it.
    """
    environment = dict(os.environ if env is None else env)
    if _is_traced(module):
        environment |= _servers_coverage
    return start_function(_run_module, (module, arguments), folder=folder, log=log, env=environment)


def start_function(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    folder: Path | None = None,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> CommandProcess:
    """Call a function in a process of its own, as `start` runs a module."""
    output, errors = (log, log) if log else (_new_file(), _new_file())
    environment = dict(os.environ if env is None else env)
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    name = " ".join(map(str, (function.__name__, *arguments)))
    process = context.Process(
        target=_run,
        args=(function, arguments, str(folder or Path.cwd()), environment, output, errors),
        name=name,
    )
    process.start()
    command = CommandProcess(process, name, output, errors)
    atexit.register(command.kill)  # of a test that failed: Python would wait for it
    return command


def run(
    module: str, *arguments: str, folder: Path | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m module arguments`` to its end, like `subprocess.run`."""
    process = start(module, *arguments, folder=folder)
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), output, errors)


@functools.cache
def _output_folder() -> str:
    """Return the folder of the outputs that no ``log`` gets, until this process ends."""
    folder = tempfile.mkdtemp(prefix="outputs")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _new_file() -> Path:
    descriptor, name = tempfile.mkstemp(dir=_output_folder())
    os.close(descriptor)
    return Path(name)


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: str,
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    is_counted = COVERAGE_VARIABLE in os.environ
    os.environ.clear()
    os.environ.update(environment)
    if COVERAGE_VARIABLE in environment and not is_counted:
        coverage.process_startup()
    for stream, file in ((sys.stdout, output), (sys.stderr, errors)):
        with file.open("ab") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()


def _run_module(module: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
