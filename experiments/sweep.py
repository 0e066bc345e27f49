"""Short Optuna trials search; the best configuration is refitted in full."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from eurosat import cli, logs, tracking, train
from eurosat.config import TrainConfig, build, compose
from eurosat.errors import ConfigError, EuroSATError, NonFiniteLoss
from eurosat.prepare import Prepared, prepare
from eurosat.progress import STYLE, bar
from experiments import space as spaces

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

T = TypeVar("T")

USAGE = """
usage: python -m experiments.sweep [key=value ...]

  trials=6         number of trials              workers=1        processes that run them
  trial_epochs=3   epochs of a trial             space=resnet18   experiments/spaces/NAME.yaml
  pruner=median    or none                       storage=sqlite:///optuna.db
  study=NAME       default: the parent run's id  sampler_seed=0   refit=true
  and everything that `python -m eurosat.train` takes: data=eurosat recipe=resnet18-quick ...
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    trials: int = 6
    workers: int = 1
    trial_epochs: int = 3
    """Epochs of a trial; its schedule is laid out for them, not cut short."""
    space: str = "resnet18"
    study: str | None = None
    storage: str = "sqlite:///optuna.db"
    sampler_seed: int = 0
    pruner: Literal["median", "none"] = "median"
    refit: bool = True

    def __post_init__(self) -> None:
        for name, limit in (("trials", 10_000), ("workers", 256), ("trial_epochs", 10_000)):
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} must be in [1, {limit}]; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker process needs to run trials of a study."""

    sweep: SweepConfig
    study: str
    overrides: tuple[str, ...]
    parent: str
    """Id of the parent run."""


class Estimate:
    """Time left of a sweep, from the epochs done so far."""

    def __init__(self, total_epochs: int) -> None:
        self._total, self._done, self._started = total_epochs, 0, time.monotonic()

    def skip(self, epochs: int) -> None:
        """Epochs that a pruned or stopped trial will not need."""
        self._total -= epochs

    def epoch_done(self) -> None:
        self._done += 1
        left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        log.info(
            "sweep: %d of %d epochs, about %s left in all", self._done, self._total, _time(left)
        )


def take(own: type[T], overrides: Sequence[str]) -> tuple[T, list[str]]:
    """The settings that the dataclass ``own`` knows, and what is left for the recipe.

    Raises:
        ConfigError: a value of its own does not fit.
    """
    import yaml

    names = {field.name for field in fields(own)}  # type: ignore[arg-type]
    given = dict(one.split("=", 1) for one in overrides if one.split("=", 1)[0] in names)
    try:
        values = {key: yaml.safe_load(value) for key, value in given.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"{given} cannot be read: {error}") from error
    return build(own, values), [one for one in overrides if one.split("=", 1)[0] not in names]


def sweep(settings: SweepConfig, overrides: tuple[str, ...], parent: tracking.Run) -> str | None:
    """Search, plot, refit. Returns the id of the refit's run, or None without a refit.

    Raises:
        EuroSATError: no trial finished, or a worker died.
    """
    config = compose(overrides)
    data = prepare(config)
    search = spaces.load(settings.space)
    compose([*overrides, *as_overrides({key: _any_of(one) for key, one in search.items()})])
    parent.set_tags({**data.tags, "kind": "sweep", "config.digest": config.digest})
    parent.log_params({"sweep": {f.name: getattr(settings, f.name) for f in fields(settings)}})
    parent.log_params(config.as_dict())
    name = settings.study or f"sweep-{parent.run_id}"
    study = _create_study(settings, name)
    study.enqueue_trial(spaces.inside(tracking.flatten(config.as_dict()), search))
    job = Job(sweep=settings, study=name, overrides=overrides, parent=parent.run_id)
    estimate = Estimate(
        settings.trials * settings.trial_epochs + settings.refit * config.trainer.epochs
    )
    if settings.workers == 1:
        for number in range(settings.trials):
            study.optimize(
                _objective(job, data, estimate, number), n_trials=1, catch=(NonFiniteLoss,)
            )
    else:
        _run_workers(job, study)
        estimate = Estimate(config.trainer.epochs)
    _conclude(study, parent)
    if not settings.refit:
        return None
    best = compose([*overrides, *as_overrides(study.best_params)])
    log.info("refitting the best in full: %s", study.best_params)
    tags = {"kind": "refit", "study": name, "trial.number": study.best_trial.number}
    with tracking.run(best.experiment, "refit of the best", parent=parent.run_id, tags=tags) as run:
        tested = train.train(best, data, run, lambda *_: estimate.epoch_done())
    parent.set_tags({tracking.BEST_RUN: run.run_id})
    parent.log_metrics(tested)
    print(train.summary(tested))
    return run.run_id


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _any_of(one: spaces.Range | spaces.Choices) -> Any:
    return one.low if isinstance(one, spaces.Range) else one.choices[0]


def _create_study(settings: SweepConfig, name: str) -> "optuna.Study":
    import optuna
    from optuna.pruners import MedianPruner, NopPruner
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # tracebacks of failed trials
    median = MedianPruner(n_startup_trials=2)
    try:
        return optuna.create_study(
            study_name=name,
            storage=settings.storage,
            direction="maximize",
            sampler=_sampler(settings, 0),
            pruner=median if settings.pruner == "median" else NopPruner(),
        )
    except (SQLAlchemyError, ImportError) as error:
        raise ConfigError(
            f"storage={settings.storage} cannot be used ({str(error).splitlines()[0]}): "
            "give a URL such as sqlite:///optuna.db"
        ) from error
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ConfigError(
            f"study {name!r} is already in {settings.storage}: give another study=NAME"
        ) from error


def _sampler(settings: SweepConfig, worker: int) -> "optuna.samplers.BaseSampler":
    """TPE that stops drawing at random after a third of the trials, at most its usual ten."""
    import optuna

    return optuna.samplers.TPESampler(
        seed=settings.sampler_seed + worker,
        n_startup_trials=min(10, max(2, settings.trials // 3)),
        constant_liar=settings.workers > 1,
    )


def _objective(
    job: Job, data: Prepared, estimate: Estimate | None, number: int, threads: int = 0
) -> Callable[["optuna.Trial"], float]:
    import optuna

    from eurosat import launch

    search = spaces.load(job.sweep.space)

    def objective(trial: "optuna.Trial") -> float:
        config = trial_config(job, spaces.suggest(trial, search), threads)
        label = f"trial {number + 1} of {job.sweep.trials}"
        tags = {"kind": "trial", "study": job.study, "trial.number": trial.number}

        with tracking.run(
            config.experiment, label, parent=job.parent, tags=tags, killed_by=(optuna.TrialPruned,)
        ) as run:

            def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
                trial.report(metrics["val_accuracy"], epoch)
                if estimate:
                    estimate.epoch_done()
                if epoch + 1 < config.trainer.epochs and trial.should_prune():
                    run.set_tags({"pruned": "true", "pruned.epoch": epoch + 1})
                    if estimate:
                        estimate.skip(config.trainer.epochs - epoch - 1)
                    log.info("%s: pruned after epoch %d", label, epoch + 1)
                    raise optuna.TrialPruned

            trial.set_user_attr("run_id", run.run_id)
            train.describe(config, data, run)
            try:
                return launch.fit(config, data, run, on_epoch).best["val_accuracy"]
            except NonFiniteLoss as error:
                log.warning("%s: %s", label, error)
                raise

    return objective


def trial_config(job: Job, suggested: Mapping[str, Any], threads: int) -> TrainConfig:
    """The recipe with what the sampler suggested, for a trial's few epochs."""
    of_trial = {**suggested, "trainer.epochs": job.sweep.trial_epochs}
    if threads:
        of_trial["trainer.threads"] = threads
    return compose([*job.overrides, *as_overrides(of_trial)])


