"""Robustness against haze, noise and others: predicted at registration, judged later."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_text

from eurosat import tracking, train
from eurosat.config import compose
from eurosat.data.prepare import PreparedData
from eurosat.evaluation import corruptions
from eurosat.models import onnx_session
from eurosat.runtime import exit_codes
from registry import card, evidence, gates, judge, ledger, register, robustness, versions
from registry.evidence import Predictions
from tests.support.recipes import TINY
from tests.support.registry import (
    MLFLOW_WARNS,
    exit_code,
    make_corrupted,
    make_predictions,
    make_run,
    run_promote,
)

pytestmark = MLFLOW_WARNS


def registered(
    store: Path, model: str, corrupted_wrong: float, wrong: int = 30, leave_out: str | None = None
) -> str:
    predictions = make_predictions(wrong=wrong)
    run_id = make_run(store, predictions, corrupted_wrong=corrupted_wrong, leave_out=leave_out)
    return register.register(run_id, model, "challenger")


def run_judge(model: str, *arguments: str) -> int:
    return exit_code(judge.main, "--model", model, *arguments)


def store_corrupted(store: Path, run_id: str, frame: pd.DataFrame) -> None:
    (store / "other").mkdir(exist_ok=True)
    frame.to_parquet(store / "other" / robustness.FILE)
    MlflowClient().log_artifact(run_id, str(store / "other" / robustness.FILE))


@pytest.mark.usefixtures("tracking_store")
def test_registration_predicts_corrupted_tiles_once(
    tiny_data: PreparedData, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        train.train(compose(TINY), tiny_data, run)
    number = register.register(run.run_id, "m", "challenger")
    stored = robustness.read(run.run_id).predictions
    assert stored is not None
    frame = stored.frame
    test = tiny_data.split.indices("test")
    assert len(frame) == len(test) * len(corruptions.KINDS)
    assert set(frame["tile"]) == set(tiny_data.pack.table["path"].iloc[test])

    rows = [
        tiny_data.pack.table["path"].tolist().index(tile) for tile in frame["tile"][: len(test)]
    ]
    hazy = corruptions.corrupt(tiny_data.pack.tiles_NHWC[rows], "haze", robustness.SEVERITY)
    has_int8 = versions.NETWORK_INT8 in versions.artifact_names(run.run_id)
    name = versions.NETWORK_INT8 if has_int8 else versions.NETWORK
    with tracking.artifact(run.run_id, name) as file:
        expected_NK = onnx_session.probabilities(file, hazy)
    stored_NK = frame[frame["kind"] == "haze"][[f"p/{name}" for name in stored.classes]].to_numpy()
    np.testing.assert_allclose(stored_NK, expected_NK, atol=1e-6)
    assert f"{len(test)} test tiles in one view" in load_text(f"runs:/{run.run_id}/{card.FILE}")

    assert register.register(run.run_id, "m", "challenger") == number
    again = robustness.read(run.run_id).predictions
    assert again is not None
    assert again.sha256 == stored.sha256, "stored predictions are not made again"
    store_corrupted(tmp_path, run.run_id, frame.assign(severity=robustness.SEVERITY + 1))
    assert "other kinds or severities" in robustness.read(run.run_id).fault
    assert register.register(run.run_id, "m", "challenger") == number
    assert not robustness.read(run.run_id).fault
    assert "not predicted" not in caplog.text


def test_without_its_tiles_a_run_is_registered_but_the_gate_refuses_it(
    store: Path, model: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = make_run(store, leave_out=robustness.FILE)
    number = register.register(run_id, model, "challenger")
    (warning,) = [line for line in caplog.messages if "tiles were not predicted" in line]
    assert "\n" not in warning
    remedy = f"run `python -m registry.register {run_id}` on a machine with its tiles"
    assert remedy in warning
    assert remedy in card_of(model, number)
    assert run_judge(model, number) == exit_codes.NEGATIVE
    printed = " ".join(capsys.readouterr().out.split())
    assert f"refused: robustness: run {run_id} has no {robustness.FILE}: {remedy}" in printed


def card_of(model: str, number: str) -> str:
    return load_text(f"runs:/{versions.run_of(versions.get(model, number))}/{card.FILE}")


def test_a_more_accurate_but_less_robust_version_is_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(store, model, 0.2)
    assert run_promote(model) == exit_codes.OK
    frail = registered(store, model, 0.3, wrong=10)
    capsys.readouterr()
    assert run_judge(model, frail) == exit_codes.NEGATIVE
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("refused: ") == 1
    assert (
        "robustness: 0.7000 is under the champion's limit 0.7700 (0.8000 with a margin" in printed
    )
    sturdy = registered(store, model, 0.22, wrong=10)
    assert run_judge(model, sturdy) == exit_codes.OK
    assert "| haze | 0.7800 | 0.9400 |" in card_of(model, sturdy)


def test_an_older_champion_gets_its_predictions_by_registering_its_run_again(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = registered(store, model, 0.2, leave_out=robustness.FILE)
    file = store / "without.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n")
    assert run_promote(model, "--gates", str(file)) == exit_codes.OK, "a file without the gate"
    number = registered(store, model, 0.2, wrong=10)
    assert run_judge(model, number) == exit_codes.NEGATIVE
    run_id = versions.run_of(versions.get(model, first))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{robustness.FILE}: run `python -m registry.register {run_id}`" in printed
    store_corrupted(store, run_id, make_corrupted(make_predictions()))
    assert run_judge(model, number) == exit_codes.OK


def test_predictions_for_corrupted_tiles_are_part_of_the_evidence(store: Path, model: str) -> None:
    number = registered(store, model, 0.2)
    version = versions.get(model, number)
    first = judge.judge_version(version, None, gates.load()).evidence
    assert judge.judge_version(version, None, gates.load()).evidence == first
    store_corrupted(store, versions.run_of(version), make_corrupted(make_predictions(), 0.1))
    assert judge.judge_version(version, None, gates.load()).evidence != first
    assert ledger.entries(model) == []


def test_two_runs_are_compared_on_their_common_corrupted_tiles(store: Path) -> None:
    def corrupted_run(tiles: range, wrong: float) -> str:
        return make_run(store, make_predictions(tiles), corrupted_wrong=wrong)

    first, second = corrupted_run(range(200), 0.0), corrupted_run(range(60, 260), 0.5)
    compared = robustness.compare(first, second)
    assert compared.candidate == 1
    assert compared.champion is not None
    assert 0 < compared.champion < 1
    assert not compared.fault
    excluded = set(make_predictions(range(60, 150))["sha256"])
    few = robustness.compare(first, second, excluded)
    assert "only 50 of 200 corrupted tiles are also the champion's" in few.fault
    assert (few.candidate, few.champion) == (1, None)


def test_the_tiles_are_chosen_by_their_content() -> None:
    ordered = make_predictions(range(400))["sha256"]
    shuffled = ordered.sample(frac=1, random_state=0)
    first, second = (
        series.iloc[robustness.select_tiles(series)].tolist() for series in (ordered, shuffled)
    )
    assert first == second
    assert len(first) == robustness.TILES


def test_every_kind_weighs_the_same_and_invalid_probabilities_give_nan() -> None:
    frame = make_corrupted(make_predictions(range(100)), wrong=0.0)
    frame.loc[frame["kind"] == "haze", ["p/Forest", "p/River", "p/SeaLake"]] = [0.0, 0.0, 0.0]
    frame.loc[frame["kind"] == "haze", "p/River"] = 1.0
    fewer = frame.drop(frame.index[frame["kind"] == "blur"][:50])
    rivers = (frame["label"] == "River").mean()
    mean = (len(corruptions.KINDS) - 1 + rivers) / len(corruptions.KINDS)
    assert robustness.mean_accuracy(Predictions(frame=fewer)) == pytest.approx(mean)
    frame.loc[0, "p/River"] = math.nan
    assert math.isnan(robustness.mean_accuracy(Predictions(frame=frame)))


def test_a_file_that_is_no_table_of_predictions_is_ignored(store: Path) -> None:
    run_id = make_run(store)
    store_corrupted(store, run_id, make_corrupted(make_predictions()).drop(columns="kind"))
    assert "lacks kind" in robustness.read(run_id).fault
    (store / "other" / robustness.FILE).write_text("not Parquet")
    MlflowClient().log_artifact(run_id, str(store / "other" / robustness.FILE))
    assert "is not a Parquet table" in robustness.read(run_id).fault
    assert evidence.read(run_id).classes
