"""The study behind a sweep: what is tried next, what is stopped, and what a dead driver left."""

import contextlib
import dataclasses
import inspect
import json
import logging
import time
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.errors import ConfigError
from experiments import space as spaces
from experiments.drivers import BEAT_S, SPENT, STALE_S, every, is_gone, me
from experiments.objective import Job, Outcome, Task
from experiments.settings import SweepConfig

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

MOST_RETRIES = 2
"""Of a trial whose worker or driver was killed."""
REDUCTION = 4
"""Successive halving lets one in so many go on, as Optuna and Ray do by themselves."""
BUSY_S = 60
"""One writer of an SQLite file waits so long for another."""
JOB, FROM = "job", "from_study"
RUN, DRIVER, RETRIES = "run", "driver", "retries"
"""Attributes of the study, and of its trials."""
RELEASED = "released"
"""In the place of a driver that has ended in an orderly way, by Ctrl-C or SIGTERM."""
ANEW = ("trials", "workers", "minutes", "target", "refit", "register")
ANEW_ON_RAY = ("refit", "register", "ray_address")
"""What a continued sweep may be told otherwise than it began with; Ray keeps the rest itself."""


def storage(
    url: str, *, beats: bool = True, kind: "type[optuna.storages.RDBStorage] | None" = None
) -> "optuna.storages.RDBStorage":
    """Where studies are kept.

    Raises:
        ConfigError: it is no database that can be reached.
    """
    import optuna
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # tracebacks of failed trials
    try:
        with _quietly():
            return (kind or optuna.storages.RDBStorage)(
                url,
                {"connect_args": {"timeout": BUSY_S}} if url.startswith("sqlite") else None,
                heartbeat_interval=BEAT_S if beats else None,
                grace_period=STALE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MOST_RETRIES),
            )
    except (SQLAlchemyError, ImportError) as error:
        why = tracking.without_password(str(error).splitlines()[0])
        raise ConfigError(
            f"storage={tracking.without_password(url)} cannot be used ({why}): "
            "give a URL such as sqlite:///optuna.db"
        ) from error


