"""Short trials search; the best configuration is refitted in full."""

import contextlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking, train
from eurosat.config import compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import ConfigError, EuroSATError, TrackingError
from eurosat.runtime import cli, exit_codes, hardware, logs
from eurosat.training.checkpoints import acquire
from experiments import drivers, process_engine
from experiments import search as searches
from experiments import space as spaces
from experiments.objective import Job, as_overrides
from experiments.search import Search
from experiments.settings import SweepConfig, take
from experiments.sweep_progress import View

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

REFITTED = "sweep.refitted_trial"
"""Tag of the parent: the trial whose configuration was trained in full."""

USAGE = """
usage: python -m experiments.sweep [key=value ...]

  trials=6         number of trials              workers=1        trials side by side
  trial_epochs=3   epochs of a trial             space=resnet18   experiments/spaces/NAME.yaml
  minutes=M        begin no trial after          target=0.98      nor once a trial is as accurate
  sampler=TPESampler  of optuna.samplers         pruner=median    asha or none
  objectives=accuracy  or accuracy,latency       sampler_seed=0
  study=NAME       default: the parent run's id  storage=sqlite:///optuna.db
  resume=STUDY     go on with one that was cut   from_study=NAME  begin with its trials
  engine=optuna    processes here; or ray        ray_address=     of a cluster
  trial_cpus=1     of a trial on a cluster       trial_gpus=0
  refit=true       the best one, in full         register=false   and make it a version
  and everything that `python -m eurosat.train` takes: data=eurosat recipe=resnet18-quick ...
"""


def sweep(settings: SweepConfig, overrides: tuple[str, ...], parent: tracking.Run) -> str | None:
    """Search, plot, refit. Returns the id of the refit's run, or None without a refit.

    Raises:
        EuroSATError: no trial finished, or a worker cannot work.
    """
    config = compose(overrides)
    if settings.workers > 1 and config.trainer.devices > 1:
        raise ConfigError(
            f"workers={settings.workers} and trainer.devices={config.trainer.devices}: a worker "
            "starts no processes of its own; take one of them, or engine=ray"
        )
    data = prepare(config)
    space = spaces.load(settings.space)
    compose([*overrides, *as_overrides({key: spaces.edge(one) for key, one in space.items()})])
    parent.set_tags({**data.tags, "kind": "sweep", "config.digest": config.digest})
    told = asdict(settings) | {"storage": tracking.without_password(settings.storage)}
    parent.log_params({"sweep": told})
    parent.log_params(config.as_dict())
    name = settings.study or f"sweep-{parent.run_id.removeprefix('journal:')}"
    job = Job(sweep=settings, study=name, overrides=overrides, parent=parent.journal)
    study = searches.create(job, space, tracking.flatten(config.as_dict()))
    parent.set_tags({"study": name})
    return carry_on(job, study, data, parent)


