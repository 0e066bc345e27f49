"""The faults that the benchmark injects into the platform, and their schedule."""

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.platform.fixture import PlatformFixture
from eurosat.errors import TrackingError

CUT_S = 30.0
RECOVERY_TIMEOUT_S = 300.0
POLL_INTERVAL_S = 0.1
LABELS = {
    "mlflow": "MLflow server killed",
    "postgres": "PostgreSQL restarted",
    "store": "object store cut off",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One service is killed, or cut off for a while."""

    service: str
    at_s: float
    """Time since the start of the load."""
    for_s: float = 0.0
    """How long the service is cut off; 0 if it is killed."""


def schedule(seconds: float) -> tuple[Fault, ...]:
    """Return the faults of a load that takes ``seconds``.

    MLflow is killed before `memory.growth` takes its first samples: so they are of one process.
    """
    return (
        Fault(service="mlflow", at_s=0.1 * seconds),
        Fault(service="postgres", at_s=0.25 * seconds),
        Fault(service="store", at_s=0.4 * seconds, for_s=min(CUT_S, seconds / 2)),
        Fault(service="postgres", at_s=0.6 * seconds),
    )


def inject(fault: Fault, platform: PlatformFixture, start: float) -> dict[str, Any]:
    """Wait for the fault's time, inject it, and wait until the service answers again.

    ``start`` is the start of the load, on the clock of `time.monotonic`. Returns a row of the
    report.

    Raises:
        TrackingError: the service does not end, or does not answer again.
    """
    time.sleep(max(0.0, start + fault.at_s - time.monotonic()))
    injected = time.monotonic()
    if fault.for_s:
        with platform.cut_off(fault.service):
            time.sleep(fault.for_s)
    else:
        platform.kill(fault.service)
    while not platform.answers(fault.service):
        if time.monotonic() - injected > fault.for_s + RECOVERY_TIMEOUT_S:
            raise TrackingError(
                f"{fault.service} did not answer again within {RECOVERY_TIMEOUT_S:g} s"
            )
        time.sleep(POLL_INTERVAL_S)
    return {
        "what": f"{LABELS[fault.service]} after {fault.at_s:.0f} s: time until it answered",
        "value": round(time.monotonic() - injected, 1),
        "unit": "s",
    }
