"""Tell others of a new champion: a signed webhook, or GitHub's repository_dispatch."""

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
from registry.ledger import Entry

VARIABLE = "EUROSAT_WEBHOOK_SECRET"
"""Holds what a webhook of ours is signed with."""
TOKEN = "GITHUB_TOKEN"  # noqa: S105 - the variable's name
GITHUB = "GITHUB_API_URL"
EVENT = "eurosat-champion"
TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where to: a URL, or github:OWNER/REPO."""

    to: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.to.partition(":")
        if scheme == "github" and rest.count("/") == 1 and not rest.startswith("/"):
            _variable(TOKEN, "a token that may write contents of the repository")
        elif scheme in ("http", "https"):
            _variable(VARIABLE, "a secret that whoever listens there knows too")
        else:
            raise ConfigError(f"--tell takes a URL or github:OWNER/REPO; got {self.to!r}")


def tell(target: Target, model: str, entry: Entry) -> None:
    """One try.

    Raises:
        TrackingError: it was not taken.
    """
    told = {
        "model": model,
        "action": entry.action,
        "version": entry.to_version,
        "previous": entry.from_version,
        "actor": entry.actor,
        "why": entry.why,
        "time": entry.time,
        "digest": entry.digest,
    }
    scheme, _, rest = target.to.partition(":")
    try:
        if scheme == "github":
            _dispatch(rest, told)
        else:
            _post(target.to, told, entry.digest)
    except requests.RequestException as error:
        raise TrackingError(f"{public(target.to)} was not told: {_reason(error)}") from error


def public(to: str) -> str:
    """Without what in a URL may be a secret: its user and its path."""
    if to.startswith("github:"):
        return to
    parts = urlsplit(to)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def signature(secret: str, id_: str, stamp: str, body: bytes) -> str:
    """As MLflow signs: of id, time and body, in base64."""
    digest = hmac.new(secret.encode(), f"{id_}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _post(url: str, told: dict[str, str | None], id_: str) -> None:
    body, stamp = json.dumps(told, sort_keys=True).encode(), str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-EuroSAT-Delivery-Id": id_,
        "X-EuroSAT-Timestamp": stamp,
        "X-EuroSAT-Signature": signature(os.environ[VARIABLE], id_, stamp, body),
    }
    requests.post(
        url, body, headers=headers, timeout=TIMEOUT_S, allow_redirects=False
    ).raise_for_status()


def _dispatch(repository: str, told: dict[str, str | None]) -> None:
    base = os.environ.get(GITHUB, "https://api.github.com")
    requests.post(
        f"{base}/repos/{repository}/dispatches",
        json={"event_type": EVENT, "client_payload": told},
        headers={
            "Authorization": f"Bearer {os.environ[TOKEN]}",
            "Accept": "application/vnd.github+json",
        },
        timeout=TIMEOUT_S,
        allow_redirects=False,
    ).raise_for_status()


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"status {error.response.status_code}"
    return type(error).__name__


def _variable(name: str, what: str) -> None:
    if not os.environ.get(name):
        raise ConfigError(f"{name} is not set: it holds {what}")
