"""Join a Ray cluster or start one on this machine, and pass settings to its processes."""

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
"""Prefixes of the variables sent to other machines: server, credentials, tiles."""
EXCLUDED_VARIABLES = (
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT",
    "MLFLOW_WEBHOOK",
    "EUROSAT_WEBHOOK",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_CRYPTO_KEK",
)
"""Prefixes of those that are not sent: the run that is open here, and secrets of the server."""


def join(address: str | None, tracking_uri: str) -> None:
    """Join the cluster at ``address``, or start one on this machine if it is None.

    The cluster's processes get this project's modules and the addresses of the server and the
    tiles. Does nothing if this process has joined a cluster already.

    Raises:
        EuroSATError: the cluster cannot be reached or started.
    """
    import ray

    if ray.is_initialized():
        return
    local: dict[str, Any] = (
        {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    )
    shipped = _runtime_env(tracking_uri, to_other_machines=bool(address))
    previous = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, logging_level=logging.WARNING, runtime_env=shipped, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EuroSATError(
            f"cannot join or start Ray at {address or 'this machine'}: {error}"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)  # Ray's handler exits with another code


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
