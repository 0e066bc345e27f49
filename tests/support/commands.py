"""Run commands in the process of a test."""

from typing import Any

import pytest

from eurosat.runtime import cli


def fails(command: Any, *arguments: str) -> int:
    """Run a command that must exit, and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(command, arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def last_error(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the only error line on standard error."""
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]