def _run_workers(job: Job, study: "optuna.Study") -> None:
    """Run the trials in several processes that share the study's storage and the pack."""
    import multiprocessing

    from optuna.trial import TrialState

    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    level = logging.getLevelName(logging.getLogger().level).lower()
    workers = [
        context.Process(target=_work, args=(job, number, taken, level), name=f"worker {number}")
        for number in range(job.sweep.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        with bar() as shown:
            task = shown.add_task("sweep", total=job.sweep.trials, note="")
            while any(worker.is_alive() for worker in workers):
                workers[0].join(timeout=1)
                workers[-1].join(timeout=1)
                done = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
                shown.update(task, completed=done, note=f"{job.sweep.workers} workers")
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # its worker was killed
        if run_id := trial.user_attrs.get("run_id"):
            tracking.fail(run_id, "its worker died")
    if died := [worker.name for worker in workers if worker.exitcode]:
        raise EuroSATError(f"{', '.join(died)} of the sweep died: see the log above")


def _work(job: Job, worker: int, taken: Any, level: str) -> None:
    """A worker process: exits 2 on an error of ours, told in one line."""
    os.environ[STYLE] = "lines"  # the terminal has one bar, the parent's
    logs.setup(level)
    cli.finish(lambda _: _take_trials(job, worker, taken), [])


def _take_trials(job: Job, worker: int, taken: Any) -> int:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # tracebacks of failed trials
    from eurosat.machine import cores

    data = prepare(compose(job.overrides))
    study = optuna.load_study(
        study_name=job.study, storage=job.sweep.storage, sampler=_sampler(job.sweep, worker)
    )
    while True:
        with taken.get_lock():  # SQLite locks no rows: two workers would take one enqueued trial
            number, taken.value = taken.value, taken.value + 1
            if number >= job.sweep.trials:
                return cli.OK
            trial = study.ask()
        objective = _objective(job, data, None, number, max(1, cores() // job.sweep.workers))
        _carry_out(study, trial, objective)


def _carry_out(
    study: "optuna.Study", trial: "optuna.Trial", objective: Callable[["optuna.Trial"], float]
) -> None:
    """As `study.optimize` does with a trial that it asked for itself."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    try:
        value = objective(trial)
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except NonFiniteLoss:
        study.tell(trial, state=TrialState.FAIL)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    else:
        study.tell(trial, value)


def _conclude(study: "optuna.Study", parent: tracking.Run) -> None:
    """Log the study's table, counts and figures to the parent run.

    Raises:
        EuroSATError: no trial finished, so that there is no best.
    """
    from experiments.plots import draw_study

    states = [trial.state.name for trial in study.trials]
    counts = {
        f"trials_{name}": states.count(name.upper()) for name in ("complete", "pruned", "fail")
    }
    parent.log_metrics(counts)
    parent.set_tags({"study": study.study_name})
    parent.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
    if not counts["trials_complete"]:
        raise EuroSATError(
            f"none of {len(states)} trials finished ({states.count('FAIL')} failed): lower the "
            "learning rates of the space, or read the trials' logs"
        )
    parent.log_metrics({"best_val_accuracy": study.best_value})
    with tempfile.TemporaryDirectory() as folder:
        draw_study(study, Path(folder))
        parent.log_folder(Path(folder), "figures")
    print(
        f"{len(states)} trials: {counts['trials_complete']} finished, {counts['trials_pruned']} "
        f"pruned, {counts['trials_fail']} failed; best is trial {study.best_trial.number} "
        f"with validation accuracy {study.best_value:.4f}: {study.best_params}"
    )


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def main(argv: Sequence[str]) -> int:
    settings, rest = take(SweepConfig, cli.overrides(argv, USAGE))
    overrides = tuple(rest)
    config = compose(overrides)
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.run(config.experiment, f"sweep {config.recipe}", tags={"kind": "sweep"}) as parent,
        logs.copied_to(Path(folder) / "sweep.log") as file,
    ):
        try:
            best = sweep(settings, overrides, parent)
        finally:
            parent.log_file(file, "logs")
    print(f"sweep {parent.run_id}")
    if best:
        print(f"run {best}")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
