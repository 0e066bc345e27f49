"""The machine's own metrics, sampled beside a run."""

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

SAMPLE_INTERVAL_S = 5.0
"""Seconds between two samples."""

LogMetrics = Callable[[Mapping[str, float], int], None]
"""Takes metrics and their step."""


class SystemMetrics:
    """Samples MLflow's own collectors, but logs through the run like everything else."""

    def __init__(self, log_metrics: LogMetrics, age_s: float = 0) -> None:
        """``age_s`` is the run's: steps go on where a process that was killed has stopped."""
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._log_metrics = log_metrics
        self._collectors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no NVIDIA card or no pynvml: nothing to sample
            self._collectors.append(GPUMonitor())
        self._stopped = threading.Event()
        self._step = int(age_s / SAMPLE_INTERVAL_S)
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
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
                metrics = {f"system/{k}": v for k, v in collector.aggregate_metrics().items()}
                collector.clear_metrics()
                self._log_metrics(metrics, self._step)
            except Exception as error:  # noqa: BLE001 - a thread's boundary: training goes on
                log.warning("system metrics were not logged: %s", error)
        self._step += 1
