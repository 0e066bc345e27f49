"""The time of a version against the champion's, measured only on request."""

import dataclasses
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat.runtime import exit_codes
from registry import gates, judge, latency, register, versions
from registry.gates import LatencyGate
from registry.latency import BatchTiming
from registry.verdict import GateResult, Verdict
from tests.support.registry import (
    REGISTRY,
    exit_code,
    make_network,
    make_predictions,
    make_run,
    register_challenger,
    run_promote,
)

pytestmark = REGISTRY
GATE = LatencyGate(ceiling=1.5, why="x")


def timings(candidate_ms: float, champion_ms: float | None) -> list[BatchTiming]:
    return [
        BatchTiming(precision="FP32", batch=32, candidate_ms=candidate_ms, champion_ms=champion_ms)
    ]


@pytest.mark.parametrize(
    ("candidate_ms", "champion_ms", "refusal"),
    [
        (15.0, 10.0, ""),
        (1.0, 10.0, ""),
        (100.0, None, ""),
        (
            16.0,
            10.0,
            "latency FP32 x32: 16.00 ms is 1.60 times the champion's 10.00 ms, over the "
            "ceiling 1.5: train a smaller network",
        ),
    ],
)
def test_a_version_may_be_slower_up_to_the_ceiling(
    candidate_ms: float, champion_ms: float | None, refusal: str
) -> None:
    (result,) = latency.judge_latency(timings(candidate_ms, champion_ms), GATE)
    assert result.refusal == refusal
    assert result.champion == ("-" if champion_ms is None else "10.00 ms")


def test_latency_that_was_not_measured_refuses_nothing_and_is_not_in_the_verdict() -> None:
    (result,) = latency.judge_latency(None, GATE)
    assert result.outcome == "not measured"
    passed = GateResult(gate="accuracy", value="1.0000", why="x")
    verdict = Verdict(results=(passed, result))
    assert verdict.passed
    assert str(verdict) == "passed: accuracy 1.0000"
    off = dataclasses.replace(GATE, off="no two machines are alike here")
    assert [result.outcome for result in latency.judge_latency(timings(9, 1), off)] == ["off"]


def test_networks_take_turns_and_the_median_counts() -> None:
    order: list[str] = []

    def network(name: str, seconds: float) -> latency.RunBatch:
        def run_batch(batch: int) -> None:
            order.append(name)
            time.sleep(seconds * batch)

        return run_batch

    slow, fast = ("a", "FP32"), ("b", "FP32")
    medians_ms = latency.time_interleaved(
        {slow: network("a", 2e-3), fast: network("b", 1e-3)}, batch=2
    )
    assert medians_ms[slow] >= 4
    assert medians_ms[fast] >= 2
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert len(order) == 2 * latency.ROUNDS


def test_both_precisions_of_both_versions_are_timed_on_request(
    store: Path, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    register_challenger(store, model, wrong=30)
    assert run_promote(model) == exit_codes.OK
    run_id = make_run(store, make_predictions(wrong=10))
    network = make_network(tmp_path / versions.NETWORK_INT8)
    MlflowClient().log_artifact(run_id, str(network))
    for name in ("test_accuracy", "int8_accuracy"):
        MlflowClient().log_metric(run_id, name, 0.95)
    number = register.register(run_id, model, "challenger")
    capsys.readouterr()
    assert exit_code(judge.main, number, "--model", model) == exit_codes.OK
    assert "not measured" in capsys.readouterr().out

    candidate, champion = versions.get(model, number), versions.by_alias(model, "champion")
    verdict = judge.judge_version(candidate, champion, gates.load(), measure_latency=True)
    rows = {row.gate: row for row in verdict.results if row.gate.startswith("latency")}
    assert list(rows) == [
        f"latency {precision} x{batch}" for precision in ("FP32", "INT8") for batch in (1, 32)
    ]
    assert all(row.value.endswith(" ms") and row.champion.endswith(" ms") for row in rows.values())
    assert rows["latency INT8 x32"].champion == rows["latency FP32 x32"].champion, (
        "a version without INT8 is served in FP32"
    )
    file = tmp_path / "gates.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[latency]\nceiling = 1e-6\nwhy = 'y'\n")
    arguments = [number, "--model", model, "--latency", "--gates", str(file)]
    assert exit_code(judge.main, *arguments) == exit_codes.NEGATIVE
    assert "times the champion's" in " ".join(capsys.readouterr().out.split())
