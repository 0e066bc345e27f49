"""Processes registry events: judges versions, reconciles aliases, checks serving, notifies others.

What is done depends on the registry as it is now, so events may come late, twice or in any order.
"""

import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from eurosat import tracking
from eurosat.errors import EuroSATError, TrackingError
from registry import gates, judge, ledger, versions
from registry.approvals import APPROVAL_TAG, ReviewDecision
from registry.event_queue import EventQueue, QueuedEvent
from registry.judge_process import judge_apart
from registry.notifications import Target, notify, redact
from registry.promote import promote
from registry.reconcile import RegistryState, baseline, last_active, reconcile
from registry.rollback import rollback
from registry.serving_check import NOT_LOADED, REJECTED_BY_SERVER, serving_fault

log = logging.getLogger(__name__)

CREATED, ALIAS_SET = "model_version.created", "model_version_alias.created"
TAG_SET = "model_version_tag.set"
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
NOTIFY = "tell"
"""An event of our own; files of earlier versions hold this value."""
ACTOR = "registry.receiver"
POLL_INTERVAL_S = 30.0
"""Time between two polls of the registry."""
SERVING_TIMEOUT_S = 60.0
"""How long serving may take to answer with a new champion."""
SERVING_POLL_S = 0.2
RETENTION_DAYS = 14.0
"""How long done events are kept."""
MAX_MESSAGE = 500
"""Characters of a failure that are stored with an event."""


