"""Write and read runs; no other part of this package calls MLflow.

A `run` is written into a `journal` on this machine, and the `uploader` sends it from there.
`mlflow_client` reads what the server has.
"""

from eurosat.tracking.journal import Status, user
from eurosat.tracking.journal_runs import NOT_FOUND_CODES, PARENT
from eurosat.tracking.mlflow_client import (
    BEST_RUN,
    RunRecord,
    account,
    alias_version,
    all_versions,
    artifact,
    credentials,
    finished_runs,
    first_line,
    get,
    latest_run,
    resolve_run,
    runs_page,
    tracking_uri,
    translate_errors,
    without_password,
)
from eurosat.tracking.run import (
    NullRun,
    Run,
    append_to,
    can_continue,
    code_commit,
    end,
    fail,
    flatten,
    journal_state,
    new_journal,
    run,
)

__all__ = [
    "BEST_RUN",
    "NOT_FOUND_CODES",
    "PARENT",
    "NullRun",
    "Run",
    "RunRecord",
    "Status",
    "account",
    "alias_version",
    "all_versions",
    "append_to",
    "artifact",
    "can_continue",
    "code_commit",
    "credentials",
    "end",
    "fail",
    "finished_runs",
    "first_line",
    "flatten",
    "get",
    "journal_state",
    "latest_run",
    "new_journal",
    "resolve_run",
    "run",
    "runs_page",
    "tracking_uri",
    "translate_errors",
    "user",
    "without_password",
]
