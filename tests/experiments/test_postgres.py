"""A team's sweep: a study in PostgreSQL, several drivers, and a tracking server on it too."""

import contextlib
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from eurosat import tracking
from eurosat.runtime import exit_codes
from tests.support.mlflow_server import mlflow_server
from tests.support.postgres import create_database
from tests.support.sweeps import SWEEP, children, saying, until

pytestmark = pytest.mark.postgres


@pytest.mark.usefixtures("tiny_pack")
def test_two_drivers_work_on_one_study(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, backend = create_database(postgres, "studies"), create_database(postgres, "mlflow")
    with mlflow_server(tmp_path, backend) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        given = (*SWEEP, "study=s", f"storage={storage}", "trial_epochs=30", "pruner=none")
        first = saying(tmp_path, *given, "trials=6", "refit=false")

        def held() -> list[optuna.trial.FrozenTrial]:
            with contextlib.suppress(KeyError):
                return optuna.load_study(study_name="s", storage=storage).trials
            return []

        until(lambda: any(t.state.name == "RUNNING" for t in held()), first)
        second = saying(tmp_path, "resume=s", f"storage={storage}")
        said, complaint = second.communicate(timeout=200)
        assert second.returncode == exit_codes.OK, complaint[-3000:]
        assert "its own driver concludes it" in said
        said, complaint = first.communicate(timeout=200)
        assert first.returncode == exit_codes.OK, complaint[-3000:]
        assert said.startswith("6 trials: 6 finished")
        drivers = {trial.user_attrs["driver"] for trial in held()}
        assert len(drivers) == 2, "both had a share"
        parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
        below = children(parent)
        assert parent.info.status == "FINISHED"
        assert sorted(run.data.tags["trial.number"] for run in below) == list("012345")
        for run in below:
            assert run.info.status == "FINISHED"
            points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
            assert sorted(p.step for p in points) == list(range(30))
