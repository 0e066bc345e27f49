"""Optuna studies in their database: create, load and read them."""

import contextlib
import dataclasses
import json
import logging
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.errors import ConfigError
from experiments import space as spaces
from experiments.objective import SweepJob
from experiments.ownership import (
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    SPENT_ATTR,
    process_identity,
)
from experiments.samplers import make_pruner, make_sampler
from experiments.settings import SweepConfig

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

MAX_RETRIES = 2
"""Retries of a trial whose worker or driver was killed."""
SQLITE_TIMEOUT_S = 60
"""Longest wait of one writer of an SQLite file for another."""
JOB_ATTR = "job"
"""Attribute of a study: its ``SweepJob`` as JSON."""
FROM_ATTR = "from_study"
"""Attribute of a trial that was copied from an earlier study: that study's name."""
RUN_ATTR, DRIVER_ATTR, RETRIES_ATTR = "run", "driver", "retries"
"""Attributes of a trial: the journal of its run, the identity of its driver, its retries so far."""
RELEASED = "released"
"""Value of DRIVER_ATTR after the driver was stopped by Ctrl-C or SIGTERM."""
RESUMABLE_SETTINGS = ("trials", "workers", "minutes", "target", "refit", "register")
RESUMABLE_SETTINGS_ON_RAY = ("refit", "register", "ray_address")
"""Settings that may change when a sweep is resumed; Ray restores the others by itself."""


def open_storage(
    url: str,
    *,
    heartbeats: bool = True,
    storage_class: "type[optuna.storages.RDBStorage] | None" = None,
) -> "optuna.storages.RDBStorage":
    """Connect to the database of studies.

    Raises:
        ConfigError: ``url`` is not a database that can be reached.
    """
    import optuna
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # optuna logs tracebacks of failed trials
    engine_options = {}
    if url.startswith("sqlite"):
        engine_options["connect_args"] = {"timeout": SQLITE_TIMEOUT_S}
    try:
        with without_heartbeat_warnings():
            return (storage_class or optuna.storages.RDBStorage)(
                url,
                engine_options,
                heartbeat_interval=HEARTBEAT_INTERVAL_S if heartbeats else None,
                grace_period=HEARTBEAT_TIMEOUT_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
            )
    except (SQLAlchemyError, ImportError) as error:
        reason = tracking.without_password(str(error).splitlines()[0])
        raise ConfigError(
            f"storage={tracking.without_password(url)} cannot be used ({reason}): "
            "give a URL such as sqlite:///optuna.db"
        ) from error


