"""A PostgreSQL of the tests' own, where its programs are installed."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.server import free_port


def initdb() -> str | None:
    """The program that makes a cluster of databases; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return shutil.which("initdb") or (str(found[-1]) if found else None)


@contextmanager
def running(initdb: str) -> Iterator[str]:
    """Yields its URL up to the name of a database."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_user = []
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    data, control = str(folder / "data"), str(Path(initdb).with_name("pg_ctl"))
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"

    def run(*command: str) -> None:
        done = subprocess.run([*as_user, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run(initdb, "-D", data, "-U", "eurosat", "--auth=trust", "--encoding=UTF8", "--no-sync")
    run(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://eurosat@127.0.0.1:{port}"
    finally:
        run(control, "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def create(url: str, database: str) -> str:
    import psycopg2

    server = url.replace("postgresql+psycopg2", "postgresql")
    with contextlib.closing(psycopg2.connect(f"{server}/postgres")) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {database}")
    return f"{url}/{database}"
