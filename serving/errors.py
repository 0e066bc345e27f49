"""What a server of ours says when it does not answer: one JSON shape, that of MLflow's protocol."""

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
"""By HTTP status."""
AGAIN = (429, 503)
"""Those that a client may try again."""
FAULT = "a fault of this server's: its log tells more"
TOO_LATE = "the time allowed has passed: this server is busy"


class Refused(EuroSATError):
    """A request that is not answered, and why; the message never quotes what was sent."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def body(status: int, message: str) -> bytes:
    return json.dumps({"error_code": CODES[status], "message": message}).encode()


def response(status: int, message: str, more: Mapping[str, str] | None = None) -> Response:
    headers = dict(more or {})
    if status in AGAIN:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body(status, message), status, headers, "application/json")
