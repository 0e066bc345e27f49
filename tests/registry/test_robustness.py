"""What weather and sensors do to a version: asked at registration, judged from what is stored."""

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


def kept(store: Path, run_id: str, frame: pd.DataFrame) -> None:
    (store / "other").mkdir(exist_ok=True)
    frame.to_parquet(store / "other" / robustness.FILE)
    MlflowClient().log_artifact(run_id, str(store / "other" / robustness.FILE))


@pytest.mark.usefixtures("tracking_store")
def test_registration_asks_the_network_about_corrupted_tiles_once(
    tiny_data: PreparedData, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        train.train(compose(TINY), tiny_data, run)
    number = register.register(run.run_id, "m", "challenger")
    asked = robustness.read(run.run_id).predictions
    assert asked is not None
    frame = asked.frame
    test = tiny_data.split.indices("test")
    assert len(frame) == len(test) * len(corruptions.KINDS)
    assert set(frame["tile"]) == set(tiny_data.pack.table["path"].iloc[test])

    rows = [
        tiny_data.pack.table["path"].tolist().index(tile) for tile in frame["tile"][: len(test)]
    ]
    hazy = corruptions.corrupt(tiny_data.pack.tiles_NHWC[rows], "haze", robustness.SEVERITY)
    held = versions.held(run.run_id)
    name = versions.NETWORK_INT8 if versions.NETWORK_INT8 in held else versions.NETWORK
    with tracking.artifact(run.run_id, name) as file:
        expected_NK = onnx_session.probabilities(file, hazy)
    told_NK = frame[frame["kind"] == "haze"][[f"p/{name}" for name in asked.classes]].to_numpy()
    np.testing.assert_allclose(told_NK, expected_NK, atol=1e-6)
    assert f"{len(test)} test tiles in one view" in load_text(f"runs:/{run.run_id}/{card.FILE}")

    assert register.register(run.run_id, "m", "challenger") == number
    again = robustness.read(run.run_id).predictions
    assert again is not None
    assert again.sha256 == asked.sha256, "what the run has is not asked again"
    kept(tmp_path, run.run_id, frame.assign(severity=robustness.SEVERITY + 1))
    assert "other kinds or severities" in robustness.read(run.run_id).fault
    assert register.register(run.run_id, "m", "challenger") == number
    assert not robustness.read(run.run_id).fault
    assert "not tried" not in caplog.text


def test_without_its_tiles_a_run_is_registered_and_the_gate_refuses_it(
    store: Path, model: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = make_run(store, leave_out=robustness.FILE)
    number = register.register(run_id, model, "challenger")
    (warned,) = [one for one in caplog.messages if "corrupted tiles were not tried" in one]
    assert "\n" not in warned
    remedy = f"`python -m registry.register {run_id}` asks it, where its tiles are"
    assert remedy in warned
    assert remedy in card_of(model, number)
    assert run_judge(model, number) == exit_codes.NEGATIVE
    told = " ".join(capsys.readouterr().out.split())
    assert f"refused: robustness: run {run_id} has no {robustness.FILE}: {remedy}" in told


def card_of(model: str, number: str) -> str:
    return load_text(f"runs:/{versions.run_of(versions.get(model, number))}/{card.FILE}")


def test_a_version_that_fares_worse_in_bad_weather_is_refused_though_it_is_more_often_right(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(store, model, 0.2)
    assert run_promote(model) == exit_codes.OK
    frail = registered(store, model, 0.3, wrong=10)
    capsys.readouterr()
    assert run_judge(model, frail) == exit_codes.NEGATIVE
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("refused: ") == 1
    assert "robustness: 0.7000 is under the champion's bar 0.7700 (0.8000 with a margin" in told
    sturdy = registered(store, model, 0.22, wrong=10)
    assert run_judge(model, sturdy) == exit_codes.OK
    assert "| haze | 0.7800 | 0.9400 |" in card_of(model, sturdy)


def test_a_champion_of_before_this_gate_is_asked_by_registering_its_run_again(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = registered(store, model, 0.2, leave_out=robustness.FILE)
    file = store / "without.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n")
    assert run_promote(model, "--gates", str(file)) == exit_codes.OK, "a file without the gate"
    number = registered(store, model, 0.2, wrong=10)
    assert run_judge(model, number) == exit_codes.NEGATIVE
    run_id = versions.run_of(versions.get(model, first))
    told = " ".join(capsys.readouterr().out.split())
    assert f"{robustness.FILE}: `python -m registry.register {run_id}`" in told
    kept(store, run_id, make_corrupted(make_predictions()))
    assert run_judge(model, number) == exit_codes.OK


def test_what_was_asked_is_part_of_the_evidence(store: Path, model: str) -> None:
    number = registered(store, model, 0.2)
    version = versions.get(model, number)
    first = judge.judge(version, None, gates.load()).evidence
    assert judge.judge(version, None, gates.load()).evidence == first
    kept(store, versions.run_of(version), make_corrupted(make_predictions(), 0.1))
    assert judge.judge(version, None, gates.load()).evidence != first
    assert ledger.entries(model) == []


def test_two_runs_are_compared_on_the_tiles_that_both_were_asked_about(store: Path) -> None:
    def asked(tiles: range, wrong: float) -> str:
        return make_run(store, make_predictions(tiles), corrupted_wrong=wrong)

    one, other = asked(range(200), 0.0), asked(range(60, 260), 0.5)
    compared = robustness.compare(one, other)
    assert compared.candidate == 1
    assert compared.champion is not None
    assert 0 < compared.champion < 1
    assert not compared.fault
    known = set(make_predictions(range(60, 150))["sha256"])
    few = robustness.compare(one, other, known)
    assert "only 50 of 200 corrupted tiles are the champion's too" in few.fault
    assert (few.candidate, few.champion) == (1, None)


def test_the_tiles_are_chosen_by_their_content() -> None:
    one = make_predictions(range(400))["sha256"]
    other = one.sample(frac=1, random_state=0)
    chosen = [series.iloc[robustness.chosen(series)].tolist() for series in (one, other)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == robustness.TILES


def test_every_kind_weighs_the_same_and_answers_that_are_none_give_no_figure() -> None:
    frame = make_corrupted(make_predictions(range(100)), wrong=0.0)
    frame.loc[frame["kind"] == "haze", ["p/Forest", "p/River", "p/SeaLake"]] = [0.0, 0.0, 0.0]
    frame.loc[frame["kind"] == "haze", "p/River"] = 1.0
    fewer = frame.drop(frame.index[frame["kind"] == "blur"][:50])
    rivers = (frame["label"] == "River").mean()
    mean = (len(corruptions.KINDS) - 1 + rivers) / len(corruptions.KINDS)
    assert robustness.accuracy(Predictions(frame=fewer)) == pytest.approx(mean)
    frame.loc[0, "p/River"] = math.nan
    assert math.isnan(robustness.accuracy(Predictions(frame=frame)))


def test_a_file_that_is_no_table_of_answers_counts_for_nothing(store: Path) -> None:
    run_id = make_run(store)
    kept(store, run_id, make_corrupted(make_predictions()).drop(columns="kind"))
    assert "lacks kind" in robustness.read(run_id).fault
    (store / "other" / robustness.FILE).write_text("not Parquet")
    MlflowClient().log_artifact(run_id, str(store / "other" / robustness.FILE))
    assert "is no Parquet file" in robustness.read(run_id).fault
    assert evidence.read(run_id).classes
