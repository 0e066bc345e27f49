"""The command: exit code, console output, Data Docs, the run and the validation record."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

from eurosat.config import DataConfig, compose
from eurosat.data import validation_record
from eurosat.data.pack import scan_source
from eurosat.data.synthetic import CLASSES, render
from eurosat.errors import DataError
from eurosat.runtime import cli, exit_codes
from expectations import validate
from tests.support.markup import HOSTILE_CLASS, HOSTILE_FILE, assert_page_is_inert
from tests.support.paths import ROOT
from tests.support.tiffs import eps, sparse_tiff, tiff_with_large_block

pytestmark = [
    pytest.mark.filterwarnings(
        # MLflow 3.17's own store, on SQLAlchemy 2.1
        "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:Dataset has no geotransform"),  # tiles need no place
]
EXPERIMENT = "validation"
CLASS_NAMES = ("Forest", "River", "SeaLake")
TILES_PER_CLASS = 12
HEAVY_MODULES = {"torch", "mlflow", "great_expectations", "pandas", "rasterio"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracking store, an experiment and a cache for this module alone."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("EUROSAT_CACHE", str(folder / "cache"))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        MlflowClient().create_experiment(EXPERIMENT, (folder / "artifacts").as_uri())
        yield folder


@dataclass(frozen=True)
class Outcome:
    """What one call of the command returned and wrote."""

    code: int
    printed: str
    docs: Path
    data: DataConfig

    @property
    def fingerprint(self) -> str:
        return scan_source(self.data).fingerprint


def run_command(folder: Path, *overrides: str) -> Outcome:
    docs = folder / "docs"
    arguments = [*overrides, f"experiment={EXPERIMENT}", f"docs={docs}"]
    code, printed, errors = call_main(arguments)
    assert code in (exit_codes.OK, exit_codes.NEGATIVE), errors
    assert "Calculating Metrics" not in errors  # Great Expectations' own bars
    return Outcome(code=code, printed=printed, docs=docs, data=compose([*overrides]).data)


def call_main(arguments: list[str]) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error; restore logging afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(errors), pytest.raises(SystemExit) as exited:
            cli.run_command(validate.main, arguments)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    assert isinstance(exited.value.code, int)
    return exited.value.code, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def passed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_command(
        tmp_path_factory.mktemp("passed"), "data=synthetic", "data.synthetic.tiles=200"
    )


@pytest.fixture(scope="module")
def failed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Tiles with one example of each fault."""
    folder = tmp_path_factory.mktemp("failed")
    write_tiles(folder / "tiles")
    add_faults(folder / "tiles")
    return run_command(folder, "data=folder", f"data.root={folder / 'tiles'}")


