"""A process of the webhook receiver, and deliveries signed as MLflow signs them."""

import base64
import contextlib
import hashlib
import hmac
import time
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.support.processes import CommandProcess, start
from tests.support.serving import until

SECRET = "shared by MLflow and the receiver"
MODEL = "eurosat"
WAIT_S = 180.0
"""Time for a receiver that was just started, and imports MLflow, to judge on a busy machine."""


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
    process: CommandProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *flags: str) -> None:
        command = ["registry.receiver", "--port", str(self.port)]
        command += ["--queue", str(self.folder / "queue.db"), *flags]
        self.process = start(*command, folder=self.folder, log=self.folder / "receiver.log")
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
