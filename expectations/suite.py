"""Build the suite: one named expectation for each property of a valid data set."""

import hashlib
import json
import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expectations.spec import DatasetSpec
from expectations.tiles import COLUMN_TYPES, COLUMNS

if TYPE_CHECKING:
    from great_expectations import ExpectationSuite
    from great_expectations.expectations.expectation import Expectation

SUITE_NAME = "tiles"


def load_great_expectations() -> ModuleType:
    """Import Great Expectations (2 s) with its telemetry switched off."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    with warnings.catch_warnings():
        # great_expectations 1.24.1 imports sre_constants and sre_parse, deprecated by Python 3.11
        warnings.filterwarnings("ignore", r"module 'sre_\w+' is deprecated", DeprecationWarning)
        import great_expectations
    return great_expectations


def build_suite(spec: DatasetSpec) -> "ExpectationSuite":
    """Return the suite; each expectation has its name in ``meta`` and a plain ``description``."""
    gx = load_great_expectations()
    expectations = [
        *_schema(gx.expectations),
        *_files(gx.expectations, spec),
        *_classes(gx.expectations, spec),
        *_values(gx.expectations, spec),
        *_folds(gx.expectations, spec),
    ]
    suite: ExpectationSuite = gx.ExpectationSuite(name=SUITE_NAME, expectations=expectations)
    return suite


def expectation_name(expectation: "Expectation") -> str:
    return str((expectation.meta or {})["name"])


def suite_digest(suite: "ExpectationSuite") -> str:
    """Return the sha256 of the suite's definition, without Great Expectations' random ids."""
    definitions: Any = suite.to_json_dict()["expectations"]
    stable = [{k: v for k, v in definition.items() if k != "id"} for definition in definitions]
    return hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()


def _schema(gxe: Any) -> list["Expectation"]:
    return [
        gxe.ExpectTableColumnsToMatchOrderedList(
            column_list=list(COLUMNS),
            **_label("columns", "the table has the expected columns, in order"),
        ),
        *(
            gxe.ExpectColumnValuesToBeOfType(
                column=column, type_=kind, **_label(f"type-{column}", f"{column} is {kind}")
            )
            for column, kind in COLUMN_TYPES.items()
        ),
    ]


def _files(gxe: Any, spec: DatasetSpec) -> list["Expectation"]:
    from great_expectations.expectations.row_conditions import Column

    readable = Column("bands") > 0
    sizes = (
        ("height", spec.height, f"every readable tile is {spec.height} pixels high"),
        ("width", spec.width, f"every readable tile is {spec.width} pixels wide"),
        ("bands", spec.bands, f"every readable tile has {spec.bands} bands"),
    )
    return [
        gxe.ExpectColumnValuesToBeUnique(
            column="path", **_label("path-unique", "no path is listed twice")
        ),
        gxe.ExpectColumnValuesToMatchRegex(
            column="path",
            regex=r"^[^/]+/[^/]+$",
            **_label("path-form", "a path is Class/file"),
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="fault", **_label("readable", "every tile can be read and used")
        ),
        *(
            gxe.ExpectColumnValuesToBeInSet(
                column=column,
                value_set=[value],
                row_condition=readable,
                **_label(column, description),
            )
            for column, value, description in sizes
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="dtype",
            value_set=[spec.dtype],
            **_label("dtype", f"the pixels in the files are {spec.dtype}"),
        ),
        gxe.ExpectColumnValuesToMatchRegex(
            column="sha256",
            regex="^[0-9a-f]{64}$",
            **_label("sha256", "every readable file has a sha256"),
        ),
    ]


def _classes(gxe: Any, spec: DatasetSpec) -> list["Expectation"]:
    from great_expectations.expectations.row_conditions import Column

    reference, tolerance = spec.reference, spec.tolerance
    names = sorted(reference.classes)
    return [
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="class",
            value_set=names,
            **_label(
                "classes-present", f"no class of the reference ({reference.about}) is missing"
            ),
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="class",
            value_set=names,
            **_label("classes-known", "no tile has a class that is not in the reference"),
        ),
        *(
            gxe.ExpectTableRowCountToBeBetween(
                min_value=low,
                max_value=high,
                row_condition=Column("class") == name,
                **_label(
                    f"count-{name}",
                    f"{name} has {low:,} tiles" + ("" if high == low else " or more"),
                ),
            )
            for name, (low, high) in ((name, spec.count_limits(name)) for name in names)
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="balance",
            min_value=1 / tolerance,
            max_value=tolerance,
            **_label(
                "balance",
                f"each class has 1/{tolerance:g} to {tolerance:g} times its share in the "
                f"reference ({reference.about})",
            ),
        ),
    ]


def _values(gxe: Any, spec: DatasetSpec) -> list["Expectation"]:
    ranges = spec.ranges

    def between(column: str, name: str, low: float, high: float, description: str) -> "Expectation":
        expectation: Expectation = gxe.ExpectColumnValuesToBeBetween(
            column=column,
            min_value=low,
            max_value=high,
            **_label(name, f"{description} ({column} in {low:g}..{high:g})"),
        )
        return expectation

    return [
        between("min", "min", 0, 255, "the darkest value is a grey level"),
        between("max", "max", 0, 255, "the brightest value is a grey level"),
        between("mean", "mean", *ranges.mean, "no tile is black or overexposed"),
        between("std", "std", *ranges.std, "no tile is uniformly grey or noise"),
        between("texture", "blank", ranges.texture, 127.5, "no tile is of one colour"),
        between("saturation", "saturation", *ranges.saturation, "no tile is cloud or glint"),
    ]


def _folds(gxe: Any, spec: DatasetSpec) -> list["Expectation"]:
    folds = list(spec.folds)

    def at_most_one(column: str, name: str, description: str) -> "Expectation":
        expectation: Expectation = gxe.ExpectColumnValuesToBeBetween(
            column=column, max_value=1, **_label(name, description)
        )
        return expectation

    near = at_most_one("place_folds", "duplicates-near", "no near duplicates are in two folds")
    return [
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="fold",
            value_set=folds,
            **_label("folds-present", "the tiles can be split: no fold is empty"),
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="fold",
            value_set=folds,
            **_label("folds-known", f"every fold is one of {', '.join(folds)}"),
        ),
        at_most_one("content_folds", "duplicates-exact", "no equal tiles are in two folds"),
        at_most_one("content_classes", "labels-agree", "no equal tiles have two classes"),
        *([near] if spec.near_duplicates else []),
    ]


def _label(name: str, description: str) -> dict[str, Any]:
    return {"meta": {"name": name}, "description": description}
