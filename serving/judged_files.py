"""The files of a registered version as they were judged: what is loaded must equal them."""

import re
from pathlib import Path

from eurosat import tracking
from eurosat.errors import ModelError
from eurosat.models import version_files
from eurosat.models.version_files import FILES_TAG
from eurosat.tracking import ledger_chain

VERSION = re.compile(r"models:/([^/@]+)/(\d+)")
ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")


def resolve_alias(reference: str) -> str:
    """Return models:/NAME/NUMBER for an alias, and any other reference as it is.

    Raises:
        TrackingError: there is no such version, or the registry cannot be reached.
    """
    from mlflow import MlflowClient

    alias = ALIAS.fullmatch(reference)
    if alias is None:
        return reference
    with tracking.translate_errors(reference):
        version = MlflowClient().get_model_version_by_alias(*alias.groups())
    return f"models:/{alias[1]}/{version.version}"


def check(uri: str, folder: Path) -> None:
    """Check downloaded files before any code among them runs.

    Of a version (``models:/NAME/NUMBER``) they must be those that were registered and, if the
    ledger records them, those that were judged.

    Raises:
        ModelError: they differ, or hold code that this project has not released.
        TrackingError: the registry cannot be reached.
    """
    actual = version_files.check(folder)
    match = VERSION.fullmatch(uri)
    if match is None:
        return
    registered, judged = _registered(*match.groups()), _digest_in_ledger(*match.groups())
    if not registered:
        if judged:
            raise ModelError(f"{uri} has lost its tag {FILES_TAG}: {version_files.REMEDY}")
        return
    if judged and judged != ledger_chain.manifest_digest(registered):
        raise ModelError(
            f"the tag {FILES_TAG} of {uri} differs from what the ledger says was judged: "
            f"{version_files.REMEDY}"
        )
    version_files.check_unchanged(actual, registered)


def _registered(name: str, number: str) -> dict[str, str]:
    """Return the sha256 of each file at registration; empty if it was not recorded."""
    from mlflow import MlflowClient

    with tracking.translate_errors(f"models:/{name}/{number}"):
        tags = MlflowClient().get_model_version(name, number).tags
    try:
        manifest = version_files.read_manifest(tags.get(FILES_TAG, "{}"))
    except ValueError as error:
        raise ModelError(f"the tag {FILES_TAG} of version {number} cannot be read") from error
    return {file: sha256 for file, (sha256, _) in manifest.items()}


def _digest_in_ledger(name: str, number: str) -> str | None:
    """Return the digest of the files that made the version champion; None if none is recorded."""
    records = [
        ledger_chain.LedgerRecord(
            number=int(version.version), text=version.tags.get(ledger_chain.ENTRY_TAG, "")
        )
        for version in tracking.all_versions(ledger_chain.ledger_name(name))
    ]
    entries = [link.entry for link in ledger_chain.chain(records)]
    judged = [entry.files for entry in entries if entry.to_version == number and entry.files]
    return judged[-1] if judged else None
