"""The webhook receiver and the MLflow server that delivers to it."""

import base64
import contextlib
import hashlib
import hmac
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from cryptography.fernet import Fernet

from registry import receiver
from tests.support.mlflow_server import mlflow_server
from tests.support.paths import ROOT
from tests.support.serving import until

SECRET = "shared by MLflow and the receiver"
MODEL = "eurosat"
WAIT_S = 60.0


def signature_headers(
    payload: bytes, id_: str = "d1", age_s: float = 0, key: str = SECRET
) -> dict[str, str]:
    """Sign a delivery as MLflow does, ``age_s`` seconds ago."""
    timestamp = str(int(time.time() - age_s))
    message = f"{id_}.{timestamp}.".encode() + payload
    digest = hmac.new(key.encode(), message, hashlib.sha256).digest()
    return {
        "x-mlflow-delivery-id": id_,
        "x-mlflow-timestamp": timestamp,
        "x-mlflow-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


@dataclass
class ReceiverProcess:
    """A process of `python -m registry.receiver` that tests start, kill and stop."""

    folder: Path
    port: int
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *flags: str) -> None:
        command = [sys.executable, "-m", "registry.receiver", "--port", str(self.port)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (self.folder / "receiver.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--queue", str(self.folder / "queue.db"), *flags],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": path},
            )
        until(lambda: bool(self.counts()), WAIT_S, "a receiver that answers")

    def counts(self) -> dict[str, int]:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "receiver.log").read_text()[-2000:]
        with contextlib.suppress(requests.RequestException):
            counts: dict[str, int] = requests.get(f"{self.url}/health", timeout=5).json()
            return counts
        return {}

    def send(self, payload: bytes, id_: str) -> requests.Response:
        return requests.post(
            f"{self.url}/webhook", payload, headers=signature_headers(payload, id_), timeout=10
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=30)

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=30)


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
