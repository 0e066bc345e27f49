"""HTTP requests to the platform's servers, each within a bounded time."""

import json
import threading
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import requests
import urllib3

from eurosat import tracking
from eurosat.doctor.findings import Failed

if TYPE_CHECKING:
    from requests.auth import AuthBase

CHUNK_BYTES = 65_536
MARGIN_S = 1.0
"""Time allowed for the work around the waiting."""
MAX_BODY_BYTES = 16 * 2**20
"""Limit of a response; all that the checks request are smaller."""
MAX_QUOTED_CHARS = 200
"""Limit of the part of a response that a message quotes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A complete HTTP response."""

    status: int
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        return self.status == 200

    def summary(self) -> str:
        """Return the status and the first words of the body, for an error message."""
        words = " ".join(self.body.decode("utf-8", "replace").split())[:MAX_QUOTED_CHARS]
        return f"{self.status} {words}".strip()

    def json(self) -> dict[str, Any]:
        """Return the JSON object in the body, or an empty one if the body is anything else."""
        try:
            payload = json.loads(self.body)
        except ValueError:
            return {}
        return payload if isinstance(payload, dict) else {}


@dataclass(kw_only=True)
class HttpProbe:
    """A server that is contacted by URL, each time within a bounded time."""

    name: str
    url: str
    timeout_s: float
    remedy: str
    """What to do if the server does not answer."""
    auth: "tuple[str, str] | AuthBase | None" = field(default=None, repr=False)
    verify: bool | str = True
    """TLS verification or the path of a certificate, as requests takes it."""
    clock_offset_s: float | None = None
    """Server's clock minus ours, from the Date header of the latest answer (whole seconds)."""

    def request(
        self, method: str, path: str, *, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """Send one request and return the answer, whatever its status.

        ``options`` go to ``requests.request``.

        Raises:
            Failed: the answer was not complete after about twice ``timeout_s``.
        """
        limit_s = timeout_s or self.timeout_s
        results: list[Answer | BaseException] = []

        def exchange() -> None:
            try:
                results.append(self._exchange(method, path, limit_s, **options))
            except BaseException as error:  # noqa: BLE001 - it is raised below
                results.append(error)

        # A server that sends one byte at a time resets the socket's timeout with each of them.
        # So the request runs in a thread of its own, which we abandon when the time is over.
        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(2 * limit_s + MARGIN_S)
        if not results:
            raise self._timed_out(path, limit_s)
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    def _timed_out(self, path: str, limit_s: float) -> Failed:
        return Failed(f"{self.url}{path} has not answered within {limit_s:g} s", self.remedy)

    def _exchange(self, method: str, path: str, limit_s: float, **options: Any) -> Answer:
        sent_at, deadline = time.time(), time.monotonic() + 2 * limit_s
        options |= {"auth": self.auth, "verify": self.verify, "stream": True}
        url = self.url + path
        try:
            with requests.request(method, url, timeout=limit_s, **options) as response:
                self._update_clock_offset(response.headers.get("Date"), (sent_at + time.time()) / 2)
                body = b""
                while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
                    body += chunk
                    if time.monotonic() > deadline or len(body) > MAX_BODY_BYTES:
                        raise requests.Timeout
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError) as error:
            raise self._timed_out(path, limit_s) from error
        except (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            ValueError,  # the URL is malformed
        ) as error:
            reason = tracking.first_line(error)
            if isinstance(error, requests.ConnectionError):
                reason = reason.rpartition(": ")[2].strip("\"')>") or reason
            raise Failed(f"{self.url} cannot be reached: {reason}", self.remedy) from error
        return Answer(status=response.status_code, body=body)

    def _update_clock_offset(self, date: str | None, our_time: float) -> None:
        try:
            self.clock_offset_s = parsedate_to_datetime(date or "").timestamp() + 0.5 - our_time
        except ValueError:
            return


class Bearer(requests.auth.AuthBase):
    """Authenticate with a token, as MLFLOW_TRACKING_TOKEN gives it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request
