"""MLflow's databases in PostgreSQL: where they are, what they hold, how they are swapped."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from eurosat.errors import ConfigError, TrackingError

if TYPE_CHECKING:
    from psycopg2 import extensions

MAX_NAME_BYTES = 63
"""Limit of PostgreSQL for the name of a database; a longer one would be cut."""
CONNECT_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseSpec:
    """One of the two databases that MLflow keeps."""

    name: str
    variable: str
    """Environment variable that holds the database's URI."""
    version_table: str
    """Table in which Alembic keeps the revision of the schema."""
    migrations: str
    """Folder of the MLflow package that has the revisions."""
    user_tables: Mapping[str, int]
    """Tables with data of users, and the rows that each has on a fresh server."""


DATABASE_SPECS = (
    DatabaseSpec(
        name="mlflow",
        variable="EUROSAT_DATABASE_URI",
        version_table="alembic_version",
        migrations="store/db_migrations/versions",
        user_tables={
            "runs": 0,
            "registered_models": 0,
            "logged_models": 0,
            "trace_info": 0,
            "experiments": 1,
            "webhooks": 0,
        },
    ),
    DatabaseSpec(
        name="auth",
        variable="EUROSAT_AUTH_DATABASE_URI",
        version_table="alembic_version_auth",
        migrations="server/auth/db/migrations/versions",
        user_tables={"users": 1},
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Database:
    """A PostgreSQL database of MLflow."""

    spec: DatabaseSpec
    uri: str
    """URI for libpq, without the password."""
    password: str | None

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.uri).path.strip("/"))

    @property
    def server(self) -> str:
        """Host and port."""
        return urlsplit(self.uri).netloc.rpartition("@")[2]

    def renamed(self, name: str) -> "Database":
        """Return another database of the same server, of the same spec.

        Raises:
            ConfigError: the name is too long for PostgreSQL.
        """
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ConfigError(
                f"{name} is longer than PostgreSQL's limit of {MAX_NAME_BYTES} bytes: "
                f"give the database {self.name} a shorter name"
            )
        return replace(self, uri=urlsplit(self.uri)._replace(path=f"/{name}").geturl())

    @contextmanager
    def connected(self) -> "Iterator[extensions.connection]":
        """Yield a connection; raise TrackingError for every error of PostgreSQL."""
        import psycopg2

        try:
            with contextlib.closing(self._connect()) as connection:
                yield connection
        except psycopg2.Error as error:
            raise TrackingError(f"{self.spec.variable}={self.uri}: {error}") from error

    def _connect(self) -> "extensions.connection":
        import psycopg2

        return psycopg2.connect(self.uri, password=self.password, connect_timeout=CONNECT_TIMEOUT_S)

    def environment(self) -> dict[str, str]:
        """Return the environment for PostgreSQL's programs.

        It holds the password, which every user of the machine could read in a command line.
        """
        return os.environ | ({"PGPASSWORD": self.password} if self.password else {})


def from_environment(environment: Mapping[str, str]) -> list[Database]:
    """Return the databases that the environment names.

    Raises:
        ConfigError: the tracking database is not set, or a URI is not of PostgreSQL.
    """
    configured: list[Database] = []
    for spec in DATABASE_SPECS:
        if not (uri := environment.get(spec.variable)):
            if spec is DATABASE_SPECS[0]:
                raise ConfigError(
                    f"{spec.variable} is not set: give postgresql://user@host/database"
                )
            continue
        parts = urlsplit(uri)
        if parts.scheme.partition("+")[0] not in ("postgresql", "postgres") or not parts.path[1:]:
            raise ConfigError(f"{spec.variable} must be postgresql://user@host/database")
        if "@" in parts.path + parts.query + parts.fragment or "password" in parts.query:
            raise ConfigError(
                f"{spec.variable} holds a password with characters that a URL cannot hold: "
                "write it into PGPASSFILE"
            )
        user, _, host = parts.netloc.rpartition("@")
        login = f"{user.partition(':')[0]}@" if user else ""
        bare_uri = parts._replace(scheme="postgresql", netloc=login + host).geturl()
        password = unquote(parts.password) if parts.password else None
        if all(bare_uri != other.uri for other in configured):  # both may share one database
            configured.append(Database(spec=spec, uri=bare_uri, password=password))
    return configured


