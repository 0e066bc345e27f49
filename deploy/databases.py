"""MLflow's databases in PostgreSQL: dumped in one snapshot, restored beside, swapped in at once."""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import progress

if TYPE_CHECKING:
    from psycopg2.extensions import connection

log = logging.getLogger(__name__)

MAX_NAME = 63
"""Bytes of a database's name, beyond which PostgreSQL would cut it."""
LOOK_S = 0.5
"""How often a bar is moved while PostgreSQL's own program works."""


CONNECT_S = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What MLflow keeps in a database."""

    name: str
    variable: str
    """Of the environment, with the database's URI."""
    version_table: str
    """Where Alembic keeps the revision of the schema."""
    migrations: str
    """The folder of MLflow's that has the revisions."""
    precious: Mapping[str, int]
    """Tables, and how many rows each has before anybody has used the server."""


KINDS = (
    Kind(
        name="mlflow",
        variable="EUROSAT_DATABASE_URI",
        version_table="alembic_version",
        migrations="store/db_migrations/versions",
        precious={
            "runs": 0,
            "registered_models": 0,
            "logged_models": 0,
            "trace_info": 0,
            "experiments": 1,
            "webhooks": 0,
        },
    ),
    Kind(
        name="auth",
        variable="EUROSAT_AUTH_DATABASE_URI",
        version_table="alembic_version_auth",
        migrations="server/auth/db/migrations/versions",
        precious={"users": 1},
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Database:
    kind: Kind
    uri: str
    """As libpq reads it, without the password."""
    password: str | None

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.uri).path.strip("/"))

    @property
    def server(self) -> str:
        return urlsplit(self.uri).netloc.rpartition("@")[2]

    def called(self, name: str) -> "Database":
        if len(name.encode()) > MAX_NAME:
            raise ConfigError(
                f"a database of the name {name} would be needed beside, and {MAX_NAME} bytes are "
                "the limit of PostgreSQL: rename the database"
            )
        return replace(self, uri=urlsplit(self.uri)._replace(path=f"/{name}").geturl())

    @contextmanager
    def connected(self) -> "Iterator[connection]":
        """Raises TrackingError in place of what PostgreSQL refuses."""
        import psycopg2

        try:
            with contextlib.closing(self._connect()) as opened:
                yield opened
        except psycopg2.Error as error:
            raise TrackingError(f"{self.kind.variable}={self.uri}: {error}") from error

    def _connect(self) -> "connection":
        import psycopg2

        return psycopg2.connect(self.uri, password=self.password, connect_timeout=CONNECT_S)

    def environment(self) -> dict[str, str]:
        """A password is told to programs here: in a command all users would see it."""
        return os.environ | ({"PGPASSWORD": self.password} if self.password else {})


def configured(environment: Mapping[str, str]) -> list[Database]:
    """Raises:
    ConfigError: the variable of the tracking database is not set, or one is no PostgreSQL.
    """
    found: list[Database] = []
    for kind in KINDS:
        if not (uri := environment.get(kind.variable)):
            if kind is KINDS[0]:
                raise ConfigError(f"{kind.variable} is not set: postgresql://user@host/database")
            continue
        parts = urlsplit(uri)
        if parts.scheme.partition("+")[0] not in ("postgresql", "postgres") or not parts.path[1:]:
            raise ConfigError(f"{kind.variable} is not of the form postgresql://user@host/database")
        if "@" in parts.path + parts.query + parts.fragment or "password" in parts.query:
            raise ConfigError(
                f"{kind.variable} holds a password that a URL cannot: write it into PGPASSFILE"
            )
        user, _, host = parts.netloc.rpartition("@")
        login = f"{user.partition(':')[0]}@" if user else ""
        bare = parts._replace(scheme="postgresql", netloc=login + host).geturl()
        password = unquote(parts.password) if parts.password else None
        if not any(bare == other.uri for other in found):  # both may be kept in one
            found.append(Database(kind=kind, uri=bare, password=password))
    return found


