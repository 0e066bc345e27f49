"""Growth of the platform's memory during the load."""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.platform.fixture import PlatformFixture

SAMPLE_INTERVAL_S = 1.0

Sample = dict[str, float]
"""MiB by service."""

MIN_SAMPLES = 10
"""Samples that `fifths` needs."""


@contextmanager
def sampled(platform: PlatformFixture) -> Iterator[list[Sample]]:
    """Yield a list that grows by one sample per second until the block ends."""
    samples: list[Sample] = []
    stop = threading.Event()

    def sample() -> None:
        start = time.monotonic()
        while not stop.wait(max(0.0, start + len(samples) * SAMPLE_INTERVAL_S - time.monotonic())):
            samples.append(platform.memory_mb())

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def fifths(samples: Sequence[Sample]) -> tuple[Sample, Sample]:
    """Return each service's median in the second fifth, after the warm-up, and in the last."""
    names = sorted({name for sample in samples for name in sample})
    count = len(samples)
    if count < MIN_SAMPLES:
        raise ValueError(
            f"{count} samples are too few, at least {MIN_SAMPLES} are needed: run the load longer"
        )

    def median(part: Sequence[Sample]) -> Sample:
        by_name = {name: [sample[name] for sample in part if name in sample] for name in names}
        return {name: statistics.median(values) for name, values in by_name.items() if values}

    return median(samples[count // 5 : 2 * count // 5]), median(samples[4 * count // 5 :])


def growth(samples: Sequence[Sample]) -> float:
    """Return the memory of all services in the last fifth, divided by that in the second fifth.

    A service that was down for a whole fifth is left out of both.
    """
    before, after = fifths(samples)
    both = before.keys() & after.keys()
    return sum(after[name] for name in both) / sum(before[name] for name in both)
