"""Commands use the platform of their folder, and say so."""

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


def test_variables_that_are_set_already_take_precedence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, f"{URI}=http://a\n\n# a comment\nEUROSAT_X=$HOME a=b #c\nEUROSAT_Y=file\n")
    environ = {"EUROSAT_Y": "mine"}
    env_file.read(tmp_path, environ)
    assert environ == {URI: "http://a", "EUROSAT_X": "$HOME a=b", "EUROSAT_Y": "mine"}
    assert capsys.readouterr().err == "using the platform of .platform/env\n"
    env_file.read(tmp_path, environ)
    assert not capsys.readouterr().err, "a command started by a command prints nothing again"


@pytest.mark.parametrize(
    "value",
    ["", "plain", "a b", "a#b", "a=b", "$HOME ${HOME}", "it's", 'say "a"', "back\\slash\\n", "\\'"],
)
def test_a_value_is_written_as_it_is(value: str, tmp_path: Path) -> None:
    assert env_file.dump({"EUROSAT_A": value}) == f"EUROSAT_A={value}\n"
    assert env_file.load(write(tmp_path, env_file.dump({"EUROSAT_A": value}))) == {
        "EUROSAT_A": value
    }


@pytest.mark.parametrize(
    "value", ["/a #b/c", "'quoted'", '"q" # $HOME=1', " a", "a ", "two\nlines", "'\\ #", "a #'b\\"]
)
def test_a_value_that_needs_quotes_is_read_back_unchanged(value: str, tmp_path: Path) -> None:
    text = env_file.dump({"EUROSAT_A": value, "EUROSAT_B": "next"})
    assert env_file.load(write(tmp_path, text)) == {"EUROSAT_A": value, "EUROSAT_B": "next"}


def test_a_password_is_not_sent_to_another_server(
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


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("A", "is not of the form KEY=VALUE: `make plat"),
        ("=b", "is not of the form KEY=VALUE: `make plat"),
        ("EUROSAT_B='b", "is not of the form KEY=VALUE: `make plat"),
        ("export A=b", "sets A, which is no variable of a platform: `make plat"),
        ("1A=b", "sets 1A, which is no variable of a platform"),
        (" A=b", "sets A, which is no variable of a platform"),
        ("PATH=b", "sets PATH, which is no variable of a platform"),
    ],
)
def test_a_line_that_does_not_fit_is_named(line: str, fault: str, tmp_path: Path) -> None:
    write(tmp_path, f"EUROSAT_A=b\n\n{line}\n")
    environ: dict[str, str] = {}
    with pytest.raises(ConfigError, match=f"env, line 3 {fault}"):
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
def test_a_command_reads_the_file_before_it_runs(
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


def test_the_command_of_the_platform_itself_ignores_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "A b\n")
    monkeypatch.chdir(tmp_path)

    def command(argv: Sequence[str]) -> int:
        return exit_codes.OK

    with pytest.raises(SystemExit) as stopped:
        cli.run_command(command, [], platform=False)
    assert stopped.value.code == exit_codes.OK
