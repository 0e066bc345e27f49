"""Error responses of every server of this project, in the one JSON shape of MLflow's protocol."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

from eurosat.errors import EuroSATError

RETRY_AFTER_S = 1
CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    411: "LENGTH_REQUIRED",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    422: "INVALID_PARAMETER_VALUE",
    429: "RESOURCE_EXHAUSTED",
    431: "HEADERS_TOO_LARGE",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
}
"""HTTP status -> error code."""
RETRYABLE = (429, 503)
"""Statuses after which a client may send the same request again."""
INTERNAL_ERROR = "internal error: see the server's log"
DEADLINE_PASSED = "the deadline has passed: the server is busy, try again"


class RequestRejected(EuroSATError):
    """A request that is answered with an error; the message never repeats the payload."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class TileRejected(RequestRejected):
    """A tile that cannot be read or used."""


def body(status: int, message: str) -> bytes:
    return json.dumps({"error_code": CODES[status], "message": message}).encode()


def response(status: int, message: str, extra: Mapping[str, str] | None = None) -> Response:
    """Return the error with the headers of its status, and ``extra`` headers."""
    headers = dict(extra or {})
    if status in RETRYABLE:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body(status, message), status, headers, "application/json")
