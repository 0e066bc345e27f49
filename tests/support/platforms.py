"""A platform of the tests' own, as `make platform` starts it, and its users."""

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
    folder: Path
    env: dict[str, str]

    @property
    def url(self) -> str:
        return self.env["MLFLOW_TRACKING_URI"]

    @property
    def pid(self) -> int:
        """Of the process that looks after the others."""
        return int(json.loads((self.folder / "process.json").read_text())["pid"])

    def administrator(self) -> users.Server:
        told = (self.env[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD"))
        return users.Server(*told)

    def user(self, role: str) -> tuple[str, str]:
        """Name and password of one with that role."""
        self.administrator().add(f"a-{role}", role, PASSWORD)
        return f"a-{role}", PASSWORD

    def ask(self, who: tuple[str, str], method: str, call: str, **told: object) -> int:
        """The status of the answer."""
        sent = {"params": told} if method == "GET" else {"json": told}
        url = f"{self.url}/api/2.0/mlflow/{call}"
        return requests.request(method, url, auth=who, timeout=30, **sent).status_code  # type: ignore[arg-type]

    def become(self, patch: pytest.MonkeyPatch, who: tuple[str, str]) -> None:
        """Verbs of this process are that user's."""
        for name, value in zip(("USERNAME", "PASSWORD"), who, strict=True):
            patch.setenv(f"MLFLOW_TRACKING_{name}", value)
        patch.setenv("MLFLOW_TRACKING_URI", self.url)


def command(verb: str, folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.platform", verb, f"--folder={folder}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def started(folder: Path) -> Platform:
    done = command("up", folder, "--free-ports")
    assert done.returncode == 0, done.stderr
    lines = (folder / "env").read_text().splitlines()
    return Platform(folder, dict(line.split("=", 1) for line in lines))


@contextmanager
def place() -> Iterator[Path]:
    """A folder that PostgreSQL's own user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="platform"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        command("down", folder)
        shutil.rmtree(folder, ignore_errors=True)


def left(folder: Path) -> list[str]:
    """The commands of processes that name the folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                told = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in told:
                found.append(told)
    return found
