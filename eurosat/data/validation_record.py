"""The record that a validation writes beside the packs, and that training requires."""

import dataclasses
import json
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from eurosat.config import DataConfig
from eurosat.errors import DataError
from eurosat.runtime import atomic

log = logging.getLogger(__name__)

FOLDER = "receipts"
"""Folder in the cache; its name stays, so that earlier records are still found."""
MISSING = "missing"
NOT_PART_OF_THE_DATA = {"source", "protocol", "split_seed", "per_class", "allow_unvalidated"}
"""Fields of DataConfig that do not change which tiles are read or how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRecord:
    """The outcome of the last validation of one data set."""

    fingerprint: str
    """Fingerprint of the data set that was validated."""
    success: bool
    expectations: int
    """Number of expectations that were checked."""
    failed: tuple[str, ...]
    """Names of the expectations that failed."""
    suite: str
    """sha256 of the suite's definition."""
    validated_at: str
    """UTC, ISO 8601."""


def record_path(fingerprint: str, cache: Path) -> Path:
    return cache / FOLDER / f"{fingerprint}.json"


def write(record: ValidationRecord, cache: Path) -> Path:
    """Replace the data set's record atomically.

    Raises:
        DataError: the cache cannot be written.
    """
    file = record_path(record.fingerprint, cache)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write_text(file, json.dumps(dataclasses.asdict(record), indent=1))
    except OSError as error:
        raise DataError(
            f"cannot write the validation record {file}: {error.strerror}; set EUROSAT_CACHE to a "
            "folder that can be written"
        ) from error
    return file


def read(fingerprint: str, cache: Path) -> ValidationRecord | None:
    """Return the data set's record, or None if it was never validated.

    Raises:
        DataError: the file is not a validation record of this data set.
    """
    file = record_path(fingerprint, cache)
    try:
        values = json.loads(file.read_text())
        record = ValidationRecord(**(values | {"failed": tuple(values["failed"])}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is not a validation record ({error}): remove it and validate again"
        ) from error
    if record.fingerprint != fingerprint:
        raise DataError(
            f"{file} belongs to the data set {record.fingerprint}: remove it and validate again"
        )
    return record


def require_passed(fingerprint: str, config: DataConfig) -> str:
    """Return 'passed', or with ``data.allow_unvalidated=true`` also 'failed' or 'missing'.

    Raises:
        DataError: validation failed or never ran, and ``allow_unvalidated`` is false.
    """
    record = read(fingerprint, config.cache_dir)
    if record and record.success:
        return "passed"
    state = "failed" if record else MISSING
    reason = f"failed {', '.join(record.failed)}" if record else "was never validated"
    if not config.allow_unvalidated:
        raise DataError(
            f"the data set {fingerprint[:12]} {reason}: run `{validate_command(config)}` first, "
            "or set data.allow_unvalidated=true"
        )
    log.warning("the data set %s %s; training on it anyway", fingerprint[:12], reason)
    return state


def validate_command(config: DataConfig) -> str:
    """Return the command that validates this very data set, with the user's settings."""
    defaults = _flatten(_default_config(config.source))
    changed = [
        f"{key}={value}" for key, value in _flatten(config).items() if value != defaults[key]
    ]
    command = ["python", "-m", "expectations.validate", f"data={config.source}", *changed]
    return shlex.join(command)


def _default_config(source: str) -> DataConfig:
    """Return what ``data=SOURCE`` alone gives in this environment."""
    root = os.environ.get("EUROSAT_ROOT") if source == "eurosat" else None
    cache = os.environ.get("EUROSAT_CACHE")
    config = DataConfig(source=source, root=root)  # type: ignore[arg-type]
    return dataclasses.replace(config, cache=cache) if cache else config


def _flatten(config: DataConfig) -> dict[str, object]:
    """Return the fields that decide which tiles are read and how, by their keys in a recipe."""
    values = dataclasses.asdict(config)
    synthetic = values.pop("synthetic")
    return {
        **{f"data.{key}": values[key] for key in values if key not in NOT_PART_OF_THE_DATA},
        **{f"data.synthetic.{key}": value for key, value in synthetic.items()},
    }
