"""Which schema of MLflow's is newer: told by the migrations of the MLflow that is installed."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.databases import KINDS, Database, Kind
from eurosat.errors import ConfigError


def revisions(kind: Kind) -> dict[str, str | None]:
    """Of the MLflow installed here: each, and the one before it.

    Raises:
        ConfigError: MLflow is not installed.
    """
    found = importlib.util.find_spec("mlflow")  # which is not imported: it takes a second
    if found is None or not found.submodule_search_locations:
        raise ConfigError("MLflow is not installed here, and it tells which schema is newer")
    before: dict[str, str | None] = {}
    for file in (Path(found.submodule_search_locations[0]) / kind.migrations).glob("*.py"):
        text = file.read_text(encoding="utf-8")
        named = dict(re.findall(r'^(revision|down_revision) = ["\'](\w+)["\']', text, re.M))
        if "revision" in named:
            before[named["revision"]] = named.get("down_revision")
    return before


def reaches(kind: Kind, newest: str | None, schema: str) -> bool:
    """Whether a server of the schema ``newest`` can be given ``schema``, upgrading it if need be.

    ``newest`` is None where no server has been: then the MLflow that is installed here counts.
    """
    before = revisions(kind)
    if newest not in before:  # none, or one that is newer than ours
        return schema in before
    line: set[str] = set()
    at: str | None = newest
    while at and at not in line:
        line.add(at)
        at = before.get(at)
    return schema in line


def upgrade(database: Database, told: Mapping[str, Any]) -> str | None:
    """The command that a server wants before it starts on an older schema."""
    schema, before = told[database.kind.name]["schema"], revisions(database.kind)
    if schema not in before.values():
        return None
    command = (
        "mlflow db upgrade"
        if database.kind is KINDS[0]
        else ("python -m mlflow.server.auth db upgrade --url")
    )
    return f"the schema is older than this MLflow's: {command} {database.uri}"
