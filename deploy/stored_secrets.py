"""What MLflow's databases keep of the secrets: the administrator's password and the webhook key.

A restored database comes with those of the platform that it was saved from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import secrets
from deploy.databases import Database

if TYPE_CHECKING:
    from psycopg2 import extensions

ADMINISTRATOR = "admin"
PASSWORD, WEBHOOK_KEY = "admin_password", "webhook_key"


def find_differing(databases: Sequence[Database], folder: Path) -> list[str]:
    """Return the names of the secrets in ``folder`` that the databases do not accept."""
    differing: list[str] = []
    for database in databases:
        with database.connected() as connection:
            if _rejects_password(connection, folder):
                differing.append(PASSWORD)
            if _unreadable_webhooks(connection, folder):
                differing.append(WEBHOOK_KEY)
    return differing


def use_secrets(databases: Sequence[Database], folder: Path) -> list[str]:
    """Make the databases accept the secrets in ``folder``, and return what was changed.

    The administrator gets the password. Webhooks that the key cannot decrypt are deleted: nothing
    can read their signing keys any more.

    Raises:
        ConfigError: a secret is missing.
        TrackingError: PostgreSQL cannot be reached, or refuses.
    """
    from werkzeug.security import generate_password_hash

    changes: list[str] = []
    for database in databases:
        with database.connected() as connection, connection, connection.cursor() as cursor:
            if _rejects_password(connection, folder):
                cursor.execute(
                    "UPDATE users SET password_hash = %s WHERE username = %s",
                    (generate_password_hash(secrets.read(PASSWORD, folder)), ADMINISTRATOR),
                )
                changes.append(f"{ADMINISTRATOR} has the password of {folder / PASSWORD}")
            for webhook_id, name in _unreadable_webhooks(connection, folder):
                for table in ("webhook_events", "webhooks"):
                    cursor.execute(f"DELETE FROM {table} WHERE webhook_id = %s", (webhook_id,))  # noqa: S608 - constants
                changes.append(f"the webhook {name} is deleted: its signing key cannot be read")
    return changes


@contextmanager
def new_database_password(database: Database, password: str) -> Iterator[None]:
    """Give the connected user another password, which counts once the block has succeeded."""
    with database.connected() as connection, connection, connection.cursor() as cursor:
        cursor.execute("ALTER ROLE CURRENT_USER PASSWORD %s", (password,))
        yield


def _rejects_password(connection: "extensions.connection", folder: Path) -> bool:
    """Return whether the administrator exists, and has another password than the secret."""
    from werkzeug.security import check_password_hash

    rows = _rows(connection, "users", "password_hash", "username = %s", ADMINISTRATOR)
    return bool(rows) and not check_password_hash(rows[0][0], secrets.read(PASSWORD, folder))


def _unreadable_webhooks(
    connection: "extensions.connection", folder: Path
) -> list[tuple[str, str]]:
    """Return id and name of each webhook whose signing key the secret cannot decrypt."""
    rows = _rows(connection, "webhooks", "webhook_id, name, secret", "deleted_timestamp IS NULL")
    if not any(secret for _, _, secret in rows):
        return []
    can_decrypt = _decrypter(secrets.read(WEBHOOK_KEY, folder))
    return [(id_, name) for id_, name, secret in rows if secret and not can_decrypt(secret)]


def _decrypter(key: str) -> Callable[[str], bool]:
    from cryptography.fernet import Fernet, InvalidToken

    cipher = Fernet(key)

    def can_decrypt(token: str) -> bool:
        try:
            cipher.decrypt(token.encode())
        except InvalidToken:
            return False
        return True

    return can_decrypt


def _rows(
    connection: "extensions.connection", table: str, columns: str, condition: str, *values: str
) -> list[tuple[str, ...]]:
    """Return rows of a table; none if the database does not have it."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (table,))
        if cursor.fetchone() == (None,):
            return []
        cursor.execute(f"SELECT {columns} FROM {table} WHERE {condition}", values)  # noqa: S608 - constants
        return list(cursor.fetchall())
