"""The verb: tiles on disk in; exit code, Data Docs, a run and a receipt out."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from eurosat.config import DataConfig, compose
from eurosat.data import validation_record
from eurosat.data.pack import scan_source
from eurosat.data.synthetic import CLASSES, render
from eurosat.errors import ConfigError, DataError
from eurosat.runtime import cli, exit_codes
from expectations import validate
from expectations.docs import MARKER, check_target, self_contained
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17's own store, on SQLAlchemy 2.1
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
)
EXPERIMENT = "validation"
NAMES = ("Forest", "River", "SeaLake")
EACH = 12
HEAVY = {"torch", "mlflow", "great_expectations", "pandas", "rasterio"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracking store, an experiment and a cache of this module's own."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("EUROSAT_CACHE", str(folder / "cache"))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        MlflowClient().create_experiment(EXPERIMENT, (folder / "artifacts").as_uri())
        yield folder


@dataclass(frozen=True)
class Outcome:
    code: int
    printed: str
    docs: Path
    data: DataConfig

    @property
    def fingerprint(self) -> str:
        return scan_source(self.data).fingerprint


def run_verb(folder: Path, *overrides: str) -> Outcome:
    docs = folder / "docs"
    arguments = [*overrides, f"experiment={EXPERIMENT}", f"docs={docs}"]
    code, printed, told = exit_of(arguments)
    assert code in (exit_codes.OK, exit_codes.NEGATIVE), told
    assert "Calculating Metrics" not in told  # Great Expectations' own bars
    return Outcome(code=code, printed=printed, docs=docs, data=compose([*overrides]).data)


def exit_of(arguments: list[str]) -> tuple[int, str, str]:
    """The verb's exit code, standard output and standard error; leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    printed, told = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(told), pytest.raises(SystemExit) as exited:
            cli.run_command(validate.main, arguments)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    assert isinstance(exited.value.code, int)
    return exited.value.code, printed.getvalue(), told.getvalue()


@pytest.fixture(scope="module")
def passed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_verb(tmp_path_factory.mktemp("passed"), "data=synthetic", "data.synthetic.tiles=200")


@pytest.fixture(scope="module")
def failed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Tiles with one of each fault among them."""
    folder = tmp_path_factory.mktemp("failed")
    write_tiles(folder / "tiles")
    break_tiles(folder / "tiles")
    return run_verb(folder, "data=folder", f"data.root={folder / 'tiles'}")


def jpeg(label: str, number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(CLASSES.index(label), number)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tiles(root: Path) -> None:
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for number in range(EACH):
            (root / name / f"{number:02}.jpg").write_bytes(jpeg(name, number))


def break_tiles(root: Path) -> None:
    truncated = root / "Forest" / "03.jpg"
    truncated.write_bytes(truncated.read_bytes()[:900])
    Image.new("RGB", (32, 48), "green").save(root / "Forest" / "wide.png")
    Image.new("I;16", (64, 64), 4000).save(root / "River" / "deep.png")
    Image.new("RGB", (64, 64), "teal").save(root / "SeaLake" / "blank.png")
    (root / "SeaLake" / "copy.jpg").write_bytes((root / "River" / "02.jpg").read_bytes())


def logged(outcome: Outcome) -> tuple[dict[str, str], dict[str, float], dict[str, str], str, Path]:
    """Params, metrics, tags, status and artifacts of the run that a validation logged."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`data.fingerprint` = '{outcome.fingerprint}'"
    )
    assert run.info.run_name == "validate"
    assert run.info.artifact_uri is not None
    return (
        run.data.params,
        run.data.metrics,
        run.data.tags,
        run.info.status,
        Path(run.info.artifact_uri.removeprefix("file://")),
    )


def test_the_synthetic_tiles_pass_and_leave_a_receipt_that_training_accepts(
    passed: Outcome,
) -> None:
    assert passed.code == exit_codes.OK
    assert "FAILED" not in passed.printed
    found = validation_record.read(passed.fingerprint, passed.data.cache_dir)
    assert found is not None
    assert found.success
    assert found.failed == ()
    assert f"all {found.expectations} expectations passed" in passed.printed
    assert validation_record.require_passed(passed.fingerprint, passed.data) == "passed"


def test_a_passed_validation_is_a_finished_run_with_its_numbers_and_artifacts(
    passed: Outcome,
) -> None:
    params, metrics, tags, status, artifacts = logged(passed)
    found = validation_record.read(passed.fingerprint, passed.data.cache_dir)
    assert found is not None
    assert status == "FINISHED"
    assert tags["data.validation"] == "passed"
    assert params["source"] == "synthetic"
    assert params["suite"] == found.suite
    assert metrics["tiles"] == 200
    assert metrics["expectations"] == found.expectations
    assert metrics["failed"] == metrics["duplicates_exact"] == metrics["duplicates_near"] == 0
    assert metrics["seconds"] > 0
    table = pd.read_parquet(artifacts / "tiles.parquet")
    assert len(table) == 200
    assert set(table["fold"]) == {"train", "val", "test"}
    assert json.loads((artifacts / "result.json").read_text())["success"] is True
    assert (artifacts / "data_docs" / "index.html").is_file()
    assert "0 failed" in (artifacts / "log.txt").read_text()


