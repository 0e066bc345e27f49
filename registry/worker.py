"""What a registry's events ask for, done by the registry as it is, whatever order they came in."""

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal

import requests

from eurosat import tracking
from eurosat.errors import EuroSATError, TrackingError
from registry import gates, judge, ledger, versions
from registry.approvals import APPROVAL, Opinion
from registry.event_queue import Inbox, Job
from registry.notifications import Target, public, tell
from registry.promote import promote
from registry.reconcile import Standing, last_kept, reconcile, rival
from registry.rollback import rollback

log = logging.getLogger(__name__)

CREATED, MOVED = "model_version.created", "model_version_alias.created"
SAID = "model_version_tag.set"
EVENTS: tuple[
    Literal[
        "model_version.created",
        "model_version_tag.set",
        "model_version_alias.created",
        "model_version_alias.deleted",
    ],
    ...,
] = (
    "model_version.created",
    "model_version_tag.set",
    "model_version_alias.created",
    "model_version_alias.deleted",
)
TELL = "tell"
"""A job of our own."""
REFUSED, LATE = "the server refused it: ", "not loaded in time: "
ACTOR = "registry.receiver"
SERVING_KEY = "EUROSAT_SERVING_KEY"
"""Holds the key that a serving process asks for, if it does."""
LOOK_S = 30.0
"""Between two looks at the registry itself."""
SERVED_S = 60.0
"""That serving has to answer with a new champion."""
ASK_EVERY_S = 0.2
KEPT_DAYS = 14.0