class Worker:
    """Processes the events of a queue, one after another."""

    def __init__(
        self,
        model: str,
        queue: EventQueue,
        *,
        promotes: bool = False,
        serving: str | None = None,
        serving_timeout_s: float = SERVING_TIMEOUT_S,
        gates_file: Path = gates.FILE,
        targets: Sequence[Target] = (),
    ) -> None:
        """Create a worker for one registered model.

        ``promotes``: a version that passes every gate becomes champion, not only challenger.
        ``serving``: URL of a server that must answer with each new champion within
        ``serving_timeout_s``; otherwise the champion is rolled back. ``gates_file`` is read again
        for each judgement. ``targets`` are notified of each new champion.
        """
        self._model, self._queue = model, queue
        self._promotes, self._serving = promotes, serving
        self._serving_timeout_s = serving_timeout_s
        self._gates_file, self._targets = gates_file, targets
        self._stop = threading.Event()
        self._polled_at = -math.inf

    def run(self) -> None:
        """Process events until `stop`; an event that fails is retried, then kept as dead."""
        while not self._stop.is_set():
            try:
                if time.monotonic() - self._polled_at >= POLL_INTERVAL_S:
                    self.poll_registry()
                if event := self._queue.next(self._model, wait_s=1.0):
                    self.process(event)
            except Exception:  # such as a full disk; this thread must survive it
                log.exception(
                    "the event queue cannot be processed now; next try in %g s", POLL_INTERVAL_S
                )
                self._stop.wait(POLL_INTERVAL_S)

    def stop(self) -> None:
        self._stop.set()

    def process(self, event: QueuedEvent) -> None:
        """Handle one event and store its result, or schedule another try."""
        self._queue.begin(event)
        try:
            message = self._handle(event)
        except Exception as error:  # noqa: BLE001 - any failure is stored with the event
            reason = " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
            again = self._queue.fail(event, reason)
            log.warning(
                "%s of version %s: %s (%s)",
                event.event,
                event.version,
                reason,
                "will be retried" if again else "given up",
            )
        else:
            self._queue.finish(event, message)
            log.info("%s of version %s: %s", event.event, event.version, message)

    def poll_registry(self) -> None:
        """Queue what lost events would have triggered, so that these are only late."""
        self._polled_at = time.monotonic()
        self._queue.prune(RETENTION_DAYS, *EVENTS)
        try:
            reconcile(self._model)
            for event in (*self._missed_events(), *self._unnotified()):
                self._queue.accept(event)
        except EuroSATError as error:
            log.warning("the registry cannot be reached now: %s", error)

    def _missed_events(self) -> Iterator[QueuedEvent]:
        """Yield what events would have triggered.

        Their ids are fixed, so that each is done once; existing queues hold these prefixes.
        """
        entries = ledger.entries(self._model)
        if entries and self._serving:
            last = entries[-1]
            yield self._event(
                f"served-{last.digest}", ALIAS_SET, last.to_version, versions.CHAMPION
            )
        for version in versions.all_of(self._model):
            number = str(version.version)
            verdict = version.tags.get(versions.VERDICT_TAG, "")
            suffix = f"{self._model}-{number}-{version.creation_timestamp}"
            review = ReviewDecision.from_tag(version, APPROVAL_TAG)
            if version.run_id and not verdict:
                yield self._event(f"look-{suffix}", CREATED, number)
            elif review and "approval: " in verdict:
                yield self._event(f"said-{suffix}-{review.time}", TAG_SET, number, APPROVAL_TAG)

    def _unnotified(self) -> Iterator[QueuedEvent]:
        """Yield a notification per target and ledger entry since the queue was created."""
        if not self._targets:
            return
        created = datetime.fromtimestamp(self._queue.created_at, UTC).isoformat(timespec="seconds")
        for entry in ledger.entries(self._model):
            if entry.time < created:
                continue
            for target in self._targets:
                address = hashlib.sha256(target.address.encode()).hexdigest()[:16]
                yield self._event(
                    f"{entry.digest}-{address}", NOTIFY, entry.to_version, target.address
                )

    def _event(self, id_: str, event: str, version: str | None, detail: str = "") -> QueuedEvent:
        return QueuedEvent(
            id=id_, event=event, model=self._model, version=version or "", detail=detail
        )

    def _handle(self, event: QueuedEvent) -> str:
        """Do what the event asks for, and return the result in one line."""
        if event.event in (CREATED, TAG_SET):
            return self._judge(event.version, again=event.event == TAG_SET)
        if event.event == NOTIFY:
            return self._notify(event)
        state = reconcile(self._model)
        for notification in self._unnotified():
            self._queue.accept(notification)
        if event.detail == versions.CHAMPION and state.champion and self._serving:
            return self._wait_until_served(state, self._serving)
        return "aliases and ledger agree"

    def _judge(self, number: str, *, again: bool = False) -> str:
        """Judge a version; if it passes, make it challenger, or champion if ``promotes``.

        A refused version is judged once, except ``again`` after a person's decision, or if its
        alias shows that the judgement was interrupted.
        """
        version = versions.get_or_none(self._model, number)
        if version is None:
            return "it was deleted meanwhile"
        if not version.run_id:
            return "it names no run, so it cannot be judged"
        before = reconcile(self._model)
        if number in {entry.to_version for entry in ledger.entries(self._model)}:
            return "it has been champion"
        is_challenger = versions.has_alias(self._model, versions.CHALLENGER, number)
        refused = version.tags.get(versions.VERDICT_TAG, "").startswith("refused")
        if refused and not again and not is_challenger:
            return "it was judged before"
        champion = baseline(self._model, before)
        verdict = judge_apart(
            self._model, number, str(champion.version) if champion else None, self._gates_file
        )
        if verdict.passed and self._promotes:
            promote(self._model, version, before, verdict, "it passed every gate", ACTOR)
            return f"promoted: {verdict}"
        judge.record_verdict(self._model, number, verdict)
        self._update_challenger(number, passed=verdict.passed)
        return str(verdict)

    def _update_challenger(self, number: str, *, passed: bool) -> None:
        """Give the alias to a version that passed, and take it from one that was refused."""
        with tracking.translate_errors(f"alias {versions.CHALLENGER}"):
            client = versions.client()
            if passed:
                client.set_registered_model_alias(self._model, versions.CHALLENGER, number)
            elif versions.has_alias(self._model, versions.CHALLENGER, number):
                client.delete_registered_model_alias(self._model, versions.CHALLENGER)

    def _notify(self, event: QueuedEvent) -> str:
        digest = event.id.partition("-")[0]
        for entry in ledger.entries(self._model):
            if entry.digest == digest:
                notify(Target(address=event.detail), self._model, entry)
                return f"notified {redact(event.detail)}"
        return "the ledger has no such entry any more"

    def _wait_until_served(self, state: RegistryState, url: str) -> str:
        """Wait until the server answers with the new champion; otherwise roll back, once.

        Raises:
            TrackingError: the server does not answer, or there is no version to go back to.
        """
        number = str(state.champion_number)
        deadline, fault = time.monotonic() + self._serving_timeout_s, ""
        while time.monotonic() < deadline and not self._stop.is_set():
            fault = serving_fault(url, self._model, number)
            if not fault:
                return f"served by {redact(url)}"
            if fault.startswith(REJECTED_BY_SERVER):
                break
            self._stop.wait(SERVING_POLL_S)
        last = ledger.entries(self._model)[-1]
        to = last_active(self._model, state.earlier_champions)
        model_is_faulty = fault.startswith((REJECTED_BY_SERVER, NOT_LOADED))
        if (
            not model_is_faulty
            or self._stop.is_set()
            or last.action == ledger.ROLLBACK
            or to is None
        ):
            raise TrackingError(f"version {number} is champion but is not served: {fault}")
        why = f"not served within {self._serving_timeout_s:g} s: {fault}"[: ledger.MAX_WHY]
        rollback(self._model, to, state, why, ACTOR)
        return f"rolled back to version {to}: {why}"
