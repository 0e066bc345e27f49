"""The service behind MLflow's registry webhooks: judges what is registered, and keeps order.

It answers as soon as a delivery is on disk; a thread works them off, one at a time, and looks
at the registry itself now and then, as MLflow drops a delivery after its fourth try.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import requests
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eurosat import cli, logs, tracking
from eurosat.config import usual_cache
from eurosat.errors import ConfigError, EuroSATError, TrackingError
from registry import gates, judge, ledger, versions
from registry.inbox import Inbox, Job
from registry.opinions import APPROVAL
from registry.outgoing import Target, tell
from registry.promote import promote
from registry.reconcile import Standing, last_kept, reconcile
from registry.rollback import rollback

log = logging.getLogger(__name__)

VARIABLE = "MLFLOW_WEBHOOK_SECRET"
"""Holds what MLflow signs with."""
FRESH_S = 300.0
"""Between MLflow's clock and ours; its tries of one delivery are over within seconds."""
MOST_BYTES = 65_536
BODY_S = 10.0
"""For a delivery to arrive whole."""
LOOK_S = 30.0
"""Between two looks at the registry itself."""
KEPT_DAYS = 14.0
ACTOR = "registry.receiver"
CREATED, MOVED = "model_version.created", "model_version_alias.created"
SAID = "model_version_tag.set"
EVENTS: tuple[Literal["model_version.created", "model_version_tag.set",
                      "model_version_alias.created", "model_version_alias.deleted"], ...] = (
    "model_version.created", "model_version_tag.set", "model_version_alias.created",
    "model_version_alias.deleted",
)  # fmt: skip
TELL = "tell"
"""A job of our own."""
SERVED_S = 60.0
"""That serving has to answer with a new champion."""


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
    signed = f"{id_}.{stamp}.".encode() + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    wanted = f"v1,{base64.b64encode(digest).decode()}"
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
    """Takes deliveries in, and works them off in a thread of its own."""

    def __init__(
        self, model: str, inbox: Inbox, secret: str, *, promotes: bool = False,
        serving: str | None = None, served_s: float = SERVED_S, bars: Path = gates.FILE,
        targets: Sequence[Target] = (),
    ) -> None:  # fmt: skip
        """``promotes``: what passes every gate becomes champion, and not challenger alone.

        ``serving`` is the URL of a server that must answer with each new champion within
        ``served_s``, or the champion is rolled back.
        """
        self._model, self._inbox, self._secret = model, inbox, secret
        self._promotes, self._serving, self._served_s = promotes, serving, served_s
        self._gates, self._targets = bars, targets
        self._stop = threading.Event()
        self._looked = -math.inf

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
        told = [
            {"id": one.id, "event": one.event, "version": one.version, "why": one.said}
            for one in self._inbox.dead()
        ]
        return JSONResponse(told)

    def work(self) -> None:
        """Until `stop`; a job that fails is tried again, and then kept as dead."""
        while not self._stop.is_set():
            try:
                if time.monotonic() - self._looked >= LOOK_S:
                    self._look()
                if job := self._inbox.next(wait_s=1.0):
                    self._do(job)
            except Exception:  # a full disk, say: nobody else works while this thread is away
                log.exception("the inbox cannot be worked on now")
                self._stop.wait(LOOK_S)

    def stop(self) -> None:
        self._stop.set()

    def _do(self, job: Job) -> None:
        try:
            said = self.handle(job)
        except Exception as error:  # noqa: BLE001 - whatever fails is told with the job
            why = " ".join(str(error).split())[:500] or type(error).__name__
            again = self._inbox.fail(job, why)
            log.warning("%s of version %s: %s (%s)", job.event, job.version, why,
                        "tried again" if again else "given up")  # fmt: skip
        else:
            self._inbox.finish(job, said)
            log.info("%s of version %s: %s", job.event, job.version, said)

    def handle(self, job: Job) -> str:
        """What came of it; the registry as it is now decides, whatever order events came in."""
        if job.event in (CREATED, SAID):
            return self.judged(job.version, again=job.event == SAID)
        if job.event == TELL:
            return self._told(job)
        standing = reconcile(job.model)
        self._have_told()
        if job.told == versions.CHAMPION and standing.champion and self._serving:
            return self._see_served(standing, self._serving)
        return "aliases and ledger agree"

    def _have_told(self) -> None:
        """Put it to the inbox to tell the targets of the last entry, once."""
        known = ledger.entries(self._model)
        for target in self._targets if known else ():
            digest, to = known[-1].digest, known[-1].to_version or ""
            where = hashlib.sha256(target.to.encode()).hexdigest()[:16]
            self._inbox.accept(
                Job(id=f"{digest}-{where}", event=TELL, model=self._model, version=to,
                    told=target.to)
            )  # fmt: skip

    def _told(self, job: Job) -> str:
        digest = job.id.partition("-")[0]
        for entry in ledger.entries(self._model):
            if entry.digest == digest:
                tell(Target(to=job.told), self._model, entry)
                return f"told {job.told}"
        return "the ledger has no such entry any more"

    def _see_served(self, standing: Standing, url: str) -> str:
        """Wait until the new champion answers; one that does not is rolled back, once."""
        assert standing.champion is not None
        number = str(standing.champion.version)
        deadline, said = time.monotonic() + self._served_s, ""
        while time.monotonic() < deadline and not self._stop.is_set():
            try:
                told = requests.get(f"{url}/model", timeout=5).json()
            except (requests.RequestException, ValueError) as error:
                said = f"{url} does not answer: {type(error).__name__}"
            else:
                if told.get("model_version") == number:
                    return f"served by {url}"
                uri = f"models:/{self._model}/{number}"
                said = f"{url} refused it: {told.get('refused', {}).get(uri, 'not loaded in time')}"
                if uri in told.get("refused", {}):
                    break
            time.sleep(0.2)
        last = ledger.entries(self._model)[-1]
        to = last_kept(self._model, standing.before)
        if "does not answer" in said or last.action == ledger.ROLLBACK or to is None:
            raise TrackingError(f"version {number} is champion and not served: {said}")
        why = f"not served within {self._served_s:g} s: {said}"[: ledger.MAX_WHY]
        rollback(self._model, to, standing, why, ACTOR)
        return f"rolled back to version {to}: {why}"

    def judged(self, number: str, *, again: bool = False) -> str:
        """Judge a version that was not judged before; who passes challenges, or takes the place.

        One whose judgement was cut off is judged again, and one of which a person spoke since.
        """
        if not versions.exists(self._model, number):
            return "it was deleted meanwhile"
        version = versions.get(self._model, number)
        if not version.run_id:
            return "it names no run: nothing is known of it"
        before = reconcile(self._model)
        if number in {entry.to_version for entry in ledger.entries(self._model)}:
            return "it has been champion"
        if version.tags.get(judge.VERDICT, "").startswith("refused") and not again:
            return "it was judged before"
        verdict = judge.judge(version, before.champion, gates.load(self._gates))
        if verdict.passed and self._promotes:
            promote(self._model, version, before, verdict, "it passed every gate", ACTOR)
            return f"promoted: {verdict}"
        judge.tag(self._model, number, verdict)
        if verdict.passed:
            with tracking.explained(f"alias {versions.CHALLENGER}"):
                versions.client().set_registered_model_alias(
                    self._model, versions.CHALLENGER, number
                )
        elif versions.holds(self._model, versions.CHALLENGER, number):
            with tracking.explained(f"alias {versions.CHALLENGER}"):
                versions.client().delete_registered_model_alias(self._model, versions.CHALLENGER)
        return str(verdict)

    def _look(self) -> None:
        """At the registry itself: a delivery that was lost is only late."""
        self._looked = time.monotonic()
        self._inbox.forget(KEPT_DAYS)
        try:
            reconcile(self._model)
            self._have_told()
            for version in versions.all_of(self._model):
                if version.run_id and judge.VERDICT not in version.tags:
                    made = version.creation_timestamp
                    missed = f"look-{self._model}-{version.version}-{made}"
                    job = Job(id=missed, event=CREATED, model=self._model,
                              version=str(version.version), told="")  # fmt: skip
                    self._inbox.accept(job)
        except EuroSATError as error:
            log.warning("the registry cannot be asked now: %s", error)


