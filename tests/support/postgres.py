"""A PostgreSQL server for tests, if its programs are installed."""

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy import postgresql
from tests.support.mlflow_server import free_port

START_S = 60.0


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server; yield its URL without the name of a database."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    folder.chmod(0o755)  # PostgreSQL's user enters it
    try:
        postgresql.initialise(folder / "data", "eurosat")
        with (folder / "log").open("wb") as log_file:
            process = subprocess.Popen(
                [
                    *postgresql.unprivileged_prefix(),
                    *postgresql.server_command(folder / "data", port),
                ],
                stdout=log_file,
                stderr=log_file,
            )
        try:
            _wait_for(port, process, folder / "log")
            yield f"postgresql+psycopg2://eurosat@127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGQUIT)  # immediate shutdown
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log_file: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(f"postgresql://eurosat@127.0.0.1:{port}/postgres").close()
            return
        assert process.poll() is None, log_file.read_text()
        assert time.monotonic() < deadline, log_file.read_text()
        time.sleep(0.05)


def create_database(url: str, database: str) -> str:
    """Create an empty database, and return its URL."""
    import psycopg2

    server = url.replace("postgresql+psycopg2", "postgresql")
    with contextlib.closing(psycopg2.connect(f"{server}/postgres")) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {database}")
    return f"{url}/{database}"
