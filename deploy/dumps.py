"""Dumps of a database, made and read by PostgreSQL's own programs."""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from deploy.databases import Database, count_rows, execute, schema_revision
from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import progress

if TYPE_CHECKING:
    from psycopg2 import extensions

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
"""How often the progress of pg_dump is shown."""


def find_program(name: str, min_version: int, reason: str) -> Path:
    """Return a program of PostgreSQL, of the lowest major version from ``min_version`` on.

    Raises:
        ConfigError: none is installed; the message gives ``reason`` and how to install it.
    """
    files = {
        *([Path(on_path)] if (on_path := shutil.which(name)) else []),
        *Path("/usr/lib/postgresql").glob(f"*/bin/{name}"),
    }
    versions = {file: version for file in files if (version := _major_version(file))}
    if usable := {file: version for file, version in versions.items() if version >= min_version}:
        # Debian's program on PATH is a wrapper that may choose another version.
        return min(usable, key=lambda file: (usable[file], file.parent == Path("/usr/bin")))
    problem = f"has version {max(versions.values())}" if versions else "is not installed"
    raise ConfigError(
        f"{name} {problem}, and {reason}: apt-get install postgresql-client-{min_version}, "
        "or set PATH"
    )


def _major_version(file: Path) -> int | None:
    result = subprocess.run([file, "--version"], capture_output=True, text=True)
    version = re.search(r"(\d+)(?:\.\d+|\w+)", result.stdout)
    return int(version[1]) if version and not result.returncode else None


def dump(database: Database, into: IO[bytes]) -> dict[str, Any]:
    """Dump one snapshot with pg_dump; return its versions and row counts for the manifest.

    Raises:
        TrackingError: PostgreSQL refuses, or MLflow has never used the database.
    """
    with database.connected() as connection:
        connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
        version = connection.server_version // 10_000
        pg_dump = find_program(
            "pg_dump", version, f"{database.name} is served by PostgreSQL {version}"
        )
        schema = schema_revision(connection, database.spec)
        if schema is None:
            raise TrackingError(
                f"{database.spec.variable}={database.uri} has no {database.spec.version_table}: "
                "it is not MLflow's, or no server has been started on it"
            )
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_export_snapshot()")
            (snapshot,) = cursor.fetchone() or ("",)
        metadata = {
            "postgresql": connection.get_parameter_status("server_version"),
            "pg_dump": _major_version(pg_dump),
            "schema": schema,
            "rows": count_rows(connection),
        }
        command = [str(pg_dump), "--format=custom", f"--snapshot={snapshot}"]
        _run_program(database, command, f"dumping {database.name}", stdout=into)
    return metadata


def restore(
    connection: "extensions.connection",
    fresh: Database,
    dump_file: IO[bytes],
    metadata: Mapping[str, Any],
) -> None:
    """Create the database ``fresh`` from a dump, and compare its row counts with ``metadata``.

    Raises:
        TrackingError: PostgreSQL refuses, or the rows are not those of the snapshot.
    """
    version = metadata["pg_dump"]
    pg_restore = find_program("pg_restore", version, f"the archive was made by pg_dump {version}")
    execute(connection, "DROP DATABASE IF EXISTS {} WITH (FORCE)", fresh.name)
    execute(connection, "CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'", fresh.name)
    command = [str(pg_restore), "--no-owner", "--no-acl", "--single-transaction"]
    _run_program(fresh, command, f"restoring {fresh.name}", stdin=dump_file)
    with fresh.connected() as restored:
        if (counts := count_rows(restored)) != metadata["rows"]:
            differences = sorted(counts.items() ^ metadata["rows"].items())
            raise TrackingError(
                f"{fresh.name} has other row counts than the archive: {differences[:4]}"
            )
        execute(restored, "ANALYZE")
        restored.commit()


def _run_program(
    database: Database,
    command: list[str],
    label: str,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
) -> None:
    log.info("%s", label)
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [*command, f"--dbname={database.uri}", "--no-password"],
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout or messages,
            stderr=messages,
            env=database.environment(),
        )
        try:
            if stdout:
                _show_progress(process, stdout, label)
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode:
            messages.seek(0)
            raise TrackingError(
                f"{Path(command[0]).name} of {database.name} ended with {process.returncode}: "
                f"{messages.read().decode(errors='replace').strip()[-500:]}"
            )


def _show_progress(process: "subprocess.Popen[bytes]", dump_file: IO[bytes], label: str) -> None:
    with progress.bar() as bar:
        task = bar.add_task(label, total=None, note="")
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_INTERVAL_S)
            size = os.fstat(dump_file.fileno()).st_size
            bar.update(task, note=f"{size / 2**20:,.0f} MiB")
