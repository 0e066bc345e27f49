"""Runs on the tracking server: the one place where this package calls MLflow.

A run is written into a journal on this machine and sent on from there (`runs`, `journal`,
`delivery`); what the server holds is read from it (`store`).
"""

from eurosat.tracking.journal import Status
from eurosat.tracking.mlflow_client import (
    ABSENT,
    BEST_RUN,
    PARENT,
    FinishedRun,
    alias_version,
    artifact,
    credentials,
    explained,
    finished_runs,
    first_line,
    get,
    latest_run,
    resolve_run,
    server,
    without_password,
)
from eurosat.tracking.run import (
    Run,
    Unlogged,
    attached,
    can_continue,
    code_commit,
    end,
    fail,
    flatten,
    known_as,
    new_journal,
    run,
    user,
)

__all__ = [
    "ABSENT",
    "BEST_RUN",
    "PARENT",
    "FinishedRun",
    "Run",
    "Status",
    "Unlogged",
    "alias_version",
    "artifact",
    "attached",
    "can_continue",
    "code_commit",
    "credentials",
    "end",
    "explained",
    "fail",
    "finished_runs",
    "first_line",
    "flatten",
    "get",
    "known_as",
    "latest_run",
    "new_journal",
    "resolve_run",
    "run",
    "server",
    "user",
    "without_password",
]
