"""Checks that are run one after the other, and what each has found."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eurosat import tracking
from eurosat.errors import EuroSATError

if TYPE_CHECKING:
    from eurosat.doctor.context import Visit

Verdict = Literal["ok", "failed", "n/a"]
FIRST_S, EVERY_S = 2.0, 5.0
"""When a check that still looks is told of, and how often from then on."""
REPORT = "see what it says; if that is no help, it is a fault of ours: please report it"

log = logging.getLogger(__name__)


class Failed(EuroSATError):
    """A check has found a fault."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


class NotApplicable(EuroSATError):
    """There is nothing to check here, and the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    name: str
    verdict: Verdict
    said: str
    """What was found, or why there was nothing to look at."""
    remedy: str = ""
    """Of a failed check."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    look: "Callable[[Visit], str]"
    """Returns what it found; raises Failed or NotApplicable."""
    needs: tuple[str, ...] = ()
    """Checks before it, without which there is nothing to look at."""


def examine(
    checks: Sequence[Check], visit: "Visit", tell: Callable[[Finding], None]
) -> list[Finding]:
    """Run ``checks`` in order and tell of each as soon as it is done; none hides another."""
    found: dict[str, Finding] = {}
    for check in checks:
        started = time.monotonic()
        with watched(check.name):
            verdict, said, remedy = _look(check, visit, found)
        found[check.name] = Finding(
            name=check.name,
            verdict=verdict,
            said=_line(said),
            remedy=_line(remedy),
            seconds=round(time.monotonic() - started, 3),
        )
        tell(found[check.name])
    return list(found.values())


def _look(check: Check, visit: "Visit", found: dict[str, Finding]) -> tuple[Verdict, str, str]:
    for need in check.needs:
        if found[need].verdict == "failed":
            return "n/a", f"{need} failed", ""
        if found[need].verdict == "n/a":
            return "n/a", found[need].said, ""
    try:
        return "ok", check.look(visit), ""
    except NotApplicable as why:
        return "n/a", str(why), ""
    except Failed as fault:
        return "failed", str(fault), fault.remedy
    except Exception as error:
        log.debug("the check %s could not be made", check.name, exc_info=True)
        return "failed", f"{type(error).__name__}: {tracking.first_line(error)}", REPORT


@contextmanager
def watched(name: str) -> Iterator[None]:
    """Say on standard error that a check still looks, until the block ends."""
    ended, started = threading.Event(), time.monotonic()

    def tell() -> None:
        wait_s = FIRST_S
        while not ended.wait(wait_s):
            wait_s = EVERY_S
            waited = time.monotonic() - started
            print(f"... {name}: {waited:.0f} s so far", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _line(text: str) -> str:
    return tracking.without_password(" ".join(text.split()))
