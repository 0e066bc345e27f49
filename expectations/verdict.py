"""Run a suite over a table: what was found, and on which tiles."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expectations.docs import publish
from expectations.spec import DatasetSpec
from expectations.suite import build_suite, expectation_name, load_great_expectations, suite_digest
from expectations.tiles import SHARING_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite

MAX_TILES_SHOWN = 10
"""Tiles named on the console for each expectation that failed; result.json names them all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectationResult:
    """What came of one expectation."""

    name: str
    description: str
    success: bool
    observed: str
    """What was seen instead, where the expectation is on the whole table; may be empty."""
    tiles: tuple[tuple[str, str], ...]
    """Path and offending value of each tile that broke it."""

    def lines(self) -> list[str]:
        """The verdict, and the first of the tiles that broke it."""
        head = f"{'passed' if self.success else 'FAILED'}  {self.name:<26} {self.description}"
        if self.success:
            return [head]
        seen = f": {self.observed}" if self.observed else ""
        count = f": {len(self.tiles):,} tile{'s' * (len(self.tiles) != 1)}" if self.tiles else ""
        lines = [f"{head}{seen}{count}"]
        lines += [
            f"          {path}  {value}".rstrip() for path, value in self.tiles[:MAX_TILES_SHOWN]
        ]
        if (more := len(self.tiles) - MAX_TILES_SHOWN) > 0:
            lines.append(f"          ... and {more:,} more")
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    results: tuple[ExpectationResult, ...]
    suite: str
    """sha256 of the suite's definition."""

    @property
    def success(self) -> bool:
        return bool(self.results) and not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(finding.name for finding in self.results if not finding.success)

    def as_dict(self) -> dict[str, Any]:
        return {"success": self.success, **asdict(self)}


def run_suite(
    table: "pd.DataFrame", spec: DatasetSpec, *, docs: Path | None = None, run_name: str = "tiles"
) -> Verdict:
    """Run the suite for ``expected`` over a table of `tiles.COLUMNS`; Data Docs go to ``docs``."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "docs"
        context = _context(site)
        asset = context.data_sources.add_pandas("eurosat").add_dataframe_asset("tiles")
        suite = context.suites.add(build_suite(spec))
        checkpoint = _checkpoint(context, asset.add_batch_definition_whole_dataframe("all"), suite)
        run = checkpoint.run(
            batch_parameters={"dataframe": table},
            run_id=load_great_expectations().RunIdentifier(run_name=run_name),
        )
        if docs is not None:
            context.build_data_docs()
            publish(site, docs)
    (validated,) = run.run_results.values()
    found = {f.name: f for f in (_parse_result(one.to_json_dict()) for one in validated.results)}
    return Verdict(
        results=tuple(found[expectation_name(one)] for one in suite.expectations),
        suite=suite_digest(suite),
    )


def _context(site: Path) -> Any:
    """A context that lives in memory, silent, with its pages built in ``site``."""
    gx = load_great_expectations()
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    config = DataContextConfig(
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites={
            "data_docs": {
                "class_name": "SiteBuilder",
                "show_how_to_buttons": False,
                "store_backend": {
                    "class_name": "TupleFilesystemStoreBackend",
                    "base_directory": str(site),
                },
            }
        },
    )
    return gx.get_context(project_config=config, mode="ephemeral")


def _checkpoint(context: Any, batch: Any, suite: "ExpectationSuite") -> Any:
    gx = load_great_expectations()
    definition = gx.ValidationDefinition(name="tiles", data=batch, suite=suite)
    checkpoint = gx.Checkpoint(
        name="validate",
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": ["path", "fold", "group"],
            "return_unexpected_index_query": False,  # row numbers, as long as the table
        },
    )
    return context.checkpoints.add(checkpoint)


def _parse_result(result: Mapping[str, Any]) -> ExpectationResult:
    configuration, seen = result["expectation_config"], result["result"]
    column = configuration["kwargs"].get("column")
    rows = seen.get("unexpected_index_list") or []
    return ExpectationResult(
        name=configuration["meta"]["name"],
        description=configuration["description"],
        success=bool(result["success"]),
        observed=_evaluation_errors(result["exception_info"])
        or (_class_shares(rows) if column == "balance" else _observed_value(seen)),
        tiles=tuple((row["path"], _offending_value(row, column)) for row in rows),
    )


def _offending_value(row: Mapping[str, Any], column: str | None) -> str:
    """The value that a tile should not have; of a duplicate, where it stands and with whom."""
    if column in (None, "path"):
        return ""
    if column in SHARING_COLUMNS:
        return f"fold {row['fold']}, group {row['group']:.0f}"
    value = row[column]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).removeprefix(f"{row['path']} ")  # a fault names its file, as errors do


def _class_shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each class that is out of balance, once."""
    shares = {row["path"].split("/")[0]: row["balance"] for row in rows}
    return ", ".join(f"{name} {share:.3g} times" for name, share in sorted(shares.items()))


def _observed_value(seen: Mapping[str, Any]) -> str:
    if missing := seen.get("partial_missing_list"):
        return f"missing {', '.join(map(str, sorted(missing)))}"
    value = seen.get("observed_value")
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _evaluation_errors(info: Mapping[str, Any]) -> str:
    """Why an expectation could not be evaluated: told as it is, or by metric."""
    told = [info] if "raised_exception" in info else list(info.values())
    return "; ".join(
        " ".join(str(one["exception_message"]).split()) for one in told if one["raised_exception"]
    )
