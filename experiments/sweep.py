"""A sweep: short trials search a space around a recipe, then the best configuration is refitted.

One parent run holds the study's table and plots; each trial and the refit is a child run of it.
"""

import contextlib
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking, train
from eurosat.config import TrainConfig, compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import ConfigError, EuroSATError, TrackingError
from eurosat.runtime import cli, exit_codes, hardware, logs
from eurosat.training.checkpoints import acquire
from experiments import ownership, process_engine, studies
from experiments import space as spaces
from experiments.objective import SweepJob, as_overrides
from experiments.settings import SweepConfig, split_settings
from experiments.study_driver import StudyDriver
from experiments.sweep_progress import SweepProgress

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

REFITTED_TAG = "sweep.refitted_trial"
"""Tag of the parent run: the number of the trial whose configuration was trained in full."""

USAGE = """
usage: python -m experiments.sweep [key=value ...]

  trials=6         number of trials              workers=1        trials side by side
  trial_epochs=3   epochs of a trial             space=auto       the recipe's own, or NAME of
                                                                  experiments/spaces, or a file
  minutes=M        start no trial after M min    target=0.98      or after this accuracy
  sampler=TPESampler  of optuna.samplers         pruner=median    or asha, none
  objectives=accuracy  or accuracy,latency       sampler_seed=0
  study=NAME       default: sweep-RUN_ID         storage=sqlite:///optuna.db
  resume=STUDY     continue this study           from_study=NAME  start with its trials
  engine=optuna    processes here, or ray        ray_address=     of a Ray cluster
  trial_cpus=1     per trial, on a cluster       trial_gpus=0     per trial, on a cluster
  refit=true       train the best in full        register=false   and register it as a version
  and everything that `python -m eurosat.train` takes: data=eurosat recipe=resnet18-quick ...
"""


def main(argv: Sequence[str]) -> int:
    arguments = cli.overrides(argv, USAGE)
    settings, recipe = split_settings(SweepConfig, arguments)
    changed = {argument.partition("=")[0] for argument in arguments}
    hardware.warn_if_busy()
    if "resume" in changed:
        return resume(settings, changed, recipe)
    config = compose(recipe)
    with (
        tracking.run(config.experiment, run_name(config), tags={"kind": "sweep"}) as parent,
        _logged_to(parent),
    ):
        refit_run = run_sweep(settings, tuple(recipe), parent)
    return print_runs(parent, refit_run)


def run_name(config: TrainConfig) -> str:
    """Return the name of a sweep's parent run."""
    return f"sweep {config.recipe} on {config.data.label}"


def run_sweep(
    settings: SweepConfig, overrides: tuple[str, ...], parent: tracking.Run
) -> str | None:
    """Search and refit; return the id of the refit's run, or None for ``refit=false``.

    Raises:
        EuroSATError: the settings do not fit, no trial finished, or a worker failed.
    """
    config = compose(overrides)
    if settings.workers > 1 and config.trainer.devices > 1:
        raise ConfigError(
            f"workers={settings.workers} and trainer.devices={config.trainer.devices}: a worker "
            "starts no processes of its own; set one of them to 1, or engine=ray"
        )
    settings = replace(settings, space=spaces.choose(settings.space, config))
    space = spaces.load(settings.space)
    data = prepare(config)
    examples = {key: spaces.example_value(entry) for key, entry in space.items()}
    compose([*overrides, *as_overrides(examples)])  # raises if the recipe lacks a key of the space
    tags = {**data.tags, "data.name": config.data.label, "config.digest": config.digest}
    parent.set_tags(tags | {"kind": "sweep"})
    public_url = tracking.without_password(settings.storage)
    parent.log_params({"sweep": asdict(settings) | {"storage": public_url}})
    parent.log_params(config.as_dict())
    name = settings.study or f"sweep-{parent.run_id.removeprefix('journal:')}"
    job = SweepJob(sweep=settings, study=name, overrides=overrides, parent=parent.journal)
    study = studies.create(job, space, tracking.flatten(config.as_dict()))
    parent.set_tags({"study": name})
    log.info("study %s in %s", name, public_url)
    return complete_sweep(job, study, data, parent)


def complete_sweep(
    job: SweepJob, study: "optuna.Study", data: PreparedData, parent: tracking.Run
) -> str | None:
    """Run the trials that are left, log the results and refit the best configuration."""
    with _resume_hint(job), ownership.owning(study):
        run_trials(job, study, data, is_owner=True)
        _log_results(study, parent)
        return _refit_best(job, study, data, parent) if job.sweep.refit else None


