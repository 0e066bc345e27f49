"""The suite, as code: one named expectation for each thing that a data set promises."""

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
    """Import the library (2 s), its telemetry off."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    with warnings.catch_warnings():
        # great_expectations 1.24.1 imports sre_constants and sre_parse, deprecated by Python 3.11
        warnings.filterwarnings("ignore", r"module 'sre_\w+' is deprecated", DeprecationWarning)
        import great_expectations
    return great_expectations


def build_suite(spec: DatasetSpec) -> "ExpectationSuite":
    """Every expectation carries its name in ``meta`` and says in ``description`` what it holds."""
    gx = load_great_expectations()
    made = [
        *_schema(gx.expectations),
        *_files(gx.expectations, spec),
        *_classes(gx.expectations, spec),
        *_values(gx.expectations, spec),
        *_folds(gx.expectations, spec),
    ]
    suite: ExpectationSuite = gx.ExpectationSuite(name=SUITE_NAME, expectations=made)
    return suite


def expectation_name(expectation: "Expectation") -> str:
    return str((expectation.meta or {})["name"])


def suite_digest(suite: "ExpectationSuite") -> str:
    """sha256 of what the suite holds; the ids that Great Expectations deals are left out."""
    listed: Any = suite.to_json_dict()["expectations"]
    held = [{key: value for key, value in one.items() if key != "id"} for one in listed]
    return hashlib.sha256(json.dumps(held, sort_keys=True, default=str).encode()).hexdigest()


def _schema(gxe: Any) -> list["Expectation"]:
    return [
        gxe.ExpectTableColumnsToMatchOrderedList(
            column_list=list(COLUMNS), **_label("columns", "the table has its columns, in order")
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

    decoded = Column("bands") > 0
    size = {"height": spec.height, "width": spec.width, "bands": spec.bands}
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
            column="fault", **_label("readable", "every tile can be read and used as it is")
        ),
        *(
            gxe.ExpectColumnValuesToBeInSet(
                column=column,
                value_set=[value],
                row_condition=decoded,
                **_label(column, f"the {column} of every tile that can be read is {value}"),
            )
            for column, value in size.items()
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="dtype",
            value_set=[spec.dtype],
            **_label("dtype", f"files hold {spec.dtype} pixels"),
        ),
        gxe.ExpectColumnValuesToMatchRegex(
            column="sha256",
            regex="^[0-9a-f]{64}$",
            **_label("sha256", "every file that can be opened has its sha256"),
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
            **_label("classes-present", f"no class of the reference is missing: {reference.about}"),
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="class",
            value_set=names,
            **_label("classes-known", "no tile has a class that the reference does not know"),
        ),
        *(
            gxe.ExpectTableRowCountToBeBetween(
                min_value=least,
                max_value=most,
                row_condition=Column("class") == name,
                **_label(
                    f"count-{name}",
                    f"{name} has {least:,} tiles" + ("" if most == least else " or more"),
                ),
            )
            for name, (least, most) in ((name, spec.count_limits(name)) for name in names)
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="balance",
            min_value=1 / tolerance,
            max_value=tolerance,
            **_label(
                "balance",
                f"each class holds 1/{tolerance:g} to {tolerance:g} times its share in the "
                f"reference: {reference.about}",
            ),
        ),
    ]


def _values(gxe: Any, spec: DatasetSpec) -> list["Expectation"]:
    ranges = spec.ranges

    def between(column: str, name: str, low: float, high: float, what: str) -> "Expectation":
        made: Expectation = gxe.ExpectColumnValuesToBeBetween(
            column=column,
            min_value=low,
            max_value=high,
            **_label(name, f"{what} ({column} in {low:g}..{high:g})"),
        )
        return made

    return [
        between("min", "min", 0, 255, "the darkest value is a grey level"),
        between("max", "max", 0, 255, "the brightest value is a grey level"),
        between("mean", "mean", *ranges.mean, "no tile is black or burnt out"),
        between("std", "std", *ranges.std, "no tile is grey all over or noise"),
        between("texture", "blank", ranges.texture, 127.5, "no tile is of one colour"),
        between("saturation", "saturation", *ranges.saturation, "no tile is cloud or glint"),
    ]


def _folds(gxe: Any, spec: DatasetSpec) -> list["Expectation"]:
    folds = list(spec.folds)

    def at_most_one(column: str, name: str, what: str) -> "Expectation":
        made: Expectation = gxe.ExpectColumnValuesToBeBetween(
            column=column, max_value=1, **_label(name, what)
        )
        return made

    near = at_most_one("place_folds", "duplicates-near", "no near duplicates stand in two folds")
    return [
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="fold",
            value_set=folds,
            **_label("folds-present", "the tiles can be split: every fold holds some"),
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="fold", value_set=folds, **_label("folds-known", f"a fold is {', '.join(folds)}")
        ),
        at_most_one("content_folds", "duplicates-exact", "no pixels stand in two folds"),
        at_most_one("content_classes", "labels-agree", "no pixels stand under two classes"),
        *([near] if spec.near_duplicates else []),
    ]


def _label(name: str, what: str) -> dict[str, Any]:
    return {"meta": {"name": name}, "description": what}
