"""A team's sweep: several drivers, with the study and the tracking server in PostgreSQL."""

import contextlib
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from eurosat import tracking
from eurosat.runtime import exit_codes
from tests.support.mlflow_server import mlflow_server
from tests.support.postgres import create_database
from tests.support.sweeps import SWEEP, child_runs, start_sweep, wait_until

pytestmark = pytest.mark.postgres


@pytest.mark.usefixtures("tiny_pack")
def test_two_drivers_share_the_trials_of_one_study(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, backend = create_database(postgres, "studies"), create_database(postgres, "mlflow")
    with mlflow_server(tmp_path, backend) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        settings = (*SWEEP, "study=s", f"storage={storage}", "trial_epochs=12", "pruner=none")
        first = start_sweep(tmp_path, *settings, "trials=6", "refit=false")

        def trials() -> list[optuna.trial.FrozenTrial]:
            with contextlib.suppress(KeyError):
                return optuna.load_study(study_name="s", storage=storage).trials
            return []

        wait_until(lambda: any(t.state.name == "RUNNING" for t in trials()), first)
        second = start_sweep(tmp_path, "resume=s", f"storage={storage}")
        stdout, stderr = second.communicate(timeout=200)
        assert second.returncode == exit_codes.OK, stderr[-3000:]
        assert "its own driver concludes it" in stdout
        stdout, stderr = first.communicate(timeout=200)
        assert first.returncode == exit_codes.OK, stderr[-3000:]
        assert stdout.startswith("6 trials: 6 finished")
        drivers = {trial.user_attrs["driver"] for trial in trials()}
        assert len(drivers) == 2, "each driver ran some of the trials"
        parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
        runs = child_runs(parent)
        assert parent.info.status == "FINISHED"
        assert sorted(run.data.tags["trial.number"] for run in runs) == list("012345")
        for run in runs:
            assert run.info.status == "FINISHED"
            points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
            assert sorted(p.step for p in points) == list(range(12))