def encode_jpeg(label: str, number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(CLASSES.index(label), number)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tiles(root: Path) -> None:
    for name in CLASS_NAMES:
        (root / name).mkdir(parents=True)
        for number in range(TILES_PER_CLASS):
            (root / name / f"{number:02}.jpg").write_bytes(encode_jpeg(name, number))


def add_faults(root: Path) -> None:
    truncated = root / "Forest" / "03.jpg"
    truncated.write_bytes(truncated.read_bytes()[:900])
    Image.new("RGB", (32, 48), "green").save(root / "Forest" / "wide.png")
    Image.new("I;16", (64, 64), 4000).save(root / "River" / "deep.png")
    Image.new("RGB", (64, 64), "teal").save(root / "SeaLake" / "blank.png")
    (root / "River" / "bomb.tif").write_bytes(tiff_with_large_block(64, 8192))
    (root / "River" / "bands.tif").write_bytes(sparse_tiff(400, 1024, "uint8"))
    (root / "River" / "script.jpg").write_bytes(eps())
    (root / "SeaLake" / "copy.jpg").write_bytes((root / "River" / "02.jpg").read_bytes())


def logged_run(
    outcome: Outcome,
) -> tuple[dict[str, str], dict[str, float], dict[str, str], str, Path]:
    """Return params, metrics, tags, status and artifact folder of the run."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`data.fingerprint` = '{outcome.fingerprint}'"
    )
    label = "tiles" if run.data.params["source"] == "folder" else run.data.params["source"]
    assert run.info.run_name == f"validate {label}"
    assert run.info.artifact_uri is not None
    return (
        run.data.params,
        run.data.metrics,
        run.data.tags,
        run.info.status,
        Path(run.info.artifact_uri.removeprefix("file://")),
    )


def test_synthetic_tiles_pass_and_get_a_record_that_training_accepts(
    passed: Outcome,
) -> None:
    assert passed.code == exit_codes.OK
    assert "FAILED" not in passed.printed
    record = validation_record.read(passed.fingerprint, passed.data.cache_dir)
    assert record is not None
    assert record.success
    assert record.failed == ()
    lines = passed.printed.splitlines()
    assert lines[0] == f"all {record.expectations} expectations passed"
    assert lines[1:] == [f"Data Docs: {passed.docs / 'index.html'}"]
    assert validation_record.require_passed(passed.fingerprint, passed.data) == "passed"


def test_a_passed_validation_is_a_finished_run_with_metrics_and_artifacts(
    passed: Outcome,
) -> None:
    params, metrics, tags, status, artifacts = logged_run(passed)
    record = validation_record.read(passed.fingerprint, passed.data.cache_dir)
    assert record is not None
    assert status == "FINISHED"
    assert tags["data.validation"] == "passed"
    assert params["source"] == "synthetic"
    assert params["suite"] == record.suite
    assert metrics["tiles"] == 200
    assert metrics["expectations"] == record.expectations
    assert metrics["failed"] == metrics["duplicates_exact"] == metrics["duplicates_near"] == 0
    assert metrics["seconds"] > 0
    table = parquet.read_table(artifacts / "tiles.parquet").to_pandas()
    assert len(table) == 200
    assert set(table["fold"]) == {"train", "val", "test"}
    assert json.loads((artifacts / "result.json").read_text())["success"] is True
    assert (artifacts / "data_docs" / "index.html").is_file()
    assert "0 failed" in (artifacts / "log.txt").read_text()


def test_every_faulty_tile_is_printed_with_its_fault_after_one_line_for_what_passed(
    failed: Outcome,
) -> None:
    assert failed.code == exit_codes.NEGATIVE
    first, *sections = re.split(r"^(?=FAILED)", failed.printed, flags=re.MULTILINE)
    assert re.fullmatch(r"passed  \d+ expectations\n", first)
    failures = {section.split()[1]: section for section in sections}
    tiles = {
        name: re.findall(r"^ +(\S+/\S+)", text, re.MULTILINE) for name, text in failures.items()
    }
    assert tiles == {
        "readable": [
            "Forest/03.jpg",
            "Forest/wide.png",
            "River/bands.tif",
            "River/bomb.tif",
            "River/deep.png",
            "River/script.jpg",
        ],
        "height": ["Forest/wide.png"],
        "width": ["Forest/wide.png"],
        "dtype": ["River/deep.png"],
        "blank": ["SeaLake/blank.png"],
        "labels-agree": ["River/02.jpg", "SeaLake/copy.jpg"],
    }
    assert re.search(r"^6 of \d+ expectations failed$", failed.printed, re.MULTILINE)
    reasons = failures["readable"]
    assert re.search(r"Forest/03\.jpg .*truncated", reasons)
    assert re.search(r"Forest/wide\.png .*48x32x3, but most tiles are 64x64x3", reasons)
    assert re.search(r"River/deep\.png .*holds uint16 pixels, but data.dtype is uint8", reasons)


def test_a_failed_validation_is_a_failed_run_with_the_tag_failed(failed: Outcome) -> None:
    _, metrics, tags, status, artifacts = logged_run(failed)
    assert status == "FAILED"
    assert tags["data.validation"] == "failed"
    assert metrics["failed"] == 6
    assert metrics["duplicates_exact"] == 1
    assert "duplicates_near" not in metrics
    result = json.loads((artifacts / "result.json").read_text())
    (blank,) = [entry for entry in result["results"] if entry["name"] == "blank"]
    assert blank["tiles"] == [["SeaLake/blank.png", "0"]]
    (agree,) = [entry for entry in result["results"] if entry["name"] == "labels-agree"]
    (_, first), (_, second) = agree["tiles"]
    assert first == second  # the same fold, the same group


def test_near_duplicates_are_reported_only_if_they_were_searched(
    passed: Outcome, failed: Outcome
) -> None:
    names = {}
    for outcome in (passed, failed):
        result = json.loads((logged_run(outcome)[4] / "result.json").read_text())
        names[outcome.code] = {entry["name"] for entry in result["results"]}
    assert "duplicates-near" in names[exit_codes.OK]
    assert "duplicates-near" not in names[exit_codes.NEGATIVE]
    assert "duplicates-near" in (passed.docs / "index.html").read_text()
    page = (failed.docs / "index.html").read_text()
    assert "duplicates-near" not in page
    assert "Near duplicates were not searched" in page
    assert "near duplicates were not searched" in (logged_run(failed)[4] / "log.txt").read_text()


def test_training_refuses_a_data_set_that_failed_unless_it_is_allowed(failed: Outcome) -> None:
    with pytest.raises(DataError, match=r"failed readable, height.*allow_unvalidated=true"):
        validation_record.require_passed(failed.fingerprint, failed.data)
    allowed = replace(failed.data, allow_unvalidated=True)
    assert validation_record.require_passed(failed.fingerprint, allowed) == "failed"


def test_the_data_docs_name_the_faulty_tiles_and_load_nothing_from_elsewhere(
    failed: Outcome,
) -> None:
    pages = {str(page.relative_to(failed.docs)) for page in failed.docs.rglob("*.html")}
    validations = {page for page in pages if page.startswith("validations/tiles/folder-")}
    assert len(validations) == 1
    assert pages == {"index.html", "expectations/tiles.html", *validations}
    for page in ("index.html", *validations):
        html = (failed.docs / page).read_text()
        assert "SeaLake/blank.png" in html
        assert "no tile is of one colour" in html
    for page in pages:
        html = (failed.docs / page).read_text()
        assert not re.search(r"(src|<link[^>]*href)=\"https?:|url\(\W*https?:|<script", html)
        links = re.findall(r"href=\"([^#\"]+)\"", html)
        folder = (failed.docs / page).parent
        assert [link for link in links if not (folder / link).is_file()] == []


def test_names_of_folders_and_tiles_are_text_on_every_page(store: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiles"
    write_tiles(root)
    (root / "Forest").rename(root / HOSTILE_CLASS)
    Image.new("RGB", (64, 64), "teal").save(root / HOSTILE_CLASS / HOSTILE_FILE)
    outcome = run_command(tmp_path, "data=folder", f"data.root={root}")
    assert outcome.code == exit_codes.NEGATIVE
    pages = list(outcome.docs.rglob("*.html"))
    assert len(pages) == 3
    for page in pages:
        assert_page_is_inert(page.read_text())
    assert "&lt;svg onload=attack()&gt;" in (outcome.docs / "index.html").read_text()


def test_the_page_lists_failures_before_what_passed(failed: Outcome) -> None:
    html = (failed.docs / "index.html").read_text()
    statuses = re.findall(r"<td class=\"status\">(\w+)</td>", html)
    assert statuses == sorted(statuses)  # failed, then passed
    assert statuses.count("failed") == 6
    assert failed.fingerprint in html


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tolerance=much", "tolerance must be a number"),
        ("docs=", "docs= needs a value"),
        ("--docs", "key=value"),
        ("data.synthetic.tile=3", "tile"),
        ("reference=nowhere.json", "not a reference"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    store: Path, tmp_path: Path, argument: str, message: str
) -> None:
    common = ["data.synthetic.tiles=200", f"experiment={EXPERIMENT}", f"docs={tmp_path / 'docs'}"]
    code, printed, errors = call_main([*common, argument])
    assert code == exit_codes.BAD_INPUT
    assert not printed
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "docs").exists()


def test_the_help_lists_the_options_without_heavy_imports() -> None:
    completed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "expectations.validate", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == exit_codes.OK
    for key in validate.COMMAND_KEYS:
        assert f"{key}=" in completed.stdout
    imported = {*re.findall(r"^import time:.*\|\s*(\w+)[\w.]*$", completed.stderr, re.MULTILINE)}
    assert "eurosat" in imported
    assert not HEAVY_MODULES & imported


@pytest.mark.real_data
def test_the_27000_real_tiles_pass(
    store: Path, tmp_path: Path, real_tiles: tuple[str, ...]
) -> None:
    outcome = run_command(tmp_path, *real_tiles)
    assert outcome.code == exit_codes.OK, outcome.printed
    _, metrics, _, _, _ = logged_run(outcome)
    assert metrics["tiles"] == 27_000
    assert metrics["failed"] == 0
    print(f"27,000 tiles validated in {metrics['seconds']:.0f} s")
