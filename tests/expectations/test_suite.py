"""The suite on tables made by hand: what passes, what fails, and which tiles are named."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from eurosat.config import DataConfig
from eurosat.data.synthetic import CLASSES
from eurosat.errors import ConfigError
from expectations.spec import DatasetSpec, Reference, build_spec, read_reference
from expectations.suite import build_suite, suite_digest
from expectations.tiles import COLUMNS, add_sharing_columns, tile_table
from expectations.verdict import MAX_TILES_SHOWN, Verdict, run_suite

DATA = DataConfig(source="synthetic")
EACH = 12
UNREADABLE = "Forest/Forest_3.jpg is unreadable or truncated: replace it"
OUT_OF_LINE: list[tuple[str, Any, str]] = [
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
"""Column, value, and the one expectation that it breaks."""


def surveyed(counts: dict[str, int]) -> pd.DataFrame:
    """What a survey of faultless tiles shows."""
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


def expected_of(survey: pd.DataFrame) -> DatasetSpec:
    return build_spec(DATA, survey)


def table_of(survey: pd.DataFrame, expected: DatasetSpec, data: DataConfig = DATA) -> pd.DataFrame:
    texture = np.full(len(survey), 15.0, np.float32)
    return tile_table(survey, data, expected.reference, texture=texture, dtypes={})


def judged(survey: pd.DataFrame) -> Verdict:
    expected = expected_of(survey)
    return run_suite(table_of(survey, expected), expected)


@pytest.fixture
def survey() -> pd.DataFrame:
    return surveyed(dict.fromkeys(CLASSES, EACH))


@pytest.fixture
def table(survey: pd.DataFrame) -> pd.DataFrame:
    return table_of(survey, expected_of(survey))


def named(verdict: Verdict, name: str) -> list[str]:
    (finding,) = [finding for finding in verdict.results if finding.name == name]
    return [path for path, _ in finding.tiles]


def test_faultless_tiles_pass_every_expectation(table: pd.DataFrame) -> None:
    verdict = run_suite(table, expected_of(table))
    assert verdict.success
    assert verdict.failed == ()
    names = [finding.name for finding in verdict.results]
    assert len(names) == len(set(names)) > 40
    assert all(line.startswith("passed") for f in verdict.results for line in f.lines())


@pytest.fixture(scope="module")
def outliers() -> tuple[pd.DataFrame, Verdict]:
    """A table in which tile 7 n + 2 breaks OUT_OF_LINE[n], and its verdict."""
    survey = surveyed(dict.fromkeys(CLASSES, EACH))
    expected = expected_of(survey)
    table = table_of(survey, expected)
    for number, (column, value, _) in enumerate(OUT_OF_LINE):
        table.loc[7 * number + 2, column] = value
    return table, run_suite(table, expected)


@pytest.mark.parametrize("number", range(len(OUT_OF_LINE)), ids=lambda n: OUT_OF_LINE[n][2])
def test_a_tile_out_of_line_is_named_by_the_one_expectation_that_it_breaks(
    outliers: tuple[pd.DataFrame, Verdict], number: int
) -> None:
    table, verdict = outliers
    column, value, failed = OUT_OF_LINE[number]
    path = table["path"][7 * number + 2]
    (finding,) = [f for f in verdict.results if path in dict(f.tiles)]
    assert finding.name == failed
    assert not finding.success
    (line,) = [line for line in finding.lines() if path in line]
    if column != "path":
        assert line.endswith(f"{value:g}" if isinstance(value, float) else str(value))


def test_a_path_listed_twice_is_named(table: pd.DataFrame) -> None:
    table.loc[1, "path"] = table.loc[0, "path"]
    verdict = run_suite(table, expected_of(table))
    assert verdict.failed == ("path-unique",)
    assert set(named(verdict, "path-unique")) == {table["path"][0]}


@pytest.mark.parametrize(
    ("shared", "failed"), [("pixels_sha256", "duplicates-exact"), ("group", "duplicates-near")]
)
def test_duplicates_in_two_folds_are_named_on_both_sides(
    survey: pd.DataFrame, table: pd.DataFrame, shared: str, failed: str
) -> None:
    rivers = survey["class"] == "River"
    train, test = (survey.index[rivers & (table["fold"] == f)][0] for f in ("train", "test"))
    shared_table = table.copy()
    shared_table.loc[test, shared] = shared_table[shared][train]
    expected = expected_of(survey)
    verdict = run_suite(
        add_sharing_columns(shared_table, expected.reference)[list(COLUMNS)], expected
    )
    assert verdict.failed == (failed,)
    assert named(verdict, failed) == sorted(survey["path"][[train, test]])


def test_equal_pixels_under_two_classes_are_named_though_they_share_a_fold(
    survey: pd.DataFrame,
) -> None:
    river, forest = (survey.index[survey["class"] == name][0] for name in ("River", "Forest"))
    survey.loc[river, ["pixels_sha256", "group"]] = survey.loc[forest, ["pixels_sha256", "group"]]
    verdict = judged(survey)
    assert verdict.failed == ("labels-agree",)
    assert named(verdict, "labels-agree") == ["Forest/Forest_1.jpg", "River/River_1.jpg"]


def test_a_missing_class_is_named() -> None:
    verdict = judged(surveyed({name: EACH for name in CLASSES if name != "River"}))
    assert set(verdict.failed) == {"classes-present", "count-River"}
    (finding,) = [finding for finding in verdict.results if finding.name == "classes-present"]
    assert finding.observed == "missing River"


def test_a_class_far_over_its_share_is_named_with_the_first_tiles_and_the_count() -> None:
    verdict = judged(surveyed(dict.fromkeys(CLASSES, EACH) | {"SeaLake": 60}))
    assert verdict.failed == ("balance",)
    (finding,) = [finding for finding in verdict.results if finding.name == "balance"]
    assert {path.split("/")[0] for path, _ in finding.tiles} == {"SeaLake"}
    lines = finding.lines()
    assert len(lines) == 1 + MAX_TILES_SHOWN + 1
    assert lines[0].endswith(": SeaLake 3.57 times: 60 tiles")
    assert lines[-1].split() == ["...", "and", "50", "more"]


def test_a_class_far_under_its_share_is_refused_unless_the_tolerance_says_otherwise() -> None:
    survey = surveyed(dict.fromkeys(CLASSES, 40) | {"SeaLake": 15})
    assert judged(survey).failed == ("balance",)
    lenient = build_spec(DATA, survey, tolerance=3)
    table = table_of(survey, lenient)
    assert run_suite(table, lenient).success


def test_a_class_too_small_to_split_leaves_no_folds() -> None:
    verdict = judged(surveyed(dict.fromkeys(CLASSES, EACH) | {"SeaLake": 2}))
    assert set(verdict.failed) == {"count-SeaLake", "balance", "folds-present"}
    (finding,) = [finding for finding in verdict.results if finding.name == "count-SeaLake"]
    assert finding.lines() == ["FAILED  count-SeaLake              SeaLake has 10 tiles or more: 2"]


def test_the_published_counts_of_eurosat_are_expected_to_the_tile() -> None:
    data = DataConfig(source="eurosat")
    expected = build_spec(data, surveyed({"Forest": EACH, "River": EACH}))
    assert sum(expected.reference.classes.values()) == 27_000
    assert expected.count_limits("Pasture") == (2000, 2000)
    assert (expected.height, expected.width, expected.bands) == (64, 64, 3)


def test_a_folder_is_held_to_an_even_deal_over_its_own_classes_and_its_usual_size() -> None:
    survey = surveyed({"L'Estartit": EACH, "Bare soil (dry)": EACH, "Road": 30})
    survey["width"] = 48
    survey.loc[0, "width"] = 64
    data = DataConfig(source="folder", root="tiles")
    expected = build_spec(data, survey)
    assert (expected.height, expected.width) == (64, 48)
    verdict = run_suite(table_of(survey, expected, data), expected)
    assert verdict.failed == ("width",)
    assert named(verdict, "width") == ["L'Estartit/L'Estartit_1.jpg"]


def test_a_faulty_tile_has_no_fold_and_no_pixel_facts(survey: pd.DataFrame) -> None:
    survey = survey.drop(columns="group")
    unread: dict[str, Any] = {"fault": "unreadable", "height": 0, "bands": 0, "sha256": ""}
    for column, value in unread.items():
        survey.loc[3, column] = value
    survey.loc[5, "pixels_sha256"] = survey["pixels_sha256"][4]
    table = table_of(survey, expected_of(survey))
    assert not table.iloc[3:4][["mean", "std", "fold", "sha256", "dtype"]].notna().any(axis=None)
    assert table["fold"].drop(3).isin(["train", "val", "test"]).all()
    assert table["fold"][4] == table["fold"][5]
    assert table["content_folds"][4] == 1


def test_a_table_without_a_column_fails_and_says_what_is_missing(table: pd.DataFrame) -> None:
    verdict = run_suite(table.drop(columns="saturation"), expected_of(table))
    assert set(verdict.failed) == {"columns", "type-saturation", "saturation"}
    (finding,) = [finding for finding in verdict.results if finding.name == "saturation"]
    assert "saturation" in finding.observed
    assert "does not exist" in finding.observed


def test_a_column_of_another_type_fails(table: pd.DataFrame) -> None:
    verdict = run_suite(table.astype({"height": float}), expected_of(table))
    assert verdict.failed == ("type-height",)
    (finding,) = [finding for finding in verdict.results if not finding.success]
    assert finding.observed == "float64"


def test_no_findings_are_no_success() -> None:
    assert not Verdict(results=(), suite="").success


def test_a_suite_has_the_same_digest_each_time_it_is_built_and_another_when_it_changes(
    survey: pd.DataFrame,
) -> None:
    once, again = (suite_digest(build_suite(build_spec(DATA, survey))) for _ in range(2))
    assert once == again
    assert once != suite_digest(build_suite(build_spec(DATA, survey, tolerance=3)))


def test_a_reference_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"classes": {"Road": 30, "Roof": 10}, "about": "my district"}')
    reference = read_reference(file)
    assert reference == Reference(classes={"Road": 30.0, "Roof": 10.0}, about="my district")
    assert reference.share("Road") == 0.75


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"classes": {"Road": 1}}', '{"classes": {"Road": 1, "Roof": 0}}']
)
def test_a_file_that_is_no_reference_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"reference"):
        read_reference(file)


@pytest.mark.parametrize("tolerance", [0.5, float("nan")])
def test_a_tolerance_under_one_is_refused(survey: pd.DataFrame, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="factor of 1 or more"):
        build_spec(DATA, survey, tolerance=tolerance)
