"""Which process concludes a study, and which processes are still alive."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S = 15, 60
"""A driver sends a heartbeat for itself and for its trials at this interval; without one for the
time-out it counts as dead."""
POLL_INTERVAL_S = 1.0
CLAIM_SETTLE_S = 2.0
"""Wait after a claim, so that a claim that another driver made at the same moment can be read."""
OWNER_ATTR, SPENT_ATTR = "owner", "spent_s"
"""Attributes of the study: the identity of the driver that concludes it, and the seconds that all
owners have spent. The second one grows while the owner lives; a reader only checks that it changes,
so that the clocks of two machines are never compared."""


@contextlib.contextmanager
def owning(study: "optuna.Study") -> Iterator[None]:
    """Register this process as the study's owner for the block.

    The owner concludes the study; other drivers may help with its trials.
    """
    from optuna.exceptions import StorageInternalError

    started, spent_before_s = time.monotonic(), float(study.user_attrs.get(SPENT_ATTR, 0))

    def record_time_spent() -> None:
        with contextlib.suppress(StorageInternalError):
            study.set_user_attr(SPENT_ATTR, spent_before_s + time.monotonic() - started)

    study.set_user_attr(OWNER_ATTR, process_identity())
    record_time_spent()
    try:
        with periodic(HEARTBEAT_INTERVAL_S, record_time_spent):
            yield
    finally:
        record_time_spent()
        with contextlib.suppress(StorageInternalError):  # then others wait for the time-out
            study.set_user_attr(OWNER_ATTR, None)


def is_owned(study: "optuna.Study") -> bool:
    """Return whether the study's owner is alive.

    An owner on another machine is alive if it sends a heartbeat within HEARTBEAT_TIMEOUT_S: this
    call waits for one.
    """
    owner = study.user_attrs.get(OWNER_ATTR)
    if owner is None:
        return False
    host = json.loads(owner)[0]
    if host == socket.gethostname():
        return not has_exited(owner)
    log.info("waiting up to %d s for a heartbeat of the driver on %s", HEARTBEAT_TIMEOUT_S, host)
    spent_s, deadline = study.user_attrs.get(SPENT_ATTR), time.monotonic() + HEARTBEAT_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
        attributes = study.user_attrs
        if (attributes[OWNER_ATTR], attributes.get(SPENT_ATTR)) != (owner, spent_s):
            return attributes[OWNER_ATTR] is not None
    return False


def claim(study: "optuna.Study") -> bool:
    """Become the study's owner unless one is alive; return whether this process owns it now.

    If several drivers claim a study at the same moment, the last writer wins: each one reads the
    owner again after CLAIM_SETTLE_S (M. Fischer's rule, in Lamport 1987).
    """
    if is_owned(study):
        return False
    study.set_user_attr(OWNER_ATTR, process_identity())
    time.sleep(CLAIM_SETTLE_S)
    return bool(study.user_attrs[OWNER_ATTR] == process_identity())


@contextlib.contextmanager
def periodic(interval_s: float, function: Callable[[], None]) -> Iterator[None]:
    """Call ``function`` every ``interval_s`` seconds in a thread until the block ends."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(interval_s):
            function()

    thread = threading.Thread(target=loop, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def process_identity() -> str:
    """Return this process as JSON: host name, process id and start time."""
    import psutil

    return json.dumps([socket.gethostname(), os.getpid(), psutil.Process().create_time()])


def has_exited(identity: str) -> bool:
    """Return whether a process of this machine has ended; False for other machines.

    Whether a process of another machine is alive can be known by its heartbeats alone.
    """
    import psutil

    host, pid, start_time = json.loads(identity)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE  # its parent has not waited for it
        return bool(is_zombie or abs(process.create_time() - start_time) > 1)
    except psutil.NoSuchProcess:
        return True
