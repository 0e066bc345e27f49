"""The services of the platform without containers, in the order in which they start."""

import sys
from functools import partial
from urllib.parse import urlsplit

from deploy import postgresql
from deploy.layout import ARTIFACTS_URL, BUCKET, Layout
from deploy.service import PARENT_DEATH_SIGNAL, Service, is_healthy, object_store_command

PYTHON_MODULE = [sys.executable, "-m"]


def all_services(layout: Layout) -> list[Service]:
    """Return every service; each needs only those before it.

    Raises:
        ConfigError: a program or a secret is missing.
    """
    return [
        _postgres(layout),
        _object_store(layout),
        _mlflow(layout),
        _promoter(layout),
        _serving(layout),
    ]


def _postgres(layout: Layout) -> Service:
    return Service(
        name="postgres",
        healthy=partial(_ensure_database, layout),
        command=[
            *postgresql.unprivileged_prefix(f"{PARENT_DEATH_SIGNAL}=INT"),
            *postgresql.server_command(
                layout.folder / "postgres", layout.addresses.ports["postgres"]
            ),
        ],
    )


def _object_store(layout: Layout) -> Service:
    return Service(
        name="store",
        healthy=lambda: is_healthy(f"{layout.url('store')}/storage/v1/b/{BUCKET}"),
        command=object_store_command(layout.addresses.ports["store"], layout.folder / "store"),
    )


def _mlflow(layout: Layout) -> Service:
    return Service(
        name="mlflow",
        healthy=lambda: is_healthy(f"{layout.url('mlflow')}/health"),
        environment=layout.mlflow_env(),
        command=[
            *PYTHON_MODULE,
            "mlflow",
            "server",
            "--host=127.0.0.1",
            f"--port={layout.addresses.ports['mlflow']}",
            "--workers=1",
            f"--backend-store-uri={layout.database}",
            "--serve-artifacts",
            f"--artifacts-destination={ARTIFACTS_URL}",
            "--app-name=basic-auth",
            *_public_flags(layout.addresses.public_url),
        ],
    )


def _public_flags(public_url: str | None) -> list[str]:
    """Return the flags by which MLflow accepts requests that were sent to ``public_url``."""
    hosts = "--allowed-hosts=localhost:*,127.0.0.1:*"
    if not public_url:
        return [hosts]
    host = urlsplit(public_url).hostname
    return [f"{hosts},{host},{host}:*", f"--cors-allowed-origins={public_url.rstrip('/')}"]


def _promoter(layout: Layout) -> Service:
    return Service(
        name="promoter",
        healthy=lambda: is_healthy(f"{layout.url('promoter')}/health"),
        environment=layout.promoter_env(),
        command=[
            *PYTHON_MODULE,
            "registry.receiver",
            f"--port={layout.addresses.ports['promoter']}",
            "--promote",
            f"--serving={layout.url('serving')}",
            f"--queue={layout.folder / 'inbox.db'}",
        ],
    )


def _serving(layout: Layout) -> Service:
    return Service(
        name="serving",
        healthy=lambda: is_healthy(f"{layout.url('serving')}/ping", also=503),  # no champion yet
        environment=layout.login_env("serving"),
        command=[*PYTHON_MODULE, "serving.server", f"--port={layout.addresses.ports['serving']}"],
    )


def _ensure_database(layout: Layout) -> bool:
    """Create MLflow's database if it is missing; return whether PostgreSQL answers."""
    import psycopg2

    server = layout.database.replace("+psycopg2", "").removesuffix("/mlflow")
    try:
        connection = psycopg2.connect(f"{server}/postgres", passfile=str(layout.password_file))
    except psycopg2.OperationalError:
        return False
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
        if not cursor.fetchone():
            cursor.execute("CREATE DATABASE mlflow")
    finally:
        connection.close()
    return True