def schema_revision(connection: "extensions.connection", spec: DatabaseSpec) -> str | None:
    """Return the revision of the schema; None if MLflow has not created one."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (spec.version_table,))
        if cursor.fetchone() == (None,):
            return None
        cursor.execute(f"SELECT version_num FROM {spec.version_table}")  # noqa: S608 - a constant
        row = cursor.fetchone()
        return str(row[0]) if row else None


def count_rows(connection: "extensions.connection") -> dict[str, int]:
    """Return the number of rows of every table.

    Tables outside the public schema are named ``schema.table``.
    """
    from psycopg2 import sql

    counts: dict[str, int] = {}
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT schemaname, tablename FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2"
        )
        for schema, table in cursor.fetchall():
            count = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, table))
            cursor.execute(count)
            (number,) = cursor.fetchone() or (0,)
            counts[table if schema == "public" else f"{schema}.{table}"] = int(number)
    return counts


def user_data(connection: "extensions.connection") -> list[str]:
    """Return a description of the users' data, such as ``["3 runs", "1 experiments"]``.

    The list is empty after a server's first start. Tables of both databases are looked up, as both
    may share one.
    """
    counts = count_rows(connection)
    return [
        f"{count} {table}"
        for spec in DATABASE_SPECS
        for table, initial in spec.user_tables.items()
        if (count := counts.get(table, 0)) > initial
    ]


def count_external(database: Database, url: str) -> int:
    """Count runs and logged models whose artifacts are neither proxied nor below ``url``."""
    query = " UNION ALL ".join(
        f"SELECT {column} AS uri FROM {table}"  # noqa: S608 - constants
        for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location"))
    )
    with database.connected() as connection, connection.cursor() as cursor:
        cursor.execute(
            f"SELECT count(*) FROM ({query}) AS locations "  # noqa: S608 - constants
            "WHERE uri NOT LIKE 'mlflow-artifacts:%%' "
            "AND NOT starts_with(replace(uri, 'file://', ''), %s)",
            (url,),
        )
        (number,) = cursor.fetchone() or (0,)
        return int(number)


@contextmanager
def maintenance_connection(database: Database) -> "Iterator[extensions.connection]":
    """Yield a connection that can create, rename and drop databases.

    A lock allows one restore at a time.
    """
    with database.renamed("postgres").connected() as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_try_advisory_lock(hashtext(%s))", (f"eurosat {database.name}",)
            )
            if cursor.fetchone() != (True,):
                raise ConfigError(
                    f"another restore into {database.name} is running: wait until it has ended"
                )
        yield connection


def exists(connection: "extensions.connection", name: str) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
        return cursor.fetchone() is not None


def refuse_busy(connection: "extensions.connection", name: str) -> None:
    """Raise ConfigError if a client is connected to the database."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s "
            "AND backend_type = 'client backend'",
            (name,),
        )
        (number,) = cursor.fetchone() or (0,)
    if number:
        raise ConfigError(
            f"the database {name} is to be replaced and has {number} open connections: "
            "stop the MLflow server, and run the command again"
        )


def execute(connection: "extensions.connection", statement: str, *names: str) -> None:
    """Execute a statement in which each ``{}`` stands for a name that is quoted."""
    from psycopg2 import sql

    with connection.cursor() as cursor:
        cursor.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def swap(
    connection: "extensions.connection", moves: list[tuple[str, str, str]], comment: str
) -> None:
    """Rename databases in one transaction: either all are renamed or none.

    Each move is (fresh, name, previous): ``name`` becomes ``previous`` and ``fresh`` becomes
    ``name``. ``comment`` is stored as the comment of the new database; see `swap_comment`.
    """
    from psycopg2 import sql

    connection.autocommit = False
    try:
        with connection:
            for fresh, name, previous in moves:
                if exists(connection, name):
                    execute(connection, "ALTER DATABASE {} RENAME TO {}", name, previous)
                execute(connection, "ALTER DATABASE {} RENAME TO {}", fresh, name)
                statement = sql.SQL("COMMENT ON DATABASE {} IS {}")
                with connection.cursor() as cursor:
                    cursor.execute(statement.format(sql.Identifier(name), sql.Literal(comment)))
    finally:
        connection.autocommit = True


def swap_comment(connection: "extensions.connection", name: str) -> str | None:
    """Return the comment that `swap` stored with the database."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s",
            (name,),
        )
        row = cursor.fetchone()
        return row[0] if row else None
