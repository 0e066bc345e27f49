"""Validate a data set: check every tile, write Data Docs, a run and the validation record."""

import json
import logging
import tempfile
import time
import warnings
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
from expectations.data_docs import DatasetSummary, check_target, publish
from expectations.runner import run_suite
from expectations.spec import TOLERANCE, DatasetSpec, build_spec
from expectations.texture import detect_dtype, pack_textures, source_textures
from expectations.tiles import tile_table
from expectations.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("expectations.validate")  # __name__ is __main__ here

USAGE = f"""
usage: python -m expectations.validate [data=synthetic|eurosat|folder] [key=value ...]

Check every tile of a data set against a suite of expectations. Prints what failed and on which
tiles, writes Data Docs and the validation record that training requires, and logs a run named
"validate" and the tiles to MLflow, which is FAILED if an expectation failed.

  data=SOURCE         the tiles (default synthetic); data.root=PATH is their folder or zip
  docs=FOLDER         write the Data Docs (HTML) there (default data_docs)
  report=FILE         also write the results as JSON to this file
  reference=FILE      JSON {{"classes": {{"Forest": 3000, ...}}}}: the expected classes and shares
                      (default: EuroSAT's own for data=eurosat, else equal shares)
  tolerance=FACTOR    a class may have 1/FACTOR to FACTOR times its expected share
                      (default {TOLERANCE:g})
  log_level=LEVEL     {", ".join(logs.LEVELS)}
  any key of the recipe, such as data.synthetic.tiles=500 or experiment=NAME

exit code: 0 passed, 1 failed, 2 bad input
"""
COMMAND_KEYS = ("docs", "reference", "report", "tolerance")
"""Keys of this command; all others belong to the recipe."""


def main(argv: Sequence[str]) -> int:
    options, recipe = _split_overrides(cli.overrides(argv, USAGE))
    docs = Path(options.get("docs", "data_docs"))
    check_target(docs)
    verdict = validate(
        compose(recipe),
        docs=docs,
        reference=Path(options["reference"]) if "reference" in options else None,
        report=Path(options["report"]) if "report" in options else None,
        tolerance=_parse_tolerance(options.get("tolerance", str(TOLERANCE))),
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
    """Validate the configured data set; write Data Docs, a run, the record, and a report.

    Raises:
        EuroSATError: the tiles cannot be read, or the results cannot be written.
    """
    started = time.monotonic()
    validated_at = datetime.now(UTC).isoformat(timespec="seconds")
    with (
        tracking.run(
            config.experiment, f"validate {config.data.label}", tags={"kind": "validate"}
        ) as run,
        tempfile.TemporaryDirectory() as temporary,
    ):
        folder, site = Path(temporary, "artifacts"), Path(temporary, "site")
        folder.mkdir()
        with logs.copied_to(folder / "log.txt"):
            scan = scan_source(config.data)
            spec = build_spec(config.data, scan.table, reference=reference, tolerance=tolerance)
            table = _build_table(scan, config.data, spec)
            run_name = f"{config.data.source}-{scan.fingerprint[:12]}"
            verdict = _run_suite(table, spec, site, run_name)
            log.info(
                "%s: %d expectations on %d tiles, %d failed",
                config.data.source,
                len(verdict.results),
                len(table),
                len(verdict.failed),
            )
        summary = DatasetSummary(
            source=config.data.source,
            fingerprint=scan.fingerprint,
            num_tiles=len(table),
            reference=spec.reference.about,
            near_duplicates=spec.near_duplicates,
            validated_at=validated_at,
        )
        publish(docs, verdict, summary, site)
        _log_run(run, config.data, spec, verdict, scan)
        _write_results(folder, report, scan.fingerprint, spec, verdict)
        table.to_parquet(folder / "tiles.parquet", index=False)
        run.log_folder(folder)
        run.log_folder(docs, "data_docs")
        run.log_metrics(_metrics(verdict, scan) | {"seconds": time.monotonic() - started})
        run.failed = not verdict.success
    _write_record(config.data, scan.fingerprint, verdict, validated_at)
    return verdict


def _build_table(scan: DatasetScan, data: DataConfig, spec: DatasetSpec) -> "pd.DataFrame":
    """Return the table of tiles; without a pack, faulty files are read again for their dtype."""
    if scan.pack is not None:
        texture = pack_textures(scan.pack)
        return tile_table(scan.table, data, spec.reference, texture=texture, dtypes={})
    log.warning("near duplicates were not searched: that needs every tile to be readable")
    source = open_source(data)
    undecoded = scan.table["path"][scan.table["bands"] == 0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dataset has no geotransform")  # tiles need no place
        texture = source_textures(scan.table, data, source)
        dtypes = {path: detect_dtype(source, path) for path in undecoded}
    return tile_table(scan.table, data, spec.reference, texture=texture, dtypes=dtypes)


def _run_suite(table: "pd.DataFrame", spec: DatasetSpec, site: Path, run_name: str) -> Verdict:
    """Run the suite behind a progress bar without a total: the call reports no progress."""
    with bar() as progress:
        progress.add_task("checking expectations", total=None, note=f"{len(table):,} tiles")
        return run_suite(table, spec, site=site, run_name=run_name)


def _log_run(
    run: "tracking.Run", data: DataConfig, spec: DatasetSpec, verdict: Verdict, scan: DatasetScan
) -> None:
    """Log the parameters and tags of a validation."""
    run.log_params(
        {
            "source": data.source,
            "suite": verdict.suite,
            "reference": spec.reference.about,
            "tolerance": spec.tolerance,
        }
    )
    run.set_tags(
        {
            "data.fingerprint": scan.fingerprint,
            "data.name": data.label,
            "data.validation": "passed" if verdict.success else "failed",
        }
    )


def _write_results(
    folder: Path, report: Path | None, fingerprint: str, spec: DatasetSpec, verdict: Verdict
) -> None:
    """Write ``result.json`` for the run, and the same to the file ``report`` if it is given."""
    results = {"fingerprint": fingerprint, "spec": asdict(spec), **verdict.as_dict()}
    text = json.dumps(results, indent=1)
    (folder / "result.json").write_text(text)
    if report:
        with disk_errors(report):
            report.parent.mkdir(parents=True, exist_ok=True)
            atomic.atomic_write_text(report, text + "\n")


def _write_record(data: DataConfig, fingerprint: str, verdict: Verdict, validated_at: str) -> None:
    """Write the validation record that training requires."""
    record = validation_record.ValidationRecord(
        fingerprint=fingerprint,
        success=verdict.success,
        expectations=len(verdict.results),
        failed=verdict.failed,
        suite=verdict.suite,
        validated_at=validated_at,
    )
    validation_record.write(record, data.cache_dir)


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
    *lines, summary = verdict.lines()
    for line in lines:
        console.print(line, style="red" if line.startswith("FAILED") else None)
    console.print(summary, style="green" if verdict.success else "red")


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the command's own options, and the overrides of the recipe."""
    options: dict[str, str] = {}
    recipe: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in COMMAND_KEYS:
            if not value:
                raise ConfigError(f"{key}= needs a value")
            options[key] = value
        else:
            recipe.append(override)
    return options, recipe


def _parse_tolerance(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"tolerance must be a number such as 2; got {value!r}") from error


if __name__ == "__main__":
    cli.run_command(main)
