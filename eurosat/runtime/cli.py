"""Parse the arguments of a command and run it."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from eurosat.errors import ConfigError
from eurosat.runtime import env_file, exit_codes, logs, process


def run_command(
    command: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None = None,
    *,
    platform: bool = True,
) -> NoReturn:
    """Run ``command`` and exit with its code; an EuroSATError is one line and exit code 2.

    ``platform``: set the variables of the working directory's ``.platform/env`` first.
    """

    def run() -> int:
        if platform:
            env_file.read(Path.cwd(), os.environ)
        return command(sys.argv[1:] if argv is None else argv)

    process.run(run)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--log-level``; call ``logs.setup(args.log_level)`` after parsing."""
    result = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    result.add_argument("--log-level", choices=logs.LEVELS, default="info")
    return result


def overrides(argv: Sequence[str], usage: str) -> list[str]:
    """Return the Hydra-style overrides among ``argv``, and set up logging.

    ``log_level=`` is handled here. ``overrides="a=1 b=2"`` is split: MLproject passes so what it
    has no parameter for. ``--help`` prints ``usage`` and exits with 0.

    Raises:
        ConfigError: an argument is not ``key=value``.
    """
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
        sys.exit(exit_codes.OK)
    level, accepted, remaining = "info", [], list(argv)
    while remaining:
        argument = remaining.pop(0)
        key, equals, value = argument.partition("=")
        if key.startswith("--") or not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value, such as seed=1")
        if key == "log_level":
            level = value
        elif key == "overrides":
            try:
                remaining = shlex.split(value) + remaining
            except ValueError as error:
                raise ConfigError(f"overrides={value} cannot be split: {error}") from error
        else:
            accepted.append(argument)
    logs.setup(level)
    return accepted
