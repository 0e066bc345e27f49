"""Metrics for Prometheus: each process counts, and any process reports the sum of all."""

import os
from functools import cache
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from serving.processes import METRICS_VARIABLE

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class VersionLabels(NamedTuple):
    """Labels of the gauge that counts the processes serving a version."""

    version: str
    run_id: str
    precision: str


class Metrics:
    """Counters and gauges of this process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry}
        summed = common | {"multiprocess_mode": "livesum"}
        requests = Counter("eurosat_requests", "Requests answered", ("path", "status"), **common)
        seconds = Histogram(
            "eurosat_request_seconds",
            "From the head of a request to its answer",
            ("path",),
            buckets=LATENCY_BUCKETS_S,
            **common,
        )
        tiles = Counter("eurosat_tiles", "Tiles predicted", ("version", "label"), **common)
        # looking a child up by its labels costs more than counting
        self._requests, self._seconds = cache(requests.labels), cache(seconds.labels)
        self._tiles = cache(tiles.labels)
        self._waiting = Gauge("eurosat_tiles_waiting", "Tiles that wait for a batch", **summed)
        self._open = Gauge("eurosat_requests_open", "Requests being read or answered", **summed)
        self._bytes = Gauge("eurosat_request_bytes", "Bodies and answers in memory", **summed)
        self._serving = Gauge(
            "eurosat_model",
            "Processes that serve a version",
            VersionLabels._fields,
            **summed,
        )
        self._swaps = Counter("eurosat_swaps", "Versions swapped in by a process", **common)
        self._refused_versions = Counter(
            "eurosat_versions_refused", "Versions that failed a process's self-test", **common
        )

    def record_request(self, path: str, status: int, seconds: float) -> None:
        self._requests(path, status).inc()
        self._seconds(path).observe(seconds)

    def record_unread_rejection(self, path: str) -> None:
        """Count a 429, but not its time, which says nothing about the model."""
        self._requests(path, 429).inc()

    def record_tile(self, version: str | None, label: str) -> None:
        self._tiles(version, label).inc()

    def record_swap(self, old: VersionLabels | None, new: VersionLabels) -> None:
        if old is not None:
            self._swaps.inc()
            self._serving.labels(*old).set(0)
        self._serving.labels(*new).set(1)

    def record_refused_version(self) -> None:
        self._refused_versions.inc()

    def set_gauges(self, waiting: int, in_flight: int, size: int) -> None:
        """Set tiles that wait, requests that are open, and the bytes of these in memory."""
        self._waiting.set(waiting)
        self._open.set(in_flight)
        self._bytes.set(size)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format, of all processes of this server."""
        if METRICS_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return generate_latest(merged)
