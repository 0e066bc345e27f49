"""The ASGI app: pictures in, answers out, around MLflow's own protocol.

Its few routes are a table and not a framework: one tile must not cost more than its decoding.
"""

import asyncio
import base64
import binascii
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving import errors, limits, payload_limits
from serving.errors import FAULT, TOO_LATE, Refused
from serving.hot_swap import Follower, Live
from serving.invocations import ANOTHER_KIND, PARQUET, of_mlflow
from serving.keys import Keys
from serving.limits import Limits
from serving.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger(__name__)

OPENAPI = Path(__file__).with_name("openapi.yaml")
PICTURES = ("image/jpeg", "image/png", "image/tiff", "application/octet-stream")
UNSAID = ("application/x-www-form-urlencoded", "")
"""What `curl --data-binary @tile.jpg` says of a picture, and who says nothing."""
FORM = "multipart/form-data"
TRUTH = {"true": True, "1": True, "false": False, "0": False}
LARGE_BYTES = 100_000
"""Of MLflow's protocol: they are read in a thread, and one at a time, as they grow in memory."""
LOOK_S = 1.0
"""Between two looks at how many wait."""
FORM_PARTS = 1000
"""Of a form; one of more is not taken apart."""
PART_HEAD_BYTES = 4096
"""Of a part of a form, before its file."""
BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70})(?:[\s;]|$))', re.IGNORECASE)
A_FILE = re.compile(rb"\r\ncontent-disposition:[^\r\n]*;\s*filename\*?=", re.IGNORECASE)

Handler = Callable[[Request], Awaitable[Response]]


