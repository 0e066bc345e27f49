"""Runs contain everything that was logged, and end with their true status."""

import logging
import re
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import exit_codes, logs
from eurosat.tracking import __main__ as commands
from eurosat.tracking import uploader
from tests.support.mlflow_server import free_port

pytestmark = pytest.mark.usefixtures("tracking_store")


def test_a_null_run_replaces_every_public_method_and_property_of_a_run() -> None:
    public = {name for name in vars(tracking.Run) if not name.startswith("_")}
    assert public <= set(vars(tracking.NullRun))
    assert not tracking.NullRun().backlog()


def test_a_run_contains_every_point_param_tag_and_file(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    with tracking.run("e", "r", tags={"kind": "test"}, system_metrics=False) as run:
        for step in range(2500):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
        run.log_params({"optim": {"lr": 0.1}, "seed": 3})
        run.log_file(tmp_path / "note.txt", "notes")
        run.log_text("world", "notes/other.txt")
    stored = tracking.get(run.run_id)
    assert stored.status == "FINISHED"
    assert stored.params == {"optim.lr": "0.1", "seed": "3"}
    assert stored.tags["kind"] == "test"
    assert stored.tags["code.commit"]
    points = MlflowClient().get_metric_history(run.run_id, "loss")
    assert sorted(point.step for point in points) == list(range(2500))
    with tracking.artifact(run.run_id, "notes") as folder:
        assert {file.name: file.read_text() for file in folder.iterdir()} == {
            "note.txt": "hello",
            "other.txt": "world",
        }


def test_changes_of_code_make_the_commit_dirty_but_reports_and_docs_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.code_commit() == "unknown"
    for file in ("code.py", "reports/a.json", "docs/a.png", "README.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1")
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True, timeout=30)
    commit = tracking.code_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    for file in ("reports/a.json", "docs/a.png", "README.md"):
        (tmp_path / file).write_text("2")
    assert tracking.code_commit() == commit
    monkeypatch.chdir(tmp_path / "docs")
    (tmp_path / "code.py").write_text("2")
    assert tracking.code_commit() == f"{commit}-dirty"


def test_the_run_that_mlflow_run_created_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    run_id = client.create_run(client.create_experiment("by mlflow")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with tracking.run("other", "used", system_metrics=False) as run:
        assert run.run_id == run_id
    assert tracking.get(run_id).status == "FINISHED"
    assert client.get_run(run_id).info.run_name == "used"
    assert client.get_experiment_by_name("other") is None


def test_a_child_run_is_in_the_experiment_of_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tracking.run("one", "parent", system_metrics=False) as parent:
        monkeypatch.setenv("MLFLOW_RUN_ID", parent.run_id)
        with tracking.run("two", "child", parent=parent.run_id, system_metrics=False) as child:
            assert child.run_id != parent.run_id
    stored = tracking.get(child.run_id)
    assert stored.tags[tracking.PARENT] == parent.run_id
    assert stored.experiment_id == tracking.get(parent.run_id).experiment_id


def test_system_metrics_are_logged_to_the_run() -> None:
    with tracking.run("e", "r") as run:
        pass
    names = tracking.get(run.run_id).metrics
    assert "system/cpu_utilization_percentage" in names
    assert "system/system_memory_usage_megabytes" in names


def test_every_kind_of_reference_resolves_to_its_run(tmp_path: Path) -> None:
    with tracking.run("e", "best", system_metrics=False) as best:
        best.log_text("x", "model/MLmodel")
    with tracking.run("e", "sweep", tags={"kind": "sweep"}, system_metrics=False) as parent:
        parent.set_tags({tracking.BEST_RUN: best.run_id})
    client = MlflowClient()
    client.create_registered_model("m")
    source = f"{client.get_run(best.run_id).info.artifact_uri}/model"
    client.create_model_version("m", source, best.run_id)
    client.set_registered_model_alias("m", "champion", "1")
    for reference in (
        best.run_id,
        f"runs:/{best.run_id}",
        parent.run_id,
        "models:/m/1",
        "models:/m@champion",
    ):
        assert tracking.resolve_run(reference) == best.run_id
    assert tracking.alias_version("m", "champion") == "1"
    assert tracking.alias_version("m", "challenger") is None
    assert tracking.latest_run("e", kind="sweep") == parent.run_id


@pytest.mark.parametrize("reference", ["0" * 32, "models:/none/1", "models:/none@champion"])
def test_the_error_for_a_missing_reference_names_it_and_the_server(reference: str) -> None:
    with pytest.raises(
        TrackingError, match=r"tracking server sqlite:.*MLFLOW_TRACKING_URI"
    ) as caught:
        tracking.resolve_run(reference)
    assert reference.split("/")[-1].split("@")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "context"), [("train", "training"), ("validate", "validation")])