class Worker:
    """Works off an inbox, one job after another."""

    def __init__(
        self,
        model: str,
        inbox: Inbox,
        *,
        promotes: bool = False,
        serving: str | None = None,
        served_s: float = SERVED_S,
        bars: gates.Gates | None = None,
        targets: Sequence[Target] = (),
    ) -> None:
        """``promotes``: what passes every gate becomes champion, and not challenger alone.

        ``serving`` is the URL of a server that must answer with each new champion within
        ``served_s``, or the champion is rolled back; ``targets`` are told of each.
        """
        self._model, self._inbox = model, inbox
        self._promotes, self._serving, self._served_s = promotes, serving, served_s
        self._gates, self._targets = bars or gates.load(), targets
        self._stop = threading.Event()
        self._looked = -math.inf

    def work(self) -> None:
        """Until `stop`; a job that fails is tried again, and then kept as dead."""
        while not self._stop.is_set():
            try:
                if time.monotonic() - self._looked >= LOOK_S:
                    self.look()
                if job := self._inbox.next(self._model, wait_s=1.0):
                    self.do(job)
            except Exception:  # a full disk, say: nobody else works while this thread is away
                log.exception("the inbox cannot be worked on now")
                self._stop.wait(LOOK_S)

    def stop(self) -> None:
        self._stop.set()

    def do(self, job: Job) -> None:
        try:
            said = self._handled(job)
        except Exception as error:  # noqa: BLE001 - whatever fails is told with the job
            why = " ".join(str(error).split())[:500] or type(error).__name__
            again = self._inbox.fail(job, why)
            log.warning(
                "%s of version %s: %s (%s)",
                job.event,
                job.version,
                why,
                "tried again" if again else "given up",
            )
        else:
            self._inbox.finish(job, said)
            log.info("%s of version %s: %s", job.event, job.version, said)

    def look(self) -> None:
        """At the registry itself: an event that was lost is only late."""
        self._looked = time.monotonic()
        self._inbox.forget(KEPT_DAYS, *EVENTS)
        try:
            reconcile(self._model)
            for job in (*self._missed(), *self._untold()):
                self._inbox.accept(job)
        except EuroSATError as error:
            log.warning("the registry cannot be asked now: %s", error)

    def _missed(self) -> Iterator[Job]:
        """What events would have asked for, each by an id of its own, so that it is done once."""
        known = ledger.entries(self._model)
        if known and self._serving:
            yield self._job(
                f"served-{known[-1].digest}", MOVED, known[-1].to_version, versions.CHAMPION
            )
        for version in versions.all_of(self._model):
            verdict = version.tags.get(versions.VERDICT, "")
            made = f"{self._model}-{version.version}-{version.creation_timestamp}"
            said = Opinion.of(version, APPROVAL)
            if version.run_id and not verdict:
                yield self._job(f"look-{made}", CREATED, str(version.version))
            elif said and "approval: " in verdict:
                yield self._job(f"said-{made}-{said.time}", SAID, str(version.version), APPROVAL)

    def _untold(self) -> Iterator[Job]:
        """Of each entry since the inbox was made."""
        since = datetime.fromtimestamp(self._inbox.since, UTC).isoformat(timespec="seconds")
        for entry in ledger.entries(self._model) if self._targets else ():
            for target in self._targets if entry.time >= since else ():
                where = hashlib.sha256(target.to.encode()).hexdigest()[:16]
                yield self._job(f"{entry.digest}-{where}", TELL, entry.to_version, target.to)

    def _job(self, id_: str, event: str, version: str | None, told: str = "") -> Job:
        return Job(id=id_, event=event, model=self._model, version=version or "", told=told)

    def _handled(self, job: Job) -> str:
        """What came of it."""
        if job.event in (CREATED, SAID):
            return self._judged(job.version, again=job.event == SAID)
        if job.event == TELL:
            return self._told(job)
        standing = reconcile(self._model)
        for untold in self._untold():
            self._inbox.accept(untold)
        if job.told == versions.CHAMPION and standing.champion and self._serving:
            return self._see_served(standing, self._serving)
        return "aliases and ledger agree"

    def _judged(self, number: str, *, again: bool = False) -> str:
        """Judge a version that was not judged before; who passes challenges, or takes the place.

        One whose judgement was cut off is judged again, and one of which a person spoke since.
        """
        version = versions.find(self._model, number)
        if version is None:
            return "it was deleted meanwhile"
        if not version.run_id:
            return "it names no run: nothing is known of it"
        before = reconcile(self._model)
        if number in {entry.to_version for entry in ledger.entries(self._model)}:
            return "it has been champion"
        challenges = versions.holds(self._model, versions.CHALLENGER, number)
        refused = version.tags.get(versions.VERDICT, "").startswith("refused")
        if refused and not again and not challenges:
            return "it was judged before"
        verdict = judge.judge(version, rival(self._model, before), self._gates)
        if verdict.passed and self._promotes:
            promote(self._model, version, before, verdict, "it passed every gate", ACTOR)
            return f"promoted: {verdict}"
        judge.tag(self._model, number, verdict)
        with tracking.translate_errors(f"alias {versions.CHALLENGER}"):
            client = versions.client()
            if verdict.passed:
                client.set_registered_model_alias(self._model, versions.CHALLENGER, number)
            elif versions.holds(self._model, versions.CHALLENGER, number):
                client.delete_registered_model_alias(self._model, versions.CHALLENGER)
        return str(verdict)

    def _told(self, job: Job) -> str:
        digest = job.id.partition("-")[0]
        for entry in ledger.entries(self._model):
            if entry.digest == digest:
                tell(Target(to=job.told), self._model, entry)
                return f"told {public(job.told)}"
        return "the ledger has no such entry any more"

    def _see_served(self, standing: Standing, url: str) -> str:
        """Wait until the new champion answers; one that does not is rolled back, once."""
        number = str(standing.number)
        deadline, said = time.monotonic() + self._served_s, ""
        while time.monotonic() < deadline and not self._stop.is_set():
            if (said := self._unserved(url, number)) == "":
                return f"served by {public(url)}"
            if said.startswith(REFUSED):
                break
            self._stop.wait(ASK_EVERY_S)
        last = ledger.entries(self._model)[-1]
        to = last_kept(self._model, standing.before)
        faulty = said.startswith((REFUSED, LATE)) and not self._stop.is_set()
        if not faulty or last.action == ledger.ROLLBACK or to is None:
            raise TrackingError(f"version {number} is champion and not served: {said}")
        why = f"not served within {self._served_s:g} s: {said}"[: ledger.MAX_WHY]
        rollback(self._model, to, standing, why, ACTOR)
        return f"rolled back to version {to}: {why}"

    def _unserved(self, url: str, number: str) -> str:
        """Why the server does not answer with that version; empty where it does."""
        try:
            key = os.environ.get(SERVING_KEY)
            known = {"Authorization": f"Bearer {key}"} if key else {}
            answer = requests.get(f"{url.rstrip('/')}/model", headers=known, timeout=5)
            told = answer.json() if answer.ok else {}
        except (requests.RequestException, ValueError) as error:
            return f"{public(url)} does not answer: {type(error).__name__}"
        if not answer.ok or not isinstance(told, dict):
            return f"{public(url)} does not tell its model: status {answer.status_code}"
        if told.get("model_version") == number:
            return ""
        if why := told.get("refused", {}).get(f"models:/{self._model}/{number}"):
            return f"{REFUSED}{why}"
        return f"{LATE}{public(url)} still answers with {told.get('model_version')}"