def main(argv: Sequence[str]) -> int:
    import uvicorn

    parser = cli.parser("registry.receiver", "Answer MLflow's registry webhooks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5002)
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument("--promote", action="store_true", help="what passes becomes champion")
    parser.add_argument("--gates", type=Path, default=gates.FILE, help="read for each judgement")
    parser.add_argument("--serving", metavar="URL", help="must answer with each new champion")
    parser.add_argument(
        "--tell", action="append", default=[], metavar="URL|github:OWNER/REPO",
        help="of each new entry of the ledger; may be said several times",
    )  # fmt: skip
    parser.add_argument("--inbox", type=Path, default=usual_cache() / "inbox.db", metavar="FILE")
    parser.add_argument("--dead", action="store_true", help="list what was given up, and end")
    parser.add_argument("--revive", action="store_true", help="let it be tried again, and end")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    inbox = Inbox(args.inbox)
    if args.dead or args.revive:
        return _dead(inbox, args)
    receiver = Receiver(args.model, inbox, secret(), promotes=args.promote, serving=args.serving)
    worker = threading.Thread(target=receiver.work, name="worker")
    worker.start()
    try:
        log.info("answering webhooks at http://%s:%d/webhook", args.host, args.port)
        uvicorn.run(
            receiver.app(), host=args.host, port=args.port, log_config=None, access_log=False,
            server_header=False,
        )  # fmt: skip
    finally:
        receiver.stop()
        worker.join()
        inbox.close()
    return cli.OK


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


def _dead(inbox: Inbox, args: argparse.Namespace) -> int:
    told: list[dict[str, Any]] = [
        {"id": one.id, "event": one.event, "version": one.version, "why": one.said}
        for one in inbox.dead()
    ]
    print(json.dumps(told, indent=1))
    if args.revive:
        print(f"{inbox.revive()} will be tried again")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
