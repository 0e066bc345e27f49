"""Run a suite on a table with Great Expectations, and translate its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expectations.spec import DatasetSpec
from expectations.suite import (
    build_suite,
    expectation_name,
    load_great_expectations,
    suite_digest,
)
from expectations.tiles import SHARING_COLUMNS
from expectations.verdict import ExpectationResult, Verdict

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite

OFFLINE_VIEW = {"module_name": "expectations.offline_view", "class_name": "OfflinePageView"}


def run_suite(
    table: "pd.DataFrame", spec: DatasetSpec, *, site: Path | None = None, run_name: str = "tiles"
) -> Verdict:
    """Check a table of `tiles.COLUMNS` against ``spec``.

    Great Expectations' own pages are written to the folder ``site``, if it is given.
    """
    context = _create_context(site)
    asset = context.data_sources.add_pandas("eurosat").add_dataframe_asset("tiles")
    suite = context.suites.add(build_suite(spec))
    checkpoint = _create_checkpoint(
        context, asset.add_batch_definition_whole_dataframe("all"), suite
    )
    run = checkpoint.run(
        batch_parameters={"dataframe": table},
        run_id=load_great_expectations().RunIdentifier(run_name=run_name),
    )
    if site is not None:
        context.build_data_docs(build_index=False)
    (validation,) = run.run_results.values()
    results = [_parse_result(result.to_json_dict()) for result in validation.results]
    by_name = {result.name: result for result in results}
    return Verdict(
        results=tuple(by_name[expectation_name(e)] for e in suite.expectations),
        suite=suite_digest(suite),
    )


def _create_context(site: Path | None) -> Any:
    """Return a context that lives in memory, without progress bars and telemetry."""
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
        data_docs_sites={"data_docs": _site_config(site)} if site else {},
    )
    return gx.get_context(project_config=config, mode="ephemeral")


def _site_config(site: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(site),
        },
        "site_section_builders": {
            "expectations": {"view": OFFLINE_VIEW},
            "validations": {"view": OFFLINE_VIEW},
        },
    }


def _create_checkpoint(context: Any, batch: Any, suite: "ExpectationSuite") -> Any:
    gx = load_great_expectations()
    definition = gx.ValidationDefinition(name="tiles", data=batch, suite=suite)
    checkpoint = gx.Checkpoint(
        name="validate",
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": ["path", "fold", "group"],
            "return_unexpected_index_query": False,  # a list of row numbers, as long as the table
        },
    )
    return context.checkpoints.add(checkpoint)


def _parse_result(gx_result: Mapping[str, Any]) -> ExpectationResult:
    configuration, details = gx_result["expectation_config"], gx_result["result"]
    column = configuration["kwargs"].get("column")
    rows = details.get("unexpected_index_list") or []
    observed = _class_shares(rows) if column == "balance" else _observed_value(details)
    return ExpectationResult(
        name=configuration["meta"]["name"],
        description=configuration["description"],
        success=bool(gx_result["success"]),
        observed=_evaluation_errors(gx_result["exception_info"]) or observed,
        tiles=tuple((row["path"], _offending_value(row, column)) for row in rows),
    )


def _offending_value(row: Mapping[str, Any], column: str | None) -> str:
    """Return the value that a tile should not have; for a duplicate, its fold and group."""
    if column in (None, "path"):
        return ""
    if column in SHARING_COLUMNS:
        return f"fold {row['fold']}, group {row['group']:.0f}"
    value = row[column]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).removeprefix(f"{row['path']} ")  # a fault begins with the tile's path


def _class_shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return each class that is out of balance, with its factor."""
    factors = {row["path"].split("/")[0]: row["balance"] for row in rows}
    return ", ".join(f"{name} {factor:.3g} times" for name, factor in sorted(factors.items()))


def _observed_value(details: Mapping[str, Any]) -> str:
    if missing := details.get("partial_missing_list"):
        return f"missing {', '.join(map(str, sorted(missing)))}"
    value = details.get("observed_value")
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _evaluation_errors(exception_info: Mapping[str, Any]) -> str:
    """Return why an expectation could not be evaluated, or an empty string.

    Great Expectations reports one exception, or one for each metric.
    """
    is_single = "raised_exception" in exception_info
    exceptions = [exception_info] if is_single else list(exception_info.values())
    messages = [e["exception_message"] for e in exceptions if e["raised_exception"]]
    return "; ".join(" ".join(str(message).split()) for message in messages)
