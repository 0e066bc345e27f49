"""Runs hold what was logged, and end with their true status."""

import logging
import re
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import logs

pytestmark = pytest.mark.usefixtures("tracking_store")


def test_a_run_holds_every_point_param_tag_and_file(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    with tracking.run("e", "r", tags={"kind": "test"}, system_metrics=False) as run:
        for step in range(2500):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
        run.log_params({"optim": {"lr": 0.1}, "seed": 3})
        run.log_file(tmp_path / "note.txt", "notes")
        run.log_text("world", "notes/other.txt")
    held = tracking.get(run.run_id)
    assert held.status == "FINISHED"
    assert held.params == {"optim.lr": "0.1", "seed": "3"}
    assert held.tags["kind"] == "test"
    assert held.tags["code.commit"]
    points = MlflowClient().get_metric_history(run.run_id, "loss")
    assert sorted(p.step for p in points) == list(range(2500))
    with tracking.artifact(run.run_id, "notes") as folder:
        assert {f.name: f.read_text() for f in folder.iterdir()} == {
            "note.txt": "hello",
            "other.txt": "world",
        }


def test_the_commit_is_dirty_by_code_and_not_by_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.code_commit() == "unknown"
    for file in ("code.py", "reports/a.json", "docs/a.png", "README.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1")
    name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True, timeout=30)
    commit = tracking.code_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    for file in ("reports/a.json", "docs/a.png", "README.md"):
        (tmp_path / file).write_text("2")
    assert tracking.code_commit() == commit
    monkeypatch.chdir(tmp_path / "docs")
    (tmp_path / "code.py").write_text("2")
    assert tracking.code_commit() == f"{commit}-dirty"


def test_the_run_that_mlflow_run_made_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    made = client.create_run(client.create_experiment("made")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with tracking.run("other", "joined", system_metrics=False) as run:
        assert run.run_id == made
    assert tracking.get(made).status == "FINISHED"
    assert client.get_run(made).info.run_name == "joined"
    assert client.get_experiment_by_name("other") is None


def test_a_child_stands_below_its_parent_in_the_parents_experiment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tracking.run("one", "parent", system_metrics=False) as parent:
        monkeypatch.setenv("MLFLOW_RUN_ID", parent.run_id)
        with tracking.run("two", "child", parent=parent.run_id, system_metrics=False) as child:
            assert child.run_id != parent.run_id
    held = tracking.get(child.run_id)
    assert held.tags[tracking.PARENT] == parent.run_id
    assert held.experiment_id == tracking.get(parent.run_id).experiment_id


def test_the_machine_is_sampled_into_the_run() -> None:
    with tracking.run("e", "r") as run:
        pass
    names = tracking.get(run.run_id).metrics
    assert "system/cpu_utilization_percentage" in names
    assert "system/system_memory_usage_megabytes" in names


def test_references_lead_to_runs(tmp_path: Path) -> None:
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
def test_a_reference_to_nothing_is_named(reference: str) -> None:
    with pytest.raises(TrackingError, match=r"tracking server sqlite:.*MLFLOW_TRACKING_URI") as e:
        tracking.resolve_run(reference)
    assert reference.split("/")[-1].split("@")[0] in str(e.value)
    assert "\n" not in str(e.value)


def test_no_run_of_a_kind_is_said() -> None:
    with pytest.raises(TrackingError, match="experiment e has no run of kind sweep"):
        tracking.latest_run("e", kind="sweep")


def test_an_artifact_that_is_not_there_is_named() -> None:
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
    before, level = root.handlers[:], root.level
    try:
        logs.setup("warning")
        with logs.copied_to(tmp_path / "run.log"):
            logging.getLogger("eurosat.test").warning("kept %d", 1)
            logging.getLogger("eurosat.test").info("dropped")
        logging.getLogger("eurosat.test").warning("after")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
    assert (tmp_path / "run.log").read_text().rstrip().endswith("WARNING eurosat.test: kept 1")
    said = capsys.readouterr().err
    assert "kept 1" in said
    assert "dropped" not in said


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not one of"):
        logs.setup("loud")
