"""Fixtures of the registry's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from registry import receiver
from tests.support.mlflow_server import mlflow_server
from tests.support.receiver import SECRET


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the folder of a real MLflow server that signs deliveries and sends them to loopback."""
    folder = tmp_path_factory.mktemp("receiver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
        patch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
        patch.setenv("MLFLOW_WEBHOOK_CACHE_TTL", "0")
        patch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
        patch.setenv(receiver.SECRET_VARIABLE, SECRET)
        patch.chdir(folder)
        with mlflow_server(folder) as port:
            patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            yield folder
