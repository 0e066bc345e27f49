"""The process boundary of every verb: exit codes, one-line errors, logging."""

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from eurosat import logs, platform_env
from eurosat.errors import ConfigError, EuroSATError

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",  # it would report that it is off
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # one on every small file
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is the verb's own
}
OK, NEGATIVE, BAD_INPUT, FAULT, INTERRUPTED, TERMINATED = 0, 1, 2, 70, 130, 143


def finish(
    verb: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None = None,
    *,
    platform: bool = True,
) -> NoReturn:
    """Exit with the verb's code; an error of ours is one line on standard error and code 2.

    ``platform``: what runs beside the working directory is used (`eurosat.platform_env`).
    """
    # Before any library is imported that phones home or talks over the verb's output.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # runs end with their status
    try:
        if platform:
            platform_env.read(Path.cwd(), os.environ)
        sys.exit(verb(sys.argv[1:] if argv is None else argv))
    except EuroSATError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception:
        logging.getLogger(__name__).exception("this is a fault of ours, please report it")
        sys.exit(FAULT)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser for a verb with ``--flags``; call ``logs.setup(args.log_level)`` after parsing."""
    made = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    made.add_argument("--log-level", choices=logs.LEVELS, default="info")
    return made


def overrides(argv: Sequence[str], usage: str) -> list[str]:
    """Hydra-style arguments of a verb configured by recipes; sets up logging on the way.

    ``log_level=`` is taken here; ``overrides="a=1 b=2"``, as MLproject passes what it has no
    parameter for, counts as its parts; ``--help`` prints ``usage`` and exits 0.

    Raises:
        ConfigError: an argument is not ``key=value``.
    """
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
        sys.exit(OK)
    level, kept, waiting = "info", [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.partition("=")
        if key.startswith("--") or not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value, such as seed=1")
        if key == "log_level":
            level = value
        elif key == "overrides":
            try:
                waiting = shlex.split(value) + waiting
            except ValueError as error:
                raise ConfigError(f"overrides={value} cannot be split: {error}") from error
        else:
            kept.append(argument)
    logs.setup(level)
    return kept
