"""Sample the metrics of this machine while a run goes on."""

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

SAMPLE_INTERVAL_S = 5.0
"""Time between two samples."""

LogMetrics = Callable[[Mapping[str, float], int], None]
"""Function that logs metrics with their step."""


class SystemMetrics:
    """Samples MLflow's collectors in a thread, and logs through the run like everything else."""

    def __init__(self, log_metrics: LogMetrics, age_s: float = 0) -> None:
        """Start sampling. The first step follows from ``age_s``, the age of a continued run."""
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._log_metrics = log_metrics
        self._collectors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no NVIDIA GPU, or no pynvml
            self._collectors.append(GPUMonitor())
        self._stopped = threading.Event()
        self._step = int(age_s / SAMPLE_INTERVAL_S)
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop."""
        self._stopped.set()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            self._sample()
            if self._stopped.wait(SAMPLE_INTERVAL_S):
                self._sample()
                return

    def _sample(self) -> None:
        for collector in self._collectors:
            try:
                collector.collect_metrics()
                sample = collector.aggregate_metrics()
                collector.clear_metrics()
                self._log_metrics({f"system/{k}": v for k, v in sample.items()}, self._step)
            except Exception as error:  # noqa: BLE001 - a thread's boundary: training goes on
                log.warning("cannot log system metrics: %s", error)
        self._step += 1
