"""Versions, aliases and tags of a registered model: this folder's edge to MLflow."""

import json
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "eurosat"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
ALIASES = (CHALLENGER, CHAMPION, PREVIOUS)
FILES, VERDICT = "model.files", "verdict"
"""Tags of a version: what it consists of, and what the gates have said of it."""
NETWORK, NETWORK_INT8 = "model.onnx", "model.int8.onnx"
"""Artifacts of a run: the forms of its network; the second where training kept it."""
DENIED = "PERMISSION_DENIED"
"""MLflow's code where a user may not."""
PAGE = 1000
"""Versions asked for at once."""


def client() -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient()


def by_alias(model: str, alias: str) -> "ModelVersion | None":
    """The version behind an alias, or None where the alias or the model does not exist."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"{model}@{alias}"):
        try:
            return client().get_model_version_by_alias(model, alias)
        except MlflowException as error:
            if error.error_code not in tracking.NOT_FOUND_CODES:
                raise
            return None


def get(model: str, number: str) -> "ModelVersion":
    """A version by its number.

    Raises:
        TrackingError: there is no such version.
    """
    with tracking.translate_errors(f"models:/{model}/{number}"):
        return client().get_model_version(model, number)


def named(model: str, number: str) -> "ModelVersion":
    """The version that a user names.

    Raises:
        ConfigError: that is no number.
        TrackingError: there is no such version.
    """
    if not number.isdecimal():
        raise ConfigError(f"VERSION must be a whole number, such as 3; got {number!r}")
    return get(model, number)


def holds(model: str, alias: str, number: str) -> bool:
    """Whether the alias points to the version of this number."""
    held = by_alias(model, alias)
    return held is not None and str(held.version) == number


def find(model: str, number: str) -> "ModelVersion | None":
    """As `get`, or None where there is no such version; one that was deleted is none."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"models:/{model}/{number}"):
        try:
            return client().get_model_version(model, number)
        except MlflowException as error:
            if error.error_code not in tracking.NOT_FOUND_CODES:
                raise
            return None


def files_of(version: "ModelVersion") -> dict[str, tuple[str, int]]:
    """sha256 and size in bytes of each file, as registration has told them; empty if it has not."""
    try:
        told = json.loads(version.tags.get(FILES, "{}"))
        return {str(name): (str(sha256), int(size)) for name, (sha256, size) in told.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def all_of(model: str) -> "list[ModelVersion]":
    """Every version, the oldest first; empty for an unknown model. Their aliases are empty."""
    found, token = [], None
    with tracking.translate_errors(f"versions of {model}"):
        while True:
            page = client().search_model_versions(
                f"name = '{model}'", max_results=PAGE, page_token=token
            )
            found += list(page)
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version))


def run_of(version: "ModelVersion") -> str:
    """The run that a version wraps.

    Raises:
        TrackingError: it was made without one, so nothing can be known about it.
    """
    if not version.run_id:
        raise TrackingError(
            f"{version.name} version {version.version} names no run: register one with "
            "`python -m registry.register RUN`"
        )
    return str(version.run_id)


def held(run_id: str) -> set[str]:
    """Names of the files and folders that a run's artifacts begin with."""
    with tracking.translate_errors(f"artifacts of run {run_id}"):
        return {file.path for file in client().list_artifacts(run_id)}


def ensure(model: str, description: str) -> None:
    """Create the registered model unless it is there."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"registered model {model}"):
        try:
            client().create_registered_model(model, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
