"""Faults at the edges of a process: each ends with the right code, one line and a true status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from eurosat import tracking
from eurosat.config import compose
from eurosat.errors import TrackingError
from eurosat.runtime import cli, exit_codes
from eurosat.training.callbacks import GracefulInterrupt
from tests.support.paths import ROOT
from tests.support.recipes import TINY


def verb(folder: Path, *command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, exit_codes.INTERRUPTED), (signal.SIGTERM, exit_codes.TERMINATED)],
)
@pytest.mark.usefixtures("tiny_pack", "tracking_store")
def test_a_signal_in_training_ends_the_run_as_killed(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    child = verb(tmp_path, "eurosat.train", *TINY, "trainer.epochs=10000", "experiment=signals")
    client = MlflowClient()
    deadline = time.monotonic() + 120
    found: list[Run] = []
    while not found and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.2)
        if experiment := client.get_experiment_by_name("signals"):
            found = list(client.search_runs([experiment.experiment_id], "metrics.val_accuracy > 0"))
    assert found, "training did not begin"
    child.send_signal(number)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == code, complaint[-2000:]
    assert "Traceback" not in complaint
    assert tracking.get(found[0].info.run_id).status == "KILLED"


def test_ctrl_c_waits_for_a_batch_and_is_never_lost() -> None:
    before = signal.getsignal(signal.SIGINT)  # which a shell may have told to ignore it
    interrupt, reached = GracefulInterrupt(), []
    with pytest.raises(KeyboardInterrupt), interrupt:
        signal.raise_signal(signal.SIGINT)
        reached.append("the end of the request at hand")
        interrupt.on_train_batch_end()
        reached.append("the next batch")
    assert reached == ["the end of the request at hand"]
    with pytest.raises(KeyboardInterrupt), GracefulInterrupt():
        signal.raise_signal(signal.SIGINT)  # after the last batch
    with pytest.raises(KeyboardInterrupt), GracefulInterrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append("beyond the second")
    assert len(reached) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("tiny_pack", "tracking_store")
def test_a_worker_that_cannot_train_ends_the_sweep_with_one_line(tmp_path: Path) -> None:
    child = verb(
        tmp_path,
        "experiments.sweep",
        *TINY,
        "model.name=nosuch",
        "workers=2",
        "trials=2",
        "log_level=error",
    )
    _, complaint = child.communicate(timeout=120)
    assert child.returncode == exit_codes.BAD_INPUT
    assert "error: timm has no model 'nosuch'" in complaint
    assert "Traceback" not in complaint
    parent = tracking.latest_run("eurosat", kind="sweep")
    assert tracking.get(parent).status == "FAILED"
    runs = MlflowClient().search_runs([tracking.get(parent).experiment_id])
    assert {found.info.status for found in runs} == {"FAILED"}


@pytest.mark.usefixtures("tracking_store")
def test_names_that_mlflow_refuses_are_spelt_so_that_it_takes_them() -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        run.log_metrics({"test_f1/Crops (irrigated)": 0.5})
    assert tracking.get(run.run_id).metrics == {"test_f1/Crops _irrigated_": 0.5}


@pytest.mark.usefixtures("tracking_store")
def test_a_param_that_is_logged_twice_with_two_values_is_one_line() -> None:
    with (
        pytest.raises(TrackingError, match="param seed of this run is 0, and cannot become 3"),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        run.log_params({"seed": 0})
        run.log_params({"seed": 3})


def test_a_fault_of_ours_is_not_taken_for_a_verdict(caplog: pytest.LogCaptureFixture) -> None:
    def broken(argv: object) -> int:
        raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.run_command(broken, [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == exit_codes.FAULT
    assert "please report it" in caplog.text


@pytest.mark.parametrize("name", ["EUROSAT_ROOT", "EUROSAT_CACHE"])
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    config = compose(["data=eurosat"]).data
    assert not config.root or name == "EUROSAT_CACHE"
    if name == "EUROSAT_CACHE":
        assert config.cache_dir == Path("~/.cache/eurosat").expanduser()