def create(job: Job, search: spaces.Space, recipe: Mapping[str, Any]) -> "optuna.Study":
    """A new study, which knows how to be continued; its first trial is the recipe itself.

    Raises:
        ConfigError: there is one of that name, or the earlier one does not fit.
    """
    import optuna

    kept, where = storage(job.sweep.storage), tracking.without_password(job.sweep.storage)
    earlier = _earlier(kept, job.sweep, search)
    try:
        study = optuna.create_study(
            study_name=job.study,
            storage=kept,
            directions=["minimize" if aim == "latency" else "maximize" for aim in job.sweep.aims],
            sampler=sampler(job.sweep),
            pruner=pruner(job.sweep),
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ConfigError(
            f"study {job.study!r} is already in {where}: give another study=NAME, or "
            f"go on with it by resume={job.study}"
        ) from error
    told = dataclasses.replace(job, sweep=dataclasses.replace(job.sweep, storage=where))
    study.set_user_attr(JOB, json.dumps(dataclasses.asdict(told)))
    for one in earlier:
        study.add_trial(one)
    study.enqueue_trial(spaces.inside(recipe, search))
    return study


def load(name: str, settings: SweepConfig, given: Collection[str]) -> tuple["optuna.Study", Job]:
    """A study that was begun, and its job with those of ``settings`` that were ``given`` anew.

    Raises:
        ConfigError: there is no such study, or it cannot be told that.
    """
    import optuna

    kept = storage(settings.storage)
    try:
        held = optuna.load_study(study_name=name, storage=kept).user_attrs.get(JOB)
    except KeyError as error:
        known = ", ".join(optuna.get_all_study_names(kept)) or "none"
        where = tracking.without_password(settings.storage)
        raise ConfigError(f"{where} has no study {name!r}; it has {known}") from error
    if held is None:
        raise ConfigError(f"study {name!r} was not made by a sweep: it cannot be continued")
    told = json.loads(held)
    anew = ANEW_ON_RAY if told["sweep"]["engine"] == "ray" else ANEW
    fields = {field.name for field in dataclasses.fields(SweepConfig)} - {"resume", "storage"}
    if fixed := sorted((fields & set(given)) - set(anew)):
        raise ConfigError(
            f"{fixed[0]} of study {name} cannot be told anew; what can is {', '.join(anew)}"
        )
    changed = {one: getattr(settings, one) for one in anew if one in given}
    sweep = SweepConfig(**told["sweep"] | changed | {"storage": settings.storage})
    job = Job(sweep=sweep, study=name, overrides=tuple(told["overrides"]), parent=told["parent"])
    own = zlib.crc32(me().encode()) % 1_000_000  # not what others drew from the same seed
    study = optuna.load_study(
        study_name=name, storage=kept, sampler=sampler(sweep, own), pruner=pruner(sweep)
    )
    return study, job


def sampler(settings: SweepConfig, beyond: int = 0) -> "optuna.samplers.BaseSampler":
    """By its name. TPE stops drawing at random after a quarter of the trials, at most ten.

    Raises:
        ConfigError: optuna has no such sampler, or it cannot be made without being told more.
    """
    import optuna

    kind = getattr(optuna.samplers, settings.sampler, None)
    known = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
    if settings.sampler not in known or kind is None:
        raise ConfigError(f"sampler={settings.sampler} is none of {', '.join(known)}")
    taken = inspect.signature(kind).parameters
    wanted: dict[str, Any] = {"seed": settings.sampler_seed + beyond}
    if kind is optuna.samplers.TPESampler:
        wanted["n_startup_trials"] = min(10, max(2, settings.trials // 4))
        wanted["constant_liar"] = settings.workers > 1
    if "population_size" in taken:  # with optuna's 50 a short sweep would have one generation
        wanted["population_size"] = min(50, max(4, settings.trials // 4))
    try:
        made: optuna.samplers.BaseSampler = kind(**{k: v for k, v in wanted.items() if k in taken})
    except (TypeError, ImportError) as error:
        raise ConfigError(f"sampler={settings.sampler} cannot be used here: {error}") from error
    return made


def pruner(settings: SweepConfig) -> "optuna.pruners.BasePruner":
    import optuna

    if settings.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first_rung(settings), reduction_factor=REDUCTION
        )
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=2)
    return optuna.pruners.NopPruner()


def first_rung(settings: SweepConfig) -> int:
    """Epochs after which successive halving first stops a trial.

    After one, a trial of a few epochs is still warming up: its rank says little of its last one.
    """
    return 2 if settings.trial_epochs > 3 else 1


def own_trials(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Those that were begun in the study itself, not those that it was warmed with."""
    from optuna.trial import TrialState

    begun = [state for state in TrialState if state != TrialState.WAITING]
    found = study.get_trials(deepcopy=False, states=begun)
    return [one for one in found if FROM not in one.user_attrs]


def unfinished(study: "optuna.Study", job: Job) -> bool:
    """Whether trials are left to be begun or ended."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    trials = own_trials(study)
    return (
        len(trials) < job.sweep.trials
        or any(_takes_up(one) for one in waiting)
        or not all(one.state.is_finished() for one in trials)
    )


def is_over(study: "optuna.Study", job: Job, spent_s: float | None = None) -> str | None:
    """Why no further trial begins, apart from their number; ``spent_s`` as far as is known."""
    sweep, top = job.sweep, best(study)
    if spent_s is None:
        spent_s = float(study.user_attrs.get(SPENT, 0))
    if sweep.minutes and spent_s > 60 * sweep.minutes:
        return f"its {sweep.minutes:g} minutes are over"
    if sweep.target and top and top.values[0] >= sweep.target:
        return f"trial {top.number + 1} reached {top.values[0]:.4f}"
    return None


def _takes_up(trial: "optuna.trial.FrozenTrial") -> bool:
    """Whether the trial repeats one that another driver lost."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    with _quietly():
        return RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) is not None


def best(study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """The finished trial of the highest validation accuracy."""
    from optuna.trial import TrialState

    finished = [one for one in own_trials(study) if one.state == TrialState.COMPLETE]
    return max(finished, key=lambda one: one.values[0], default=None)


class Search:
    """Says what is tried next, hears how it goes, and stops what is not worth its time.

    One a driver; several drivers may work on one study, on machines that share its storage.
    """

    def __init__(self, job: Job, study: "optuna.Study", threads: int = 0) -> None:
        self.job, self._study, self._threads = job, study, threads
        self._space = spaces.load(job.sweep.space)
        self._began, self._spent_s = time.monotonic(), float(study.user_attrs.get(SPENT, 0))
        self._running: dict[int, optuna.Trial] = {}
        self._again: list[optuna.Trial] = []
        self._take_up()

    def next(self) -> Task | None:
        """What to try now, or None where there is nothing (left) to begin."""
        while self._again and self._has_ended(self._again[0]):
            self._again.pop(0)  # another driver was quicker
        if self._again:
            trial = self._again.pop(0)
        elif self.over() or self._planned() <= len(own_trials(self._study)):
            return None
        else:
            with _quietly():
                trial = self._study.ask()
            lost = trial.user_attrs.get(RUN)
            released = trial.user_attrs.get(DRIVER) == RELEASED
            trial.set_user_attr(DRIVER, me())
            if lost:  # of another machine, taken up again here
                tracking.fail(lost, "it was taken up again on another machine")
                retries = trial.user_attrs.get(RETRIES, 0) + (not released)
                trial.set_user_attr(RETRIES, retries)
                if retries > MOST_RETRIES:
                    self._give_up(trial, "its drivers were lost", retries)
                    return self.next()
        self._running[trial.number] = trial
        self._beat(trial)
        return Task(
            number=trial.number,
            values=spaces.suggest(trial, self._space),
            retries=trial.user_attrs.get(RETRIES, 0),
            threads=self._threads,
        )

    def over(self) -> str | None:
        """Why no further trial begins, apart from their number."""
        spent_s = self._spent_s + time.monotonic() - self._began
        return is_over(self._study, self.job, spent_s)

    def begun(self, number: int, run: str) -> None:
        if not self._is_taken(number):
            self._running[number].set_user_attr(RUN, run)

    def epoch(self, number: int, epoch: int, metrics: Mapping[str, float]) -> str | None:
        """Why the trial is to stop, or None."""
        if self._is_taken(number):
            return "taken up by another driver"
        if len(self.job.sweep.aims) == 1:
            trial, done = self._running[number], epoch + 1
            if done not in trial.storage.get_trial(trial._trial_id).intermediate_values:
                trial.report(metrics["val_accuracy"], done)
            if trial.should_prune():
                return "pruned"
        over = self.over()
        return f"stopped: {over}" if over else None

    def ended(self, number: int, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        taken = self._is_taken(number)
        trial = self._running.pop(number)
        if taken:
            log.warning("trial %d was taken up by another driver", number + 1)
            return
        if outcome.run_id:
            trial.set_user_attr("run_id", outcome.run_id)
        if outcome.state == "complete":
            self._study.tell(trial, list(outcome.values))
        else:
            self._study.tell(trial, state=TrialState[outcome.state.upper()])

    def _is_taken(self, number: int) -> bool:
        """Whether the trial ended without us: we were silent for too long."""
        return self._has_ended(self._running[number])

    def _has_ended(self, trial: "optuna.Trial") -> bool:
        return bool(trial.storage.get_trial(trial._trial_id).state.is_finished())

    def died(self, number: int, why: str) -> None:
        """A trial's process is gone: it is taken up again, at most MOST_RETRIES times."""
        taken = self._is_taken(number)
        trial = self._running.pop(number)
        if not taken:
            self._retry(trial, why)

    def release(self) -> None:
        """End in an orderly way: who takes up what is left here does not count it as a retry."""
        from optuna.exceptions import StorageInternalError

        for trial in [*self._running.values(), *self._again]:
            with contextlib.suppress(StorageInternalError):  # then it counts as one
                if not self._has_ended(trial):
                    trial.set_user_attr(DRIVER, RELEASED)

    def _retry(self, trial: "optuna.Trial", why: str) -> None:
        retries = trial.user_attrs.get(RETRIES, 0) + 1
        if retries <= MOST_RETRIES:
            log.warning("trial %d: %s; it is taken up again", trial.number + 1, why)
            trial.set_user_attr(RETRIES, retries)
            trial.set_user_attr(DRIVER, me())  # it waits here, and for nobody else
            self._again.append(trial)
            return
        self._give_up(trial, why, retries)
        if run := trial.user_attrs.get(RUN):
            tracking.fail(run, f"{why}, {retries} times")

    def _give_up(self, trial: "optuna.Trial", why: str, retries: int) -> None:
        from optuna.trial import TrialState

        log.warning("trial %d: %s, %d times now: it failed", trial.number + 1, why, retries)
        self._study.tell(trial, state=TrialState.FAIL)

    def _take_up(self) -> None:
        """Try again what a driver that is gone left running."""
        import optuna
        from optuna.trial import TrialState

        for frozen in own_trials(self._study):
            if frozen.state != TrialState.RUNNING:
                continue
            driver = frozen.user_attrs.get(DRIVER)
            trial = optuna.Trial(self._study, frozen._trial_id)
            if driver == RELEASED:
                trial.set_user_attr(DRIVER, me())
                self._again.append(trial)
            elif driver is None:  # it was just asked for, or its driver died of that
                self._beat(trial)  # so that it is failed where nobody else beats for it
            elif is_gone(driver):
                self._retry(trial, "its driver was killed")

    def _planned(self) -> int:
        """How many trials the study may have: those that take up a lost one do not count."""
        from optuna.storages import fail_stale_trials

        self._beat_all()  # this process may have slept
        with _quietly():
            fail_stale_trials(self._study)
        again = sum(_takes_up(one) for one in self._study.get_trials(deepcopy=False))
        return self.job.sweep.trials + again

    def goes_on(self) -> bool:
        """Whether other drivers have trials in hand that may come back."""
        return not self.over() and unfinished(self._study, self.job)

    def _beat_all(self) -> None:
        for trial in [*self._running.values(), *self._again]:
            self._beat(trial)

    def _beat(self, trial: "optuna.Trial") -> None:
        from optuna.exceptions import StorageInternalError

        with contextlib.suppress(StorageInternalError):  # one that is lost is no matter
            trial.storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Within, drivers on other machines hear that the trials here live."""
        with every(BEAT_S, self._beat_all):
            yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without optuna's words that heartbeats are experimental and meant for its own loop."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with")
        yield


def _earlier(
    kept: "optuna.storages.BaseStorage", settings: SweepConfig, search: spaces.Space
) -> list["optuna.trial.FrozenTrial"]:
    """Finished trials of the study ``from_study``, as they are added to another one."""
    import optuna
    from optuna.trial import TrialState

    if settings.from_study is None:
        return []
    try:
        old = optuna.load_study(study_name=settings.from_study, storage=kept)
    except KeyError as error:
        known = ", ".join(optuna.get_all_study_names(kept)) or "none"
        raise ConfigError(f"from_study={settings.from_study}: there are only {known}") from error
    asked = optuna.trial.FixedTrial({key: spaces.edge(one) for key, one in search.items()})
    spaces.suggest(asked, search)
    finished = old.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting = [one for one in finished if one.distributions == asked.distributions]
    if not fitting or len(old.directions) != len(settings.aims):
        raise ConfigError(
            f"from_study={settings.from_study} has no finished trial in this very space, with "
            "these objectives"
        )
    log.info("the sampler begins with %d trials of %s", len(fitting), settings.from_study)
    return [
        optuna.trial.create_trial(
            params=one.params,
            distributions=one.distributions,
            values=one.values,
            user_attrs={FROM: settings.from_study},
        )
        for one in fitting
    ]
