"""Whether the platform's memory is flat."""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.platform.fixture import Stand

SAMPLE_S = 1.0

Sample = dict[str, float]
"""MB by service."""

LEAST = 10
"""Samples that fifths are taken of."""


@contextmanager
def sampled(stand: Stand) -> Iterator[list[Sample]]:
    """The list grows by one sample a second until the block ends."""
    samples: list[Sample] = []
    over = threading.Event()

    def look() -> None:
        begun = time.monotonic()
        while not over.wait(max(0.0, begun + len(samples) * SAMPLE_S - time.monotonic())):
            samples.append(stand.memory_mb())

    thread = threading.Thread(target=look, name="memory", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def fifths(samples: Sequence[Sample]) -> tuple[Sample, Sample]:
    """Of each service the median of the second fifth, after it has warmed up, and of the last."""
    names = sorted({name for sample in samples for name in sample})
    count = len(samples)
    if count < LEAST:
        raise ValueError(f"{count} samples are no fifths: at least {LEAST}, so a longer time")

    def median(part: Sequence[Sample]) -> Sample:
        known = {name: [one[name] for one in part if name in one] for name in names}
        return {name: statistics.median(values) for name, values in known.items() if values}

    return median(samples[count // 5 : 2 * count // 5]), median(samples[4 * count // 5 :])


def growth(samples: Sequence[Sample]) -> float:
    """All services together in the last fifth of the time, over the second fifth.

    A service that was away for the whole of one of them is left out of both.
    """
    before, after = fifths(samples)
    both = before.keys() & after.keys()
    return sum(after[name] for name in both) / sum(before[name] for name in both)
