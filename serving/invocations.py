"""Forward requests to MLflow's own scoring app, and translate its errors into our JSON shape."""

import json
import logging

from starlette.responses import Response
from starlette.types import Message, Scope

from serving.errors import DEADLINE_PASSED, INTERNAL_ERROR, RequestRejected
from serving.hot_swap import LoadedVersion
from serving.payload_limits import NOT_MLFLOW_PROTOCOL

log = logging.getLogger(__name__)

PARQUET = "application/vnd.apache.parquet"
"""MLflow reads it too, but its unpacked size is unknown before it is unpacked."""
WRONG_MEDIA_TYPE = "send application/json or text/csv"
PARSE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Exceptions that escape MLflow's app when it reads a body that is not of its protocol."""
COPIED = (
    "type",
    "asgi",
    "http_version",
    "method",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "scheme",
    "headers",
    "server",
    "client",
)
"""Keys of the ASGI scope that MLflow's app gets."""


async def forward(version: LoadedVersion, scope: Scope, body: bytes) -> Response:
    """Return the answer of MLflow's app.

    Raises:
        RequestRejected: MLflow's app answered with an error, which may repeat the request.
    """
    status, media_type, chunks = 500, "application/json", []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, media_type
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = dict(message.get("headers", ()))
            media_type = headers.get(b"content-type", b"application/json").decode("latin-1")
        else:
            chunks.append(message.get("body", b""))

    try:
        await version.app({key: scope[key] for key in COPIED}, receive, send)
    except PARSE_ERRORS as error:  # `predict` raises MlflowException alone: see serving/pyfunc.py
        raise RequestRejected(400, NOT_MLFLOW_PROTOCOL) from error
    answer = b"".join(chunks)
    if status < 400:
        return Response(answer, status, media_type=media_type)
    raise _translate_error(status, answer)


def _translate_error(status: int, answer: bytes) -> RequestRejected:
    """Return the ``reason`` that `predict` gave; any other text may repeat the request."""
    if status == 504:  # MLflow's own deadline passed before ours
        return RequestRejected(429, DEADLINE_PASSED)
    if status >= 500:
        log.error("MLflow's app answered %d", status)
        return RequestRejected(500, INTERNAL_ERROR)
    if status == 415:
        return RequestRejected(415, WRONG_MEDIA_TYPE)
    try:
        return RequestRejected(422, str(json.loads(answer)["reason"]))
    except (ValueError, TypeError, KeyError):
        return RequestRejected(400, NOT_MLFLOW_PROTOCOL)
