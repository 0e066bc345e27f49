"""How long two versions take for a batch of tiles, at the precisions that are served."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eurosat import tracking
from eurosat.runtime.progress import track
from registry import versions
from registry.gates import LatencyGate
from registry.verdict import GateResult

GATE = "latency"
BATCH_SIZES = (1, 32)
FP32, INT8 = "FP32", "INT8"
PRECISIONS = {FP32: versions.NETWORK, INT8: versions.NETWORK_INT8}
"""The run's artifact of each precision."""
ROUNDS, MIN_ROUNDS = 30, 3
MAX_TIMING_S = 8.0
"""After this long no further round of a batch size begins, except the first MIN_ROUNDS."""
THREADS = 1
"""Threads of a session, as in ``serving/pyfunc.py``; more would slow down the next network."""

NetworkKey = tuple[str, str]
"""Run id and precision of a network."""
RunBatch = Callable[[int], object]
"""Runs a network on a batch of this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTiming:
    """Median time of two versions for a batch, in milliseconds."""

    precision: str
    batch: int
    """Batch size in tiles."""
    candidate_ms: float
    champion_ms: float | None
    """None if there is no champion."""


def compare(run_id: str, champion: str | None) -> list[BatchTiming]:
    """Time the networks of both runs in turns, with their default number of views.

    A version without INT8 is served in FP32, so its FP32 time stands in for it.
    """
    artifacts = {run: versions.artifact_names(run) for run in (run_id, champion) if run}
    precisions = [
        precision
        for precision, name in PRECISIONS.items()
        if any(name in names for names in artifacts.values())
    ]
    networks = {
        (run, precision): _open_network(run, name)
        for run, names in artifacts.items()
        for precision, name in PRECISIONS.items()
        if name in names
    }
    medians_ms = {batch: time_interleaved(networks, batch) for batch in BATCH_SIZES}

    def median_ms(run: str, precision: str, batch: int) -> float:
        key = (run, precision) if (run, precision) in networks else (run, FP32)
        return medians_ms[batch][key]

    return [
        BatchTiming(
            precision=precision,
            batch=batch,
            candidate_ms=median_ms(run_id, precision, batch),
            champion_ms=median_ms(champion, precision, batch) if champion else None,
        )
        for precision in precisions
        for batch in BATCH_SIZES
    ]


def time_interleaved(
    networks: Mapping[NetworkKey, RunBatch], batch: int
) -> dict[NetworkKey, float]:
    """Return each network's median milliseconds; each round starts with another network."""
    times_ms: dict[NetworkKey, list[float]] = {key: [] for key in networks}
    keys = list(networks)
    started = time.monotonic()
    for number in track(range(ROUNDS), ROUNDS, f"timing batches of {batch}", "rounds"):
        if number >= MIN_ROUNDS and time.monotonic() - started > MAX_TIMING_S:
            break
        shift = number % len(keys)
        for key in (*keys[shift:], *keys[:shift]):
            batch_started = time.perf_counter()
            networks[key](batch)
            times_ms[key].append(1000 * (time.perf_counter() - batch_started))
    return {key: statistics.median(times) for key, times in times_ms.items()}


def judge_latency(
    timings: Sequence[BatchTiming] | None, gate: LatencyGate
) -> tuple[GateResult, ...]:
    """Return a result per timing; without a champion none refuses. None: nothing was measured."""
    if timings is None or gate.off:
        return (GateResult(gate=GATE, why=gate.why, off=gate.off, measured=False),)
    return tuple(_judge_timing(timing, gate) for timing in timings)


def _judge_timing(timing: BatchTiming, gate: LatencyGate) -> GateResult:
    result = GateResult(
        gate=f"{GATE} {timing.precision} x{timing.batch}",
        value=f"{timing.candidate_ms:.2f} ms",
        why=gate.why,
    )
    if timing.champion_ms is None:
        return result
    ratio = timing.candidate_ms / timing.champion_ms
    refusal = (
        f"{result.gate}: {result.value} is {ratio:.2f} times the champion's "
        f"{timing.champion_ms:.2f} ms, over the ceiling {gate.ceiling:g}: train a smaller network"
    )
    return replace(
        result,
        champion=f"{timing.champion_ms:.2f} ms",
        limit=f"{gate.ceiling * timing.champion_ms:.2f} ms",
        refusal="" if ratio <= gate.ceiling else refusal,
    )


def _open_network(run_id: str, name: str) -> RunBatch:
    """Open a network, warmed up, that runs on noise, which takes as long as other tiles."""
    import numpy as np

    from eurosat.models import onnx_session

    with tracking.artifact(run_id, name) as file:
        session = onnx_session.open_session(file, threads=THREADS)
    (_, *shape) = session.get_inputs()[0].shape
    largest = (max(BATCH_SIZES), *shape)
    tiles_NHWC = np.random.default_rng(0).integers(0, 256, largest, np.uint8)

    def run_batch(batch: int) -> object:
        return session.run(["probabilities"], {onnx_session.TILES: tiles_NHWC[:batch]})

    run_batch(1)  # the first run is slower
    return run_batch
