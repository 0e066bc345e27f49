"""The engine ``ray``: Ray Tune places the same trials on this machine or on a cluster.

Ray decides where a trial runs, its scheduler which ones are pruned. The trials, their runs and the
Optuna study are the same as with the other engine.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune

from eurosat import tracking
from eurosat.errors import TrackingError
from eurosat.runtime import exit_codes, ray_cluster
from experiments import studies
from experiments.objective import SweepJob
from experiments.ownership import SPENT_ATTR, process_identity
from experiments.ray_search import (
    BudgetStopper,
    DriverState,
    StudyCallback,
    make_scheduler,
    make_searcher,
)
from experiments.ray_trial import local_dir, make_trainable
from experiments.studies import DRIVER_ATTR, RELEASED, RETRIES_ATTR, RUN_ATTR
from experiments.sweep_progress import SweepProgress

log = logging.getLogger(__name__)

RAY_OPTIONS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has all metrics
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, as with the other engine
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    # an epoch reports no latency, and a failed trial no objective
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
"""Environment variables, unless the user has set them."""


def run(job: SweepJob, study: optuna.Study) -> None:
    """Run the trials that the study still lacks.

    ``RAY_STORAGE`` names the folder or bucket for checkpoints, which every node must reach.

    Raises:
        EuroSATError: Ray does not start, or the cluster cannot be reached.
    """
    for name, value in RAY_OPTIONS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # misses the disabled loggers
    ray_cluster.join(job.sweep.ray_address, tracking.tracking_uri())
    started, spent_before_s = time.monotonic(), float(study.user_attrs.get(SPENT_ATTR, 0))

    def stop_reason() -> str | None:
        return studies.stop_reason(study, job, spent_before_s + time.monotonic() - started)

    progress = SweepProgress(study, job)
    DriverState.study, DriverState.progress = study, progress
    DriverState.storage_url, DriverState.stop_reason = job.sweep.storage, stop_reason
    retries = _adopt_orphans(study)
    try:
        with progress.display():
            results = make_tuner(job, retries).fit()
    except (KeyboardInterrupt, SystemExit) as stop:
        ray.shutdown(wait_for_processes=True)  # on a cluster the trials' processes end soon after
        _end_runs(study, {"RUNNING": ("KILLED", {})})
        if isinstance(stop, SystemExit):  # Ray may have replaced its code
            raise SystemExit(exit_codes.TERMINATED) from stop
        raise
    finally:
        _release_trials(study)
    for error in results.errors:
        log.warning("a trial failed: %s", str(error).strip().splitlines()[-1])
    _close_orphaned_runs(study)
    if reason := stop_reason():
        log.info("sweep: %s", reason)


def make_tuner(job: SweepJob, retries: Mapping[int, int]) -> tune.Tuner:
    """Return a new tuner, or the one that a killed driver of this study has left.

    ``retries`` counts earlier retries by trial number.
    """
    sweep = job.sweep
    public_url = tracking.without_password(sweep.storage)  # others may read what Ray stores
    job = dataclasses.replace(job, sweep=dataclasses.replace(sweep, storage=public_url))
    folder = local_dir(job)
    storage_path = os.environ.get("RAY_STORAGE") or str(folder.parent)
    resources = {"cpu": sweep.trial_cpus, "gpu": sweep.trial_gpus}
    trainable = tune.with_resources(make_trainable(job, retries), resources)
    experiment_path = f"{storage_path}/{folder.name}"
    if tune.Tuner.can_restore(experiment_path):
        log.info("continuing the Ray experiment in %s", experiment_path)
        return tune.Tuner.restore(experiment_path, trainable=trainable)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=sweep.trials,
            max_concurrent_trials=sweep.workers,
            search_alg=make_searcher(job),
            scheduler=make_scheduler(job),
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=storage_path,
            stop=BudgetStopper(),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=studies.MAX_RETRIES),
            callbacks=[StudyCallback()],
            verbose=0,
        ),
    )


def _adopt_orphans(study: optuna.Study) -> dict[int, int]:
    """Take over the unfinished trials of a driver that is gone; return their retries by number.

    A driver that was stopped by Ctrl-C or SIGTERM has released its trials: that is no retry.
    """
    retries = {}
    for frozen in studies.own_trials(study):
        if frozen.state.is_finished() or RUN_ATTR not in frozen.user_attrs:
            continue
        was_released = frozen.user_attrs.get(DRIVER_ATTR) == RELEASED
        retries[frozen.number] = frozen.user_attrs.get(RETRIES_ATTR, 0) + (not was_released)
        trial = studies.reopen_trial(study, frozen)
        trial.set_user_attr(RETRIES_ATTR, retries[frozen.number])
        trial.set_user_attr(DRIVER_ATTR, process_identity())
    return retries


def _release_trials(study: optuna.Study) -> None:
    """Mark the unfinished trials as free, so that resuming them does not count as a retry."""
    with contextlib.suppress(optuna.exceptions.StorageInternalError):  # then it counts as a retry
        for frozen in studies.own_trials(study):
            if not frozen.state.is_finished():
                studies.reopen_trial(study, frozen).set_user_attr(DRIVER_ATTR, RELEASED)


def _close_orphaned_runs(study: optuna.Study) -> None:
    """End the trials and runs that no process will end.

    These are trials that Ray gave up or that only a killed driver knew, and runs whose process Ray
    has killed.
    """
    for frozen in studies.own_trials(study):
        if frozen.state == TrialState.RUNNING:
            study.tell(frozen.number, state=TrialState.FAIL)
    killed = {"failed.why": "its processes were killed"}
    _end_runs(study, {"FAIL": ("FAILED", killed), "PRUNED": ("KILLED", {"pruned": "true"})})


def _end_runs(study: optuna.Study, endings: Mapping[str, tuple[tracking.Status, Any]]) -> None:
    """End runs that are still open; ``endings`` gives status and tags by the trial's state."""
    for frozen in studies.own_trials(study):
        journal = frozen.user_attrs.get(RUN_ATTR)
        if journal and (ending := endings.get(frozen.state.name)):
            with contextlib.suppress(TrackingError):  # no server: the journal keeps the run open
                if tracking.get(journal).status == "RUNNING":
                    tracking.end(journal, *ending)
