"""The main job as a user runs it, in a copy of the tree: small, but every part is the real one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat.runtime import telemetry

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.synthetic.tiles=1200",
    "data.synthetic.size=32",
    "data.synthetic.difficulty=0",
    "model.name=test_resnet",
    "optim.name=adamw",
    "optim.lr=4e-3",
    "optim.ema=0.9",
    "optim.batch_size=16",
    "augment.cutmix=0",
    "trainer.epochs=10",
    "trainer.precision=fp32",
    "trials=2",
    "trial_epochs=1",
    "space=small.yaml",
)
"""Small tiles of the clean kind: past the gates' floors within seconds of training."""
SPACE = "optim.lr: {low: 3.0e-3, high: 5.0e-3, log: true}\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, as after a fresh clone."""
    copy = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / "small.yaml").write_text(SPACE)
    return copy


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    theirs = ("MLFLOW_", "DO_NOT_TRACK", "GX_", "PYTEST_", "CI")  # verbs must see to it themselves
    environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    if command[0] == "mlflow":
        environment |= telemetry.OFF
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable if part == "python" else part for part in command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def twice(tree: Path) -> list[tuple[dict[str, object], str]]:
    """Report and output of the main job, run twice: as a module, then as an entry point."""
    done = []
    overrides = " ".join(one for one in SMALL if not one.startswith("trials="))
    given = ["--env-manager", "local", "-P", "trials=2", "-P", f"overrides={overrides}"]
    for command in (
        ["python", "-m", "experiments.demo", *SMALL],
        ["mlflow", "run", ".", "-e", "main", *given],
    ):
        ended = run(tree, *command)
        assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
        report = json.loads((tree / "reports" / "demo.json").read_text())
        done.append((report, ended.stdout + ended.stderr))
    return done


def test_the_main_job_ends_with_a_champion_that_scored_tiles_over_rest(
    twice: list[tuple[dict[str, object], str]],
) -> None:
    report, said = twice[0]
    assert (report["data"], report["trials"], report["champion_version"]) == ("synthetic", 2, "1")
    for name in ("test_accuracy", "macro_f1", "macro_auprc"):
        assert 0.8 < float(str(report[name])) <= 1
    scored = report["scored"]
    assert isinstance(scored, list)
    assert len(scored) == 3
    for row in scored:
        assert set(row) == {"tile", "expected", "label", "confidence", "model_version"}
        assert row["tile"].startswith(row["expected"])
        assert 0 < row["confidence"] <= 1
        assert row["model_version"] == "1"
    assert "answers came from process" in said
    assert "mlflow ui" in said


def test_the_second_time_the_challenger_wins_or_is_refused_and_it_is_said(
    twice: list[tuple[dict[str, object], str]],
) -> None:
    report, said = twice[1]
    assert report["challenger_version"] == "2"
    if report["promoted"]:
        assert report["champion_version"] == "2"
        assert "eurosat version 2 is the champion (version 1 before)" in said
    else:
        assert report["champion_version"] == "1"
        assert "refused: " in said
    scored = report["scored"]
    assert isinstance(scored, list)
    assert {row["model_version"] for row in scored} == {report["champion_version"]}


def test_nothing_tried_to_leave_the_machine(twice: object) -> None:
    refused = Path(os.environ["EUROSAT_REFUSED_SOCKETS"])
    assert not refused.exists(), refused.read_text()


def test_every_run_ended_truthfully_and_the_sweeps_stand_over_their_trials(
    tree: Path, twice: list[tuple[dict[str, object], str]]
) -> None:
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("eurosat")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    kinds = [found.data.tags["kind"] for found in runs]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "validate": 2,
        "sweep": 2,
        "trial": 4,
        "refit": 2,
    }
    assert {found.info.status for found in runs} <= {"FINISHED", "KILLED"}
    assert client.get_model_version_by_alias("eurosat", "champion").version


def test_other_verbs_run_from_mlproject(tree: Path, twice: object) -> None:
    local = ["--env-manager", "local"]
    ended = run(tree, "mlflow", "run", ".", "-e", "evaluate", *local, "-P", "fold=val")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "macro_f1" in ended.stdout
    refused = run(tree, "mlflow", "run", ".", "-e", "promote", *local)
    assert ("champion" in refused.stdout) or ("challenger" in refused.stderr)
    bad = run(tree, "mlflow", "run", ".", "-e", "train", *local, "-P", "overrides=optim.lrr=1")
    assert bad.returncode != 0
    assert "error: unknown key optim.lrr: did you mean lr?" in bad.stderr


@pytest.mark.slow
def test_a_first_champion_under_the_floors_is_refused_and_nothing_is_served(tree: Path) -> None:
    apart = tree.parent / "apart"
    shutil.copytree(tree, apart, ignore=shutil.ignore_patterns("mlruns", "mlflow.db", "optuna.db"))
    weak = [one for one in SMALL if not one.startswith(("trainer.epochs", "trials", "optim.lr"))]
    ended = run(
        apart,
        "python",
        "-m",
        "experiments.demo",
        *weak,
        "trainer.epochs=1",
        "trials=1",
        "optim.lr=3e-3",
        "optim.warmup=0.9",
        "report=none.json",
    )
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "there is no champion: nothing to serve" in ended.stdout
    assert not (apart / "none.json").exists()


@pytest.mark.slow
def test_mlflow_run_builds_its_own_environment_with_uv(tree: Path) -> None:
    if shutil.which("uv") is None and not (Path(sys.executable).parent / "uv").exists():
        pytest.skip("uv is not on PATH")
    small = "data.synthetic.tiles=100 data.synthetic.size=32"
    ended = run(
        tree,
        "mlflow",
        "run",
        ".",
        "-e",
        "validate",
        "--env-manager",
        "uv",
        "-P",
        f"overrides={small}",
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "all 46 expectations passed" in ended.stdout


@pytest.mark.usefixtures("twice")
def test_the_notebook_runs_on_the_champion(tree: Path) -> None:
    notebook = Path("docs") / "notebooks" / "inference.ipynb"
    ended = run(tree, "jupyter-execute", str(notebook), "--output=done.ipynb")
    assert ended.returncode == 0, ended.stderr[-3000:]
    cells = json.loads((tree / notebook.with_name("done.ipynb")).read_text())["cells"]
    told = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in told) == 2
    assert not [output for output in told if output["output_type"] == "error"]