def run_trials(job: Job, study: "optuna.Study", data: PreparedData, *, owner: bool) -> None:
    """All that are left; the owner also waits for those that other drivers have in hand."""
    if job.sweep.engine == "ray":
        from experiments import ray_engine

        return ray_engine.run(job, study)
    threads = max(1, hardware.cores() // job.sweep.workers) if job.sweep.workers > 1 else 0
    search = Search(job, study, threads)
    view = View(study, job)
    with search.alive(), view.shown():
        try:
            if job.sweep.workers == 1:
                process_engine.run_here(search, data, view, wait_for_others=owner)
            else:
                process_engine.run_in_workers(search, view, wait_for_others=owner)
        finally:
            search.release()
    if why := search.over():
        log.info("sweep: %s", why)
    return None


def carry_on(
    job: Job, study: "optuna.Study", data: PreparedData, parent: tracking.Run
) -> str | None:
    """What is left of a sweep: its trials, its figures, the refit of the best."""
    with drivers.owned(study):
        run_trials(job, study, data, owner=True)
        _conclude(study, parent)
        return _refitted(job, study, data, parent) if job.sweep.refit else None


def _refitted(job: Job, study: "optuna.Study", data: PreparedData, parent: tracking.Run) -> str:
    """The run of the best configuration, trained in full."""
    top = searches.best(study)
    assert top is not None
    best = compose([*job.overrides, *as_overrides(top.params)])
    number = str(top.number)
    if parent.tag(REFITTED) == number and (held := parent.tag(tracking.BEST_RUN)):
        log.info("the best, trial %d, is refitted already: run %s", top.number + 1, held)
        _register(job, held)
        return held
    log.info("refitting the best in full: %s", top.params)
    tags = {"kind": "refit", "study": job.study, "trial.number": top.number}
    place = {**data.fingerprints, "study": job.study, "trial": "refit"}
    with (
        acquire(best, place, exclusive=True) as saved,
        tracking.run(
            best.experiment,
            "refit of the best",
            parent=job.parent,
            journal=saved.start_or_resume(),
            resume=saved.journal,
            tags=tags,
        ) as run,
    ):
        tested = train.train(best, data, run, slot=saved)
    parent.log_metrics(tested)
    parent.set_tags({tracking.BEST_RUN: run.run_id, REFITTED: number})
    print(train.summary(tested))
    _register(job, run.run_id)
    return run.run_id


def _register(job: Job, run_id: str) -> None:
    """Make it a version of the model, where the sweep was asked to."""
    if job.sweep.register:
        command = [sys.executable, "-m", "registry.register", run_id]
        if subprocess.run(command).returncode:
            raise EuroSATError(f"run {run_id} was not registered: see above")


def _conclude(study: "optuna.Study", parent: tracking.Run) -> None:
    """Log the study's table, counts and figures to the parent run.

    Raises:
        EuroSATError: no trial finished, so that there is no best.
    """
    from experiments.plots import draw_study

    states = [trial.state.name for trial in searches.own_trials(study)]
    counts = {
        f"trials_{name}": states.count(name.upper()) for name in ("complete", "pruned", "fail")
    }
    parent.log_metrics(counts)
    parent.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
    if not counts["trials_complete"]:
        raise EuroSATError(
            f"none of {len(states)} trials finished ({states.count('FAIL')} failed): lower the "
            "learning rates of the space, or read the trials' logs"
        )
    top = searches.best(study)
    assert top is not None
    parent.log_metrics({"best_val_accuracy": top.values[0]})
    with tempfile.TemporaryDirectory() as folder:
        draw_study(study, Path(folder))
        parent.log_folder(Path(folder), "figures")
    print(
        f"{len(states)} trials: {counts['trials_complete']} finished, {counts['trials_pruned']} "
        f"pruned, {counts['trials_fail']} failed; best is trial {top.number + 1} "
        f"with validation accuracy {top.values[0]:.4f}: {top.params}"
    )


def main(argv: Sequence[str]) -> int:
    told = cli.overrides(argv, USAGE)
    settings, rest = take(SweepConfig, told)
    if settings.resume:
        return resume(settings, {one.partition("=")[0] for one in told}, rest)
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
    return tell(parent.run_id, best)


def resume(settings: SweepConfig, given: set[str], rest: Sequence[str]) -> int:
    """Go on with a study whose driver was killed, or help one that lives on another machine.

    Raises:
        ConfigError: there is no such study, or settings of the recipe are given anew.
    """
    if rest:
        raise ConfigError(f"resume={settings.resume} keeps the recipe it has: drop {rest[0]}")
    study, job = searches.load(str(settings.resume), settings, given)
    config = compose(job.overrides)
    data = prepare(config)
    reached = not given & {"trials", "minutes", "target"} and searches.is_over(study, job)
    if (reached or not searches.unfinished(study, job)) and is_concluded(job.parent):
        print(f"study {job.study} is complete; trials=N asks for more")
        return tell(job.parent, None)
    if not drivers.take(study):
        if job.sweep.engine == "ray":
            raise ConfigError(f"the driver of study {job.study} lives: give its cluster more nodes")
        run_trials(job, study, data, owner=False)
        print(f"study {job.study}: no trial is left to begin; its own driver concludes it")
        return exit_codes.OK
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.run(config.experiment, f"sweep {config.recipe}", resume=job.parent) as parent,
        logs.copied_to(Path(folder) / "sweep.log") as file,
    ):
        try:
            best = carry_on(job, study, data, parent)
        finally:
            parent.log_file(file, "logs")
    return tell(parent.run_id, best)


def is_concluded(parent: str) -> bool:
    """Whether the parent run has ended well; False where the server cannot be asked."""
    with contextlib.suppress(TrackingError):
        return tracking.get(parent).status == "FINISHED"
    return False


def tell(parent: str, best: str | None) -> int:
    print(f"sweep {parent}")
    if best:
        print(f"run {best}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
