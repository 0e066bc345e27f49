"""The suite on generated tables: what passes, what fails, and which tiles are named."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from eurosat.config import DataConfig, SyntheticConfig
from eurosat.data.synthetic import CLASSES
from eurosat.errors import ConfigError
from expectations.runner import run_suite
from expectations.spec import DatasetSpec, Reference, build_spec, read_reference
from expectations.suite import build_suite, suite_digest
from expectations.tiles import COLUMNS, add_sharing_columns, tile_table
from expectations.verdict import MAX_TILES_SHOWN, ExpectationResult, Verdict

DATA = DataConfig(source="synthetic")
TILES_PER_CLASS = 12
UNREADABLE = "Forest/Forest_3.jpg is unreadable or truncated: replace it"
OUTLIERS: list[tuple[str, Any, str]] = [
    ("texture", 0.125, "blank"),
    ("std", 0.5, "std"),
    ("std", 120.0, "std"),
    ("mean", 10.0, "mean"),
    ("mean", 250.0, "mean"),
    ("saturation", 0.9, "saturation"),
    ("max", 300.0, "max"),
    ("min", -1.0, "min"),
    ("height", 32, "height"),
    ("width", 128, "width"),
    ("bands", 4, "bands"),
    ("dtype", "uint16", "dtype"),
    ("sha256", "abc", "sha256"),
    ("fold", "holdout", "folds-known"),
    ("class", "Glacier", "classes-known"),
    ("fault", UNREADABLE, "readable"),
    ("path", "Forest/deeper/Forest_3.jpg", "path-form"),
]
"""Column, value, and the only expectation that it breaks."""


def make_scan_table(counts: dict[str, int]) -> pd.DataFrame:
    """The table of a scan of tiles without faults."""
    rows: list[dict[str, Any]] = []
    for name, count in counts.items():
        for number in range(count):
            path = f"{name}/{name}_{number + 1}.jpg"
            content = hashlib.sha256(path.encode()).hexdigest()
            rows.append(
                {
                    "path": path,
                    "class": name,
                    "height": 64,
                    "width": 64,
                    "bands": 3,
                    "dtype": "uint8",
                    "mean": 90.0,
                    "std": 20.0,
                    "min": 30,
                    "max": 200,
                    "saturation": 0.01,
                    "sha256": content,
                    "pixels_sha256": content,
                    "phash": number,
                    "fault": None,
                    "group": len(rows),
                }
            )
    return pd.DataFrame(rows)


def spec_for(scan_table: pd.DataFrame) -> DatasetSpec:
    return build_spec(DATA, scan_table)


def table_for(scan_table: pd.DataFrame, spec: DatasetSpec, data: DataConfig = DATA) -> pd.DataFrame:
    texture = np.full(len(scan_table), 15.0, np.float32)
    return tile_table(scan_table, data, spec.reference, texture=texture, dtypes={})


def judge(scan_table: pd.DataFrame) -> Verdict:
    spec = spec_for(scan_table)
    return run_suite(table_for(scan_table, spec), spec)


@pytest.fixture
def scan_table() -> pd.DataFrame:
    return make_scan_table(dict.fromkeys(CLASSES, TILES_PER_CLASS))


@pytest.fixture
def table(scan_table: pd.DataFrame) -> pd.DataFrame:
    return table_for(scan_table, spec_for(scan_table))


def result_of(verdict: Verdict, name: str) -> ExpectationResult:
    (result,) = [result for result in verdict.results if result.name == name]
    return result


def bad_tiles(verdict: Verdict, name: str) -> list[str]:
    result = result_of(verdict, name)
    return [path for path, _ in result.tiles]


def test_tiles_without_faults_pass_every_expectation(table: pd.DataFrame) -> None:
    verdict = run_suite(table, spec_for(table))
    assert verdict.success
    assert verdict.failed == ()
    names = [result.name for result in verdict.results]
    assert len(names) == len(set(names)) > 40
    assert all(line.startswith("passed") for f in verdict.results for line in f.lines())


@pytest.fixture(scope="module")
def outliers() -> tuple[pd.DataFrame, Verdict]:
    """A table in which tile 7 n + 2 has OUTLIERS[n], and its verdict."""
    scan_table = make_scan_table(dict.fromkeys(CLASSES, TILES_PER_CLASS))
    spec = spec_for(scan_table)
    table = table_for(scan_table, spec)
    for number, (column, value, _) in enumerate(OUTLIERS):
        table.loc[7 * number + 2, column] = value
    return table, run_suite(table, spec)


@pytest.mark.parametrize("number", range(len(OUTLIERS)), ids=lambda n: OUTLIERS[n][2])
def test_an_outlier_is_named_by_the_only_expectation_that_it_breaks(
    outliers: tuple[pd.DataFrame, Verdict], number: int
) -> None:
    table, verdict = outliers
    column, value, failed = OUTLIERS[number]
    path = table["path"][7 * number + 2]
    (result,) = [f for f in verdict.results if path in dict(f.tiles)]
    assert result.name == failed
    assert not result.success
    (line,) = [line for line in result.lines() if path in line]
    if column != "path":
        assert line.endswith(f"{value:g}" if isinstance(value, float) else str(value))


def test_a_path_listed_twice_is_named(table: pd.DataFrame) -> None:
    table.loc[1, "path"] = table.loc[0, "path"]
    verdict = run_suite(table, spec_for(table))
    assert verdict.failed == ("path-unique",)
    assert set(bad_tiles(verdict, "path-unique")) == {table["path"][0]}


@pytest.mark.parametrize(
    ("shared", "failed"), [("pixels_sha256", "duplicates-exact"), ("group", "duplicates-near")]
)
def test_duplicates_in_two_folds_are_all_named(
    scan_table: pd.DataFrame, table: pd.DataFrame, shared: str, failed: str
) -> None:
    rivers = scan_table["class"] == "River"
    train, test = (scan_table.index[rivers & (table["fold"] == f)][0] for f in ("train", "test"))
    shared_table = table.copy()
    shared_table.loc[test, shared] = shared_table[shared][train]
    spec = spec_for(scan_table)
    verdict = run_suite(add_sharing_columns(shared_table, spec.reference)[list(COLUMNS)], spec)
    assert verdict.failed == (failed,)
    assert bad_tiles(verdict, failed) == sorted(scan_table["path"][[train, test]])


def test_equal_tiles_with_two_classes_are_named_even_in_one_fold(
    scan_table: pd.DataFrame,
) -> None:
    river, forest = (
        scan_table.index[scan_table["class"] == name][0] for name in ("River", "Forest")
    )
    scan_table.loc[river, ["pixels_sha256", "group"]] = scan_table.loc[
        forest, ["pixels_sha256", "group"]
    ]
    verdict = judge(scan_table)
    assert verdict.failed == ("labels-agree",)
    assert bad_tiles(verdict, "labels-agree") == ["Forest/Forest_1.jpg", "River/River_1.jpg"]


def test_a_missing_class_is_named() -> None:
    verdict = judge(make_scan_table({name: TILES_PER_CLASS for name in CLASSES if name != "River"}))
    assert set(verdict.failed) == {"classes-present", "count-River"}
    result = result_of(verdict, "classes-present")
    assert result.observed == "missing River"


def test_a_class_far_over_its_share_is_named_with_the_first_tiles_and_the_count() -> None:
    verdict = judge(make_scan_table(dict.fromkeys(CLASSES, TILES_PER_CLASS) | {"SeaLake": 60}))
    assert verdict.failed == ("balance",)
    result = result_of(verdict, "balance")
    assert {path.split("/")[0] for path, _ in result.tiles} == {"SeaLake"}
    lines = result.lines()
    assert len(lines) == 1 + MAX_TILES_SHOWN + 1
    assert lines[0].endswith(": SeaLake 3.57 times: 60 tiles")
    assert lines[-1].split() == ["...", "and", "50", "more"]


def test_a_class_far_under_its_share_fails_unless_the_tolerance_allows_it() -> None:
    scan_table = make_scan_table(dict.fromkeys(CLASSES, 40) | {"SeaLake": 15})
    assert judge(scan_table).failed == ("balance",)
    lenient_spec = build_spec(DATA, scan_table, tolerance=3)
    table = table_for(scan_table, lenient_spec)
    assert run_suite(table, lenient_spec).success


def test_a_class_too_small_to_split_leaves_no_folds() -> None:
    verdict = judge(make_scan_table(dict.fromkeys(CLASSES, TILES_PER_CLASS) | {"SeaLake": 2}))
    assert set(verdict.failed) == {"count-SeaLake", "balance", "folds-present"}
    result = result_of(verdict, "count-SeaLake")
    assert result.lines() == ["FAILED  count-SeaLake              SeaLake has 10 tiles or more: 2"]


def test_eurosat_must_have_exactly_its_published_counts() -> None:
    data = DataConfig(source="eurosat")
    spec = build_spec(data, make_scan_table({"Forest": TILES_PER_CLASS, "River": TILES_PER_CLASS}))
    assert sum(spec.reference.classes.values()) == 27_000
    assert spec.count_limits("Pasture") == (2000, 2000)
    assert (spec.height, spec.width, spec.bands) == (64, 64, 3)


@pytest.mark.parametrize(("option", "count"), [("all", 13), ("rgb", 3)])
def test_synthetic_tiles_must_have_the_configured_bands(
    scan_table: pd.DataFrame, option: Literal["all", "rgb"], count: int
) -> None:
    synthetic = SyntheticConfig(bands=13)
    data = DataConfig(source="synthetic", dtype="uint16", bands=option, synthetic=synthetic)
    assert build_spec(data, scan_table).bands == count


def test_a_folder_must_have_equal_shares_of_its_classes_and_one_tile_size() -> None:
    scan_table = make_scan_table(
        {"L'Estartit": TILES_PER_CLASS, "Bare soil (dry)": TILES_PER_CLASS, "Road": 30}
    )
    scan_table["width"] = 48
    scan_table.loc[0, "width"] = 64
    data = DataConfig(source="folder", root="tiles")
    spec = build_spec(data, scan_table)
    assert (spec.height, spec.width) == (64, 48)
    verdict = run_suite(table_for(scan_table, spec, data), spec)
    assert verdict.failed == ("width",)
    assert bad_tiles(verdict, "width") == ["L'Estartit/L'Estartit_1.jpg"]


def test_a_faulty_tile_has_no_fold_and_no_pixel_statistics(scan_table: pd.DataFrame) -> None:
    scan_table = scan_table.drop(columns="group")
    fault_values: dict[str, Any] = {"fault": "unreadable", "height": 0, "bands": 0, "sha256": ""}
    for column, value in fault_values.items():
        scan_table.loc[3, column] = value
    scan_table.loc[5, "pixels_sha256"] = scan_table["pixels_sha256"][4]
    table = table_for(scan_table, spec_for(scan_table))
    assert not table.iloc[3:4][["mean", "std", "fold", "sha256", "dtype"]].notna().any(axis=None)
    assert table["fold"].drop(3).isin(["train", "val", "test"]).all()
    assert table["fold"][4] == table["fold"][5]
    assert table["content_folds"][4] == 1


def test_a_table_without_a_column_fails_and_names_the_column(table: pd.DataFrame) -> None:
    verdict = run_suite(table.drop(columns="saturation"), spec_for(table))
    assert set(verdict.failed) == {"columns", "type-saturation", "saturation"}
    result = result_of(verdict, "saturation")
    assert "saturation" in result.observed
    assert "does not exist" in result.observed


def test_a_column_of_another_type_fails(table: pd.DataFrame) -> None:
    verdict = run_suite(table.astype({"height": float}), spec_for(table))
    assert verdict.failed == ("type-height",)
    (result,) = [result for result in verdict.results if not result.success]
    assert result.observed == "float64"


def test_a_verdict_without_results_is_no_success() -> None:
    assert not Verdict(results=(), suite="").success


def test_a_suite_has_the_same_digest_each_time_it_is_built_and_another_when_it_changes(
    scan_table: pd.DataFrame,
) -> None:
    once, again = (suite_digest(build_suite(build_spec(DATA, scan_table))) for _ in range(2))
    assert once == again
    assert once != suite_digest(build_suite(build_spec(DATA, scan_table, tolerance=3)))


def test_a_reference_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"classes": {"Road": 30, "Roof": 10}, "about": "my district"}')
    reference = read_reference(file)
    assert reference == Reference(classes={"Road": 30.0, "Roof": 10.0}, about="my district")
    assert reference.share("Road") == 0.75


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"classes": {"Road": 1}}', '{"classes": {"Road": 1, "Roof": 0}}']
)
def test_a_file_that_is_not_a_reference_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"reference"):
        read_reference(file)


@pytest.mark.parametrize("tolerance", [0.5, float("nan")])
def test_a_tolerance_under_one_is_refused(scan_table: pd.DataFrame, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="factor of 1 or more"):
        build_spec(DATA, scan_table, tolerance=tolerance)