def test_every_faulty_tile_is_named_beside_its_fault(failed: Outcome) -> None:
    assert failed.code == exit_codes.NEGATIVE
    sections = re.split(r"^(?=passed|FAILED)", failed.printed, flags=re.MULTILINE)
    told = {section.split()[1]: section for section in sections if section.startswith("FAILED")}
    tiles = {name: re.findall(r"^ +(\S+/\S+)", told[name], re.MULTILINE) for name in told}
    assert tiles == {
        "readable": ["Forest/03.jpg", "Forest/wide.png", "River/deep.png"],
        "height": ["Forest/wide.png"],
        "width": ["Forest/wide.png"],
        "dtype": ["River/deep.png"],
        "blank": ["SeaLake/blank.png"],
        "labels-agree": ["River/02.jpg", "SeaLake/copy.jpg"],
    }
    reasons = told["readable"]
    assert re.search(r"Forest/03\.jpg .*truncated", reasons)
    assert re.search(r"Forest/wide\.png .*48x32x3, but most tiles are 64x64x3", reasons)
    assert re.search(r"River/deep\.png .*holds uint16 pixels, but data.dtype is uint8", reasons)


def test_a_failed_validation_is_a_finished_run_that_says_so(failed: Outcome) -> None:
    _, metrics, tags, status, artifacts = logged(failed)
    assert status == "FINISHED"
    assert tags["data.validation"] == "failed"
    assert metrics["failed"] == 6
    assert metrics["duplicates_exact"] == 1
    assert "duplicates_near" not in metrics
    result = json.loads((artifacts / "result.json").read_text())
    (blank,) = [finding for finding in result["findings"] if finding["name"] == "blank"]
    assert blank["tiles"] == [["SeaLake/blank.png", "0"]]
    (agree,) = [finding for finding in result["findings"] if finding["name"] == "labels-agree"]
    (_, one), (_, other) = agree["tiles"]
    assert one == other  # the same fold, the same group


def test_what_was_not_looked_for_is_not_said_to_have_passed(
    passed: Outcome, failed: Outcome
) -> None:
    assert "duplicates-near" in passed.printed
    assert "duplicates-near" not in failed.printed
    assert "near duplicates were not looked for" in (logged(failed)[4] / "log.txt").read_text()


def test_training_refuses_a_data_set_that_failed_unless_told_otherwise(failed: Outcome) -> None:
    with pytest.raises(DataError, match=r"failed readable, height.*allow_unvalidated=true"):
        validation_record.require_passed(failed.fingerprint, failed.data)
    allowed = replace(failed.data, allow_unvalidated=True)
    assert validation_record.require_passed(failed.fingerprint, allowed) == "failed"


def test_the_data_docs_name_the_faulty_tiles_and_load_nothing_from_elsewhere(
    failed: Outcome,
) -> None:
    pages = {str(page.relative_to(failed.docs)) for page in failed.docs.rglob("*.html")}
    assert pages == {"index.html", "expectations/tiles.html"}
    index = (failed.docs / "index.html").read_text()
    assert "SeaLake/blank.png" in index
    assert "no tile is of one colour" in index
    for page in pages:
        html = (failed.docs / page).read_text()
        assert not re.search(r"(src|<link[^>]*href)=\"https?:|url\(\W*https?:|<script", html)
    links = re.findall(r"href=\"([^#\"]+)\"", index)
    assert [link for link in links if not (failed.docs / link).is_file()] == []


def test_data_docs_replace_their_own_folder_and_no_other(tmp_path: Path) -> None:
    check_target(tmp_path / "new")
    check_target(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="would be lost"):
        check_target(tmp_path)
    (tmp_path / MARKER).touch()
    check_target(tmp_path)


def test_a_page_loses_what_it_would_load_and_keeps_what_it_says() -> None:
    page = (
        '<head><link rel="stylesheet" href="https://cdn.example/a.css"><script>track()</script>'
        '</head><body><img src="https://cdn.example/logo.png"/><a href="https://b.example">b</a>'
    )
    kept = self_contained(page)
    assert "cdn.example" not in kept
    assert "track()" not in kept
    assert '<a href="https://b.example">b</a>' in kept


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("tolerance=much", "tolerance must be a number"),
        ("docs=", "docs= needs a value"),
        ("--docs", "key=value"),
        ("data.synthetic.tile=3", "tile"),
        ("reference=nowhere.json", "no reference"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    place: Path, tmp_path: Path, argument: str, told: str
) -> None:
    common = ["data.synthetic.tiles=200", f"experiment={EXPERIMENT}", f"docs={tmp_path / 'docs'}"]
    code, printed, errors = exit_of([*common, argument])
    assert code == exit_codes.BAD_INPUT
    assert not printed
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert told in line
    assert not (tmp_path / "docs").exists()


def test_the_help_says_what_the_verb_takes_without_waiting_for_heavy_imports() -> None:
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "expectations.validate", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == exit_codes.OK
    for key in validate.COMMAND_KEYS:
        assert f"{key}=" in asked.stdout
    imported = {*re.findall(r"^import time:.*\|\s*(\w+)[\w.]*$", asked.stderr, re.MULTILINE)}
    assert "eurosat" in imported
    assert not HEAVY & imported


@pytest.mark.real_data
@pytest.mark.skipif(
    not os.environ.get("EUROSAT_ROOT"), reason="EUROSAT_ROOT names no EuroSAT tiles"
)
def test_the_27000_genuine_tiles_pass(place: Path, tmp_path: Path) -> None:
    outcome = run_verb(tmp_path, "data=eurosat")
    assert outcome.code == exit_codes.OK, outcome.printed
    _, metrics, _, _, _ = logged(outcome)
    assert metrics["tiles"] == 27_000
    assert metrics["failed"] == 0
    print(f"27,000 tiles validated in {metrics['seconds']:.0f} s")
