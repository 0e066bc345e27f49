"""How long two versions take for a batch of tiles, in the forms that are served."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eurosat import tracking
from eurosat.runtime.progress import track
from registry import versions
from registry.gates import Finding, Latency

GATE = "latency"
BATCHES = (1, 32)
FP32, INT8 = "FP32", "INT8"
FORMS = {FP32: versions.NETWORK, INT8: versions.NETWORK_INT8}
ROUNDS, LEAST_ROUNDS = 30, 3
LONG_ENOUGH_S = 8.0
"""Of each batch's rounds: none begins after it, but for the least that a median is of."""
THREADS = 1
"""Of a session, as in ``serving/pyfunc.py``; more would disturb the one that has its turn next."""

Name = tuple[str, str]
"""Of a network: its run and its form."""
Ask = Callable[[int], object]
"""Lets a network answer so many tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Median milliseconds of two versions for a batch of tiles."""

    form: str
    batch: int
    candidate_ms: float
    champion_ms: float | None
    """None where there is no champion."""


def compare(run_id: str, champion: str | None) -> list[Timed]:
    """Both runs' networks, interleaved, in as many views as they are usually served with.

    A version that lacks a form is served in FP32 in its place, and timed so.
    """
    names = {run: versions.held(run) for run in (run_id, champion) if run}
    forms = [form for form, name in FORMS.items() if any(name in held for held in names.values())]
    networks = {
        (run, form): _opened(run, name)
        for run, held in names.items()
        for form, name in FORMS.items()
        if name in held
    }
    took = {batch: interleaved(networks, batch) for batch in BATCHES}

    def median(run: str, form: str, batch: int) -> float:
        return took[batch][(run, form) if (run, form) in networks else (run, FP32)]

    return [
        Timed(
            form=form,
            batch=batch,
            candidate_ms=median(run_id, form, batch),
            champion_ms=median(champion, form, batch) if champion else None,
        )
        for form in forms
        for batch in BATCHES
    ]


def interleaved(networks: Mapping[Name, Ask], batch: int) -> dict[Name, float]:
    """Median milliseconds of each, one after another in each round, and each first in turn."""
    took: dict[Name, list[float]] = {name: [] for name in networks}
    names = list(networks)
    started = time.monotonic()
    for number in track(range(ROUNDS), ROUNDS, f"timing batches of {batch}", "rounds"):
        if number >= LEAST_ROUNDS and time.monotonic() - started > LONG_ENOUGH_S:
            break
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            begun = time.perf_counter()
            networks[name](batch)
            took[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(times) for name, times in took.items()}


def judge(timed: Sequence[Timed] | None, bar: Latency) -> tuple[Finding, ...]:
    """A row for each form and batch; without a champion nothing is refused, None: nobody asked."""
    if timed is None or bar.off:
        return (Finding(gate=GATE, why=bar.why, off=bar.off, asked=False),)
    return tuple(_find(one, bar) for one in timed)


def _find(timed: Timed, bar: Latency) -> Finding:
    found = Finding(
        gate=f"{GATE} {timed.form} x{timed.batch}",
        value=f"{timed.candidate_ms:.2f} ms",
        why=bar.why,
    )
    if timed.champion_ms is None:
        return found
    ratio = timed.candidate_ms / timed.champion_ms
    refusal = (
        f"{found.gate}: {found.value} is {ratio:.2f} times the champion's "
        f"{timed.champion_ms:.2f} ms, over the ceiling {bar.ceiling:g}"
    )
    return replace(
        found,
        champion=f"{timed.champion_ms:.2f} ms",
        bar=f"{bar.ceiling * timed.champion_ms:.2f} ms",
        refusal="" if ratio <= bar.ceiling else refusal,
    )


def _opened(run_id: str, name: str) -> Ask:
    """Answers about tiles of noise, which take as long as any others."""
    import numpy as np

    from eurosat.models import onnx_session

    with tracking.artifact(run_id, name) as file:
        session = onnx_session.open_session(file, threads=THREADS)
    (_, *shape) = session.get_inputs()[0].shape
    tiles_NHWC = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *shape), np.uint8)

    def ask(batch: int) -> object:
        return session.run(["probabilities"], {onnx_session.TILES: tiles_NHWC[:batch]})

    ask(1)  # the first time takes longer
    return ask
