"""What the sweep gives to Ray Tune: searcher, scheduler, stopper and callback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import Stopper

from eurosat import tracking
from experiments import space as spaces
from experiments import studies
from experiments.objective import SweepJob
from experiments.ray_trial import JOURNAL_KEY, LOST_KEY, NUMBER_KEY
from experiments.samplers import REDUCTION_FACTOR, first_rung_epochs, make_sampler
from experiments.sweep_progress import SweepProgress

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


class DriverState:
    """What this driver process alone knows.

    The classes below are pickled: Ray stores them with its experiment and restores them in another
    driver, which sets its own state here.
    """

    study: optuna.Study
    progress: SweepProgress
    storage_url: str
    """URL of the study's database, with its password."""
    stop_reason: Callable[[], str | None]
    """Returns why the sweep ends, or None."""


class CredentialFreeStorage(optuna.storages.RDBStorage):
    """A storage that is pickled without its URL: others may read what Ray stores."""

    def __reduce__(self) -> Any:
        return reopen_storage, ()


def reopen_storage() -> CredentialFreeStorage:
    """Connect to the driver's storage, without heartbeats: Ray knows which trials are alive."""
    storage = studies.open_storage(
        DriverState.storage_url, heartbeats=False, storage_class=CredentialFreeStorage
    )
    assert isinstance(storage, CredentialFreeStorage)
    return storage


class StudySearcher(OptunaSearch):
    """Ray's OptunaSearch on the sweep's own study, where trials that Ray stops become pruned.

    Ray saves its own state every few seconds, the study at once: after a driver was killed, the
    study is right. ``_ot_trials`` and ``_ot_study`` are private to Ray.
    """

    trial_epochs = num_trials = 0
    """Epochs of a complete trial; trials of the sweep."""

    def suggest(self, trial_id: str) -> Any:
        assigned = {trial.number for trial in self._ot_trials.values()}
        started = studies.own_trials(self._study)
        for frozen in started:
            if not frozen.state.is_finished() and frozen.number not in assigned:
                self._ot_trials[trial_id] = studies.reopen_trial(self._study, frozen)
                journal = frozen.user_attrs.get(studies.RUN_ATTR) or tracking.new_journal()
                return {**frozen.params, NUMBER_KEY: frozen.number, JOURNAL_KEY: journal}
        if len(started) >= self.num_trials or DriverState.stop_reason():
            return self.FINISHED
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not self._has_ended(trial_id):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        is_complete = result is not None and result.get("done_epochs", 0) >= self.trial_epochs
        error = error or bool(result and result.get("failed"))
        if error or not is_complete:
            result = None  # then OptunaSearch records the trial as failed or pruned
        if not self._has_ended(trial_id):
            super().on_trial_complete(trial_id, result, error)

    @property
    def _study(self) -> optuna.Study:
        study: Any = self._ot_study  # its type is None in Ray: it is set once the space is known
        assert isinstance(study, optuna.Study)
        return study

    def _has_ended(self, trial_id: str) -> bool:
        return bool(studies.stored_trial(self._ot_trials[trial_id]).state.is_finished())


@dataclass
class SuggestParams:
    """Takes one value per key from the sampler; pickled with the searcher."""

    space: spaces.Space

    def __call__(self, trial: optuna.Trial) -> dict[str, Any]:
        spaces.suggest(trial, self.space)
        return {NUMBER_KEY: trial.number, JOURNAL_KEY: tracking.new_journal()}


def make_searcher(job: SweepJob) -> StudySearcher:
    modes = {"accuracy": "max", "latency": "min"}
    metrics = list(job.sweep.objective_names)
    several = len(metrics) > 1
    searcher = StudySearcher(
        SuggestParams(spaces.load(job.sweep.space)),
        metric=metrics if several else metrics[0],
        mode=[modes[metric] for metric in metrics] if several else modes[metrics[0]],
        sampler=make_sampler(job.sweep),
        study_name=job.study,
        storage=reopen_storage(),
    )
    searcher.trial_epochs, searcher.num_trials = job.sweep.trial_epochs, job.sweep.trials
    return searcher


def make_scheduler(job: SweepJob) -> "TrialScheduler | None":
    """Return Ray's scheduler for the pruner; None for no pruning or several objectives."""
    if len(job.sweep.objective_names) > 1 or job.sweep.pruner == "none":
        return None
    arguments: dict[str, Any] = {"time_attr": "done_epochs", "metric": "accuracy", "mode": "max"}
    if job.sweep.pruner == "asha":
        return ASHAScheduler(
            **arguments,
            grace_period=first_rung_epochs(job.sweep),
            max_t=job.sweep.trial_epochs,
            reduction_factor=REDUCTION_FACTOR,
        )
    return MedianStoppingRule(**arguments, grace_period=1, min_samples_required=2)


class BudgetStopper(Stopper):
    """Stops running trials after their epoch once ``minutes`` or ``target`` is reached."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return bool(DriverState.stop_reason())

    def stop_all(self) -> bool:
        return False


class StudyCallback(Callback):
    """Updates the progress bar, and records in the study which run a trial has."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config[NUMBER_KEY]
        frozen = DriverState.study.get_trials(deepcopy=False)[number]
        if studies.RUN_ATTR not in frozen.user_attrs:
            self._record_run(number, trial.config[JOURNAL_KEY])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        number = trial.config[NUMBER_KEY]
        if journal := result["run"]:
            self._record_run(number, journal)
        DriverState.progress.record_accuracy(number, result["accuracy"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Count a lost process: Ray starts the trial again with this configuration."""
        trial.config[LOST_KEY] = trial.config.get(LOST_KEY, 0) + 1

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        DriverState.progress.update()

    def _record_run(self, number: int, journal: str) -> None:
        frozen = DriverState.study.get_trials(deepcopy=False)[number]
        if frozen.user_attrs.get(studies.RUN_ATTR) != journal and not frozen.state.is_finished():
            trial = studies.reopen_trial(DriverState.study, frozen)
            trial.set_user_attr(studies.RUN_ATTR, journal)
