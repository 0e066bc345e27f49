"""The service behind MLflow's registry webhooks: judges new versions, and promotes on request.

It answers as soon as a delivery is stored on disk. One thread processes the stored events, and
polls the registry now and then, since MLflow drops a delivery after its fourth try.
"""

import argparse
import asyncio
import hmac
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eurosat.errors import ConfigError, EuroSATError
from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.cache import cache_root
from registry import gates, ledger, versions
from registry.approvals import APPROVAL_TAG
from registry.event_queue import EventQueue, QueuedEvent
from registry.notifications import Target, signature
from registry.worker import EVENTS, TAG_SET, Worker

log = logging.getLogger(__name__)

SECRET_VARIABLE = "MLFLOW_WEBHOOK_SECRET"  # noqa: S105 - the variable's name
"""Environment variable of the key that MLflow signs with."""
MAX_AGE_S = 300.0
"""Largest difference between MLflow's clock and ours; MLflow's retries end within seconds."""
EVENTS_METRIC = "eurosat_registry_events"
"""Metric with the number of events by state."""
MAX_BODY_BYTES = 65_536
BODY_TIMEOUT_S = 10.0
QUEUE_FOLDER = "inboxes"
"""Subfolder of the cache that holds one queue per model."""


class DeliveryRejected(EuroSATError):
    """A delivery that is not accepted; MLflow tries again only after status 429 and 5xx."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def verify_signature(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> str:
    """Return the id of a delivery that MLflow has signed within MAX_AGE_S of ``now``.

    Raises:
        DeliveryRejected: the signature is wrong or too old.
    """
    id_, timestamp = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
    received = headers.get("x-mlflow-signature", "")
    expected = signature(secret, id_, timestamp, body)
    if not id_ or not hmac.compare_digest(expected.encode(), received.encode()):
        raise DeliveryRejected(401, f"the signature does not match {SECRET_VARIABLE}")
    try:
        age_s = abs(now - float(timestamp))
    except ValueError:
        age_s = math.inf
    if not age_s <= MAX_AGE_S:
        raise DeliveryRejected(
            400, f"signed over {MAX_AGE_S:g} s ago: compare the clocks of both machines"
        )
    return id_


def parse_event(id_: str, body: bytes) -> QueuedEvent | None:
    """Return the event to queue, or None if it asks for nothing.

    Raises:
        DeliveryRejected: the body is not an event of MLflow's registry.
    """
    try:
        payload = json.loads(body)
        event, data = f"{payload['entity']}.{payload['action']}", payload["data"]
        model, version = str(data["name"]), str(data.get("version", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DeliveryRejected(400, "the body is not an event of MLflow's registry") from error
    detail = str(data.get("key" if event == TAG_SET else "alias", ""))
    if event not in EVENTS or model.endswith(ledger.ledger_name("")):
        return None
    if event == TAG_SET and detail != APPROVAL_TAG:
        return None
    return QueuedEvent(id=id_, event=event, model=model, version=version, detail=detail)


class Receiver:
    """Accepts deliveries for one registered model, and queues them."""

    def __init__(self, model: str, queue: EventQueue, secret: str) -> None:
        self._model, self._queue, self._secret = model, queue, secret

    def app(self) -> Starlette:
        routes = [
            Route("/webhook", self.receive, methods=["POST"]),
            Route("/health", self.health),
            Route("/dead", self.dead),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes)

    async def receive(self, request: Request) -> Response:
        """Queue a delivery; ``accepted`` is false for repeated and irrelevant ones."""
        try:
            body = await self._read_body(request)
            id_ = verify_signature(self._secret, request.headers, body, time.time())
            event = parse_event(id_, body)
        except DeliveryRejected as rejected:
            log.warning("rejected a delivery: %s", rejected)
            return JSONResponse({"message": str(rejected)}, rejected.status)
        if event is None or event.model != self._model:
            return JSONResponse({"accepted": False})
        return JSONResponse({"accepted": self._queue.accept(event)})

    async def _read_body(self, request: Request) -> bytes:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise DeliveryRejected(
                            413, f"the body is over {MAX_BODY_BYTES} bytes: MLflow's are smaller"
                        )
                    chunks.append(chunk)
        except TimeoutError as error:
            raise DeliveryRejected(
                408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            ) from error
        return b"".join(chunks)

    async def health(self, _: Request) -> Response:
        return JSONResponse(self._queue.counts())

    async def metrics(self, _: Request) -> Response:
        """Return the number of events in each state, for Prometheus."""
        registry = CollectorRegistry()
        gauge = Gauge(
            EVENTS_METRIC,
            "Events of the registry by state",
            ["state"],
            registry=registry,
        )
        for state, count in self._queue.counts().items():
            gauge.labels(state).set(count)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def dead(self, _: Request) -> Response:
        return JSONResponse(dead_events(self._queue))


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    logs.setup(args.log_level)
    file = args.queue or cache_root() / QUEUE_FOLDER / f"{args.model}.db"
    queue = EventQueue(file)
    try:
        if args.dead or args.retry_dead:
            return _print_dead(queue, retry=args.retry_dead)
        with _exclusive(file):
            return _serve(args, queue)
    finally:
        queue.close()


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("registry.receiver", "Answer MLflow's registry webhooks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5002)
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument(
        "--promote", action="store_true", help="make a version that passes every gate champion"
    )
    parser.add_argument(
        "--gates", type=Path, default=gates.default_file(), help="TOML, one table per gate"
    )
    parser.add_argument(
        "--serving", metavar="URL", help="roll back a champion that this server cannot load"
    )
    parser.add_argument(
        "--notify",
        action="append",
        default=[],
        metavar="URL|github:OWNER/REPO",
        help="send each new ledger entry there; may be repeated",
    )
    parser.add_argument(
        "--queue", type=Path, metavar="FILE", help="event queue; default: in the cache, by model"
    )
    parser.add_argument("--dead", action="store_true", help="list events that were given up; exit")
    parser.add_argument("--retry-dead", action="store_true", help="list and retry them; exit")
    return parser


def _serve(args: argparse.Namespace, queue: EventQueue) -> int:
    import uvicorn

    receiver = Receiver(args.model, queue, webhook_secret())
    gates.load(args.gates)  # a faulty file is refused now, not with the first version
    worker = Worker(
        args.model,
        queue,
        promotes=args.promote,
        serving=args.serving,
        gates_file=args.gates,
        targets=[Target(address=address) for address in args.notify],
    )
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        raise ConfigError(
            f"port {args.port} of {args.host}: {error.strerror}; choose another --host or --port"
        ) from error
    thread = threading.Thread(target=worker.run, name="worker")
    thread.start()
    try:
        log.info("answering webhooks at http://%s:%d/webhook", args.host, args.port)
        config = uvicorn.Config(
            receiver.app(), log_config=None, access_log=False, server_header=False
        )
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        worker.stop()
        thread.join()
        listener.close()
    return exit_codes.OK


@contextmanager
def _exclusive(file: Path) -> Iterator[None]:
    """Lock the queue, since only one receiver may process it.

    Raises:
        ConfigError: another receiver holds the lock.
    """
    lock = FileLock(f"{file}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"another receiver works on {file}: stop it, or choose another file with --queue"
        ) from error
    try:
        yield
    finally:
        lock.release()


def webhook_secret() -> str:
    """Return the key that MLflow signs with.

    Raises:
        ConfigError: the environment variable is not set.
    """
    if not (secret := os.environ.get(SECRET_VARIABLE)):
        raise ConfigError(
            f"{SECRET_VARIABLE} is not set: set it to the same value for the receiver and for "
            "`registry.webhooks install`; `openssl rand -hex 32` makes one"
        )
    return secret


def dead_events(queue: EventQueue) -> list[dict[str, str]]:
    """Return the events that were given up, and why."""
    return [
        {"id": event.id, "event": event.event, "version": event.version, "why": event.message}
        for event in queue.dead()
    ]


def _print_dead(queue: EventQueue, *, retry: bool) -> int:
    print(json.dumps(dead_events(queue), indent=1))
    if retry:
        print(f"{queue.retry_dead()} will be tried again")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
