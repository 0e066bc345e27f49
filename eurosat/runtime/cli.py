"""Arguments of the commands, and how a command runs."""

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
    """Exit with the command's code; an error of ours is one line on standard error and code 2.

    ``platform``: use the platform that the working directory's ``.platform/env`` names.
    """

    def run() -> int:
        if platform:
            env_file.read(Path.cwd(), os.environ)
        return command(sys.argv[1:] if argv is None else argv)

    process.run(run)


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
        sys.exit(exit_codes.OK)
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
