"""The file `.platform/env`: how commands reach the platform that `make platform` started here."""

import io
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from eurosat.errors import ConfigError

FILE = Path(".platform", "env")
"""Relative to the folder in which a command is started. Lines KEY=VALUE as python-dotenv reads
them: quotes are optional, nothing is expanded, empty lines and comments are skipped."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
ALLOWED_NAMES = re.compile(r"(MLFLOW|EUROSAT)_\w+|PGPASSFILE|STORAGE_EMULATOR_HOST")
"""Variables that the file may set: a foreign folder must not change any other."""
NEEDS_QUOTES = re.compile(r"^['\"\s]|\s#|[\r\n]|\s$")
REMEDY = "`make platform` writes the file; remove it if that platform no longer exists"


def read(folder: Path, environ: MutableMapping[str, str]) -> None:
    """Set the variables of ``folder``'s file in ``environ`` that are not set already.

    If ``environ`` names another tracking server, the whole file is ignored: its variables
    belong together, and its password is not for that server.

    Raises:
        ConfigError: the file cannot be read, or a line is not KEY=VALUE.
    """
    values = load(folder / FILE)
    if environ.get(TRACKING_URI, values.get(TRACKING_URI)) != values.get(TRACKING_URI):
        return
    if new := {name: value for name, value in values.items() if name not in environ}:
        environ.update(new)
        print(f"using the platform of {FILE}", file=sys.stderr, flush=True)


def load(file: Path) -> dict[str, str]:
    """Return the variables of a platform's file; none if there is no such file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): {REMEDY}") from error
    from dotenv.parser import parse_stream

    values = {}
    for binding in parse_stream(io.StringIO(text)):
        original = binding.original.string
        blank = original[: len(original) - len(original.lstrip())]  # lines before the binding
        line = binding.original.line + blank.count("\n")
        if binding.error or (binding.key and binding.value is None):
            raise ConfigError(f"{file}, line {line} is not of the form KEY=VALUE: {REMEDY}")
        if binding.key is None or binding.value is None:
            continue  # a comment, or blank lines at the end
        if not ALLOWED_NAMES.fullmatch(binding.key):
            raise ConfigError(
                f"{file}, line {line} sets {binding.key}, which is no variable of a platform: "
                f"{REMEDY}"
            )
        values[binding.key] = binding.value
    return values


def dump(values: Mapping[str, str]) -> str:
    """Return the text of a file from which `load` reads ``values``; quotes only where needed."""
    return "".join(f"{name}={_quote(value)}\n" for name, value in values.items())


def _quote(value: str) -> str:
    if not NEEDS_QUOTES.search(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