def program(name: str, least: int, why: str) -> Path:
    """PostgreSQL's own, of the release ``least`` or the next above that is here.

    Raises:
        ConfigError: there is none; the message ends with ``why`` and how to get it.
    """
    files = {
        *([Path(on_path)] if (on_path := shutil.which(name)) else []),
        *Path("/usr/lib/postgresql").glob(f"*/bin/{name}"),
    }
    releases = {file: release for file in files if (release := _release(file))}
    if fit := {file: release for file, release in releases.items() if release >= least}:
        # Debian's own on PATH is a wrapper that may choose another release
        return min(fit, key=lambda file: (fit[file], file.parent == Path("/usr/bin")))
    has = f"is of release {max(releases.values())}" if releases else "is not installed"
    raise ConfigError(
        f"{name} {has}, and {why}: apt-get install postgresql-client-{least}, or set PATH"
    )


def _release(file: Path) -> int | None:
    asked = subprocess.run([file, "--version"], capture_output=True, text=True)
    found = re.search(r"(\d+)(?:\.\d+|\w+)", asked.stdout)
    return int(found[1]) if found and not asked.returncode else None


def dump(database: Database, into: IO[bytes]) -> dict[str, Any]:
    """Write what pg_dump makes of one snapshot; what it holds, counted in that same snapshot.

    Raises:
        TrackingError: PostgreSQL refuses, or MLflow has never used the database.
    """
    with database.connected() as opened:
        opened.set_session(isolation_level="REPEATABLE READ", readonly=True)
        release = opened.server_version // 10_000
        pg_dump = program("pg_dump", release, f"{database.name} is served by PostgreSQL {release}")
        schema = revision(opened, database.kind)
        if schema is None:
            raise TrackingError(
                f"{database.kind.variable}={database.uri} holds no {database.kind.version_table}: "
                "it is not MLflow's, or no server has been started on it"
            )
        with opened.cursor() as cursor:
            cursor.execute("SELECT pg_export_snapshot()")
            (snapshot,) = cursor.fetchone() or ("",)
        told = {
            "postgresql": opened.get_parameter_status("server_version"),
            "pg_dump": _release(pg_dump),
            "schema": schema,
            "rows": rows(opened),
        }
        command = [str(pg_dump), "--format=custom", f"--snapshot={snapshot}"]
        _run(database, command, f"dumping {database.name}", stdout=into)
    return told


def revision(opened: "connection", kind: Kind) -> str | None:
    """Of the schema; None where MLflow has made none."""
    with opened.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (kind.version_table,))
        if cursor.fetchone() == (None,):
            return None
        cursor.execute(f"SELECT version_num FROM {kind.version_table}")  # noqa: S608 - ours
        found = cursor.fetchone()
        return str(found[0]) if found else None


def rows(opened: "connection") -> dict[str, int]:
    """Of every table, the schema's name before each but the public ones."""
    from psycopg2 import sql

    counted: dict[str, int] = {}
    with opened.cursor() as cursor:
        cursor.execute(
            "SELECT schemaname, tablename FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2"
        )
        for schema, table in cursor.fetchall():
            count = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, table))
            cursor.execute(count)
            (number,) = cursor.fetchone() or (0,)
            counted[table if schema == "public" else f"{schema}.{table}"] = int(number)
    return counted


def held(opened: "connection") -> list[str]:
    """What somebody would miss, as words; nothing after a server's first start.

    Of all kinds, as several may be kept in one database.
    """
    counted = rows(opened)
    return [
        f"{number} {table}"
        for one in KINDS
        for table, blank in one.precious.items()
        if (number := counted.get(table, 0)) > blank
    ]


def elsewhere(database: Database, place: str) -> int:
    """Runs and logged models whose artifacts are neither proxied nor below ``place``."""
    query = " UNION ALL ".join(
        f"SELECT {column} AS uri FROM {table}"  # noqa: S608 - constants
        for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location"))
    )
    with database.connected() as opened, opened.cursor() as cursor:
        cursor.execute(
            f"SELECT count(*) FROM ({query}) AS named "  # noqa: S608 - the same
            "WHERE uri NOT LIKE 'mlflow-artifacts:%%' "
            "AND NOT starts_with(replace(uri, 'file://', ''), %s)",
            (place,),
        )
        (number,) = cursor.fetchone() or (0,)
        return int(number)


