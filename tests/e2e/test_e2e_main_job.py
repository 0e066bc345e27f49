"""The demo as a user runs it, in a copy of the repository: small, but with every real part."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat.runtime import telemetry
from tests.support.paths import ROOT

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
    "trainer.threads=1",
    "trials=2",
    "trial_epochs=1",
    "space=small.yaml",
)
"""Small, clean tiles: seconds of training suffice for the gates' fixed limits."""
SPACE = "optim.lr: {low: 3.0e-3, high: 5.0e-3, log: true}\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks, as after a fresh clone."""
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
    # without the tests' own telemetry settings: the commands must turn telemetry off themselves
    removed = ("MLFLOW_", "DO_NOT_TRACK", "GX_", "PYTEST_", "CI")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(removed)}
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


Demo = tuple[dict[str, object], str]
"""Report and output of a demo."""


def run_demo(tree: Path, *command: str) -> Demo:
    process = run(tree, *command)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-5000:]
    return json.loads((tree / "reports" / "demo.json").read_text()), output


@pytest.fixture(scope="module")
def demo(tree: Path) -> Demo:
    """The first demo in the tree."""
    return run_demo(tree, "python", "-m", "experiments.demo", *SMALL)


def test_the_demo_ends_with_a_champion_that_classified_tiles_over_rest(demo: Demo) -> None:
    report, output = demo
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
    assert "the predictions came from process" in output
    assert "mlflow ui" in output


@pytest.mark.slow
@pytest.mark.usefixtures("demo")
def test_the_second_demo_prints_whether_its_challenger_was_promoted_or_refused(
    tree: Path,
) -> None:
    """It is run as an entry point of MLproject."""
    overrides = " ".join(setting for setting in SMALL if not setting.startswith("trials="))
    flags = ["--env-manager", "local", "-P", "trials=2", "-P", f"overrides={overrides}"]
    report, output = run_demo(tree, "mlflow", "run", ".", "-e", "main", *flags)
    assert report["challenger_version"] == "2"
    if report["promoted"]:
        assert report["champion_version"] == "2"
        assert "eurosat version 2 is the champion (version 1 before)" in output
    else:
        assert report["champion_version"] == "1"
        assert "refused: " in output
    scored = report["scored"]
    assert isinstance(scored, list)
    assert {row["model_version"] for row in scored} == {report["champion_version"]}


@pytest.mark.usefixtures("demo")
def test_the_demo_contacts_no_other_machine() -> None:
    refused = Path(os.environ["EUROSAT_REFUSED_SOCKETS"])
    assert not refused.exists(), refused.read_text()


@pytest.mark.usefixtures("demo")
def test_every_step_of_the_demo_has_its_runs_and_all_have_ended(tree: Path) -> None:
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("eurosat")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    kinds = [logged.data.tags["kind"] for logged in runs]
    times = len(kinds) // 5  # a second demo may have run
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "validate": times,
        "sweep": times,
        "trial": 2 * times,
        "refit": times,
    }
    assert {logged.info.status for logged in runs} <= {"FINISHED", "KILLED"}
    assert client.get_model_version_by_alias("eurosat", "champion").version


@pytest.mark.usefixtures("demo")
def test_other_entry_points_of_mlproject_run(tree: Path) -> None:
    local = ["--env-manager", "local"]
    evaluation = run(tree, "mlflow", "run", ".", "-e", "evaluate", *local, "-P", "fold=val")
    assert evaluation.returncode == 0, evaluation.stderr[-3000:]
    assert "macro_f1" in evaluation.stdout
    typo = [*local, "-P", "overrides=optim.lrr=1"]
    training = run(tree, "mlflow", "run", ".", "-e", "train", *typo)
    assert training.returncode != 0
    assert "error: unknown key optim.lrr: did you mean lr?" in training.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("demo")
def test_the_entry_point_that_promotes_runs(tree: Path) -> None:
    promotion = run(tree, "mlflow", "run", ".", "-e", "promote", "--env-manager", "local")
    assert ("champion" in promotion.stdout) or ("challenger" in promotion.stderr)


@pytest.mark.slow
def test_a_first_champion_that_fails_the_gates_is_refused_and_nothing_is_served(
    tree: Path,
) -> None:
    apart = tree.parent / "apart"
    shutil.copytree(tree, apart, ignore=shutil.ignore_patterns("mlruns", "mlflow.db", "optuna.db"))
    replaced = ("trainer.epochs", "trials", "optim.lr")
    settings = [setting for setting in SMALL if not setting.startswith(replaced)]
    settings += ["trainer.epochs=1", "trials=1", "optim.lr=3e-3", "optim.warmup=0.9"]
    process = run(apart, "python", "-m", "experiments.demo", *settings, "report=none.json")
    assert process.returncode == 1, process.stderr[-3000:]
    assert "there is no champion: nothing to serve" in process.stdout
    assert not (apart / "none.json").exists()


@pytest.mark.slow
def test_mlflow_run_builds_its_own_environment_with_uv(tree: Path) -> None:
    if shutil.which("uv") is None and not (Path(sys.executable).parent / "uv").exists():
        pytest.skip("uv is not on PATH")
    overrides = "overrides=data.synthetic.tiles=100 data.synthetic.size=32"
    flags = ["-e", "validate", "--env-manager", "uv", "-P", overrides]
    process = run(tree, "mlflow", "run", ".", *flags)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "all 46 expectations passed" in process.stdout


@pytest.mark.usefixtures("demo")
def test_the_notebook_runs_on_the_champion(tree: Path) -> None:
    notebook = Path("docs") / "notebooks" / "inference.ipynb"
    process = run(tree, "jupyter-execute", str(notebook), "--output=done.ipynb")
    assert process.returncode == 0, process.stderr[-3000:]
    cells = json.loads((tree / notebook.with_name("done.ipynb")).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error"]
