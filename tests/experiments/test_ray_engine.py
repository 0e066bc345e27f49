"""Sweeps on Ray leave what the others leave, and survive the loss of their driver or of a node."""

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
from tests.support.sweeps import SWEEP, check_whole, children, saying, trials, until

RAY = (*SWEEP, "engine=ray", "workers=2", "study=s", "log_level=warning")


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_leaves_what_the_other_engine_leaves(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = ("trials=3", "trial_epochs=2", "pruner=asha", "trial_cpus=0.5")
    process = saying(tmp_path, *RAY, storage, *given)
    said, complaint = process.communicate(timeout=300)
    assert process.returncode == exit_codes.OK, complaint[-3000:]
    refit = said.splitlines()[-1].removeprefix("run ")
    parent = MlflowClient().get_run(said.splitlines()[-2].removeprefix("sweep "))
    assert parent.info.status == "FINISHED"
    assert parent.data.tags[tracking.BEST_RUN] == refit
    held = {str(trial.number): trial for trial in trials(tmp_path)}
    below = {
        run.data.tags["trial.number"]: run
        for run in children(parent)
        if run.data.tags["kind"] == "trial"
    }
    assert set(held) == set(below) == {"0", "1", "2"}
    assert {trial.state.name for trial in held.values()} <= {"COMPLETE", "PRUNED"}
    for number, run in below.items():
        whole = held[number].state.name == "COMPLETE"
        assert run.info.status == ("FINISHED" if whole else "KILLED")
        assert ("pruned" in run.data.tags) != whole
        assert run.data.params["optim.lr"] == str(held[number].params["optim.lr"])
        points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(p.step for p in points) == [0, 1] if whole else [0]
        if whole:
            assert held[number].value == max(p.value for p in points)
    assert parent.data.metrics["best_val_accuracy"] == max(
        trial.value for trial in held.values() if trial.value is not None
    )
    with tracking.artifact(parent.info.run_id, "figures/history.png") as file:
        assert file.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_takes_two_objectives(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = ("trials=2", "trial_epochs=2", "objectives=accuracy,latency", "refit=false")
    process = saying(tmp_path, *RAY, storage, *given, "sampler=NSGAIISampler")
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == exit_codes.OK, complaint[-3000:]
    for trial in trials(tmp_path):
        held = tracking.get(trial.user_attrs["run"])
        assert trial.values == [held.metrics["best_val_accuracy"], held.metrics["latency_ms"]]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_that_is_told_to_end_says_so_and_goes_on(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = (*RAY, storage, "trials=3", "trial_epochs=60", "pruner=none", "refit=false")
    first = saying(tmp_path, *given)
    until(lambda: sum(len(t.intermediate_values) > 3 for t in trials(tmp_path)) == 2, first)
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == exit_codes.TERMINATED
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    below = children(parent)
    assert {run.info.status for run in [parent, *below]} == {"KILLED"}
    second = saying(tmp_path, "resume=s", storage)
    _, complaint = second.communicate(timeout=400)
    assert second.returncode == exit_codes.OK, complaint[-3000:]
    by_number = check_whole(tmp_path, 3, 60)
    assert not [r for r in by_number.values() if "trial.retries" in r.data.tags]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_ends_at_its_target_and_a_diverged_trial_failed(tmp_path: Path) -> None:
    (tmp_path / "wild.yaml").write_text("optim.lr: {choices: [0.1, 1.0e+30]}\n")
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = (*RAY, storage, "trials=9", "trial_epochs=30", "pruner=none", "refit=false")
    free = (f"space={tmp_path}/wild.yaml", "optim.clip_norm=0", "target=0.05", "sampler_seed=1")
    process = saying(tmp_path, *given, *free)
    said, complaint = process.communicate(timeout=400)
    assert process.returncode == exit_codes.OK, complaint[-3000:]
    held = {str(trial.number): trial for trial in trials(tmp_path)}
    states = [trial.state.name for trial in held.values()]
    assert "COMPLETE" in states
    assert len(states) < 9, "none began after the target was reached"
    assert "FAIL" in states, said
    status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    for run in children(parent):
        assert run.info.status == status[held[run.data.tags["trial.number"]].state.name]
        assert "trial.retries" not in run.data.tags, "no process was lost"


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_on_ray_whose_driver_was_killed_goes_on(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = (*RAY, storage, "trials=4", "trial_epochs=60", "pruner=none", "refit=false")
    first = saying(tmp_path, *given)
    held: list[optuna.trial.FrozenTrial] = []

    def under_way() -> set[int]:
        """Trials that no process ends before it has heard of the driver's death."""
        held[:] = trials(tmp_path)
        left = [t for t in held if not t.state.is_finished()]
        return {t.number for t in left if 3 < len(t.intermediate_values) < 25}

    until(lambda: under_way() and any(t.state.is_finished() for t in held), first)
    cut = under_way()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = {t.number: t.datetime_complete for t in trials(tmp_path) if t.state.is_finished()}
    second = saying(tmp_path, "resume=s", storage)
    _, complaint = second.communicate(timeout=400)
    assert second.returncode == exit_codes.OK, complaint[-3000:]
    by_number = check_whole(tmp_path, 4, 60)
    again = {int(n): r.data.tags.get("trial.retries") for n, r in by_number.items()}
    assert {again[number] for number in cut} == {"1"}
    assert {again[number] for number in done} == {None}
    after = {t.number: t.datetime_complete for t in trials(tmp_path)}
    assert all(after[number] == when for number, when in done.items())


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, int]]:
    """A cluster of two nodes with a core each on this machine; yields the address, and the
    process id of the second one's raylet.
    """
    port, ray = free_port(), str(Path(sys.executable).with_name("ray"))
    usual = ["--num-cpus", "1", "--node-ip-address", "127.0.0.1"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    head = [ray, "start", "--head", f"--port={port}", "--include-dashboard=false", *usual]
    try:
        subprocess.run([*head, "--temp-dir", str(folder)], check=True, env=environment)
        before = raylets()
        subprocess.run(
            [ray, "start", "--address", f"127.0.0.1:{port}", *usual], check=True, env=environment
        )
        [second] = raylets() - before
        yield f"127.0.0.1:{port}", second
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(folder) in " ".join(process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


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
    short = Path(tempfile.gettempdir(), f"r{os.getpid()}")  # paths of sockets are short
    with two_nodes(short) as (address, second):
        given = (*RAY, storage, "trials=4", "trial_epochs=80", "pruner=none", "refit=false")
        process = saying(tmp_path, *given, f"ray_address={address}")
        until(lambda: sum(len(t.intermediate_values) > 2 for t in trials(tmp_path)) == 2, process)
        psutil.Process(second).kill()
        _, complaint = process.communicate(timeout=500)
        assert process.returncode == exit_codes.OK, complaint[-3000:]
    held = trials(tmp_path)
    assert [trial.state.name for trial in held] == ["COMPLETE"] * 4
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    runs = [run for run in children(parent) if run.data.tags["kind"] == "trial"]
    assert sorted(run.data.tags["trial.number"] for run in runs) == list("0123")
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(p.step for p in points) == list(range(80)), "no epoch twice, none lost"
    again = [run.data.tags.get("trial.retries") for run in runs]
    assert sorted(again, key=str) == ["1", None, None, None]
