"""bench-registry: how long a judgement and a rollback take, and how often chance promotes.

`python -m benchmarks.registry [--rounds 5] [--pairs 1000]`
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests

from benchmarks import reports
from eurosat.runtime import logs
from eurosat.runtime.progress import track
from registry import evidence, gates, judge, versions
from registry.metric_gates import PairedCounts, judge_difference, judge_metrics
from registry.verdict import Verdict
from tests.support.mlflow_server import free_port, mlflow_server

TILES, CLASSES = 5400, 10
"""Size of EuroSAT's test fold."""
ACCURACY, DISAGREE = 0.98, 0.02
"""The champion's accuracy, and the share of tiles that only one of the two has right: half of the
errors that two such models make together."""
DIFFERENCES_PP = (-0.5, -0.2, 0.0, 0.2, 0.5, 1.0)
"""True differences of accuracy, in percentage points."""
SERVING_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.02
WHY = "bench-registry"
LENIENT_GATES = """
[accuracy]
floor = 0.0
margin = 1.0
why = "this benchmark measures times, not accuracy"
[difference]
off = "this benchmark measures times, not accuracy"
"""
DATA = "data.synthetic.tiles=1000"

Environment = Mapping[str, str]


def promotion_rate(
    difference_pp: float, limits: gates.Gates, pairs: int, rng: np.random.Generator
) -> float:
    """Return the share of candidates that the gates `accuracy` and `difference` would promote.

    Each pair of models is drawn anew: the champion is right on ACCURACY of all tiles, and the
    candidate's true accuracy is higher by ``difference_pp`` percentage points.
    """
    accuracy_gates = tuple(gate for gate in limits.metrics if gate.metric == "accuracy")
    only_candidate = (DISAGREE + difference_pp / 100) / 2
    only_champion = DISAGREE - only_candidate
    shares = [only_candidate, only_champion, ACCURACY - only_champion]
    passed = 0
    for won, lost, both, _ in rng.multinomial(TILES, [*shares, 1 - sum(shares)], pairs):
        counts = PairedCounts(tiles=TILES, only_candidate=int(won), only_champion=int(lost))
        candidate, champion = ({"accuracy": (both + n) / TILES} for n in (won, lost))
        results = judge_metrics(candidate, champion, accuracy_gates)
        difference = judge_difference(counts, limits.difference)
        passed += Verdict(results=(*results, difference)).passed
    return passed / pairs


def last_word(command: Sequence[str], environment: Environment) -> str:
    """Run one of our commands, and return the last word that it prints."""
    process = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=reports.ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    if process.returncode:
        name = " ".join(command)
        sys.exit(f"error: {name} ended with {process.returncode}:\n{process.stdout}")
    return process.stdout.split()[-1]


def make_version(
    seed: int, rng: np.random.Generator, folder: Path, environment: Environment
) -> str:
    """Train for one epoch, replace the predictions by a random full test fold, and register."""
    run_id = last_word(
        ["eurosat.train", "recipe=demo", DATA, "trainer.epochs=1", f"seed={seed}"], environment
    )
    classes = evidence.read(run_id).classes
    labels = rng.integers(0, CLASSES, TILES)
    guesses = np.where(rng.random(TILES) < ACCURACY, labels, rng.integers(0, CLASSES, TILES))
    probabilities_NK = rng.dirichlet(np.full(CLASSES, 0.05), TILES)
    probabilities_NK[np.arange(TILES), guesses] += 9
    probabilities_NK /= probabilities_NK.sum(axis=1, keepdims=True)
    frame = pd.DataFrame({"sha256": [f"{tile:064d}" for tile in range(TILES)]})
    frame["label"] = [classes[label] for label in labels]
    for k, name in enumerate(classes):
        frame[evidence.PROBABILITY_PREFIX + name] = probabilities_NK[:, k]
    frame.to_parquet(folder / evidence.PREDICTIONS)
    versions.client().log_artifact(run_id, str(folder / evidence.PREDICTIONS))
    return last_word(["registry.register", run_id], environment)


