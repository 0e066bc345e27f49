"""A platform for tests, started as by `make platform`, and its users."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from deploy import users
from tests.support.paths import ROOT

PASSWORD = "twelve or more"


@dataclass(frozen=True)
class Platform:
    """A running platform."""

    folder: Path
    env: dict[str, str]
    """Content of the file `env`."""

    @property
    def url(self) -> str:
        return self.env["MLFLOW_TRACKING_URI"]

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return int(json.loads((self.folder / "process.json").read_text())["pid"])

    def administrator(self) -> users.UserAdmin:
        login = (self.env[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD"))
        return users.UserAdmin(*login)

    def user(self, role: str) -> tuple[str, str]:
        """Create a user with the role; return name and password."""
        self.administrator().add(f"a-{role}", role, PASSWORD)
        return f"a-{role}", PASSWORD

    def status(self, login: tuple[str, str], method: str, path: str, **fields: object) -> int:
        """Send a request to MLflow's REST API; return the status of the answer."""
        payload = {"params": fields} if method == "GET" else {"json": fields}
        url = f"{self.url}/api/2.0/mlflow/{path}"
        return requests.request(method, url, auth=login, timeout=30, **payload).status_code  # type: ignore[arg-type]

    def log_in(self, patch: pytest.MonkeyPatch, login: tuple[str, str]) -> None:
        """Let commands in this process use the login."""
        for name, value in zip(("USERNAME", "PASSWORD"), login, strict=True):
            patch.setenv(f"MLFLOW_TRACKING_{name}", value)
        patch.setenv("MLFLOW_TRACKING_URI", self.url)


def platform_command(name: str, folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.platform", name, f"--folder={folder}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def start_platform(folder: Path, *flags: str) -> Platform:
    result = platform_command("up", folder, "--free-ports", *flags)
    assert result.returncode == 0, result.stderr
    lines = (folder / "env").read_text().splitlines()
    return Platform(folder, dict(line.split("=", 1) for line in lines))


@contextmanager
def platform_folder() -> Iterator[Path]:
    """Yield a folder that PostgreSQL's user can enter; stop the platform in it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="platform"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        platform_command("down", folder)
        shutil.rmtree(folder, ignore_errors=True)


def remaining_processes(folder: Path) -> list[str]:
    """Return the command lines of processes that name the folder."""
    commands = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in command:
                commands.append(command)
    return commands
