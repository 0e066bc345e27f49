"""Commands run within the process of a test."""

from typing import Any

import pytest

from eurosat.runtime import cli


def fails(verb: Any, *arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(verb, arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def last_error(capfd: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]
