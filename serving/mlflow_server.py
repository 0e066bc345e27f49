"""Serve a registered model with MLflow's own scoring server, in this environment."""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from eurosat import tracking
from eurosat.errors import ConfigError
from eurosat.runtime import cli, logs, telemetry
from serving import judged_files

log = logging.getLogger(__name__)

CHAMPION = "models:/eurosat@champion"


def command(model: str, host: str, port: int, workers: int) -> list[str]:
    """Return the command of the server; another environment manager would first build a venv."""
    source = ["--model-uri", model, "--env-manager", "local"]
    address = ["--host", host, "--port", str(port), "--workers", str(workers)]
    return [sys.executable, "-m", "mlflow", "models", "serve", *source, *address]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the server: no telemetry, and our ``uvicorn`` first in PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    return dict(inherited) | telemetry.OFF | {"PATH": path}


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen on the address."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}): choose another") from error


def check_files(uri: str) -> None:
    """Check the version's files before MLflow runs its code.

    Raises:
        ModelError: they are not the files that were judged.
        TrackingError: they cannot be downloaded.
    """
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        with tracking.translate_errors(uri):
            files = download_artifacts(uri, dst_path=folder)
        judged_files.check(uri, Path(files))


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "serving.mlflow_server",
        "Serve a registered model with `mlflow models serve`, until stopped.",
    )
    parser.add_argument("--model", default=CHAMPION, help=f"models:/ or runs:/ ({CHAMPION})")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5001)
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if args.workers < 1:
        raise ConfigError(f"--workers must be 1 or more; got {args.workers}")
    check_address(args.host, args.port)
    uri = judged_files.resolve_alias(args.model)
    check_files(uri)
    run_id = tracking.resolve_run(uri)
    log.info("serving %s (run %s) on http://%s:%d", uri, run_id, args.host, args.port)
    argv = command(uri, args.host, args.port, args.workers)
    os.execve(argv[0], argv, environment(os.environ))  # noqa: S606 - a list, and no shell


if __name__ == "__main__":
    cli.run_command(main)
