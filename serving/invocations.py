"""MLflow's own scoring app, which is asked what the model can answer, and not quoted."""

import json
import logging

from starlette.responses import Response
from starlette.types import Message, Scope

from serving.errors import FAULT, TOO_LATE, Refused
from serving.hot_swap import Live
from serving.payload_limits import NOT_THE_PROTOCOL

log = logging.getLogger(__name__)

PARQUET = "application/vnd.apache.parquet"
"""MLflow reads it, and what it unpacks to cannot be told before."""
ANOTHER_KIND = "send application/json or text/csv"
MISREAD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What MLflow's app lets through when it reads a body that is none of its protocol."""


async def of_mlflow(live: Live, scope: Scope, body: bytes) -> Response:
    """The answer of MLflow's app; its refusals quote the request, so they are told anew."""
    status, kind, parts = 500, "application/json", []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, kind
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = dict(message.get("headers", ()))
            kind = headers.get(b"content-type", b"application/json").decode("latin-1")
        else:
            parts.append(message.get("body", b""))

    own = {key: scope[key] for key in ("type", "asgi", "http_version", "method", "path")}
    own |= {key: scope[key] for key in ("raw_path", "query_string", "root_path", "scheme")}
    own |= {"headers": scope["headers"], "server": scope["server"], "client": scope["client"]}
    try:
        await live.app(own, receive, send)
    except MISREAD as error:  # `predict` lets none through: see its faults in serving/pyfunc.py
        raise Refused(400, NOT_THE_PROTOCOL) from error
    answer = b"".join(parts)
    if status < 400:
        return Response(answer, status, media_type=kind)
    raise _retold(status, answer)


def _retold(status: int, answer: bytes) -> Refused:
    """Why ``predict`` refused; all else that MLflow says may hold what was sent."""
    if status == 504:  # MLflow's own deadline, where it is before ours
        return Refused(429, TOO_LATE)
    if status >= 500:
        log.error("MLflow's app answered %d", status)
        return Refused(500, FAULT)
    if status == 415:
        return Refused(415, ANOTHER_KIND)
    try:
        return Refused(422, str(json.loads(answer)["reason"]))
    except (ValueError, TypeError, KeyError):
        return Refused(400, NOT_THE_PROTOCOL)