@contextmanager
def maintained(database: Database) -> "Iterator[connection]":
    """A connection beside, to make, rename and drop databases; one restore has it at a time."""
    with database.called("postgres").connected() as opened:
        opened.autocommit = True
        with opened.cursor() as cursor:
            cursor.execute(
                "SELECT pg_try_advisory_lock(hashtext(%s))", (f"eurosat {database.name}",)
            )
            if cursor.fetchone() != (True,):
                raise ConfigError(f"another restore into {database.name} is at work: wait for it")
        yield opened


def exists(opened: "connection", name: str) -> bool:
    with opened.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
        return cursor.fetchone() is not None


def refuse_busy(opened: "connection", name: str) -> None:
    """Raises ConfigError while anybody is connected to the database."""
    with opened.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s "
            "AND backend_type = 'client backend'",
            (name,),
        )
        (number,) = cursor.fetchone() or (0,)
    if number:
        raise ConfigError(
            f"{number} connections to the database {name} are open, and it is to be replaced: "
            "stop the MLflow server, and say it again"
        )


def execute(opened: "connection", statement: str, *names: str) -> None:
    """Each ``{}`` in ``statement`` stands for a name, quoted."""
    from psycopg2 import sql

    with opened.cursor() as cursor:
        cursor.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def restore(
    opened: "connection", fresh: Database, dumped: IO[bytes], told: Mapping[str, Any]
) -> None:
    """Fill the database ``fresh``, made anew, and count that all is there.

    Raises:
        TrackingError: PostgreSQL refuses, or the rows are not those of the snapshot.
    """
    pg_restore = program(
        "pg_restore", told["pg_dump"], f"the archive was made by pg_dump {told['pg_dump']}"
    )
    execute(opened, "DROP DATABASE IF EXISTS {} WITH (FORCE)", fresh.name)
    execute(opened, "CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'", fresh.name)
    command = [str(pg_restore), "--no-owner", "--no-acl", "--single-transaction"]
    _run(fresh, command, f"restoring {fresh.name}", stdin=dumped)
    with fresh.connected() as filled:
        if (counted := rows(filled)) != told["rows"]:
            wrong = sorted(counted.items() ^ told["rows"].items())
            raise TrackingError(f"{fresh.name} was not restored as it was: {wrong[:4]}")
        execute(filled, "ANALYZE")
        filled.commit()


def swap(opened: "connection", moves: list[tuple[str, str, str]], mark: str) -> None:
    """Of each (fresh, name, kept): ``name`` becomes ``kept`` and ``fresh`` becomes ``name``.

    In one transaction: killed, none has moved or all have. ``mark`` stays as their comment.
    """
    from psycopg2 import sql

    opened.autocommit = False
    try:
        with opened:
            for fresh, name, kept in moves:
                if exists(opened, name):
                    execute(opened, "ALTER DATABASE {} RENAME TO {}", name, kept)
                execute(opened, "ALTER DATABASE {} RENAME TO {}", fresh, name)
                comment = sql.SQL("COMMENT ON DATABASE {} IS {}")
                with opened.cursor() as cursor:
                    cursor.execute(comment.format(sql.Identifier(name), sql.Literal(mark)))
    finally:
        opened.autocommit = True


def marked(opened: "connection", name: str) -> str | None:
    """What `swap` left with the database."""
    with opened.cursor() as cursor:
        cursor.execute(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s",
            (name,),
        )
        found = cursor.fetchone()
        return found[0] if found else None


def _run(
    database: Database,
    command: list[str],
    label: str,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
) -> None:
    log.info("%s", label)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, f"--dbname={database.uri}", "--no-password"],
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout or said,
            stderr=said,
            env=database.environment(),
        )
        try:
            if stdout:
                _watch(process, stdout, label)
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode:
            said.seek(0)
            raise TrackingError(
                f"{Path(command[0]).name} of {database.name} ended with {process.returncode}: "
                f"{said.read().decode(errors='replace').strip()[-500:]}"
            )


def _watch(process: "subprocess.Popen[bytes]", written: IO[bytes], label: str) -> None:
    with progress.bar() as shown:
        task = shown.add_task(label, total=None, note="")
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
            size = os.fstat(written.fileno()).st_size
            shown.update(task, note=f"{size / 2**20:,.0f} MiB")
