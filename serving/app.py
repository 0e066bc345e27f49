"""The ASGI app: routes for tiles, for MLflow's protocol, and for the state of the server.

The routes are a table, not a framework: their overhead must stay small beside decoding a tile.
"""

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving import errors, invocations, limits, multipart, payload_limits, query_options
from serving.admission import Admission
from serving.errors import DEADLINE_PASSED, INTERNAL_ERROR, RequestRejected, TileRejected
from serving.hot_swap import AliasWatcher, LoadedVersion
from serving.keys import KeyRing
from serving.limits import BytesInUse, Limits
from serving.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger(__name__)

OPENAPI = Path(__file__).with_name("openapi.yaml")
IMAGE_TYPES = ("image/jpeg", "image/png", "image/tiff", "application/octet-stream")
UNTYPED = ("application/x-www-form-urlencoded", "")
"""Media types of clients that do not set one; ``curl --data-binary`` sends the first."""
CURL_HINT = "; with curl use --data-binary, since -d changes the file"
"""Added to errors about a tile of the media type that both options of curl send."""
MULTIPART = "multipart/form-data"
LARGE_BYTES = 100_000
"""Larger bodies of MLflow's protocol are read in a thread, one at a time: they grow in memory."""
BYTES_IN_USE = "eurosat.bytes_in_use"
"""Key of a request's `BytesInUse` in its ASGI scope."""
GAUGE_INTERVAL_S = 1.0
"""Time between two updates of the gauges."""

Handler = Callable[[Request], Awaitable[Response]]


