"""How long a version takes beside the champion: only where it is asked for."""

import dataclasses
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat.runtime import exit_codes
from registry import gates, judge, latency, register, versions
from registry.gates import Latency
from registry.latency import Timed
from tests.support.registry import (
    REGISTRY,
    challenge,
    exit_code,
    make_network,
    make_predictions,
    make_run,
    run_promote,
)

pytestmark = REGISTRY
BAR = Latency(ceiling=1.5, why="x")


def timed(candidate_ms: float, champion_ms: float | None) -> list[Timed]:
    return [Timed(form="FP32", batch=32, candidate_ms=candidate_ms, champion_ms=champion_ms)]


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
            "ceiling 1.5",
        ),
    ],
)
def test_a_version_may_be_slower_up_to_the_ceiling(
    candidate_ms: float, champion_ms: float | None, refusal: str
) -> None:
    (found,) = latency.judge(timed(candidate_ms, champion_ms), BAR)
    assert found.refusal == refusal
    assert found.champion == ("-" if champion_ms is None else "10.00 ms")


def test_what_nobody_asked_for_refuses_nothing_and_is_not_in_the_verdicts_line() -> None:
    (found,) = latency.judge(None, BAR)
    assert found.verdict == "not asked for"
    passed = gates.Finding(gate="accuracy", value="1.0000", why="x")
    verdict = gates.Verdict(findings=(passed, found))
    assert verdict.passed
    assert str(verdict) == "passed: accuracy 1.0000"
    off = dataclasses.replace(BAR, off="no two machines are alike here")
    assert [one.verdict for one in latency.judge(timed(9, 1), off)] == ["off"]


def test_the_networks_take_turns_and_the_median_is_told() -> None:
    order: list[str] = []

    def network(name: str, seconds: float) -> latency.Ask:
        def ask(batch: int) -> None:
            order.append(name)
            time.sleep(seconds * batch)

        return ask

    slow, fast = ("a", "FP32"), ("b", "FP32")
    took = latency.interleaved({slow: network("a", 2e-3), fast: network("b", 1e-3)}, batch=2)
    assert took[slow] >= 4
    assert took[fast] >= 2
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert len(order) == 2 * latency.ROUNDS


def test_both_forms_of_both_versions_are_timed_where_it_is_asked_for(
    store: Path, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    challenge(store, model, wrong=30)
    assert run_promote(model) == exit_codes.OK
    run_id = make_run(store, make_predictions(wrong=10))
    network = make_network(tmp_path / versions.NETWORK_INT8)
    MlflowClient().log_artifact(run_id, str(network))
    for name in ("test_accuracy", "int8_accuracy"):
        MlflowClient().log_metric(run_id, name, 0.95)
    number = register.register(run_id, model, "challenger")
    capsys.readouterr()
    assert exit_code(judge.main, number, "--model", model) == exit_codes.OK
    assert "not asked for" in capsys.readouterr().out

    candidate, champion = versions.get(model, number), versions.by_alias(model, "champion")
    verdict = judge.judge(candidate, champion, gates.load(), timed=True)
    rows = {one.gate: one for one in verdict.findings if one.gate.startswith("latency")}
    assert list(rows) == [
        f"latency {form} x{batch}" for form in ("FP32", "INT8") for batch in (1, 32)
    ]
    assert all(one.value.endswith(" ms") and one.champion.endswith(" ms") for one in rows.values())
    assert rows["latency INT8 x32"].champion == rows["latency FP32 x32"].champion, (
        "who has no INT8 form is served in FP32"
    )
    file = tmp_path / "gates.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[latency]\nceiling = 1e-6\nwhy = 'y'\n")
    arguments = [number, "--model", model, "--latency", "--gates", str(file)]
    assert exit_code(judge.main, *arguments) == exit_codes.NEGATIVE
    assert "times the champion's" in " ".join(capsys.readouterr().out.split())
