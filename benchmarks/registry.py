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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import requests

from benchmarks import reports
from eurosat.runtime import logs
from eurosat.runtime.progress import track
from registry import evidence, gates, judge, versions
from tests.support.mlflow_server import free_port, mlflow_server

TILES, CLASSES = 5400, 10
"""EuroSAT's test fold."""
ACCURACY, DISAGREE = 0.98, 0.02
"""Of the champion; and the share of tiles that only one of the two has right: half of what two such
models have wrong between them."""
DIFFERENCES_PP = (-0.5, -0.2, 0.0, 0.2, 0.5, 1.0)
WAIT_S = 60.0
LENIENT = """
[accuracy]
floor = 0.0
margin = 1.0
why = "how long it takes is measured here, and not how well it does"
[difference]
off = "as above"
"""
DATA = "data.synthetic.tiles=1000"


def promoted(
    difference_pp: float, bars: gates.Gates, pairs: int, rng: np.random.Generator
) -> float:
    """Share of candidates that the gates on accuracy and on chance would promote.

    Each pair of models is drawn anew: the champion is right on ACCURACY of all tiles, and the
    candidate truly better by so many percentage points.
    """
    figure = tuple(gate for gate in bars.figures if gate.metric == "accuracy")
    better = (DISAGREE + difference_pp / 100) / 2
    shares = [better, DISAGREE - better, ACCURACY - (DISAGREE - better)]
    passed = 0
    for won, lost, both, _ in rng.multinomial(TILES, [*shares, 1 - sum(shares)], pairs):
        paired = gates.Paired(tiles=TILES, only_candidate=int(won), only_champion=int(lost))
        candidate, champion = ({"accuracy": (both + n) / TILES} for n in (won, lost))
        findings = gates.judge(candidate, champion, figure)
        chance = gates.judge_difference(paired, bars.difference)
        passed += gates.Verdict(findings=(*findings, chance)).passed
    return passed / pairs


def said(command: Sequence[str], environment: dict[str, str]) -> str:
    """The last word of a verb of ours."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=reports.ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout.split()[-1]


def made(seed: int, rng: np.random.Generator, folder: Path, environment: dict[str, str]) -> str:
    """A version of a network trained for a moment, its predictions drawn for a whole test fold."""
    run_id = said(
        ["eurosat.train", "recipe=demo", DATA, "trainer.epochs=1", f"seed={seed}"], environment
    )
    known = evidence.read(run_id).classes
    labels = rng.integers(0, CLASSES, TILES)
    guesses = np.where(rng.random(TILES) < ACCURACY, labels, rng.integers(0, CLASSES, TILES))
    probabilities_NK = rng.dirichlet(np.full(CLASSES, 0.05), TILES)
    probabilities_NK[np.arange(TILES), guesses] += 9
    probabilities_NK /= probabilities_NK.sum(axis=1, keepdims=True)
    frame = pd.DataFrame({"sha256": [f"{tile:064d}" for tile in range(TILES)]})
    frame["label"] = [known[label] for label in labels]
    for k, name in enumerate(known):
        frame[evidence.PREFIX + name] = probabilities_NK[:, k]
    frame.to_parquet(folder / evidence.PREDICTIONS)
    versions.client().log_artifact(run_id, str(folder / evidence.PREDICTIONS))
    return said(["registry.register", run_id], environment)


def judged_s(candidate: str, champion: str) -> float:
    started = time.monotonic()
    judge.judge(
        versions.get(versions.MODEL, candidate),
        versions.get(versions.MODEL, champion),
        gates.load(),
    )
    return time.monotonic() - started


def answering(url: str) -> str | None:
    """The version that answers."""
    with contextlib.suppress(requests.RequestException, KeyError):
        return str(requests.get(f"{url}/model", timeout=5).json()["model_version"])
    return None


def until(url: str, number: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while answering(url) != number:
        if time.monotonic() > deadline:
            sys.exit(f"error: version {number} did not answer within {WAIT_S:g} s")
        time.sleep(0.02)


def rolled_back_s(url: str, to: str, environment: dict[str, str]) -> float:
    """From the command's start to the serving process that answers with the old version."""
    command = ["registry.rollback", "--to", to, "--why", "bench-registry"]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=reports.ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    until(url, to)
    seconds = time.monotonic() - started
    if process.wait():
        sys.exit("error: the rollback failed")
    return seconds


def lived(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each judgement and of each rollback, on a real server with a serving process."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary, mlflow_server(Path(temporary)) as port:
        folder = Path(temporary)
        os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": str(reports.ROOT)}
        (folder / "gates.toml").write_text(LENIENT)
        said(["expectations.validate", DATA], environment)
        numbers = []
        for seed in range(2):
            numbers.append(made(seed, rng, folder, environment))
            lenient = ["--gates", str(folder / "gates.toml"), "--why", "bench-registry"]
            lenient += ["--accept-uncommitted"]
            said(["registry.promote", numbers[-1], *lenient], environment)
        judgements = [judged_s(numbers[0], numbers[1]) for _ in range(rounds)]
        served = free_port()
        serving = subprocess.Popen(
            [sys.executable, "-m", "serving.server", "--port", str(served), "--processes", "1"],
            cwd=reports.ROOT,
            env=environment,
        )
        url = f"http://127.0.0.1:{served}"
        try:
            until(url, numbers[1])
            rollbacks = [
                rolled_back_s(url, numbers[number % 2], environment) for number in range(rounds)
            ]
        finally:
            serving.terminate()
            serving.wait(timeout=30)
    return judgements, rollbacks


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1000, help="of models, at each difference")
    args = parser.parse_args(argv)
    logs.setup("info")
    started, rng, bars = reports.now(), np.random.default_rng(0), gates.load()
    strict = replace(bars, difference=replace(bars.difference, better=True))
    rates = {
        pp: [promoted(pp, one, args.pairs, rng) for one in (bars, strict)]
        for pp in track(DIFFERENCES_PP, len(DIFFERENCES_PP), "drawing pairs", "differences")
    }
    judgements, rollbacks = lived(args.rounds)
    rows = [
        {
            "true difference, pp": f"{pp:+g}",
            "promoted": round(usual, 3),
            "with better = true": round(better, 3),
        }
        for pp, (usual, better) in rates.items()
    ]
    reports.write(
        "registry",
        started=started,
        n=args.rounds,
        rows=rows,
        pairs=args.pairs,
        tiles=TILES,
        accuracy=ACCURACY,
        disagree=DISAGREE,
        judgements_s=judgements,
        rollbacks_s=rollbacks,
        goals=[
            reports.goal("registry.judge_s", statistics.median(judgements), 10, at_most=True),
            reports.goal("registry.rollback_s", statistics.median(rollbacks), 5, at_most=True),
            reports.goal("registry.false_promotion_rate", rates[-0.5][0], 0.05, at_most=True),
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
