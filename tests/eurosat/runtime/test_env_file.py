"""A platform that runs beside the working directory is used, and never by surprise."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from eurosat.errors import ConfigError
from eurosat.runtime import cli, env_file, exit_codes
from tests.support.paths import ROOT

URI = "MLFLOW_TRACKING_URI"


def write(folder: Path, text: str) -> Path:
    file = folder / env_file.FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def test_what_is_set_already_wins_and_the_rest_is_taken_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, f'{URI}=http://a\n\n# a comment\nEUROSAT_X="q" # $HOME=1\nEUROSAT_Y=file\n')
    environ = {"EUROSAT_Y": "mine"}
    env_file.read(tmp_path, environ)
    assert environ == {URI: "http://a", "EUROSAT_X": '"q" # $HOME=1', "EUROSAT_Y": "mine"}
    assert capsys.readouterr().err == "using the platform of .platform/env\n"
    env_file.read(tmp_path, environ)
    assert not capsys.readouterr().err, "a verb that a verb starts says nothing again"


def test_a_password_is_not_taken_to_another_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, f"{URI}=http://a\nMLFLOW_TRACKING_PASSWORD=s\n")
    environ = {URI: "http://b"}
    env_file.read(tmp_path, environ)
    assert environ == {URI: "http://b"}
    assert not capsys.readouterr().err
    environ = {URI: "http://a"}
    env_file.read(tmp_path, environ)
    assert environ["MLFLOW_TRACKING_PASSWORD"] == "s"


def test_no_platform_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ: dict[str, str] = {}
    env_file.read(tmp_path, environ)
    assert environ == {}
    assert not capsys.readouterr().err


@pytest.mark.parametrize("line", ["export A=b", "A", "=b", "1A=b", " A=b", "A =b"])
def test_a_line_that_is_malformed_is_named(line: str, tmp_path: Path) -> None:
    write(tmp_path, f"EUROSAT_A=b\n{line}\n")
    environ: dict[str, str] = {}
    with pytest.raises(ConfigError, match=r"env, line 2 is not of the form KEY=VALUE: `make plat"):
        env_file.read(tmp_path, environ)
    assert environ == {}, "all of it or nothing"


COMMAND = """
import os
from eurosat.runtime import cli
cli.run_command(lambda _: print(os.environ["EUROSAT_A"]) or 0)
"""


@pytest.mark.parametrize(
    ("text", "status", "out", "err"),
    [
        ("EUROSAT_A=b c\n", exit_codes.OK, "b c\n", "using the platform of .platform/env\n"),
        ("A b\n", exit_codes.BAD_INPUT, "", "line 1 is not of the form"),
        ("EUROSAT_A=\xff\n", exit_codes.BAD_INPUT, "", "cannot be read"),
    ],
)
def test_a_verb_reads_it_before_it_runs(
    text: str, status: int, out: str, err: str, tmp_path: Path
) -> None:
    write(tmp_path, "").write_bytes(text.encode("latin-1"))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == status
    assert done.stdout == out
    assert err in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_platforms_own_command_does_not_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "A b\n")
    monkeypatch.chdir(tmp_path)

    def verb(argv: Sequence[str]) -> int:
        return exit_codes.OK

    with pytest.raises(SystemExit) as stopped:
        cli.run_command(verb, [], platform=False)
    assert stopped.value.code == exit_codes.OK