def create(job: SweepJob, space: spaces.Space, recipe: Mapping[str, Any]) -> "optuna.Study":
    """Create a study that holds what is needed to resume it; its first trial is the recipe itself.

    Raises:
        ConfigError: the study exists already, ``from_study`` does not fit this sweep, or a value of
            the recipe lies outside the space.
    """
    import optuna

    settings = job.sweep
    first = spaces.first_trial(recipe, space, settings.space)
    storage = open_storage(settings.storage)
    public_url = tracking.without_password(settings.storage)
    earlier_trials = _trials_of_earlier_study(storage, settings, space)
    try:
        study = optuna.create_study(
            study_name=job.study,
            storage=storage,
            directions=[
                "minimize" if name == "latency" else "maximize" for name in settings.objective_names
            ],
            sampler=make_sampler(settings),
            pruner=make_pruner(settings),
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ConfigError(
            f"study {job.study!r} is already in {public_url}: give another study=NAME, or "
            f"continue it by resume={job.study}"
        ) from error
    public_job = dataclasses.replace(job, sweep=dataclasses.replace(settings, storage=public_url))
    study.set_user_attr(JOB_ATTR, json.dumps(dataclasses.asdict(public_job)))
    for trial in earlier_trials:
        study.add_trial(trial)
    study.enqueue_trial(first)
    return study


def load(
    name: str, settings: SweepConfig, changed: Collection[str]
) -> tuple["optuna.Study", SweepJob]:
    """Load a study and its job; the job takes the ``changed`` settings from ``settings``.

    Raises:
        ConfigError: the study does not exist, or a changed setting is fixed for its lifetime.
    """
    import optuna

    storage = open_storage(settings.storage)
    try:
        stored_job = optuna.load_study(study_name=name, storage=storage).user_attrs.get(JOB_ATTR)
    except KeyError as error:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        public_url = tracking.without_password(settings.storage)
        raise ConfigError(f"{public_url} has no study {name!r}; it has {known}") from error
    if stored_job is None:
        raise ConfigError(f"study {name!r} was not made by a sweep: it cannot be continued")
    fields = json.loads(stored_job)
    on_ray = fields["sweep"]["engine"] == "ray"
    resumable = RESUMABLE_SETTINGS_ON_RAY if on_ray else RESUMABLE_SETTINGS
    known_settings = {field.name for field in dataclasses.fields(SweepConfig)}
    fixed_settings = known_settings - {"resume", "storage"} - set(resumable)
    if refused := sorted(fixed_settings & set(changed)):
        raise ConfigError(
            f"{refused[0]} of study {name} cannot be changed; drop it, or change one of "
            f"{', '.join(resumable)}"
        )
    new_values = {key: getattr(settings, key) for key in resumable if key in changed}
    sweep = SweepConfig(**fields["sweep"] | new_values | {"storage": settings.storage})
    job = SweepJob(
        sweep=sweep, study=name, overrides=tuple(fields["overrides"]), parent=fields["parent"]
    )
    # a seed of its own: the same one would suggest what other drivers have suggested already
    seed_offset = zlib.crc32(process_identity().encode()) % 1_000_000
    study = optuna.load_study(
        study_name=name,
        storage=storage,
        sampler=make_sampler(sweep, seed_offset),
        pruner=make_pruner(sweep),
    )
    return study, job


def own_trials(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Return the trials that were started in this study, without those of ``from_study``."""
    from optuna.trial import TrialState

    started = [state for state in TrialState if state != TrialState.WAITING]
    trials = study.get_trials(deepcopy=False, states=started)
    return [trial for trial in trials if FROM_ATTR not in trial.user_attrs]


def best_trial(study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """Return the finished trial of the highest validation accuracy."""
    from optuna.trial import TrialState

    finished = [trial for trial in own_trials(study) if trial.state == TrialState.COMPLETE]
    return max(finished, key=lambda trial: trial.values[0], default=None)


def has_unfinished_trials(study: "optuna.Study", job: SweepJob) -> bool:
    """Return whether trials remain to be started or to end."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    trials = own_trials(study)
    return (
        len(trials) < job.sweep.trials
        or any(repeats_lost_trial(trial) for trial in waiting)
        or not all(trial.state.is_finished() for trial in trials)
    )


def stop_reason(study: "optuna.Study", job: SweepJob, spent_s: float | None = None) -> str | None:
    """Return why no more trials start (``minutes`` or ``target``), or None if they may.

    ``spent_s`` is the time spent so far; None reads what the study has recorded.
    """
    settings, best = job.sweep, best_trial(study)
    if spent_s is None:
        spent_s = float(study.user_attrs.get(SPENT_ATTR, 0))
    if settings.minutes and spent_s > 60 * settings.minutes:
        return f"the limit of {settings.minutes:g} minutes is reached"
    if settings.target and best and best.values[0] >= settings.target:
        return f"trial {best.number} reached {best.values[0]:.4f}"
    return None


def repeats_lost_trial(trial: "optuna.trial.FrozenTrial") -> bool:
    """Return whether the trial repeats one whose driver was lost."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    with without_heartbeat_warnings():
        return RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) is not None


def reopen_trial(study: "optuna.Study", frozen: "optuna.trial.FrozenTrial") -> "optuna.Trial":
    """Return a stored trial that has not ended as one that can be written to.

    ``_trial_id`` is private to Optuna: it has no public way to continue a running trial.
    """
    import optuna

    return optuna.Trial(study, frozen._trial_id)


def stored_trial(trial: "optuna.Trial") -> "optuna.trial.FrozenTrial":
    """Return the trial as the database has it now."""
    return trial.study.get_trials(deepcopy=False)[trial.number]


def send_heartbeat(trial: "optuna.Trial") -> None:
    """Record in the database that the trial's driver is alive.

    ``_trial_id`` and the storage's heartbeat are private to Optuna, which sends heartbeats only
    from its own ``study.optimize``.
    """
    from optuna.exceptions import StorageInternalError

    with contextlib.suppress(StorageInternalError):  # a single lost heartbeat does no harm
        trial.storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_heartbeat_warnings() -> Iterator[None]:
    """Silence optuna's warnings that heartbeats are experimental and meant for its own loop."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with")
        yield


def _trials_of_earlier_study(
    storage: "optuna.storages.BaseStorage", settings: SweepConfig, space: spaces.Space
) -> list["optuna.trial.FrozenTrial"]:
    """Return copies of the finished trials of ``from_study``, marked with FROM_ATTR."""
    import optuna
    from optuna.trial import TrialState

    name = settings.from_study
    if name is None:
        return []
    try:
        earlier = optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise ConfigError(f"from_study={name} does not exist; the studies are: {known}") from error
    example = optuna.trial.FixedTrial(
        {key: spaces.example_value(entry) for key, entry in space.items()}
    )
    spaces.suggest(example, space)
    finished = earlier.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting = [trial for trial in finished if trial.distributions == example.distributions]
    if not fitting or len(earlier.directions) != len(settings.objective_names):
        raise ConfigError(
            f"from_study={name} has no finished trial of the same space and objectives: "
            "drop from_study, or take its space= and objectives="
        )
    log.info("the sampler starts with %d trials of study %s", len(fitting), name)
    return [
        optuna.trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            values=trial.values,
            user_attrs={FROM_ATTR: name},
        )
        for trial in fitting
    ]
