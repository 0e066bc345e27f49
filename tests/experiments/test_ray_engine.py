"""Sweeps on Ray: the same results, and a lost driver or node costs no trial."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient

from eurosat import tracking
from eurosat.runtime import exit_codes
from tests.support.mlflow_server import free_port
from tests.support.sweeps import (
    SWEEP,
    check_all_complete,
    child_runs,
    load_trials,
    start_sweep,
    wait_until,
)

RAY = (*SWEEP, "engine=ray", "workers=2", "study=s", "log_level=warning")


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_logs_what_the_other_engine_logs(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = ("trials=2", "trial_epochs=2", "pruner=asha", "trial_cpus=0.5")
    process = start_sweep(tmp_path, *RAY, storage, *settings)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == exit_codes.OK, stderr[-3000:]
    refit = stdout.splitlines()[-1].removeprefix("run ")
    parent = MlflowClient().get_run(stdout.splitlines()[-2].removeprefix("sweep "))
    assert parent.info.status == "FINISHED"
    assert parent.data.tags[tracking.BEST_RUN] == refit
    trials = {str(trial.number): trial for trial in load_trials(tmp_path)}
    runs = {
        run.data.tags["trial.number"]: run
        for run in child_runs(parent)
        if run.data.tags["kind"] == "trial"
    }
    assert set(trials) == set(runs) == {"0", "1"}
    assert {trial.state.name for trial in trials.values()} <= {"COMPLETE", "PRUNED"}
    for number, run in runs.items():
        complete = trials[number].state.name == "COMPLETE"
        assert run.info.status == ("FINISHED" if complete else "KILLED")
        assert ("pruned" in run.data.tags) != complete
        assert run.data.params["optim.lr"] == str(trials[number].params["optim.lr"])
        points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(p.step for p in points) == [0, 1] if complete else [0]
        if complete:
            assert trials[number].value == max(p.value for p in points)
    assert parent.data.metrics["best_val_accuracy"] == max(
        trial.value for trial in trials.values() if trial.value is not None
    )
    with tracking.artifact(parent.info.run_id, "figures/history.png") as file:
        assert file.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_takes_two_objectives(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = ("trials=2", "trial_epochs=2", "objectives=accuracy,latency", "refit=false")
    process = start_sweep(tmp_path, *RAY, storage, *settings, "sampler=NSGAIISampler")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == exit_codes.OK, stderr[-3000:]
    for trial in load_trials(tmp_path):
        run = tracking.get(trial.user_attrs["run"])
        assert trial.values == [run.metrics["best_val_accuracy"], run.metrics["latency_ms"]]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_that_was_terminated_is_resumed(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = (*RAY, storage, "trials=3", "trial_epochs=60", "pruner=none", "refit=false")
    first = start_sweep(tmp_path, *settings)
    wait_until(lambda: count_under_way(tmp_path, epochs=3) == 2, first)
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == exit_codes.TERMINATED
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    assert {run.info.status for run in [parent, *child_runs(parent)]} == {"KILLED"}
    second = start_sweep(tmp_path, "resume=s", storage)
    _, stderr = second.communicate(timeout=400)
    assert second.returncode == exit_codes.OK, stderr[-3000:]
    runs = check_all_complete(tmp_path, 3, 60)
    assert not [run for run in runs.values() if "trial.retries" in run.data.tags]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_ends_at_its_target_and_a_diverged_trial_fails(tmp_path: Path) -> None:
    (tmp_path / "wild.yaml").write_text("optim.lr: {choices: [0.1, 1.0e+30]}\n")
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = (*RAY, storage, "trials=9", "trial_epochs=30", "pruner=none", "refit=false")
    diverging = (
        f"space={tmp_path}/wild.yaml",
        "optim.clip_norm=0",
        "target=0.05",
        "sampler_seed=1",
    )
    process = start_sweep(tmp_path, *settings, *diverging)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == exit_codes.OK, stderr[-3000:]
    trials = {str(trial.number): trial for trial in load_trials(tmp_path)}
    states = [trial.state.name for trial in trials.values()]
    assert "COMPLETE" in states
    assert len(states) < 9, "none started after the target was reached"
    assert "FAIL" in states, stdout
    status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    for run in child_runs(parent):
        assert run.info.status == status[trials[run.data.tags["trial.number"]].state.name]
        assert "trial.retries" not in run.data.tags, "no process was lost"


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_whose_driver_was_killed_is_resumed(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = (*RAY, storage, "trials=4", "trial_epochs=60", "pruner=none", "refit=false")
    first = start_sweep(tmp_path, *settings)
    trials: list[optuna.trial.FrozenTrial] = []

    def half_done() -> set[int]:
        """Return trials that cannot end before their processes notice the driver's death."""
        trials[:] = load_trials(tmp_path)
        unfinished = [trial for trial in trials if not trial.state.is_finished()]
        return {t.number for t in unfinished if 3 < len(t.intermediate_values) < 25}

    wait_until(lambda: half_done() and any(t.state.is_finished() for t in trials), first)
    interrupted = half_done()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    ended_at = {
        t.number: t.datetime_complete for t in load_trials(tmp_path) if t.state.is_finished()
    }
    second = start_sweep(tmp_path, "resume=s", storage)
    _, stderr = second.communicate(timeout=400)
    assert second.returncode == exit_codes.OK, stderr[-3000:]
    runs = check_all_complete(tmp_path, 4, 60)
    retries = {int(n): run.data.tags.get("trial.retries") for n, run in runs.items()}
    assert {retries[number] for number in interrupted} == {"1"}
    assert {retries[number] for number in ended_at} == {None}
    after = {t.number: t.datetime_complete for t in load_trials(tmp_path)}
    assert all(after[number] == moment for number, moment in ended_at.items())


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, int]]:
    """Run a Ray cluster of two nodes with one core each on this machine.

    Yields its address and the process id of the second node's raylet.
    """
    port, ray = free_port(), str(Path(sys.executable).with_name("ray"))
    common = ["--num-cpus", "1", "--node-ip-address", "127.0.0.1"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    head = [ray, "start", "--head", f"--port={port}", "--include-dashboard=false", *common]
    try:
        subprocess.run([*head, "--temp-dir", str(folder)], check=True, env=environment)
        before = raylets()
        subprocess.run(
            [ray, "start", "--address", f"127.0.0.1:{port}", *common], check=True, env=environment
        )
        [second] = raylets() - before
        yield f"127.0.0.1:{port}", second
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(folder) in " ".join(process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def count_under_way(folder: Path, *, epochs: int) -> int:
    """Return how many trials have reported more than ``epochs`` epochs."""
    return sum(len(trial.intermediate_values) > epochs for trial in load_trials(folder))


def raylets() -> set[int]:
    return {p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == "raylet"}


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_survives_the_loss_of_one_of_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_STORAGE", str(tmp_path / "ray"))
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    folder = Path(tempfile.gettempdir(), f"r{os.getpid()}")  # a socket's path must be short
    with two_nodes(folder) as (address, second):
        settings = (*RAY, storage, "trials=4", "trial_epochs=80", "pruner=none", "refit=false")
        process = start_sweep(tmp_path, *settings, f"ray_address={address}")
        wait_until(lambda: count_under_way(tmp_path, epochs=2) == 2, process)
        psutil.Process(second).kill()
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == exit_codes.OK, stderr[-3000:]
    assert [trial.state.name for trial in load_trials(tmp_path)] == ["COMPLETE"] * 4
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    runs = [run for run in child_runs(parent) if run.data.tags["kind"] == "trial"]
    assert sorted(run.data.tags["trial.number"] for run in runs) == list("0123")
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(p.step for p in points) == list(range(80)), "every epoch exactly once"
    retries = [run.data.tags.get("trial.retries") for run in runs]
    assert sorted(retries, key=str) == ["1", None, None, None]
