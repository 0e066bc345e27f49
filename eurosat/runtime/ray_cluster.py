"""A Ray cluster: joined, or started on this machine, with what its processes need to know."""

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

from eurosat.errors import EuroSATError
from eurosat.runtime import telemetry
from eurosat.runtime.progress import STYLE

ROOT = Path(__file__).resolve().parents[2]
EXCLUDED_FILES = [".venv*", ".git", "mlruns", "mlartifacts", "*.db", "reports", "docs", "data_docs"]
SHIPPED_VARIABLES = ("MLFLOW_", "EUROSAT_", "OMP_", "GOOGLE_APPLICATION_CREDENTIALS")
"""Prefixes of what a process on another machine is told: the server, its credentials, the tiles."""
EXCLUDED_VARIABLES = (
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT",
    "MLFLOW_WEBHOOK",
    "EUROSAT_WEBHOOK",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_CRYPTO_KEK",
)
"""And of what it is not: which run is open here, and what is between the server and others."""


def join(address: str | None, tracking_uri: str) -> None:
    """Join the cluster at ``address``, or start one on this machine; once a process.

    Its processes have this project's modules, and know where the server and the tiles are.

    Raises:
        EuroSATError: there is no cluster.
    """
    import ray

    if ray.is_initialized():
        return
    local: dict[str, Any] = (
        {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    )
    shipped = _runtime_env(tracking_uri, to_other_machines=bool(address))
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, logging_level=logging.WARNING, runtime_env=shipped, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EuroSATError(
            f"Ray cannot be started at {address or 'this machine'}: {error}"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's own exits with another code


def _runtime_env(tracking_uri: str, *, to_other_machines: bool) -> dict[str, Any]:
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(SHIPPED_VARIABLES)
    }
    for name in [name for name in variables if name.startswith(EXCLUDED_VARIABLES)]:
        del variables[name]
    variables |= telemetry.OFF | {"MLFLOW_TRACKING_URI": tracking_uri, STYLE: "lines"}
    if to_other_machines:
        return {"working_dir": str(ROOT), "excludes": EXCLUDED_FILES, "env_vars": variables}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"env_vars": variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
