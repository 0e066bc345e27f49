"""What Prometheus is told: counted by each process, told for all of them together."""

import os
from functools import cache
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from serving.processes import METRICS

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Bounds of the histogram."""


class VersionLabels(NamedTuple):
    """Labels of the gauge that counts the processes serving a version."""

    version: str
    run_id: str
    precision: str


class Metrics:
    """Counters and gauges of this process, and the text of all processes together."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry}
        summed = made | {"multiprocess_mode": "livesum"}
        requests = Counter("eurosat_requests", "Requests answered", ("path", "status"), **made)
        seconds = Histogram(
            "eurosat_request_seconds",
            "From a request's head to its answer",
            ("path",),
            buckets=SECONDS,
            **made,
        )
        tiles = Counter("eurosat_tiles", "Tiles answered", ("version", "label"), **made)
        # looking a child up by its labels costs more than counting
        self._requests, self._seconds = cache(requests.labels), cache(seconds.labels)
        self._tiles = cache(tiles.labels)
        self._waiting = Gauge("eurosat_tiles_waiting", "Tiles that wait for their turn", **summed)
        self._open = Gauge("eurosat_requests_open", "Requests being read or answered", **summed)
        self._live = Gauge(
            "eurosat_model",
            "Processes that answer by a version",
            VersionLabels._fields,
            **summed,
        )
        self._swaps = Counter("eurosat_swaps", "Versions swapped in by a process", **made)
        self._refused = Counter(
            "eurosat_versions_refused", "Versions that failed a process's check", **made
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests(path, status).inc()
        self._seconds(path).observe(seconds)

    def refused_unread(self, path: str) -> None:
        """It took no time that would tell anything."""
        self._requests(path, 429).inc()

    def tile(self, version: str | None, label: str) -> None:
        self._tiles(version, label).inc()

    def swapped(self, old: VersionLabels | None, new: VersionLabels) -> None:
        if old is not None:
            self._swaps.inc()
            self._live.labels(*old).set(0)
        self._live.labels(*new).set(1)

    def refused(self) -> None:
        self._refused.inc()

    def at_present(self, waiting: int, asked: int) -> None:
        self._waiting.set(waiting)
        self._open.set(asked)

    def text(self) -> bytes:
        if METRICS not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
