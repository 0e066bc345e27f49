"""Signals and errors end a process with the right exit code, one line and the right run status."""

import signal
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
from tests.support.processes import start
from tests.support.recipes import TINY


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, exit_codes.INTERRUPTED), (signal.SIGTERM, exit_codes.TERMINATED)],
)
@pytest.mark.usefixtures("tiny_pack", "tracking_store")
def test_a_signal_in_training_ends_the_run_as_killed(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    child = start(
        "eurosat.train", *TINY, "trainer.epochs=10000", "experiment=signals", folder=tmp_path
    )
    client = MlflowClient()
    deadline = time.monotonic() + 120
    runs: list[Run] = []
    while not runs and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.2)
        if experiment := client.get_experiment_by_name("signals"):
            runs = list(client.search_runs([experiment.experiment_id], "metrics.val_accuracy > 0"))
    assert runs, "training did not begin"
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code, stderr[-2000:]
    assert "Traceback" not in stderr
    assert tracking.get(runs[0].info.run_id).status == "KILLED"


def test_ctrl_c_waits_for_the_end_of_a_batch_and_is_never_lost() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell may have set it to be ignored
    interrupt, steps = GracefulInterrupt(), []
    with pytest.raises(KeyboardInterrupt), interrupt:
        signal.raise_signal(signal.SIGINT)
        steps.append("end of the current request")
        interrupt.on_train_batch_end()
        steps.append("the next batch")
    assert steps == ["end of the current request"]
    with pytest.raises(KeyboardInterrupt), GracefulInterrupt():
        signal.raise_signal(signal.SIGINT)  # after the last batch
    with pytest.raises(KeyboardInterrupt), GracefulInterrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("after the second signal")
    assert len(steps) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("tiny_pack", "tracking_store")
def test_a_worker_that_cannot_train_ends_the_sweep_with_one_line(tmp_path: Path) -> None:
    child = start(
        "experiments.sweep",
        *TINY,
        "model.name=nosuch",
        "workers=2",
        "trials=2",
        "log_level=error",
        folder=tmp_path,
    )
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == exit_codes.BAD_INPUT
    assert "error: timm has no model 'nosuch'" in stderr
    assert "Traceback" not in stderr
    parent = tracking.latest_run("eurosat", kind="sweep")
    assert tracking.get(parent).status == "FAILED"
    runs = MlflowClient().search_runs([tracking.get(parent).experiment_id])
    assert {run.info.status for run in runs} == {"FAILED"}


@pytest.mark.usefixtures("tracking_store")
def test_metric_names_that_mlflow_refuses_are_changed_to_accepted_ones() -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        run.log_metrics({"test_f1/Crops (irrigated)": 0.5})
    assert tracking.get(run.run_id).metrics == {"test_f1/Crops _irrigated_": 0.5}


@pytest.mark.usefixtures("tracking_store")
def test_a_param_logged_twice_with_different_values_is_an_error_of_one_line() -> None:
    with (
        pytest.raises(TrackingError, match="param seed of this run is 0 and cannot become 3"),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        run.log_params({"seed": 0})
        run.log_params({"seed": 3})


def test_an_internal_error_has_an_exit_code_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
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
