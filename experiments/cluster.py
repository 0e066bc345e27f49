"""The engine ``ray``: the same trials, placed by Ray Tune on this machine or on a cluster.

Ray decides where a trial runs, ASHA which ones are stopped; what a trial is and what it leaves are
those of the other engine, and so is the study, which Ray's OptunaSearch writes.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from ray import tune
from ray.tune import Callback, Tuner
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import Stopper
from ray.tune.trainable.function_trainable import wrap_function

from eurosat import durable, logs, ray_cluster, tracking
from eurosat.config import compose, usual_cache
from eurosat.errors import EuroSATError, TrackingError
from eurosat.prepare import prepare
from eurosat.unfinished import Unfinished
from experiments import drivers, objective, search
from experiments import space as spaces
from experiments.objective import Job, Outcome, Task
from experiments.view import View

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

log = logging.getLogger(__name__)

LAST_WORDS_S = 60
"""A trial that is stopped is given so long to end its run."""
NUMBER, LOST = "trial.number", "trial.lost"
"""In a trial's configuration: its number in the study, and how often Ray has lost its process."""


def run(job: Job, study: optuna.Study) -> None:
    """Run the trials that the study still lacks.

    ``RAY_STORAGE`` names the folder or bucket for their checkpoints, which every node must reach.

    Raises:
        EuroSATError: Ray or the cluster cannot be had.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has it all
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep, as elsewhere
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # misses those loggers' files
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    ray_cluster.join(job.sweep.ray_address)
    Listener.study, Listener.view = study, View(study, job)
    retries = _take_up(study)
    try:
        with Listener.view.shown():
            results = tuner(job, retries).fit()
    finally:
        _release(study)
    for error in results.errors:
        log.warning("a trial failed: %s", str(error).strip().splitlines()[-1])
    _bury_the_lost(study)


def home(job: Job) -> Path:
    """What this machine keeps of the sweep; another storage may have a study of the same name."""
    return usual_cache() / "ray" / f"{job.study}-{job.parent.removeprefix('journal:')[:8]}"


def tuner(job: Job, retries: Mapping[int, int]) -> Tuner:
    """A new one, or the one of this study as a driver that was killed has left it.

    ``retries`` says how often each trial was left so.
    """
    sweep = job.sweep
    kept = os.environ.get("RAY_STORAGE") or str(home(job).parent)
    resources = {"cpu": sweep.trial_cpus, "gpu": sweep.trial_gpus}
    trial = tune.with_resources(trainable(job, retries), resources)
    place = f"{kept}/{home(job).name}"
    if tune.Tuner.can_restore(place):
        log.info("continuing what is kept in %s", place)
        return tune.Tuner.restore(place, trainable=trial, resume_errored=True)
    return tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(
            num_samples=sweep.trials,
            max_concurrent_trials=sweep.workers,
            search_alg=searcher(job),
            scheduler=scheduler(job),
            time_budget_s=60 * sweep.minutes if sweep.minutes else None,
        ),
        run_config=tune.RunConfig(
            name=home(job).name,
            storage_path=kept,
            stop=Target(sweep.target, sweep.trial_epochs),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=search.MOST_RETRIES),
            callbacks=[Listener()],
            verbose=0,
        ),
    )


class Searcher(OptunaSearch):
    """On the sweep's own study; what the scheduler stops counts as pruned there.

    Ray keeps it every few seconds, the study knows at once: after a driver was killed the study
    is right.
    """

    epochs = trials = 0
    """Of a whole trial; of the sweep."""

    def suggest(self, trial_id: str) -> Any:
        known = {trial.number for trial in self._ot_trials.values()}
        begun = search.own_trials(self._study)
        for frozen in begun:
            if not frozen.state.is_finished() and frozen.number not in known:
                self._ot_trials[trial_id] = optuna.Trial(self._study, frozen._trial_id)
                return {**frozen.params, NUMBER: frozen.number}
        if len(begun) >= self.trials:
            return self.FINISHED
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not self._has_ended(trial_id):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        whole = result and result.get("done_epochs", 0) >= self.epochs
        if not self._has_ended(trial_id):
            super().on_trial_complete(trial_id, result if whole else None, error)

    @property
    def _study(self) -> optuna.Study:
        study: Any = self._ot_study  # typed as None, which it is until its space is known
        assert isinstance(study, optuna.Study)
        return study

    def _has_ended(self, trial_id: str) -> bool:
        number = self._ot_trials[trial_id].number
        return bool(self._study.get_trials(deepcopy=False)[number].state.is_finished())


@dataclass
class Suggest:
    """Asks the sampler for a value per key; pickled with the searcher."""

    space: spaces.Space

    def __call__(self, trial: optuna.Trial) -> dict[str, Any]:
        spaces.suggest(trial, self.space)
        return {NUMBER: trial.number}


def searcher(job: Job) -> Searcher:
    modes = {"accuracy": "max", "latency": "min"}
    metrics = list(job.sweep.aims)
    several = len(metrics) > 1
    made = Searcher(
        Suggest(spaces.load(job.sweep.space)),
        metric=metrics if several else metrics[0],
        mode=[modes[one] for one in metrics] if several else modes[metrics[0]],
        sampler=search.sampler(job.sweep),
        study_name=job.study,
        storage=search.storage(job.sweep.storage, beats=False),  # Ray knows which trials live
    )
    made.epochs, made.trials = job.sweep.trial_epochs, job.sweep.trials
    return made


def scheduler(job: Job) -> "TrialScheduler | None":
    told: dict[str, Any] = {"time_attr": "done_epochs", "metric": "accuracy", "mode": "max"}
    if len(job.sweep.aims) > 1 or job.sweep.pruner == "none":
        return None
    if job.sweep.pruner == "asha":
        return ASHAScheduler(
            **told, grace_period=search.first_rung(job.sweep), max_t=job.sweep.trial_epochs,
            reduction_factor=search.REDUCTION,
        )  # fmt: skip
    return MedianStoppingRule(**told, grace_period=1, min_samples_required=2)


class Target(Stopper):
    """Ends the sweep once a whole trial is as accurate as the target."""

    def __init__(self, accuracy: float | None, epochs: int) -> None:
        self._accuracy, self._epochs, self._reached = accuracy, epochs, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self._accuracy is not None and result.get("done_epochs", 0) >= self._epochs:
            self._reached = self._reached or result["accuracy"] >= self._accuracy
        return False

    def stop_all(self) -> bool:
        return self._reached


class Listener(Callback):
    """Keeps the view up to date, and notes in the study which run a trial has."""

    study: optuna.Study
    view: View
    """Both of the class: Ray keeps its callbacks with the experiment and brings them back."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        number = trial.config[NUMBER]
        frozen = self.study.get_trials(deepcopy=False)[number]
        if frozen.user_attrs.get(search.RUN) != result["run"] and not frozen.state.is_finished():
            optuna.Trial(self.study, frozen._trial_id).set_user_attr(search.RUN, result["run"])
        self.view.heard(number, result["accuracy"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Ray starts it again, in a new process that is given this configuration."""
        trial.config[LOST] = trial.config.get(LOST, 0) + 1

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self.view.update()


def trainable(job: Job, retries: Mapping[int, int]) -> Any:
    """One trial as Ray runs it, in a process of its own."""
    ended = "_ended"

    def trial(config: Mapping[str, Any]) -> None:
        done = threading.Event()
        globals()[ended] = done  # there is one trial in a process
        try:
            carry_out(job, config, retries)
        finally:
            done.set()

    class Trial(wrap_function(trial)):  # type: ignore[misc]
        def cleanup(self) -> None:
            """Ray ends the process after it; the trial has its run to end first."""
            super().cleanup()
            if done := globals().get(ended):
                done.wait(LAST_WORDS_S)

    return Trial


def carry_out(job: Job, config: Mapping[str, Any], retries: Mapping[int, int]) -> None:
    """Train in a process of Ray's, telling Ray of each epoch."""
    logs.setup("info")
    data = prepare(compose(job.overrides))
    values = {name: value for name, value in config.items() if name not in (NUMBER, LOST)}
    number, threads = config[NUMBER], max(1, int(job.sweep.trial_cpus))
    again = retries.get(number, 0) + config.get(LOST, 0)
    task = Task(number=number, values=values, retries=again, threads=threads)
    best, run = 0.0, ""
    kept: Path | None = None

    def tell(epoch: int, **more: Any) -> str | None:
        checkpoint = None
        if job.sweep.ray_address and kept and kept.exists():  # for a node that takes over
            checkpoint = tune.Checkpoint.from_directory(kept)
        told = {"accuracy": best, "done_epochs": epoch, "run": run} | more
        try:
            tune.report(told, checkpoint=checkpoint)
        except SystemExit:  # how Ray says that the trial is stopped
            return "pruned"
        return None

    def report(epoch: int, metrics: Mapping[str, float]) -> str | None:
        nonlocal best
        best = max(best, metrics["val_accuracy"])
        # the last epoch is told with the trial's values, when it has ended
        return tell(epoch + 1) if epoch + 1 < job.sweep.trial_epochs else None

    def begun(opened: tracking.Run, saved: Unfinished) -> None:
        nonlocal run, kept
        run, kept = opened.journal, saved.directory

    done = home(job) / f"trial-{task.number}.json"

    def ended(outcome: Outcome) -> None:
        done.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_text(done, json.dumps(dataclasses.asdict(outcome)))

    if done.exists():  # a driver that was killed did not know
        outcome = Outcome(**json.loads(done.read_text()))
    else:
        with contextlib.ExitStack() as stack:
            checkpoint = tune.get_checkpoint()
            left = Path(stack.enter_context(checkpoint.as_directory())) if checkpoint else None
            outcome = objective.run(job, task, data, report, begun, left, ended)
    if outcome.state == "complete":
        best = outcome.values[0]
        named = dict(zip(job.sweep.aims, outcome.values, strict=True))
        tell(job.sweep.trial_epochs, **named)
    elif outcome.state == "fail":
        raise EuroSATError(f"trial {task.number + 1} failed: see its run {outcome.run_id}")


def _take_up(study: optuna.Study) -> dict[int, int]:
    """How often each trial that is taken up was left by a driver that was killed.

    One that ended in an orderly way has let its trials go: taking them up is no retry.
    """
    retries = {}
    for frozen in search.own_trials(study):
        if frozen.state.is_finished() or search.RUN not in frozen.user_attrs:
            continue
        released = frozen.user_attrs.get(search.DRIVER) == search.RELEASED
        retries[frozen.number] = frozen.user_attrs.get(search.RETRIES, 0) + (not released)
        trial = optuna.Trial(study, frozen._trial_id)
        trial.set_user_attr(search.RETRIES, retries[frozen.number])
        trial.set_user_attr(search.DRIVER, drivers.me())
    return retries


def _release(study: optuna.Study) -> None:
    with contextlib.suppress(optuna.exceptions.StorageInternalError):  # then it counts as one
        for frozen in search.own_trials(study):
            if not frozen.state.is_finished():
                trial = optuna.Trial(study, frozen._trial_id)
                trial.set_user_attr(search.DRIVER, search.RELEASED)


def _bury_the_lost(study: optuna.Study) -> None:
    """End the runs of trials that Ray gave up, or that a killed driver alone knew of."""
    from optuna.trial import TrialState

    for trial in search.own_trials(study):
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL:
            continue
        if reference := trial.user_attrs.get(search.RUN):
            with contextlib.suppress(TrackingError):  # the server is away: its journal is kept
                if tracking.get(reference).status == "RUNNING":
                    tracking.fail(reference, "its processes were killed")