class App:
    """Answers with the version that ``watcher`` has loaded; serving/openapi.yaml has the routes."""

    def __init__(
        self, watcher: AliasWatcher, metrics: Metrics, limits: Limits, keys: KeyRing | None = None
    ) -> None:
        self.watcher, self.metrics, self.limits = watcher, metrics, limits
        self.admission = Admission(watcher, limits, keys)
        self.closing = False
        self._large_requests = asyncio.Semaphore(1)
        self._routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self.index},
            "/predict": {"POST": self.predict},
            "/predict/batch": {"POST": self.predict_batch},
            "/invocations": {"POST": self.invocations},
            "/ping": {"GET": self.mlflow_route},
            "/health": {"GET": self.mlflow_route},
            "/version": {"GET": self.mlflow_route},
            "/ready": {"GET": self.ready},
            "/model": {"GET": self.model},
            "/metrics": {"GET": self.prometheus},
            "/openapi.json": {"GET": self.openapi},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":  # websockets are closed
            await send({"type": "websocket.close", "code": 1003})
            return
        started = time.perf_counter()
        request = Request(scope, receive)
        path = scope["path"] if scope["path"] in self._routes else "other"
        in_use = BytesInUse(self.admission.bytes)
        scope[BYTES_IN_USE] = in_use
        try:
            self.admission.in_flight += 1
            try:
                response = await self._respond(request)
            except ClientDisconnect:
                return
            finally:
                self.admission.in_flight -= 1
                if extension := scope.get("extensions", {}).get("eurosat"):
                    extension["on_answered"]()
            self.metrics.record_request(path, response.status_code, time.perf_counter() - started)
            in_use.add(len(response.body))
            await response(scope, receive, send)
        finally:
            in_use.release()

    async def _respond(self, request: Request) -> Response:
        """Return the answer of the route; every error becomes a response."""
        try:
            methods = self._routes.get(request.scope["path"])
            if methods is None:
                raise RequestRejected(404, "no such path: GET /openapi.json lists the paths")
            handler = methods.get(request.scope["method"])
            if handler is None:
                allowed = ", ".join(methods)
                raise RequestRejected(405, f"this path takes {allowed}", {"Allow": allowed})
            if "POST" in methods or handler == self.model:
                self.admission.check_key(request)
            return await handler(request)
        except RequestRejected as error:
            return errors.response(error.status, str(error), error.headers)
        except ClientDisconnect:
            raise
        except Exception:
            log.exception("a request failed")
            return errors.response(500, INTERNAL_ERROR)

    async def predict(self, request: Request) -> Response:
        """Predict one tile: the body itself, or the one file of a multipart form."""
        self.admission.admit()
        deadline = limits.deadline(request, self.limits)
        media_type = _media_type(request)
        if media_type in IMAGE_TYPES or media_type in UNTYPED:
            images = [await self._read_body(request)]
        elif media_type == MULTIPART:
            images = await self._read_multipart(request, 1)
        else:
            kinds = ", ".join(IMAGE_TYPES)
            raise RequestRejected(415, f"send an image as {kinds} or {MULTIPART}")
        try:
            (prediction,) = await self._predict_images(request, images, deadline)
        except TileRejected as error:
            if media_type == UNTYPED[0]:
                raise RequestRejected(error.status, f"{error}{CURL_HINT}") from error
            raise
        return _json(prediction)

    async def predict_batch(self, request: Request) -> Response:
        """Predict the files of a multipart form, or of JSON ``{"images": [base64, ...]}``."""
        self.admission.admit()
        deadline = limits.deadline(request, self.limits)
        media_type = _media_type(request)
        if media_type == MULTIPART:
            images = await self._read_multipart(request, self.limits.tiles)
        elif media_type == "application/json":
            body = await self._read_body(request)
            images = _decode_json_images(body, self.limits.tiles)
        else:
            raise RequestRejected(415, f"send files as {MULTIPART}, or base64 as application/json")
        predictions = await self._predict_images(request, images, deadline)
        return _json({"predictions": predictions})

    async def _read_body(self, request: Request) -> bytes:
        return await limits.read_body(request, self.limits, request.scope[BYTES_IN_USE])

    async def _read_multipart(self, request: Request, max_files: int) -> list[bytes]:
        """Return the files of a multipart form, 1 to ``max_files``."""
        body = await self._read_body(request)
        try:
            files = multipart.read_files(request.headers["content-type"], body)
        except multipart.MalformedForm as error:
            message = f"the form cannot be read ({error}): send {MULTIPART}"
            raise RequestRejected(400, message) from error
        _check_count(len(files), max_files, "files in a form")
        return files

    async def _predict_images(
        self, request: Request, images: Sequence[bytes], deadline: float
    ) -> list[dict[str, Any]]:
        with self.admission.admit() as version:  # again, as reading a body takes time
            try:
                options = version.classifier.parse_options(
                    query_options.parse(request.query_params)
                )
            except ValueError as error:
                raise RequestRejected(422, str(error)) from error
            futures = version.submit(images, options, deadline)
            results = await asyncio.gather(*futures, return_exceptions=True)
            predictions = [
                _unwrap(result, number, len(results)) for number, result in enumerate(results)
            ]
            for prediction in predictions:
                self.metrics.record_tile(version.version, prediction["label"])
            return predictions

    async def invocations(self, request: Request) -> Response:
        """Answer MLflow's protocol by MLflow's own app; only its errors are translated."""
        self.admission.admit()
        if _media_type(request) == invocations.PARQUET:
            raise RequestRejected(415, invocations.WRONG_MEDIA_TYPE)
        deadline = limits.deadline(request, self.limits)
        body = await self._read_body(request)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                if len(body) <= LARGE_BYTES:
                    payload_limits.check(_media_type(request), body)
                    return await self._forward_to_mlflow(request, body)
                # shielded: when the client gives up it goes on, so that no second one starts
                return await asyncio.shield(asyncio.create_task(self._forward_large(request, body)))
        except TimeoutError as error:
            raise RequestRejected(429, DEADLINE_PASSED) from error

    async def _forward_large(self, request: Request, body: bytes) -> Response:
        in_use = BytesInUse(self.admission.bytes)
        in_use.add(len(body))  # a second time, as it is parsed, and maybe after the client has gone
        try:
            return await self._forward_in_turn(request, body)
        finally:
            in_use.release()

    async def _forward_in_turn(self, request: Request, body: bytes) -> Response:
        async with self._large_requests:
            try:
                await asyncio.to_thread(payload_limits.check, _media_type(request), body)
                return await self._forward_to_mlflow(request, body)
            except RequestRejected as error:  # caught here, as the client may have gone
                return errors.response(error.status, str(error), error.headers)

    async def _forward_to_mlflow(self, request: Request, body: bytes) -> Response:
        with self.admission.admit() as version:
            return await invocations.forward(version, request.scope, body)

    async def mlflow_route(self, request: Request) -> Response:
        return await invocations.forward(self.admission.current_version(), request.scope, b"")

    async def ready(self, request: Request) -> Response:
        if self.closing:
            raise RequestRejected(503, "this server is shutting down")
        return _json({"ready": True, "model_version": self.admission.current_version().version})

    async def model(self, request: Request) -> Response:
        """Return the provenance of the current version, and the versions that were refused."""
        return _json(_describe(self.watcher, self.admission.current_version()))

    async def prometheus(self, request: Request) -> Response:
        self._update_gauges()
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def _update_gauges(self) -> None:
        admission = self.admission
        self.metrics.set_gauges(admission.num_waiting(), admission.in_flight, admission.bytes.used)

    async def _update_gauges_forever(self) -> None:
        """Keep this process's gauges recent: /metrics may be answered by another process."""
        while True:
            self._update_gauges()
            await asyncio.sleep(GAUGE_INTERVAL_S)

    async def index(self, request: Request) -> Response:
        """Return where to look, for a person who opens the address in a browser."""
        return _json(
            {
                "serves": self.watcher.reference,
                "predict": "curl --data-binary @tile.jpg http://HOST:PORT/predict",
                "routes": [
                    f"{method} {path}" for path, ms in self._routes.items() for method in ms
                ],
                "documentation": "/openapi.json",
            }
        )

    async def openapi(self, request: Request) -> Response:
        return _json(openapi_schema())

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Task[None]] = []
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.watcher.check_alias()
                loops = (self.watcher.watch, self._update_gauges_forever)
                tasks = [asyncio.create_task(loop()) for loop in loops]
                await send({"type": "lifespan.startup.complete"})
            else:
                self.closing = True
                for task in tasks:
                    task.cancel()
                await self.watcher.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def create_app(
    model: str,
    model_config: Mapping[str, Any],
    *,
    poll_s: float,
    limits: Limits,
    keys_file: Path | None,
    processes: int,
) -> App:
    """Return the app of one of several processes, each of which allows its share of a key's rate.

    Raises:
        ConfigError: the file of API keys cannot be read.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every bad form
    keys = KeyRing(keys_file, share=1 / processes) if keys_file else None
    metrics = Metrics()
    return App(AliasWatcher(model, model_config, poll_s, metrics), metrics, limits, keys)


def openapi_schema() -> dict[str, Any]:
    """Return the OpenAPI document of the server."""
    schema: dict[str, Any] = yaml.safe_load(OPENAPI.read_text(encoding="utf-8"))
    return schema


def _describe(watcher: AliasWatcher, version: LoadedVersion) -> dict[str, Any]:
    """Return the answer of /model."""
    classifier = version.classifier
    height, width, bands = classifier.shape_HWC
    return {
        "follows": watcher.reference,
        "uri": version.uri,
        **classifier.provenance,
        "precision": classifier.precision,
        "classes": classifier.classes,
        "tile": {"height": height, "width": width, "bands": bands},
        "views": classifier.default_views,
        "swaps": watcher.swaps,
        "refused": watcher.refused,
    }


def _media_type(request: Request) -> str:
    """Return the media type of the body, without parameters and in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unwrap(result: Any, number: int, count: int) -> dict[str, Any]:
    """Return the prediction of tile ``number`` of ``count``, or raise its error as a rejection."""
    if isinstance(result, TimeoutError):
        raise RequestRejected(429, f"{result}: the server is busy, try again") from result
    if isinstance(result, ValueError):
        message = f"row {number}: {result}" if count > 1 else str(result)
        raise TileRejected(422, message) from result
    if isinstance(result, BaseException):
        raise result
    prediction: dict[str, Any] = result
    return prediction


def _json(value: object) -> Response:
    return Response(json.dumps(value).encode(), media_type="application/json")


def _decode_json_images(body: bytes, max_images: int) -> list[bytes]:
    """Return the images of ``{"images": [base64, ...]}``, 1 to ``max_images``."""
    payload_limits.check_brackets(body)
    try:
        images = json.loads(body)["images"]
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RequestRejected(400, 'send JSON of the form {"images": ["<base64>", ...]}') from error
    _check_count(len(images), max_images, "images in one request")
    decoded = []
    for number, text in enumerate(images):
        try:
            decoded.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            message = f"row {number}: not base64: encode the bytes of the file as base64"
            raise RequestRejected(422, message) from error
    return decoded


def _check_count(count: int, maximum: int, what: str) -> None:
    if not 1 <= count <= maximum:
        status = 413 if count > maximum else 422
        raise RequestRejected(status, f"{count} {what}: send 1 to {maximum}")
