"""YAML files that this package holds by name, or that a user gives by path."""

from pathlib import Path
from typing import Any

from eurosat.errors import ConfigError


def read(kind: str, folder: Path, name: str) -> tuple[dict[str, Any], Path]:
    """Return a mapping and its file: ``folder/NAME.yaml``, or the YAML file at path ``name``.

    Raises:
        ConfigError: the file is missing or is not a mapping; the message calls it a ``kind``.
    """
    import yaml

    file = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"no {kind} {name!r}: choose from {known}, or give a YAML file")
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{file} has no keys: a {kind} is a YAML mapping")
    return values, file
