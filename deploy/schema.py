"""The order of MLflow's database schemas, read from the migrations of the installed MLflow."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.databases import Database, DatabaseSpec
from eurosat.errors import ConfigError


def previous_revisions(spec: DatabaseSpec) -> dict[str, str | None]:
    """Return every revision of the installed MLflow, with the one before it.

    Raises:
        ConfigError: MLflow is not installed.
    """
    package = importlib.util.find_spec("mlflow")  # not imported: that takes a second
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "MLflow is not installed, and its migrations are needed to compare schemas: install it"
        )
    previous: dict[str, str | None] = {}
    for file in (Path(package.submodule_search_locations[0]) / spec.migrations).glob("*.py"):
        text = file.read_text(encoding="utf-8")
        values = dict(re.findall(r'^(revision|down_revision) = ["\'](\w+)["\']', text, re.M))
        if "revision" in values:
            previous[values["revision"]] = values.get("down_revision")
    return previous


def can_upgrade(spec: DatabaseSpec, newest: str | None, schema: str) -> bool:
    """Return whether a server of the schema ``newest`` can use ``schema``, upgrading it if needed.

    ``newest`` is None for an empty database: then the installed MLflow counts.
    """
    previous = previous_revisions(spec)
    if newest not in previous:  # None, or newer than the installed MLflow
        return schema in previous
    ancestors: set[str] = set()
    revision: str | None = newest
    while revision and revision not in ancestors:
        ancestors.add(revision)
        revision = previous.get(revision)
    return schema in ancestors


def upgrade_hint(database: Database, databases: Mapping[str, Any]) -> str | None:
    """Return the command that upgrades a restored database; None if its schema is the newest.

    ``databases`` is that part of the archive's manifest. A server refuses an older schema.
    """
    schema = databases[database.spec.name]["schema"]
    if schema not in previous_revisions(database.spec).values():
        return None
    commands = {
        "mlflow": "mlflow db upgrade",
        "auth": "python -m mlflow.server.auth db upgrade --url",
    }
    return f"the schema is older than this MLflow's: {commands[database.spec.name]} {database.uri}"
