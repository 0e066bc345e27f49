"""The platform that runs beside a checkout: `make platform` writes down how to reach it."""

import re
import sys
from collections.abc import MutableMapping
from pathlib import Path

from eurosat.errors import ConfigError

FILE = Path(".platform", "env")
"""In the directory that a verb is started in. Lines of KEY=VALUE, the value as it stands: no
quotes, no expansion (as docker's --env-file has it); empty lines and those of # are left out."""
LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
TRACKING = "MLFLOW_TRACKING_URI"
TAKEN = re.compile(r"(MLFLOW|EUROSAT)_\w+|PGPASSFILE|STORAGE_EMULATOR_HOST")
"""Names of the variables that it may set: a folder of somebody else's has no say in others."""


def read(folder: Path, environ: MutableMapping[str, str]) -> None:
    """Take what ``folder``'s file sets into ``environ``, where it is not set already.

    A file of another tracking server than the one that is set is left alone as a whole: its
    parts belong together, and its password is not for that server.

    Raises:
        ConfigError: the file cannot be read, or a line is not KEY=VALUE.
    """
    told = load(folder / FILE)
    if environ.get(TRACKING, told.get(TRACKING)) != told.get(TRACKING):
        return
    if new := {name: value for name, value in told.items() if name not in environ}:
        environ.update(new)
        print(f"using the platform of {FILE}", file=sys.stderr, flush=True)


def load(file: Path) -> dict[str, str]:
    """What a platform's file sets; nothing where there is none."""
    remedy = "`make platform` writes it; remove it where that platform is gone"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): {remedy}") from error
    told = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (parts := LINE.fullmatch(line)):
            raise ConfigError(f"{file}, line {number} is not of the form KEY=VALUE: {remedy}")
        if not TAKEN.fullmatch(parts[1]):
            raise ConfigError(f"{file}, line {number} sets {parts[1]}, no platform's: {remedy}")
        told[parts[1]] = parts[2]
    return told