class App:
    """`follower`'s version answers; see serving/openapi.yaml for the routes."""

    def __init__(
        self, follower: Follower, metrics: Metrics, bounds: Limits, keys: Keys | None = None
    ) -> None:
        self.follower, self.metrics, self.limits, self.keys = follower, metrics, bounds, keys
        self.asked, self.arrived = 0, 0
        """Requests that are open, and connections whose request for tiles has arrived whole and is
        not answered; `serving.protocol` counts the latter.
        """
        self.closing = False
        self._one_large = asyncio.Semaphore(1)
        self._routes: dict[str, dict[str, Handler]] = {
            "/predict": {"POST": self.predict},
            "/predict/batch": {"POST": self.predict_batch},
            "/invocations": {"POST": self.invocations},
            "/ping": {"GET": self.mlflows_own},
            "/health": {"GET": self.mlflows_own},
            "/version": {"GET": self.mlflows_own},
            "/ready": {"GET": self.ready},
            "/model": {"GET": self.model},
            "/metrics": {"GET": self.measured},
            "/openapi.json": {"GET": self.openapi},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":  # a websocket is closed
            await send({"type": "websocket.close", "code": 1003})
            return
        started = time.perf_counter()
        request = Request(scope, receive)
        path = scope["path"] if scope["path"] in self._routes else "other"
        self.asked += 1
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            return
        finally:
            self.asked -= 1
            if told := scope.get("extensions", {}).get("answered"):
                told["tell"]()
        self.metrics.request(path, response.status_code, time.perf_counter() - started)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            methods = self._routes.get(request.scope["path"])
            if methods is None:
                raise Refused(404, "no such path: GET /openapi.json tells those that there are")
            handler = methods.get(request.scope["method"])
            if handler is None:
                allowed = ", ".join(methods)
                raise Refused(405, f"this path takes {allowed}", {"Allow": allowed})
            if ("POST" in methods or handler == self.model) and self.keys is not None:
                self.keys.admit(request.headers)
            return await handler(request)
        except Refused as refused:
            return errors.response(refused.status, str(refused), refused.headers)
        except ClientDisconnect:
            raise
        except Exception:
            log.exception("a request failed")
            return errors.response(500, FAULT)

    def _live(self) -> Live:
        """The version that answers; raises Refused while there is none."""
        if self.follower.live is None:
            raise Refused(503, f"no version of {self.follower.reference} is loaded yet")
        return self.follower.live

    def _admit(self) -> Live:
        """The version that answers, if there is room for another request.

        Raises:
            Refused: none is loaded, or too many are waiting.
        """
        live = self._live()
        if len(live.waiting) >= self.limits.queue or self.asked > self.limits.requests:
            raise Refused(429, self._how_crowded())
        return live

    def crowded(self) -> str:
        """Why a request for tiles need not be read; empty where it is to be.

        Tiles may be on their way to the queue: those whose request has arrived count, and those
        whose client takes its time do not.
        """
        live = self.follower.live
        if live is None:
            return ""
        return self._how_crowded() if live.is_full(self.limits.queue, self.arrived) else ""

    def _how_crowded(self) -> str:
        waiting = len(self.follower.live.waiting) if self.follower.live else 0
        return f"{waiting} tiles wait and {self.asked} requests are open: wait"

    async def predict(self, request: Request) -> Response:
        """One tile: the body itself, or the one file of a form."""
        self._admit()
        deadline = limits.deadline(request, self.limits)
        kind = _kind(request)
        if kind in PICTURES or kind in UNSAID:
            pictures = [await limits.read_body(request, self.limits)]
        elif kind == FORM:
            pictures = await self._form(request, 1)
        else:
            raise Refused(415, f"send a picture as {', '.join(PICTURES)} or as {FORM}")
        (answer,) = await self._ask(request, pictures, deadline)
        return _json(answer)

    async def predict_batch(self, request: Request) -> Response:
        """Several: the files of a form, or JSON of ``{"images": [base64, ...]}``."""
        self._admit()
        deadline = limits.deadline(request, self.limits)
        kind = _kind(request)
        if kind == FORM:
            pictures = await self._form(request, self.limits.tiles)
        elif kind == "application/json":
            pictures = _decoded(await limits.read_body(request, self.limits), self.limits.tiles)
        else:
            raise Refused(415, f"send files as {FORM}, or application/json of images in base64")
        answers = await self._ask(request, pictures, deadline)
        return _json({"predictions": answers})

    async def _form(self, request: Request, most: int) -> list[bytes]:
        """The files of a form."""
        boundary = BOUNDARY.search(request.headers["content-type"])
        whole = await limits.read_body(request, self.limits)
        try:
            if boundary is None:
                raise ValueError("no boundary, or one that is longer than RFC 2046 has it")
            files = _files(whole, (boundary[1] or boundary[2]).encode("latin-1"))
        except ValueError as error:
            raise Refused(
                400, f"the form cannot be taken apart ({error}): send multipart/form-data"
            ) from error
        if not 1 <= len(files) <= most:
            status = 413 if len(files) > most else 422
            raise Refused(status, f"a form of {len(files)} files: send 1 to {most}")
        return files

    async def _ask(
        self, request: Request, pictures: Sequence[bytes], deadline: float
    ) -> list[dict[str, Any]]:
        with self._admit() as live:  # asked anew: reading a body takes its time
            try:
                wish = live.classifier.wish(_params(request.query_params))
            except ValueError as error:
                raise Refused(422, str(error)) from error
            told = await asyncio.gather(*live.ask(pictures, wish, deadline), return_exceptions=True)
            answers = [_said(one, number, len(told)) for number, one in enumerate(told)]
            for answer in answers:
                self.metrics.tile(live.version, answer["label"])
            return answers

    async def invocations(self, request: Request) -> Response:
        """MLflow's protocol, by MLflow's own app; only what it refuses is told in our shape."""
        self._admit()
        if _kind(request) == PARQUET:
            raise Refused(415, ANOTHER_KIND)
        deadline = limits.deadline(request, self.limits)
        whole = await limits.read_body(request, self.limits)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                if len(whole) <= LARGE_BYTES:
                    payload_limits.check(_kind(request), whole)
                    return await self._of_mlflow(request, whole)
                # which goes on when the client has given up: no other is begun beside it
                return await asyncio.shield(asyncio.create_task(self._large(request, whole)))
        except TimeoutError as error:
            raise Refused(429, TOO_LATE) from error

    async def _large(self, request: Request, whole: bytes) -> Response:
        async with self._one_large:
            try:
                await asyncio.to_thread(payload_limits.check, _kind(request), whole)
                return await self._of_mlflow(request, whole)
            except Refused as refused:  # perhaps nobody waits for it any more
                return errors.response(refused.status, str(refused), refused.headers)

    async def _of_mlflow(self, request: Request, whole: bytes) -> Response:
        with self._admit() as live:
            return await of_mlflow(live, request.scope, whole)

    async def mlflows_own(self, request: Request) -> Response:
        return await of_mlflow(self._live(), request.scope, b"")

    async def ready(self, request: Request) -> Response:
        if self.closing:
            raise Refused(503, "this server is shutting down")
        return _json({"ready": True, "model_version": self._live().version})

    async def model(self, request: Request) -> Response:
        """Where the version that answers is from, and which were refused."""
        live = self._live()
        classifier = live.classifier
        height, width, bands = classifier.shape_HWC
        return _json(
            {
                "follows": self.follower.reference,
                "uri": live.uri,
                **classifier.provenance,
                "form": classifier.form,
                "classes": classifier.classes,
                "tile": {"height": height, "width": width, "bands": bands},
                "views": classifier.judged_views,
                "swaps": self.follower.swaps,
                "refused": self.follower.refused,
            }
        )

    async def measured(self, request: Request) -> Response:
        self._look()
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def _look(self) -> None:
        live = self.follower.live
        self.metrics.at_present(len(live.waiting) if live else 0, self.asked)

    async def _look_on(self) -> None:
        """Another process of this server may be the one that tells."""
        while True:
            self._look()
            await asyncio.sleep(LOOK_S)

    async def openapi(self, request: Request) -> Response:
        return _json(document())

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Task[None]] = []
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.follower.step()
                tasks = [
                    asyncio.create_task(each()) for each in (self.follower.follow, self._look_on)
                ]
                await send({"type": "lifespan.startup.complete"})
            else:
                self.closing = True
                for task in tasks:
                    task.cancel()
                await self.follower.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def _kind(request: Request) -> str:
    """The media type of its body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _said(told: Any, number: int, count: int) -> dict[str, Any]:
    """The answer to a tile; raises what came instead."""
    if isinstance(told, TimeoutError):
        raise Refused(429, f"{told}: this server is busy, try again") from told
    if isinstance(told, ValueError):
        raise Refused(422, f"row {number}: {told}" if count > 1 else str(told)) from told
    if isinstance(told, BaseException):
        raise told
    answer: dict[str, Any] = told
    return answer


def document() -> dict[str, Any]:
    """What the server offers, as OpenAPI."""
    told: dict[str, Any] = yaml.safe_load(OPENAPI.read_text(encoding="utf-8"))
    return told


def _json(value: object) -> Response:
    return Response(json.dumps(value).encode(), media_type="application/json")


def _params(query: Mapping[str, str]) -> dict[str, Any]:
    """Parameters of a tile's answer, from the query.

    Raises:
        Refused: one is unknown, or not of its type.
    """
    told: dict[str, Any] = {}
    for name, text in query.items():
        if name == "top_k" and text.isascii() and text.isdecimal() and len(text) < 10:
            told[name] = int(text)
        elif name in ("tta", "explain") and text.lower() in TRUTH:
            told[name] = TRUTH[text.lower()]
        else:
            raise Refused(422, "the query takes top_k=NUMBER, tta=true|false, explain=true|false")
    return told


def _decoded(body: bytes, most: int) -> list[bytes]:
    """The pictures of ``{"images": [base64, ...]}``."""
    payload_limits.check_brackets(body)
    try:
        images = json.loads(body)["images"]
        if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(400, 'send JSON of the form {"images": ["<base64>", ...]}') from error
    if not 1 <= len(images) <= most:
        status = 413 if len(images) > most else 422
        raise Refused(status, f"{len(images)} images in one request: send 1 to {most}")
    pictures = []
    for number, text in enumerate(images):
        try:
            pictures.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refused(422, f"row {number}: not base64: send the file's bytes so") from error
    return pictures


def _files(whole: bytes, boundary: bytes) -> list[bytes]:
    """The files of a form (RFC 7578), which is here as a whole and so only has to be cut.

    Raises:
        ValueError: it is none; the message does not quote it.
    """
    _, *parts = (b"\r\n" + whole).split(b"\r\n--" + boundary, FORM_PARTS + 1)
    if len(parts) > FORM_PARTS:
        raise ValueError(f"over {FORM_PARTS} parts")
    if not parts or not parts.pop().startswith(b"--"):
        raise ValueError("its end is missing")
    files = []
    for part in parts:
        end = part.find(b"\r\n\r\n", 0, PART_HEAD_BYTES)
        if end < 0 or not part.startswith(b"\r\n"):
            raise ValueError("a part without a head")
        if A_FILE.search(part, 0, end):
            files.append(part[end + 4 :])
    return files
