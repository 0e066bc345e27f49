"""A PostgreSQL of the tests' own, where its programs are installed."""

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
def running() -> Iterator[str]:
    """Yields its URL up to the name of a database."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    folder.chmod(0o755)  # its own user enters it
    try:
        postgresql.initialise(folder / "data", "eurosat")
        with (folder / "log").open("wb") as said:
            process = subprocess.Popen(
                [*postgresql.as_user(), *postgresql.serve(folder / "data", port)],
                stdout=said,
                stderr=said,
            )
        try:
            _wait_for(port, process, folder / "log")
            yield f"postgresql+psycopg2://eurosat@127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGQUIT)  # at once
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, process: "subprocess.Popen[bytes]", said: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(f"postgresql://eurosat@127.0.0.1:{port}/postgres").close()
            return
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


def create(url: str, database: str) -> str:
    import psycopg2

    server = url.replace("postgresql+psycopg2", "postgresql")
    with contextlib.closing(psycopg2.connect(f"{server}/postgres")) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {database}")
    return f"{url}/{database}"
