"""Validate a data set: the verb that training's receipt comes from."""

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.config import DataConfig, TrainConfig, compose
from eurosat.data import validation_record
from eurosat.data.pack import DatasetScan, scan_source
from eurosat.data.sources import open_source
from eurosat.errors import ConfigError
from eurosat.runtime import atomic, cli, exit_codes, logs
from eurosat.runtime.progress import bar
from eurosat.storage import disk_errors
from expectations.docs import check_target
from expectations.spec import TOLERANCE, DatasetSpec, build_spec
from expectations.texture import detect_dtype, pack_textures, source_textures
from expectations.tiles import tile_table
from expectations.verdict import Verdict, run_suite

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("expectations.validate")  # __name__ is __main__ here

USAGE = f"""
usage: python -m expectations.validate [data=synthetic|eurosat|folder] [key=value ...]

Hold every tile of a data set to a suite of expectations. Prints what failed on which tiles,
writes Data Docs and a receipt that training asks for, logs a run named validate to MLflow.

  data=SOURCE         which tiles (default synthetic); data.root=PATH says where
  docs=FOLDER         where the Data Docs (HTML) go (default data_docs)
  report=FILE         JSON of the verdicts goes there as well
  reference=FILE      JSON {{"classes": {{"Forest": 3000, ...}}}} to compare the classes with
                      (default: EuroSAT's own for data=eurosat, else an even deal)
  tolerance=FACTOR    a class may hold 1/FACTOR to FACTOR times its share there
                      (default {TOLERANCE:g})
  log_level=LEVEL     {", ".join(logs.LEVELS)}
  any key of the recipe, such as data.synthetic.tiles=500, experiment=NAME

exit code: 0 passed, 1 failed, 2 bad input
"""
COMMAND_KEYS = ("docs", "reference", "report", "tolerance")


def main(argv: Sequence[str]) -> int:
    own, recipe = _split_overrides(cli.overrides(argv, USAGE))
    docs = Path(own.get("docs", "data_docs"))
    reference = Path(own["reference"]) if "reference" in own else None
    tolerance = _parse_tolerance(own.get("tolerance", str(TOLERANCE)))
    check_target(docs)
    verdict = validate(
        compose(recipe),
        docs=docs,
        reference=reference,
        report=Path(own["report"]) if "report" in own else None,
        tolerance=tolerance,
    )
    _print_verdict(verdict)
    print(f"Data Docs: {docs / 'index.html'}")
    return exit_codes.OK if verdict.success else exit_codes.NEGATIVE


def validate(
    config: TrainConfig,
    *,
    docs: Path,
    reference: Path | None = None,
    report: Path | None = None,
    tolerance: float = TOLERANCE,
) -> Verdict:
    """Validate the configured data set; leave Data Docs, a run, a receipt, and a report if asked.

    Raises:
        EuroSATError: there is nothing to validate, or nowhere to log it.
    """
    started = time.monotonic()
    with (
        tracking.run(config.experiment, "validate", tags={"kind": "validate"}) as run,
        tempfile.TemporaryDirectory() as kept,
    ):
        folder = Path(kept)
        with logs.copied_to(folder / "log.txt"):
            survey = scan_source(config.data)
            expected = build_spec(
                config.data, survey.table, reference=reference, tolerance=tolerance
            )
            table = _build_table(survey, config.data, expected)
            verdict = _run_suite(
                table, expected, docs, f"{config.data.source}-{survey.fingerprint[:12]}"
            )
            log.info(
                "%s: %d expectations on %d tiles, %d failed",
                config.data.source,
                len(verdict.results),
                len(table),
                len(verdict.failed),
            )
        run.log_params(
            {
                "source": config.data.source,
                "suite": verdict.suite,
                "reference": expected.reference.about,
                "tolerance": tolerance,
            }
        )
        run.set_tags(
            {
                "data.fingerprint": survey.fingerprint,
                "data.validation": "passed" if verdict.success else "failed",
            }
        )
        result = {"fingerprint": survey.fingerprint, "expected": asdict(expected)}
        told = json.dumps(result | verdict.as_dict(), indent=1)
        (folder / "result.json").write_text(told)
        if report:
            with disk_errors(report):
                report.parent.mkdir(parents=True, exist_ok=True)
                atomic.atomic_write_text(report, told + "\n")
        table.to_parquet(folder / "tiles.parquet", index=False)
        run.log_folder(folder)
        run.log_folder(docs, "data_docs")
        run.log_metrics(_metrics(verdict, survey) | {"seconds": time.monotonic() - started})
    validation_record.write(
        validation_record.ValidationRecord(
            fingerprint=survey.fingerprint,
            success=verdict.success,
            expectations=len(verdict.results),
            failed=verdict.failed,
            suite=verdict.suite,
            validated_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        config.data.cache_dir,
    )
    return verdict


def _build_table(scan: DatasetScan, data: DataConfig, spec: DatasetSpec) -> "pd.DataFrame":
    surveyed = scan.table
    if scan.pack is not None:
        texture = pack_textures(scan.pack)
        return tile_table(surveyed, data, spec.reference, texture=texture, dtypes={})
    log.warning("near duplicates were not looked for: that waits until every tile can be read")
    source = open_source(data)
    return tile_table(
        surveyed,
        data,
        spec.reference,
        texture=source_textures(surveyed, data, source),
        dtypes={
            path: detect_dtype(source, path) for path in surveyed["path"][surveyed["bands"] == 0]
        },
    )


def _run_suite(table: "pd.DataFrame", spec: DatasetSpec, docs: Path, name: str) -> Verdict:
    """One call that takes seconds and tells nothing on its way: a bar that only moves."""
    with bar() as shown:
        shown.add_task("holding the tiles to the suite", total=None, note=f"{len(table):,} tiles")
        return run_suite(table, spec, docs=docs, run_name=name)


def _metrics(verdict: Verdict, scan: DatasetScan) -> dict[str, float]:
    metrics: dict[str, float] = {
        "expectations": len(verdict.results),
        "failed": len(verdict.failed),
        "tiles": len(scan.table),
    }
    if scan.pack is not None:
        return metrics | {
            "duplicates_exact": scan.pack.num_exact_duplicates,
            "duplicates_near": scan.pack.num_near_duplicates,
        }
    pixels = scan.table["pixels_sha256"].replace("", None).dropna()
    return metrics | {"duplicates_exact": int(pixels.duplicated().sum())}


def _print_verdict(verdict: Verdict) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for finding in verdict.results:
        for number, line in enumerate(finding.lines()):
            console.print(line, style="red" if not finding.success and number == 0 else None)
    count = len(verdict.results)
    told = (
        f"{len(verdict.failed)} of {count} expectations failed"
        if verdict.failed
        else (f"all {count} expectations passed")
    )
    console.print(told, style="red" if verdict.failed else "green")


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The verb's own keys, and the recipe's overrides."""
    own: dict[str, str] = {}
    recipe: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in COMMAND_KEYS:
            if not value:
                raise ConfigError(f"{key}= needs a value")
            own[key] = value
        else:
            recipe.append(override)
    return own, recipe


def _parse_tolerance(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"tolerance must be a number such as 2; got {value!r}") from error


if __name__ == "__main__":
    cli.run_command(main)
