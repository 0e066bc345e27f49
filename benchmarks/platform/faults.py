"""What befalls the platform while it is written to, and when."""

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.platform.fixture import Stand
from eurosat.errors import TrackingError

CUT_S = 30.0
BACK_S = 300.0
LOOK_S = 0.1
TOLD = {
    "mlflow": "MLflow server killed",
    "postgres": "PostgreSQL restarted",
    "store": "object store cut",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    service: str
    at_s: float
    for_s: float = 0.0
    """A service that is cut, and not ended, is cut for so long."""


def schedule(seconds: float) -> tuple[Fault, ...]:
    """The faults of a load of so many seconds.

    The server is killed before its memory is first looked at (`memory.growth`).
    """
    return (
        Fault(service="mlflow", at_s=0.1 * seconds),
        Fault(service="postgres", at_s=0.25 * seconds),
        Fault(service="store", at_s=0.4 * seconds, for_s=min(CUT_S, seconds / 2)),
        Fault(service="postgres", at_s=0.6 * seconds),
    )


def inflict(fault: Fault, stand: Stand, begun: float) -> dict[str, Any]:
    """Wait for its time, do it, and wait until the service answers again; a row of the report.

    ``begun`` is when the load began, on the clock of `time.monotonic`.

    Raises:
        TrackingError: the service does not end, or does not come back.
    """
    time.sleep(max(0.0, begun + fault.at_s - time.monotonic()))
    done = time.monotonic()
    if fault.for_s:
        with stand.cut(fault.service):
            time.sleep(fault.for_s)
    else:
        stand.end(fault.service)
    while not stand.is_there(fault.service):
        if time.monotonic() - done > fault.for_s + BACK_S:
            raise TrackingError(f"{fault.service} did not answer again within {BACK_S:g} s")
        time.sleep(LOOK_S)
    return {
        "what": f"{TOLD[fault.service]} after {fault.at_s:.0f} s: until it answered",
        "value": round(time.monotonic() - done, 1),
        "unit": "s",
    }
