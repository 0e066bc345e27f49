"""Find the run of a journal on the server.

Runs carry the id of their journal as a tag. Every writer can set that tag on any run, and chooses
start time and user of a run that it creates. So the tag only finds candidates: it never says which
of several runs is meant, and never allows that a run is deleted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eurosat.errors import TrackingError
from eurosat.tracking import journal_index
from eurosat.tracking.journal import PREFIX

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

JOURNAL_TAG = "journal.id"
"""Tag with the id of a run's journal: it finds a run whose id did not arrive here."""
PARENT, NAME_TAG, USER_TAG = "mlflow.parentRunId", "mlflow.runName", "mlflow.user"
CREATION_TAGS = frozenset({JOURNAL_TAG, PARENT, NAME_TAG, USER_TAG})
"""Tags that a run has from its creation."""
NOT_FOUND_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for what does not exist; the second for an unknown alias of a known model."""


def find_run(client: "MlflowClient", reference: str) -> str | None:
    """Return the run id for a run id or ``journal:ID``; None if the server does not have the run.

    A journal on this machine knows its run. Otherwise there must be only one run with the tag,
    aside from empty copies that a repeated request created.

    Raises:
        TrackingError: several runs have the tag.
    """
    if not reference.startswith(PREFIX):
        return reference
    if (known := _recorded_run_id(reference)) and _is_active(client, known):
        return known
    candidates = tagged_runs(client, reference.removeprefix(PREFIX))
    if len(candidates) > 1:
        candidates = _without_empty_copies(client, candidates)
    run_ids = [str(run.info.run_id) for run in candidates]
    if len(run_ids) > 1:
        raise TrackingError(
            f"{len(run_ids)} runs have the tag {JOURNAL_TAG} of {reference} "
            f"({', '.join(run_ids)}), and only one can be meant: give the id of the run instead, "
            "or remove the tag from the others"
        )
    return next(iter(run_ids), None)


def tagged_runs(client: "MlflowClient", journal_id: str) -> list["Run"]:
    """Return the runs of all experiments with this journal's tag, oldest first.

    Raises:
        TrackingError: this cannot be the id of a journal.
    """
    if not re.fullmatch(r"\w+", journal_id):
        raise TrackingError(f"{PREFIX}{journal_id!r} names no journal: give {PREFIX}ID")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            experiments,
            f"tags.`{JOURNAL_TAG}` = '{journal_id}'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            page_token=token,
        )
        runs += page
        if not (token := page.token):
            return runs


def identity(run: "Run") -> tuple[str, str, int]:
    """Return experiment id, user and start time of a run, which never change."""
    return str(run.info.experiment_id), str(run.info.user_id), int(run.info.start_time)


def is_empty(client: "MlflowClient", run_id: str) -> bool:
    """Return whether nothing was written to a run since its creation."""
    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    inputs = [*run.inputs.dataset_inputs, *run.inputs.model_inputs] if run.inputs else []
    is_written = run.data.metrics or run.data.params or set(run.data.tags) - CREATION_TAGS
    if is_written or inputs or outputs or run.info.status != "RUNNING":
        return False
    return not client.list_artifacts(run_id)


def _without_empty_copies(client: "MlflowClient", runs: Sequence["Run"]) -> list["Run"]:
    """Leave out empty runs that have the identity of another run with content."""
    copies = Counter(map(identity, runs))
    empty = {
        run.info.run_id
        for run in runs
        if copies[identity(run)] > 1 and is_empty(client, run.info.run_id)
    }
    with_content = {identity(run) for run in runs if run.info.run_id not in empty}
    return [run for run in runs if not (run.info.run_id in empty and identity(run) in with_content)]


def _recorded_run_id(reference: str) -> str | None:
    """Return the run id that the journal on this machine recorded, or None."""
    directory = journal_index.find_journal(reference)
    journal = journal_index.try_open(directory) if directory else None
    if journal is None:
        return None
    try:
        return journal.run_id
    finally:
        journal.close()


def _is_active(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in NOT_FOUND_CODES:
            return False
        raise
