"""The processes that drive a study: which one concludes it, and which of them still live."""

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

BEAT_S, STALE_S = 15, 60
"""How often a driver says that it and its trials live, and how long after its last word they do
not."""
LISTEN_S = 1.0
SETTLE_S = 2.0
"""After which what another driver wrote in the same moment is there to be read."""
OWNER, SPENT = "owner", "spent_s"
"""Attributes of the study: who concludes it, and how long all that did have spent. While its owner
lives, the second one grows: no clock of one machine is held against another's."""


@contextlib.contextmanager
def owned(study: "optuna.Study") -> Iterator[None]:
    """Within, this driver is the one that concludes the study; others may help with its trials."""
    from optuna.exceptions import StorageInternalError

    began, spent_s = time.monotonic(), float(study.user_attrs.get(SPENT, 0))

    def beat() -> None:
        with contextlib.suppress(StorageInternalError):
            study.set_user_attr(SPENT, spent_s + time.monotonic() - began)

    study.set_user_attr(OWNER, me())
    beat()
    try:
        with every(BEAT_S, beat):
            yield
    finally:
        beat()
        with contextlib.suppress(StorageInternalError):  # then others listen for it in vain
            study.set_user_attr(OWNER, None)


def is_owned(study: "optuna.Study") -> bool:
    """Whether the driver that concludes the study lives.

    One on another machine is listened for, STALE_S at most.
    """
    owner = study.user_attrs.get(OWNER)
    if owner is None:
        return False
    host = json.loads(owner)[0]
    if host == socket.gethostname():
        return not is_gone(owner)
    log.info("listening for the study's driver on %s, %d s at most", host, STALE_S)
    spent_s, until = study.user_attrs.get(SPENT), time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(LISTEN_S)
        told = study.user_attrs
        if (told[OWNER], told.get(SPENT)) != (owner, spent_s):
            return told[OWNER] is not None
    return False


def take(study: "optuna.Study") -> bool:
    """Become the driver that concludes the study, unless one lives.

    Of several that find it deserted in the same moment, the last one to say so has it: each looks
    again after SETTLE_S (M. Fischer's rule, in Lamport 1987).
    """
    if is_owned(study):
        return False
    study.set_user_attr(OWNER, me())
    time.sleep(SETTLE_S)
    return bool(study.user_attrs[OWNER] == me())


@contextlib.contextmanager
def every(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Do ``work`` again and again, until the block ends."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(seconds):
            work()

    thread = threading.Thread(target=loop, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def me() -> str:
    """The present process, told so that others can see whether it lives."""
    import psutil

    return json.dumps([socket.gethostname(), os.getpid(), psutil.Process().create_time()])


def is_gone(driver: str) -> bool:
    """Whether a driver of this machine has ended; of other machines only heartbeats tell."""
    import psutil

    host, pid, born = json.loads(driver)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE  # and nobody has asked for its exit code
        return bool(dead or abs(process.create_time() - born) > 1)
    except psutil.NoSuchProcess:
        return True
