"""The services of the platform without containers, in the order in which they start."""

import contextlib
import logging
import sys
from functools import partial
from urllib.parse import urlsplit

from deploy import postgresql
from deploy.layout import ARTIFACTS_URL, BUCKET, Layout
from deploy.service import PARENT_DEATH_SIGNAL, Service, is_healthy, object_store_command

log = logging.getLogger(__name__)

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
        healthy=partial(_has_database, layout),
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


def _has_database(layout: Layout) -> bool:
    """Return whether PostgreSQL answers, and warn if MLflow's account is a superuser."""
    import psycopg2

    uri = layout.database.replace("+psycopg2", "")
    try:
        connection = psycopg2.connect(uri, passfile=str(layout.password_file))
    except psycopg2.OperationalError:
        return False
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        if cursor.fetchone() == (True,):
            log.warning(
                "MLflow's account is a superuser of PostgreSQL, as %s is of an earlier release: "
                "docs/platform.md says how to change it",
                layout.folder / "postgres",
            )
    return True
