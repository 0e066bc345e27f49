"""A PostgreSQL of one's own on loopback, from the programs that Debian or PATH has."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eurosat.errors import ConfigError

INSTALLED = Path("/usr/lib/postgresql")
UNPRIVILEGED = "nobody"
"""Who runs it where the user is root, as whom PostgreSQL refuses to run."""


def program(name: str) -> str | None:
    """Such as initdb, the newest that Debian has; None where PostgreSQL is not installed."""
    found = sorted(INSTALLED.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(found[-1]) if found else shutil.which(name)


def programs() -> Path:
    """The folder of them.

    Raises:
        ConfigError: PostgreSQL is not installed.
    """
    if not (found := program("initdb")):
        raise ConfigError("PostgreSQL is not installed: apt-get install postgresql")
    return Path(found).parent


def as_user(*flags: str) -> list[str]:
    """What its commands begin with; ``flags`` are of setpriv."""
    if os.geteuid() == 0:
        return ["setpriv", f"--reuid={UNPRIVILEGED}", "--clear-groups", *flags]
    return ["setpriv", *flags] if flags and shutil.which("setpriv") else []


def initialise(data: Path, user: str, password_file: Path | None = None) -> None:
    """An empty cluster of databases in ``data``; without a password everybody here is trusted.

    Raises:
        ConfigError: PostgreSQL is not installed, or cannot make it.
    """
    data.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(data, UNPRIVILEGED)
    command = [str(programs() / "initdb"), "-D", str(data), "-U", user, "--encoding=UTF8"]
    if not password_file:
        run([*command, "--auth=trust", "--no-sync"])
        return
    with tempfile.NamedTemporaryFile() as copy:  # which whoever runs it may read
        copy.write(password_file.read_bytes())
        copy.flush()
        if os.geteuid() == 0:
            shutil.chown(copy.name, UNPRIVILEGED)
        run([*command, "--auth=scram-sha-256", f"--pwfile={copy.name}"])


def serve(data: Path, port: int) -> list[str]:
    """The command of the server, in the foreground."""
    told = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "log_destination": "stderr",
    }
    settings = [part for name, value in told.items() for part in ("-c", f"{name}={value}")]
    return [str(programs() / "postgres"), "-D", str(data), "-p", str(port), *settings]


def run(command: Sequence[str]) -> None:
    """A program of it, to its end.

    Raises:
        ConfigError: it failed.
    """
    done = subprocess.run([*as_user(), *command], cwd="/", capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"{Path(command[0]).name} failed: {said[-1] if said else 'no reason'}")
