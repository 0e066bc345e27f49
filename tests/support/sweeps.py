"""Start sweeps as processes that a test can kill, wait for them, and check what they left."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from eurosat import tracking
from experiments import space, studies
from experiments.objective import SweepJob
from experiments.settings import SweepConfig
from tests.support.processes import CommandProcess, start
from tests.support.recipes import TINY

SWEEP = (*TINY, "trials=3", "trial_epochs=2", "trainer.epochs=3")


def child_runs(parent: Run) -> list[Run]:
    runs = MlflowClient().search_runs(
        [parent.info.experiment_id], f"tags.`{tracking.PARENT}` = '{parent.info.run_id}'"
    )
    return list(runs)


def make_study(folder: Path, **settings: Any) -> tuple[SweepJob, optuna.Study]:
    """Return a new study ``s`` of the space resnet18, in a database in ``folder``."""
    storage = f"sqlite:///{folder}/study.db"
    config = SweepConfig(study="s", storage=storage, space="resnet18", **settings)
    job = SweepJob(sweep=config, study="s", overrides=(), parent="")
    return job, studies.create(job, space.load("resnet18"), {})


def start_sweep(folder: Path, *arguments: str) -> CommandProcess:
    """Start `python -m experiments.sweep` in ``folder``, in a process group of its own."""
    environment = os.environ | {"EUROSAT_PROGRESS": "lines"}
    return start("experiments.sweep", *arguments, folder=folder, env=environment)


def load_trials(folder: Path, study: str = "s") -> list[optuna.trial.FrozenTrial]:
    """Return the study's trials, or none while the study does not exist or its file is busy."""
    try:
        return optuna.load_study(study_name=study, storage=f"sqlite:///{folder}/study.db").trials
    except (KeyError, OperationalError, StorageInternalError):
        return []


def wait_until(
    condition: Callable[[], object], process: "CommandProcess | subprocess.Popen[str] | None"
) -> None:
    """Poll ``condition`` until it is true; fail after 180 s, or if ``process`` ends before."""
    deadline = time.monotonic() + 180
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "the condition did not become true in 180 s"
        time.sleep(0.1)


def check_all_complete(folder: Path, count: int, epochs: int) -> dict[str, Run]:
    """Check that all trials are complete, each with one run that has every epoch once.

    Returns the runs by trial number.
    """
    client = MlflowClient()
    trials = load_trials(folder)
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert len(trials) == count
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = client.search_runs(experiments, "tags.kind = 'sweep'")
    assert [parent.info.status for parent in parents] == ["FINISHED"]
    trial_runs = [run for run in child_runs(parents[0]) if run.data.tags["kind"] == "trial"]
    run_by_number = {run.data.tags["trial.number"]: run for run in trial_runs}
    assert len(trial_runs) == len(run_by_number) == count
    for trial in trials:
        run = run_by_number[str(trial.number)]
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(p.step for p in points) == list(range(epochs)), "every epoch exactly once"
        assert trial.value == max(p.value for p in points)
    return run_by_number
