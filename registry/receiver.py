"""The service behind MLflow's registry webhooks: judges what is registered, and keeps order.

It answers as soon as a delivery is on disk; a thread works them off, one at a time, and looks
at the registry itself now and then, as MLflow drops a delivery after its fourth try.
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
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eurosat.errors import ConfigError, EuroSATError
from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.cache import cache_root
from registry import gates, ledger, versions
from registry.approvals import APPROVAL
from registry.event_queue import Inbox, Job
from registry.notifications import Target, signature
from registry.worker import EVENTS, SAID, Worker

log = logging.getLogger(__name__)

VARIABLE = "MLFLOW_WEBHOOK_SECRET"
"""Holds what MLflow signs with."""
FRESH_S = 300.0
"""Between MLflow's clock and ours; its tries of one delivery are over within seconds."""
MOST_BYTES = 65_536
BODY_S = 10.0
"""For a delivery to arrive whole."""


class Refused(EuroSATError):
    """A delivery that is not taken; MLflow tries again after 429 and 5xx alone."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def check(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> str:
    """The delivery's id, if MLflow has signed it lately.

    Raises:
        Refused: it has not.
    """
    id_, stamp = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
    given = headers.get("x-mlflow-signature", "")
    wanted = signature(secret, id_, stamp, body)
    if not id_ or not hmac.compare_digest(wanted.encode(), given.encode()):
        raise Refused(401, f"not signed with {VARIABLE}")
    try:
        age = abs(now - float(stamp))
    except ValueError:
        age = math.inf
    if not age <= FRESH_S:
        raise Refused(400, f"signed over {FRESH_S:g} s ago: compare the clocks of both machines")
    return id_


def read(id_: str, body: bytes) -> Job | None:
    """What is to be done; None for an event that asks for nothing.

    Raises:
        Refused: it is no event of MLflow's.
    """
    try:
        whole = json.loads(body)
        event, data = f"{whole['entity']}.{whole['action']}", whole["data"]
        model, version = str(data["name"]), str(data.get("version", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(400, "not an event of MLflow's registry") from error
    told = str(data.get("key" if event == SAID else "alias", ""))
    if event not in EVENTS or model.endswith(ledger.name_of("")):
        return None
    if event == SAID and told != APPROVAL:
        return None
    return Job(id=id_, event=event, model=model, version=version, told=told)


class Receiver:
    """Takes deliveries in for a worker."""

    def __init__(self, model: str, inbox: Inbox, secret: str) -> None:
        self._model, self._inbox, self._secret = model, inbox, secret

    def app(self) -> Starlette:
        routes = [
            Route("/webhook", self.receive, methods=["POST"]),
            Route("/health", self.health),
            Route("/dead", self.dead),
        ]
        return Starlette(routes=routes)

    async def receive(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            job = read(check(self._secret, request.headers, body, time.time()), body)
        except Refused as refused:
            log.warning("refused a delivery: %s", refused)
            return JSONResponse({"message": str(refused)}, refused.status)
        if job is None or job.model != self._model:
            return JSONResponse({"taken": False})
        return JSONResponse({"taken": self._inbox.accept(job)})

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    size += len(part)
                    if size > MOST_BYTES:
                        raise Refused(
                            413, f"over {MOST_BYTES} bytes: no event of MLflow's is so large"
                        )
                    parts.append(part)
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {BODY_S:g} s") from error
        return b"".join(parts)

    async def health(self, _: Request) -> Response:
        return JSONResponse(self._inbox.counts())

    async def dead(self, _: Request) -> Response:
        return JSONResponse(given_up(self._inbox))


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.receiver", "Answer MLflow's registry webhooks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5002)
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument("--promote", action="store_true", help="what passes becomes champion")
    parser.add_argument("--gates", type=Path, default=gates.FILE, help="TOML, a table per figure")
    parser.add_argument("--serving", metavar="URL", help="must answer with each new champion")
    parser.add_argument(
        "--tell",
        action="append",
        default=[],
        metavar="URL|github:OWNER/REPO",
        help="of each new entry of the ledger; may be said several times",
    )
    parser.add_argument("--inbox", type=Path, metavar="FILE", help="in the cache, one per model")
    parser.add_argument("--dead", action="store_true", help="list what was given up, and end")
    parser.add_argument("--revive", action="store_true", help="let it be tried again, and end")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    file = args.inbox or cache_root() / "inboxes" / f"{args.model}.db"
    inbox = Inbox(file)
    try:
        if args.dead or args.revive:
            return _dead(inbox, revive=args.revive)
        with _alone(file):
            return _receive(args, inbox)
    finally:
        inbox.close()


def _receive(args: argparse.Namespace, inbox: Inbox) -> int:
    import uvicorn

    receiver = Receiver(args.model, inbox, secret())
    worker = Worker(
        args.model,
        inbox,
        promotes=args.promote,
        serving=args.serving,
        bars=gates.load(args.gates),
        targets=[Target(to=to) for to in args.tell],
    )
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        raise ConfigError(f"port {args.port} of {args.host}: {error.strerror}") from error
    thread = threading.Thread(target=worker.work, name="worker")
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
def _alone(file: Path) -> Iterator[None]:
    """One receiver works on an inbox.

    Raises:
        ConfigError: another one does.
    """
    lock = FileLock(f"{file}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"another receiver works on {file}: end it, or say --inbox") from error
    try:
        yield
    finally:
        lock.release()


def secret() -> str:
    """What MLflow signs with.

    Raises:
        ConfigError: nobody has said it.
    """
    if not (told := os.environ.get(VARIABLE)):
        raise ConfigError(
            f"{VARIABLE} is not set: give the receiver and `registry.webhooks install` the same, "
            "such as `openssl rand -hex 32` makes"
        )
    return told


def given_up(inbox: Inbox) -> list[dict[str, str]]:
    """What was tried in vain, and why."""
    return [
        {"id": one.id, "event": one.event, "version": one.version, "why": one.said}
        for one in inbox.dead()
    ]


def _dead(inbox: Inbox, *, revive: bool) -> int:
    print(json.dumps(given_up(inbox), indent=1))
    if revive:
        print(f"{inbox.revive()} will be tried again")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
