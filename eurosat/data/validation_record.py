"""The receipt that a validation leaves beside the packs, and that training asks for."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from eurosat.config import DataConfig
from eurosat.errors import DataError
from eurosat.runtime import atomic

log = logging.getLogger(__name__)

MISSING = "missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRecord:
    fingerprint: str
    """Of the data set that was validated."""
    success: bool
    expectations: int
    failed: tuple[str, ...]
    """Names of the expectations that failed."""
    suite: str
    """sha256 of the suite's definition."""
    validated_at: str
    """UTC, ISO 8601."""


def path_of(fingerprint: str, cache: Path) -> Path:
    return cache / "receipts" / f"{fingerprint}.json"


def write(receipt: ValidationRecord, cache: Path) -> Path:
    """Replace the data set's receipt by one rename."""
    file = path_of(receipt.fingerprint, cache)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write_text(file, json.dumps(dataclasses.asdict(receipt), indent=1))
    except OSError as error:
        raise DataError(
            f"cannot write the receipt {file}: {error.strerror}; set EUROSAT_CACHE to a folder "
            "that can be written"
        ) from error
    return file


def read(fingerprint: str, cache: Path) -> ValidationRecord | None:
    """The data set's receipt, or None where it was never validated.

    Raises:
        DataError: the file is not a receipt of this data set.
    """
    file = path_of(fingerprint, cache)
    try:
        values = json.loads(file.read_text())
        receipt = ValidationRecord(**(values | {"failed": tuple(values["failed"])}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is not a receipt ({error}): remove it and validate again"
        ) from error
    if receipt.fingerprint != fingerprint:
        raise DataError(f"{file} is the receipt of {receipt.fingerprint}: remove it")
    return receipt


def require_passed(fingerprint: str, config: DataConfig) -> str:
    """'passed', or, where ``data.allow_unvalidated=true`` was said, 'failed' or 'missing'.

    Raises:
        DataError: validation failed or never ran, and nothing else was said.
    """
    receipt = read(fingerprint, config.cache_dir)
    if receipt and receipt.success:
        return "passed"
    state = "failed" if receipt else MISSING
    what = f"failed {', '.join(receipt.failed)}" if receipt else "was never validated"
    if not config.allow_unvalidated:
        raise DataError(
            f"the data set {fingerprint[:12]} {what}: run `python -m expectations.validate "
            f"data={config.source}` first, or say data.allow_unvalidated=true"
        )
    log.warning("the data set %s %s; training all the same", fingerprint[:12], what)
    return state
