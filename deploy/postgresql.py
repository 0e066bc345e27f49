"""A PostgreSQL server on loopback, from the programs of Debian or on PATH."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eurosat.errors import ConfigError
from eurosat.runtime import atomic

INSTALLED = Path("/usr/lib/postgresql")
PASSWORD_FILE = "pgpass"  # noqa: S105 - the name of a file
SUPERUSER = "postgres"
DATABASE_USER = "mlflow"
"""MLflow's account, which owns the database of the same name and is no superuser."""
SERVER_USER = "nobody"
"""User of the server if we are root, as which PostgreSQL refuses to run."""


def find_program(name: str) -> str | None:
    """Return the newest program, such as initdb; None if PostgreSQL is not installed."""
    programs = sorted(INSTALLED.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(programs[-1]) if programs else shutil.which(name)


def programs_folder() -> Path:
    """Return the folder of PostgreSQL's programs.

    Raises:
        ConfigError: PostgreSQL is not installed.
    """
    if not (initdb := find_program("initdb")):
        raise ConfigError("PostgreSQL is not installed: apt-get install postgresql")
    return Path(initdb).parent


def unprivileged_prefix(*flags: str) -> list[str]:
    """Return the prefix that runs a command as `SERVER_USER`, with ``flags`` of setpriv."""
    if os.geteuid() == 0:
        return ["setpriv", f"--reuid={SERVER_USER}", "--clear-groups", *flags]
    return ["setpriv", *flags] if flags and shutil.which("setpriv") else []


def initialise(data: Path, user: str, password_file: Path | None = None) -> None:
    """Create an empty database cluster in ``data``.

    Without ``password_file`` every local user may connect.

    Raises:
        ConfigError: PostgreSQL is not installed, or initdb fails.
    """
    data.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(data, SERVER_USER)
    command = [str(programs_folder() / "initdb"), "-D", str(data), "-U", user, "--encoding=UTF8"]
    if not password_file:
        run([*command, "--auth=trust", "--no-sync"])
        return
    with tempfile.NamedTemporaryFile() as copy:  # readable for SERVER_USER
        copy.write(password_file.read_bytes())
        copy.flush()
        if os.geteuid() == 0:
            shutil.chown(copy.name, SERVER_USER)
        run([*command, "--auth=scram-sha-256", f"--pwfile={copy.name}"])


def create_account(data: Path, password: str) -> None:
    """Create `DATABASE_USER` and its database in a cluster that has not been started yet.

    Afterwards the superuser has no password, so that nobody can log in as it over the network.

    Raises:
        ConfigError: PostgreSQL refuses.
    """
    quoted = password.replace("'", "''")
    statements = [
        f"CREATE ROLE {DATABASE_USER} LOGIN CREATEDB PASSWORD '{quoted}';",
        f"CREATE DATABASE {DATABASE_USER} OWNER {DATABASE_USER};",
        f"ALTER ROLE {SUPERUSER} PASSWORD NULL;",
    ]
    single_user = [str(programs_folder() / "postgres"), "--single", "-D", str(data)]
    run([*single_user, "-c", "exit_on_error=on", "postgres"], "\n".join([*statements, ""]))


def write_password_file(folder: Path, password: str) -> Path:
    """Write a file for PGPASSFILE that only its owner can read, and return its path."""
    file = folder / PASSWORD_FILE
    atomic.atomic_write_private(file, f"*:*:*:{DATABASE_USER}:{password}\n")
    return file


def server_command(data: Path, port: int) -> list[str]:
    """Return the command that runs the server in the foreground."""
    options = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "log_destination": "stderr",
    }
    settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    return [str(programs_folder() / "postgres"), "-D", str(data), "-p", str(port), *settings]


def run(command: Sequence[str], stdin: str = "") -> None:
    """Run a program of PostgreSQL until it ends; ``stdin`` is its input.

    Raises:
        ConfigError: it failed.
    """
    result = subprocess.run(
        [*unprivileged_prefix(), *command], cwd="/", input=stdin, capture_output=True, text=True
    )
    if result.returncode:
        messages = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise ConfigError(f"{Path(command[0]).name} failed: {messages[-1]}")
