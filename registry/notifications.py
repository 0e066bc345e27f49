"""Notify others of a new champion: a signed webhook, or GitHub's repository_dispatch."""

import base64
import hashlib
import hmac
import json
import os
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests

from eurosat.errors import ConfigError, TrackingError
from registry.ledger import LedgerEntry

SECRET_VARIABLE = "EUROSAT_WEBHOOK_SECRET"  # noqa: S105 - the variable's name
"""Environment variable of the key that signs our own webhooks."""
TOKEN_VARIABLE = "GITHUB_TOKEN"  # noqa: S105 - the variable's name
GITHUB_API_VARIABLE = "GITHUB_API_URL"
DISPATCH_EVENT = "eurosat-champion"
TIMEOUT_S = 10

Payload = dict[str, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An address to notify: a URL, or github:OWNER/REPO."""

    address: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.address.partition(":")
        if scheme == "github" and rest.count("/") == 1 and not rest.startswith("/"):
            _require(TOKEN_VARIABLE, "a token that may write contents of the repository")
        elif scheme in ("http", "https"):
            _require(SECRET_VARIABLE, "a secret that the receiver knows too")
        else:
            raise ConfigError(f"--notify takes a URL or github:OWNER/REPO; got {self.address!r}")


def notify(target: Target, model: str, entry: LedgerEntry) -> None:
    """Send the entry to the target, once.

    Raises:
        TrackingError: the target did not accept it.
    """
    payload: Payload = {
        "model": model,
        "action": entry.action,
        "version": entry.to_version,
        "previous": entry.from_version,
        "actor": entry.actor,
        "why": entry.why,
        "time": entry.time,
        "digest": entry.digest,
    }
    scheme, _, repository = target.address.partition(":")
    try:
        if scheme == "github":
            _dispatch(repository, payload)
        else:
            _post(target.address, payload, entry.digest)
    except requests.RequestException as error:
        raise TrackingError(
            f"{redact(target.address)} was not notified: {_reason(error)}"
        ) from error


def redact(address: str) -> str:
    """Return the address without the parts of a URL that may be secret: user and path."""
    if address.startswith("github:"):
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def signature(secret: str, id_: str, timestamp: str, body: bytes) -> str:
    """Sign id, time and body as MLflow does: HMAC-SHA256 in base64."""
    message = f"{id_}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), message, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _post(url: str, payload: Payload, id_: str) -> None:
    body, timestamp = json.dumps(payload, sort_keys=True).encode(), str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-EuroSAT-Delivery-Id": id_,
        "X-EuroSAT-Timestamp": timestamp,
        "X-EuroSAT-Signature": signature(os.environ[SECRET_VARIABLE], id_, timestamp, body),
    }
    response = requests.post(url, body, headers=headers, timeout=TIMEOUT_S, allow_redirects=False)
    response.raise_for_status()


def _dispatch(repository: str, payload: Payload) -> None:
    api = os.environ.get(GITHUB_API_VARIABLE, "https://api.github.com")
    response = requests.post(
        f"{api}/repos/{repository}/dispatches",
        json={"event_type": DISPATCH_EVENT, "client_payload": payload},
        headers={
            "Authorization": f"Bearer {os.environ[TOKEN_VARIABLE]}",
            "Accept": "application/vnd.github+json",
        },
        timeout=TIMEOUT_S,
        allow_redirects=False,
    )
    response.raise_for_status()


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"status {error.response.status_code}"
    return type(error).__name__


def _require(variable: str, content: str) -> None:
    if not os.environ.get(variable):
        raise ConfigError(f"{variable} is not set: set it to {content}")
