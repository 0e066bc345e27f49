"""A command that is started outside the environment says how to enter it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

COMMANDS = (
    "eurosat.train",
    "eurosat.doctor",
    "experiments.sweep",
    "expectations.validate",
    "registry.register",
    "serving.server",
    "deploy.platform",
)


def run_without_packages(root: Path, module: str) -> subprocess.CompletedProcess[str]:
    """Run a command in isolation from site-packages, as the system's Python does."""
    return subprocess.run(
        [sys.executable, "-S", "-m", module],
        cwd=root,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_without_its_packages_names_the_environment_in_one_line(module: str) -> None:
    process = run_without_packages(ROOT, module)
    assert process.returncode == 2
    [line] = process.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} lacks this project's packages")
    assert "`source .venv/bin/activate`" in line


def test_make_setup_is_named_only_where_it_was_not_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "eurosat", tmp_path / "eurosat")
    assert "run `make setup` and" in run_without_packages(tmp_path, "eurosat.train").stderr
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "product").touch()
    assert "make setup" not in run_without_packages(tmp_path, "eurosat.train").stderr
