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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune import Callback, Tuner
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import Stopper
from ray.tune.trainable.function_trainable import wrap_function

from eurosat import tracking
from eurosat.config import compose
from eurosat.data.prepare import prepare
from eurosat.errors import TrackingError
from eurosat.runtime import atomic, exit_codes, logs, ray_cluster
from eurosat.runtime.cache import cache_root
from eurosat.training.checkpoints import CheckpointSlot
from experiments import drivers, objective, search
from experiments import space as spaces
from experiments.objective import Job, Outcome, Task
from experiments.sweep_progress import View

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

log = logging.getLogger(__name__)

LAST_WORDS_S = 60
"""A trial that is stopped is given so long to end its run."""
NUMBER, LOST, JOURNAL = "trial.number", "trial.lost", "trial.journal"
"""In a trial's configuration: its number in the study, how often Ray has lost its process, and the
journal of its run."""


class Here:
    """What only this driver knows: Ray keeps the rest with the experiment and brings it back."""

    study: optuna.Study
    view: View
    url: str
    """Of the storage, with its password."""
    over: Callable[[], str | None]
    """Why the sweep ends, or None."""


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
    # an epoch tells no latency, nor one that failed
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    ray_cluster.join(job.sweep.ray_address, tracking.tracking_uri())
    began, before_s = time.monotonic(), float(study.user_attrs.get(drivers.SPENT, 0))
    Here.study, Here.view, Here.url = study, View(study, job), job.sweep.storage
    Here.over = lambda: search.is_over(study, job, before_s + time.monotonic() - began)
    retries = _take_up(study)
    try:
        with Here.view.shown():
            results = tuner(job, retries).fit()
    except (KeyboardInterrupt, SystemExit) as told:
        ray.shutdown(wait_for_processes=True)  # those of the trials; of a cluster they end soon
        _end_runs(study, {"RUNNING": ("KILLED", {})})
        if isinstance(told, SystemExit):  # Ray may have made another code of it
            raise SystemExit(exit_codes.TERMINATED) from told
        raise
    finally:
        _release(study)
    for error in results.errors:
        log.warning("a trial failed: %s", str(error).strip().splitlines()[-1])
    _bury_the_lost(study)
    if why := Here.over():
        log.info("sweep: %s", why)


def home(job: Job) -> Path:
    """What this machine keeps of the sweep; another storage may have a study of the same name."""
    return cache_root() / "ray" / f"{job.study}-{job.parent.removeprefix('journal:')[:8]}"


def tuner(job: Job, retries: Mapping[int, int]) -> Tuner:
    """A new one, or the one of this study as a driver that was killed has left it.

    ``retries`` says how often each trial was left so.
    """
    sweep = job.sweep
    told = dataclasses.replace(sweep, storage=tracking.without_password(sweep.storage))
    job = dataclasses.replace(job, sweep=told)  # Ray keeps it where others may read
    kept = os.environ.get("RAY_STORAGE") or str(home(job).parent)
    resources = {"cpu": sweep.trial_cpus, "gpu": sweep.trial_gpus}
    trial = tune.with_resources(trainable(job, retries), resources)
    place = f"{kept}/{home(job).name}"
    if tune.Tuner.can_restore(place):
        log.info("continuing what is kept in %s", place)
        return tune.Tuner.restore(place, trainable=trial)
    return tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(
            num_samples=sweep.trials,
            max_concurrent_trials=sweep.workers,
            search_alg=searcher(job),
            scheduler=scheduler(job),
        ),
        run_config=tune.RunConfig(
            name=home(job).name,
            storage_path=kept,
            stop=Limit(),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=search.MOST_RETRIES),
            callbacks=[Listener()],
            verbose=0,
        ),
    )


class Storage(optuna.storages.RDBStorage):
    """Pickled without its address: Ray keeps it where others may read."""

    def __reduce__(self) -> Any:
        return _storage, ()


def _storage() -> Storage:
    """Ray knows which trials live: they need no heartbeat."""
    made = search.storage(Here.url, beats=False, kind=Storage)
    assert isinstance(made, Storage)
    return made


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
                journal = frozen.user_attrs.get(search.RUN) or tracking.new_journal()
                return {**frozen.params, NUMBER: frozen.number, JOURNAL: journal}
        if len(begun) >= self.trials or Here.over():
            return self.FINISHED
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not self._has_ended(trial_id):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        whole = result and result.get("done_epochs", 0) >= self.epochs
        error = error or bool(result and result.get("failed"))
        if not self._has_ended(trial_id):
            super().on_trial_complete(trial_id, result if whole and not error else None, error)

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
        return {NUMBER: trial.number, JOURNAL: tracking.new_journal()}


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
        storage=_storage(),
    )
    made.epochs, made.trials = job.sweep.trial_epochs, job.sweep.trials
    return made


