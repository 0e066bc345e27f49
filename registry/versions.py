"""Versions, aliases and tags of a registered model; here this folder calls MLflow."""

from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError
from eurosat.models.version_files import FILES_TAG, read_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "eurosat"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
ALIASES = (CHALLENGER, CHAMPION, PREVIOUS)
VERDICT_TAG = "verdict"
"""Tag of a version: the verdict of the gates."""
REGISTERED_BY_TAG = "registered.by"
"""Tag of a version: the account that registered it."""
NETWORK, NETWORK_INT8 = "model.onnx", "model.int8.onnx"
"""Artifacts of a run: its network; the second only if training kept an INT8 network."""
BAD_REQUEST, PERMISSION_DENIED = "BAD_REQUEST", "PERMISSION_DENIED"
"""MLflow's error codes."""


def client() -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient()


def by_alias(model: str, alias: str) -> "ModelVersion | None":
    """Return the version with an alias, or None if the alias or the model does not exist."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"{model}@{alias}"):
        try:
            return client().get_model_version_by_alias(model, alias)
        except MlflowException as error:
            if error.error_code not in tracking.NOT_FOUND_CODES:
                raise
            return None


def get(model: str, number: str) -> "ModelVersion":
    """Return a version by its number.

    Raises:
        TrackingError: there is no such version.
    """
    with tracking.translate_errors(f"models:/{model}/{number}"):
        return client().get_model_version(model, number)


def from_argument(model: str, number: str) -> "ModelVersion":
    """Return the version that a command's argument names.

    Raises:
        ConfigError: it is neither a number nor an alias.
        TrackingError: there is no such version.
    """
    if number in ALIASES:
        if (version := by_alias(model, number)) is None:
            raise TrackingError(f"{model} has no {number}: name a VERSION by its number")
        return version
    if not number.isdecimal():
        raise ConfigError(
            f"VERSION must be a whole number, such as 3, or {', '.join(ALIASES)}; got {number!r}"
        )
    return get(model, number)


def has_alias(model: str, alias: str, number: str) -> bool:
    """Return whether the alias points to the version of this number."""
    version = by_alias(model, alias)
    return version is not None and str(version.version) == number


def get_or_none(model: str, number: str) -> "ModelVersion | None":
    """Return a version by its number, or None if it does not exist or was deleted."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"models:/{model}/{number}"):
        try:
            return client().get_model_version(model, number)
        except MlflowException as error:
            if error.error_code not in tracking.NOT_FOUND_CODES:
                raise
            return None


def registered_files(version: "ModelVersion") -> dict[str, tuple[str, int]]:
    """Return the sha256 and size in bytes of each file at registration; empty if not recorded."""
    try:
        return read_manifest(version.tags.get(FILES_TAG, "{}"))
    except ValueError:
        return {}


def registered_digests(version: "ModelVersion") -> dict[str, str]:
    """Return the sha256 of each file at registration; empty if not recorded."""
    return {name: sha256 for name, (sha256, _) in registered_files(version).items()}


def all_of(model: str) -> "list[ModelVersion]":
    """Return every version, the oldest first; empty for an unknown model.

    MLflow leaves out the aliases of these versions.
    """
    return tracking.all_versions(model)


def run_of(version: "ModelVersion") -> str:
    """Return the id of the run that a version wraps.

    Raises:
        TrackingError: the version was created without a run, so it cannot be judged.
    """
    if not version.run_id:
        raise TrackingError(
            f"{version.name} version {version.version} names no run: register one with "
            "`python -m registry.register RUN`"
        )
    return str(version.run_id)


def artifact_names(run_id: str) -> set[str]:
    """Return the top-level files and folders of a run's artifacts."""
    return set(artifact_sizes(run_id))


def artifact_sizes(run_id: str) -> dict[str, int]:
    """Return the size in bytes of the top-level files of a run's artifacts; 0 for folders."""
    with tracking.translate_errors(f"artifacts of run {run_id}"):
        return {file.path: file.file_size or 0 for file in client().list_artifacts(run_id)}


def set_tag(model: str, number: str, key: str, value: str) -> None:
    """Set a tag of a version.

    MLflow inserts a tag that it did not find: if another process inserts it meanwhile, the database
    refuses the second one. It is found at the second attempt, and replaced.
    """
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"tag {key} of {model} version {number}"):
        try:
            client().set_model_version_tag(model, number, key, value)
        except MlflowException as error:
            if error.error_code != BAD_REQUEST:
                raise
            client().set_model_version_tag(model, number, key, value)


def ensure_model(model: str, description: str) -> None:
    """Create the registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"registered model {model}"):
        try:
            client().create_registered_model(model, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