def time_judgement_s(candidate: str, champion: str) -> float:
    started = time.monotonic()
    judge.judge_version(
        versions.get(versions.MODEL, candidate),
        versions.get(versions.MODEL, champion),
        gates.load(),
    )
    return time.monotonic() - started


def served_version(url: str) -> str | None:
    """Return the version that the serving process answers with, or None if there is none."""
    with contextlib.suppress(requests.RequestException, KeyError):
        return str(requests.get(f"{url}/model", timeout=5).json()["model_version"])
    return None


def wait_until_served(url: str, number: str) -> None:
    deadline = time.monotonic() + SERVING_TIMEOUT_S
    while served_version(url) != number:
        if time.monotonic() > deadline:
            sys.exit(f"error: version {number} did not answer within {SERVING_TIMEOUT_S:g} s")
        time.sleep(POLL_INTERVAL_S)


def time_rollback_s(url: str, to: str, environment: Environment) -> float:
    """Measure from the command's start to the serving process that answers with the version."""
    command = ["registry.rollback", "--to", to, "--why", WHY]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=reports.ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    wait_until_served(url, to)
    seconds = time.monotonic() - started
    if process.wait():
        sys.exit("error: the rollback failed")
    return seconds


@contextmanager
def serving(environment: Environment) -> Iterator[str]:
    """Run a serving process; yield its URL."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.server", "--port", str(port), "--processes", "1"],
        cwd=reports.ROOT,
        env=environment,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def promote_two(folder: Path, environment: Environment) -> list[str]:
    """Register and promote two versions; return their numbers."""
    gates_file = folder / "gates.toml"
    gates_file.write_text(LENIENT_GATES)
    last_word(["expectations.validate", DATA], environment)
    rng = np.random.default_rng(0)
    numbers = []
    for seed in range(2):
        numbers.append(make_version(seed, rng, folder, environment))
        options = ["--gates", str(gates_file), "--why", WHY, "--accept-uncommitted"]
        last_word(["registry.promote", numbers[-1], *options], environment)
    return numbers


def time_commands(rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each judgement and rollback, with real MLflow and serving processes."""
    with tempfile.TemporaryDirectory() as temporary, mlflow_server(Path(temporary)) as port:
        os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": str(reports.ROOT)}
        numbers = promote_two(Path(temporary), environment)
        judgements_s = [time_judgement_s(numbers[0], numbers[1]) for _ in range(rounds)]
        with serving(environment) as url:
            wait_until_served(url, numbers[1])
            rollbacks_s = [
                time_rollback_s(url, numbers[number % 2], environment) for number in range(rounds)
            ]
    return judgements_s, rollbacks_s


def promotion_rates(pairs: int) -> dict[float, tuple[float, float]]:
    """Return by true difference: the rates with the default gates, and with better = true."""
    rng, limits = np.random.default_rng(0), gates.load()
    strict = replace(limits, difference=replace(limits.difference, better=True))
    return {
        pp: (promotion_rate(pp, limits, pairs, rng), promotion_rate(pp, strict, pairs, rng))
        for pp in track(DIFFERENCES_PP, len(DIFFERENCES_PP), "drawing pairs", "differences")
    }


def rate_rows(rates: Mapping[float, tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {
            "true difference, pp": f"{pp:+g}",
            "promoted": round(default, 3),
            "with better = true": round(strict, 3),
        }
        for pp, (default, strict) in rates.items()
    ]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="judgements and rollbacks to time")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of models per difference")
    args = parser.parse_args(argv)
    logs.setup("info")
    started = reports.now()
    rates = promotion_rates(args.pairs)
    judgements_s, rollbacks_s = time_commands(args.rounds)
    reports.write(
        "registry",
        started=started,
        n=args.rounds,
        rows=rate_rows(rates),
        pairs=args.pairs,
        tiles=TILES,
        accuracy=ACCURACY,
        disagree=DISAGREE,
        judgements_s=judgements_s,
        rollbacks_s=rollbacks_s,
        goals=[
            reports.goal("registry.judge_s", statistics.median(judgements_s), 10, at_most=True),
            reports.goal("registry.rollback_s", statistics.median(rollbacks_s), 5, at_most=True),
            reports.goal("registry.false_promotion_rate", rates[-0.5][0], 0.05, at_most=True),
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