def scheduler(job: Job) -> "TrialScheduler | None":
    told: dict[str, Any] = {"time_attr": "done_epochs", "metric": "accuracy", "mode": "max"}
    if len(job.sweep.aims) > 1 or job.sweep.pruner == "none":
        return None
    if job.sweep.pruner == "asha":
        return ASHAScheduler(
            **told,
            grace_period=search.first_rung(job.sweep),
            max_t=job.sweep.trial_epochs,
            reduction_factor=search.REDUCTION,
        )
    return MedianStoppingRule(**told, grace_period=1, min_samples_required=2)


class Limit(Stopper):
    """Ends the trials that run, each after its epoch, once the sweep is over."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return bool(Here.over())

    def stop_all(self) -> bool:
        return False


class Listener(Callback):
    """Keeps the view up to date, and notes in the study which run a trial has."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config[NUMBER]
        if search.RUN not in Here.study.get_trials(deepcopy=False)[number].user_attrs:
            self._note(number, trial.config[JOURNAL])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        number = trial.config[NUMBER]
        if run := result["run"]:
            self._note(number, run)
        Here.view.heard(number, result["accuracy"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Ray starts it again, in a new process that is given this configuration."""
        trial.config[LOST] = trial.config.get(LOST, 0) + 1

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        Here.view.update()

    def _note(self, number: int, run: str) -> None:
        frozen = Here.study.get_trials(deepcopy=False)[number]
        if frozen.user_attrs.get(search.RUN) != run and not frozen.state.is_finished():
            optuna.Trial(Here.study, frozen._trial_id).set_user_attr(search.RUN, run)


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
    own = (NUMBER, LOST, JOURNAL)
    values = {name: value for name, value in config.items() if name not in own}
    number, threads = config[NUMBER], max(1, int(job.sweep.trial_cpus))
    again = retries.get(number, 0) + config.get(LOST, 0)
    task = Task(
        number=number, values=values, retries=again, threads=threads, journal=config[JOURNAL]
    )
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

    def begun(opened: tracking.Run, saved: CheckpointSlot) -> None:
        nonlocal run, kept
        run, kept = opened.journal, saved.directory

    done = home(job) / f"trial-{task.number}.json"

    def ended(outcome: Outcome) -> None:
        done.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write_text(done, json.dumps(dataclasses.asdict(outcome)))

    if done.exists():  # a driver that was killed did not know
        outcome = Outcome(**json.loads(done.read_text()))
    elif again > search.MOST_RETRIES:
        outcome = Outcome(state="fail")
    else:
        with contextlib.ExitStack() as stack:
            checkpoint = tune.get_checkpoint()
            left = Path(stack.enter_context(checkpoint.as_directory())) if checkpoint else None
            outcome = objective.run(job, task, data, report, begun, left, ended)
    if outcome.state == "complete":
        best = outcome.values[0]
        named = dict(zip(job.sweep.aims, outcome.values, strict=True))
        tell(job.sweep.trial_epochs, **named)
    elif outcome.state == "fail":  # trained again it would fail again
        tell(job.sweep.trial_epochs, failed=True)


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
    """End the trials that Ray gave up, or that a killed driver alone knew of, and their runs; and
    the runs of those that Ray ended by force.
    """
    for trial in search.own_trials(study):
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
    killed = {"failed.why": "its processes were killed"}
    _end_runs(study, {"FAIL": ("FAILED", killed), "PRUNED": ("KILLED", {"pruned": "true"})})


def _end_runs(study: optuna.Study, endings: Mapping[str, tuple[tracking.Status, Any]]) -> None:
    """Give the runs that no process ends any more the status and tags of their trials' states."""
    for trial in search.own_trials(study):
        reference = trial.user_attrs.get(search.RUN)
        if reference and (ending := endings.get(trial.state.name)):
            with contextlib.suppress(TrackingError):  # the server is away: its journal is kept
                if tracking.get(reference).status == "RUNNING":
                    tracking.end(reference, *ending)