def run_trials(job: SweepJob, study: "optuna.Study", data: PreparedData, *, is_owner: bool) -> None:
    """Run the trials that are left; the owner also waits for those of other drivers."""
    if job.sweep.engine == "ray":
        from experiments import ray_engine

        ray_engine.run(job, study)
        return
    threads = max(1, hardware.cores() // job.sweep.workers) if job.sweep.workers > 1 else 0
    driver = StudyDriver(job, study, threads)
    progress = SweepProgress(study, job)
    with driver.heartbeats(), progress.display():
        try:
            if job.sweep.workers == 1:
                process_engine.run_in_process(driver, data, progress, wait_for_others=is_owner)
            else:
                process_engine.run_in_workers(driver, progress, wait_for_others=is_owner)
        finally:
            driver.release()
    if reason := driver.stop_reason():
        log.info("sweep: %s", reason)


def resume(settings: SweepConfig, changed: Collection[str], recipe: Sequence[str]) -> int:
    """Continue a study whose driver has ended, or help a driver on another machine.

    ``changed`` names the settings that were given on the command line.

    Raises:
        ConfigError: there is no such study, or a setting was given that cannot change.
    """
    if not settings.resume:
        raise ConfigError("resume= names no study: give resume=STUDY, or drop it for a new sweep")
    if recipe:
        raise ConfigError(
            f"resume={settings.resume} keeps the recipe of the study: drop {recipe[0]}"
        )
    study, job = studies.load(settings.resume, settings, changed)
    config = compose(job.overrides)
    data = prepare(config)
    limits = {"trials", "minutes", "target"}
    limit_reached = not limits & set(changed) and studies.stop_reason(study, job)
    trials_done = limit_reached or not studies.has_unfinished_trials(study, job)
    if trials_done and is_finished(job.parent):
        print(f"study {job.study} is complete; give trials=N for more trials")
        print(f"sweep {job.parent}")
        return exit_codes.OK
    if not ownership.claim(study):
        if job.sweep.engine == "ray":
            raise ConfigError(
                f"study {job.study} is running already: add nodes to its Ray cluster instead"
            )
        run_trials(job, study, data, is_owner=False)
        print(f"study {job.study}: no trial is left to start; its own driver concludes it")
        return exit_codes.OK
    with (
        tracking.run(config.experiment, run_name(config), resume=job.parent) as parent,
        _logged_to(parent),
    ):
        refit_run = complete_sweep(job, study, data, parent)
    return print_runs(parent, refit_run)


def resume_command(job: SweepJob) -> str:
    """Return the command that continues the sweep, without the storage's password."""
    command = ["python", "-m", "experiments.sweep", f"resume={job.study}"]
    if job.sweep.storage != SweepConfig().storage:
        command.append(f"storage={tracking.without_password(job.sweep.storage)}")
    return shlex.join(command)


def is_finished(parent: str) -> bool:
    """Return whether the parent run ended well; False if the server cannot be reached."""
    with contextlib.suppress(TrackingError):
        return tracking.get(parent).status == "FINISHED"
    return False


def print_runs(parent: tracking.Run, refit_run: str | None) -> int:
    print(parent.summary("sweep"))
    if refit_run:
        print(f"run {refit_run}")
    return exit_codes.OK


@contextlib.contextmanager
def _logged_to(parent: tracking.Run) -> Iterator[None]:
    """Log what the block logs to ``logs/sweep.log`` of the parent run."""
    with (
        tempfile.TemporaryDirectory() as folder,
        logs.copied_to(Path(folder) / "sweep.log") as file,
    ):
        try:
            yield
        finally:
            parent.log_file(file, "logs")


@contextlib.contextmanager
def _resume_hint(job: SweepJob) -> Iterator[None]:
    """Print the command that continues the sweep if Ctrl-C or SIGTERM ends the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"to continue: {resume_command(job)}", file=sys.stderr, flush=True)
        raise


def _refit_best(
    job: SweepJob, study: "optuna.Study", data: PreparedData, parent: tracking.Run
) -> str:
    """Train the best configuration in full, unless that was done; return the id of its run."""
    best = studies.best_trial(study)
    assert best is not None
    config = compose([*job.overrides, *as_overrides(best.params)])
    number = str(best.number)
    if parent.tag(REFITTED_TAG) == number and (refit_run := parent.tag(tracking.BEST_RUN)):
        log.info("the best trial, %d, was refitted before: run %s", best.number, refit_run)
        _register_refit(job, refit_run)
        return refit_run
    log.info("refitting trial %d, the best, in full: %s", best.number, best.params)
    identity = {**data.fingerprints, "study": job.study, "trial": "refit"}
    with (
        acquire(config, identity, exclusive=True) as checkpoint,
        tracking.run(
            config.experiment,
            "refit of the best",
            parent=job.parent,
            journal=checkpoint.start_or_resume(),
            resume=checkpoint.journal,
            tags={"kind": "refit", "study": job.study, "trial.number": best.number},
        ) as run,
    ):
        test_metrics = train.train(config, data, run, slot=checkpoint)
    parent.log_metrics(test_metrics)
    parent.set_tags({tracking.BEST_RUN: run.run_id, REFITTED_TAG: number})
    print(train.summary(test_metrics))
    _register_refit(job, run.run_id)
    return run.run_id


def _register_refit(job: SweepJob, run_id: str) -> None:
    """Register the refit as a version of the model, for ``register=true``."""
    if job.sweep.register:
        command = [sys.executable, "-m", "registry.register", run_id]
        if subprocess.run(command).returncode:
            raise EuroSATError(
                f"run {run_id} was not registered (see above): mend that, then run "
                f"python -m registry.register {run_id}"
            )


def _log_results(study: "optuna.Study", parent: tracking.Run) -> None:
    """Log the study's table, counts and plots to the parent run, and print the best trial.

    Raises:
        EuroSATError: no trial finished, so that there is no best one.
    """
    from experiments.plots import draw_study

    states = [trial.state.name for trial in studies.own_trials(study)]
    counts = {
        f"trials_{state}": states.count(state.upper()) for state in ("complete", "pruned", "fail")
    }
    parent.log_metrics(counts)
    parent.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
    best = studies.best_trial(study)
    if best is None:
        raise EuroSATError(
            f"none of {len(states)} trials finished ({states.count('FAIL')} failed): lower the "
            "learning rates of the space, or read the trials' logs"
        )
    parent.log_metrics({"best_val_accuracy": best.values[0]})
    with tempfile.TemporaryDirectory() as folder:
        draw_study(study, Path(folder))
        parent.log_folder(Path(folder), "figures")
    print(
        f"{len(states)} trials: {counts['trials_complete']} finished, {counts['trials_pruned']} "
        f"pruned, {counts['trials_fail']} failed; best is trial {best.number} "
        f"with validation accuracy {best.values[0]:.4f}: {best.params}"
    )


if __name__ == "__main__":
    cli.run_command(main)
