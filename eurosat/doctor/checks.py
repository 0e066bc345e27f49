"""The runner: checks run in order, and a check that breaks does not stop the others."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from eurosat import tracking
from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Failed, Finding, NotApplicable, Verdict

FIRST_NOTICE_S, NOTICE_INTERVAL_S = 2.0, 5.0
"""When a slow check is first reported, and how often from then on."""
REPORT_BUG = "follow the message; if it does not help, this is a bug: please report it"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    run: Callable[[DoctorContext], str]
    """Returns what it found; raises Failed or NotApplicable."""
    needs: tuple[str, ...] = ()
    """Names of earlier checks without whose success this one does not apply."""


def run_checks(
    checks: Sequence[Check], context: DoctorContext, report: Callable[[Finding], None]
) -> list[Finding]:
    """Run ``checks`` in order and pass each finding to ``report`` as soon as it is there."""
    findings: dict[str, Finding] = {}
    for check in checks:
        started = time.monotonic()
        with slow_check_notices(check.name):
            verdict, message, remedy = _run(check, context, findings)
        finding = Finding(
            name=check.name,
            verdict=verdict,
            message=_one_line(message),
            remedy=_one_line(remedy),
            seconds=round(time.monotonic() - started, 3),
        )
        findings[check.name] = finding
        report(finding)
    return list(findings.values())


def _run(
    check: Check, context: DoctorContext, findings: dict[str, Finding]
) -> tuple[Verdict, str, str]:
    """Return the verdict, the message and the remedy of one check."""
    for need in check.needs:
        if findings[need].verdict == "failed":
            return "n/a", f"{need} failed", ""
        if findings[need].verdict == "n/a":
            return "n/a", findings[need].message, ""
    try:
        return "ok", check.run(context), ""
    except NotApplicable as reason:
        return "n/a", str(reason), ""
    except Failed as fault:
        return "failed", str(fault), fault.remedy
    except Exception as error:
        log.debug("the check %s raised an unexpected error", check.name, exc_info=True)
        return "failed", f"{type(error).__name__}: {tracking.first_line(error)}", REPORT_BUG


@contextmanager
def slow_check_notices(name: str) -> Iterator[None]:
    """Print on standard error, now and then, that the check still runs until the block ends."""
    done, started = threading.Event(), time.monotonic()

    def print_notices() -> None:
        wait_s = FIRST_NOTICE_S
        while not done.wait(wait_s):
            wait_s = NOTICE_INTERVAL_S
            elapsed_s = time.monotonic() - started
            print(f"... {name}: {elapsed_s:.0f} s so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=print_notices, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _one_line(text: str) -> str:
    return tracking.without_password(" ".join(text.split()))