def test_mlflow_shows_the_data_set_of_a_run(kind: str, context: str) -> None:
    tags = {"kind": kind, "data.fingerprint": "a" * 64, "data.name": "parcels"}
    with tracking.run("e", "r", tags=tags, system_metrics=False) as run:
        pass
    inputs = MlflowClient().get_run(run.run_id).inputs
    assert inputs
    [data_input] = inputs.dataset_inputs
    assert (data_input.dataset.name, data_input.dataset.digest) == ("parcels", "a" * 36)
    assert [(tag.key, tag.value) for tag in data_input.tags] == [("mlflow.data.context", context)]


def test_the_page_of_the_runs_opens_on_model_training_best_first(tracking_store: str) -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        pass
    experiment = MlflowClient().get_experiment(tracking.get(run.run_id).experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = tracking.runs_page("e", "test_accuracy")
    assert page.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?")
    assert "workflowType=machine_learning" in page
    assert page.endswith("orderByKey=metrics.%60test_accuracy%60&orderByAsc=false")


def test_a_run_that_ended_tells_its_page_and_its_id(tracking_store: str) -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        pass
    experiment = tracking.get(run.run_id).experiment_id
    address = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{run.run_id}"
    lines = [f"its page: {address} (after `mlflow ui`)", f"sweep {run.run_id}"]
    assert run.summary("sweep").splitlines() == lines
    run.is_delivered = False
    assert run.summary() == f"run {run.run_id}"


def test_the_error_for_a_missing_kind_of_run_names_the_experiment() -> None:
    with pytest.raises(TrackingError, match="experiment e has no run of kind sweep"):
        tracking.latest_run("e", kind="sweep")


def test_the_error_for_a_missing_artifact_names_it() -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        pass
    with (
        pytest.raises(TrackingError, match="artifact none.txt"),
        tracking.artifact(run.run_id, "none.txt"),
    ):
        pass


def test_the_log_goes_to_the_console_and_into_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.setup("warning")
        with logs.copied_to(tmp_path / "run.log"):
            logging.getLogger("eurosat.test").warning("shown %d", 1)
            logging.getLogger("eurosat.test").info("dropped")
        logging.getLogger("eurosat.test").warning("after")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    assert (tmp_path / "run.log").read_text().rstrip().endswith("WARNING eurosat.test: shown 1")
    stderr = capsys.readouterr().err
    assert "shown 1" in stderr
    assert "dropped" not in stderr


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not one of"):
        logs.setup("loud")


def test_sync_sends_the_journals_of_a_server_that_has_moved(
    tracking_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uploader, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(uploader, "STALL_TIMEOUT_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with tracking.run("moved", "r", system_metrics=False) as run:
        run.log_metrics({"loss": 0.5}, 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store)
    assert commands.main(["sync", run.run_id]) == exit_codes.NEGATIVE
    assert "sync --to URI" in capsys.readouterr().out
    assert commands.main(["sync", "--to", tracking_store, run.run_id]) == exit_codes.OK
    assert tracking.get(run.run_id).metrics == {"loss": 0.5}
