"""Sweeps as processes of their own, which tests kill, and what must be whole afterwards."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from eurosat import tracking
from tests.support.paths import ROOT
from tests.support.recipes import TINY

SWEEP = (*TINY, "trials=3", "trial_epochs=2", "trainer.epochs=3")


def children(parent: Run) -> list[Run]:
    found = MlflowClient().search_runs(
        [parent.info.experiment_id], f"tags.`{tracking.PARENT}` = '{parent.info.run_id}'"
    )
    return list(found)


def saying(folder: Path, *given: str) -> "subprocess.Popen[str]":
    """The verb as a process of its own, which a test can kill."""
    path = f"{os.environ['PYTHONPATH']}:{ROOT}"
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *given],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "EUROSAT_PROGRESS": "lines"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def trials(folder: Path, study: str = "s") -> list[optuna.trial.FrozenTrial]:
    try:
        return optuna.load_study(study_name=study, storage=f"sqlite:///{folder}/study.db").trials
    except (KeyError, OperationalError, StorageInternalError):  # not begun yet, or busy
        return []


def until(condition: Callable[[], object], process: "subprocess.Popen[str] | None") -> None:
    """Wait for it, as long as ``process`` lives."""
    deadline = time.monotonic() + 180
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def check_whole(folder: Path, count: int, epochs: int) -> dict[str, Run]:
    """All trials have ended, each with one run that holds each epoch once."""
    client = MlflowClient()
    held = trials(folder)
    assert {trial.state.name for trial in held} == {"COMPLETE"}
    assert len(held) == count
    parents = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "tags.kind = 'sweep'"
    )
    assert [parent.info.status for parent in parents] == ["FINISHED"]
    below = [run for run in children(parents[0]) if run.data.tags["kind"] == "trial"]
    by_number = {run.data.tags["trial.number"]: run for run in below}
    assert len(below) == len(by_number) == count
    for trial in held:
        run = by_number[str(trial.number)]
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(p.step for p in points) == list(range(epochs)), "no epoch twice, none lost"
        assert trial.value == max(p.value for p in points)
    return by_number
