"""What the checks of one call share: the user's settings, and the servers that these name."""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
import urllib3

from eurosat import tracking
from eurosat.doctor.checks import Failed, NotApplicable
from eurosat.runtime import env_file

if TYPE_CHECKING:
    from requests.auth import AuthBase

    from eurosat.doctor.roundtrip import Trip

CHECKOUT = Path(__file__).resolve().parents[2]
TRACKING, PROMOTER, SERVING = "MLFLOW_TRACKING_URI", "EUROSAT_PROMOTER_URL", "EUROSAT_SERVING_URL"
CHUNK = 65_536
MARGIN_S = 1.0
"""For what is no waiting."""
MOST_BYTES = 16 * 2**20
"""Of an answer: none of those asked for has more."""
QUOTED = 200
"""Characters of what a server said."""
PLATFORM = "start the platform (`make platform`, or docker compose)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    status: int
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        return self.status == 200

    def said(self) -> str:
        """The status and the first words, for a message."""
        words = " ".join(self.body.decode("utf-8", "replace").split())[:QUOTED]
        return f"{self.status} {words}".strip()

    def json(self) -> dict[str, Any]:
        """The object that came; empty where the body is none."""
        import json

        try:
            told = json.loads(self.body)
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}


@dataclass(kw_only=True)
class Server:
    """A server that is asked by URL, each time within a bounded time."""

    name: str
    url: str
    timeout_s: float
    remedy: str
    """Where it does not answer."""
    auth: "tuple[str, str] | AuthBase | None" = field(default=None, repr=False)
    verify: bool | str = True
    """Of TLS, as requests takes it."""
    ahead_s: float | None = None
    """Its clock before ours, by the Date of its latest answer, which counts whole seconds."""

    def ask(self, method: str, path: str, *, timeout_s: float | None = None, **sent: Any) -> Answer:
        """One request, whatever the status of its answer.

        Raises:
            Failed: no whole answer within ``timeout_s``.
        """
        limit_s = timeout_s or self.timeout_s
        told: list[Answer | BaseException] = []

        def exchange() -> None:
            try:
                told.append(self._exchange(method, path, limit_s, **sent))
            except BaseException as error:  # noqa: BLE001 - it is raised below
                told.append(error)

        # Each byte of a header starts the time of a socket anew: the thread is left to its server.
        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(2 * limit_s + MARGIN_S)
        if not told:
            raise self._late(path, limit_s)
        if isinstance(told[0], BaseException):
            raise told[0]
        return told[0]

    def _late(self, path: str, limit_s: float) -> Failed:
        return Failed(f"{self.url}{path} has not answered within {limit_s:g} s", self.remedy)

    def _exchange(self, method: str, path: str, limit_s: float, **sent: Any) -> Answer:
        asked, deadline = time.time(), time.monotonic() + 2 * limit_s
        try:
            with requests.request(
                method,
                self.url + path,
                timeout=limit_s,
                stream=True,
                auth=self.auth,
                verify=self.verify,
                **sent,
            ) as response:
                self._note(response.headers.get("Date"), (asked + time.time()) / 2)
                body = b""
                while part := response.raw.read1(CHUNK, decode_content=True):  # as it comes
                    body += part
                    if time.monotonic() > deadline or len(body) > MOST_BYTES:
                        raise requests.Timeout
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError) as error:
            raise self._late(path, limit_s) from error
        except (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            ValueError,  # a URL that is none
        ) as error:
            why = tracking.first_line(error)
            if isinstance(error, requests.ConnectionError):
                why = why.rpartition(": ")[2].strip("\"')>") or why
            raise Failed(f"{self.url} cannot be asked: {why}", self.remedy) from error
        return Answer(status=response.status_code, body=body)

    def _note(self, date: str | None, ours: float) -> None:
        try:
            self.ahead_s = parsedate_to_datetime(date or "").timestamp() + 0.5 - ours
        except ValueError:
            return


class Bearer(requests.auth.AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


@dataclass(kw_only=True)
class Visit:
    """Left with ``with``: what the checks have made is removed."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    folder: Path = field(default_factory=Path.cwd)
    lock: Path = CHECKOUT / "requirements.lock"
    free_gb: float = 2.0
    """Wanted on every disk that is written to."""
    timeout_s: float = 10.0
    """Of a request."""
    known: bool = False
    """Whether the tracking server has taken our credentials."""
    user: str = ""
    """As it knows us."""
    trip: "Trip | None" = None
    left: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.left.close()

    @cached_property
    def tracking(self) -> Server:
        """As MLflow's client would ask it, its credentials from wherever that takes them.

        Raises:
            NotApplicable: runs go to a local store.
        """
        if not (uri := self.environ.get(TRACKING, "")):
            raise NotApplicable(f"{TRACKING} is not set: runs go to ./mlflow.db, without a server")
        if urlsplit(uri).scheme not in ("http", "https"):
            raise NotApplicable(f"{TRACKING}={uri} is a store without a server")
        taken = tracking.credentials()
        auth: Any = Bearer(taken.token) if taken.token else None
        if taken.username and taken.password:
            auth = (taken.username, taken.password)
        remedy = f"{PLATFORM}, or let {TRACKING} name a server that runs"
        if self.from_file:
            remedy = f"start the platform again (`make platform`), or remove {env_file.FILE}"
        return Server(
            name="tracking server",
            url=uri.rstrip("/"),
            timeout_s=self.timeout_s,
            remedy=remedy,
            auth=auth,
            verify=taken.verify,
        )

    @cached_property
    def promoter(self) -> Server:
        return self._server("promoter", PROMOTER)

    @cached_property
    def serving(self) -> Server:
        return self._server("serving", SERVING)

    def _server(self, name: str, variable: str) -> Server:
        if not (url := self.environ.get(variable)):
            raise NotApplicable(f"{variable} is not set")
        remedy = f"{PLATFORM}, or let {variable} name one that runs"
        return Server(name=name, url=url.rstrip("/"), timeout_s=self.timeout_s, remedy=remedy)

    @property
    def from_file(self) -> bool:
        """Whether there is a platform's file here, which may have outlived it."""
        return (self.folder / env_file.FILE).exists()

    def asked(self) -> list[Server]:
        """The servers that were asked so far."""
        names = ("tracking", "promoter", "serving")
        return [self.__dict__[name] for name in names if name in self.__dict__]
