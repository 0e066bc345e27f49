"""What is stored of a version decides: leaks, changed files, other interfaces, lost lineage."""

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from registry import gates, judge, ledger, register, versions
from tests.support.registry import (
    CLASSES,
    REGISTRY,
    TAGS,
    challenge,
    exit_code,
    make_predictions,
    make_run,
    run_promote,
)

pytestmark = REGISTRY


def run_judge(model: str, *arguments: str) -> int:
    return exit_code(judge.main, "--model", model, *arguments)


def files_of(model: str, number: str) -> Path:
    """Where the store keeps a version's files."""
    return Path(str(versions.get(model, number).source).removeprefix("file://"))


def test_a_judgement_shows_every_gate_and_changes_nothing(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = challenge(store, model, wrong=30)
    assert run_promote(model) == 0
    better, worse = (challenge(store, model, wrong=wrong) for wrong in (10, 60))
    capsys.readouterr()
    assert run_judge(model, better) == 0
    told = capsys.readouterr().out
    for gate in (
        "data_validation",
        "leakage",
        "lineage",
        "committed",
        "signature",
        "files",
        "test_tiles",
        "accuracy",
        "worst_recall",
        "recall_drop",
        "ece",
        "robustness",
        "onnx_difference",
        "int8_loss",
        "size_mb",
        "difference",
        "latency",
    ):
        assert gate in told
    assert run_judge(model, worse) == 1
    told = capsys.readouterr().out
    assert "refused: accuracy: 0.9000 is under the champion's bar 0.9500" in told
    assert "difference: worse than the champion, 0 tiles won and 30 lost" in told
    assert run_judge(model, worse, "--against", better) == 1
    assert run_judge(model, first, "--against", worse) == 0
    assert "verdict" not in versions.get(model, better).tags
    assert len(ledger.entries(model)) == 1


def test_tiles_that_were_learned_from_are_no_test(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = make_predictions()
    run_id = make_run(store, predictions)
    split = Path(download_artifacts(f"runs:/{run_id}/split.csv", dst_path=str(store / run_id)))
    rows = [f"a.jpg,{sha256},Forest,train" for sha256 in predictions["sha256"][:7]]
    split.write_text("\n".join(["tile,sha256,class,fold", *rows]) + "\n")
    MlflowClient().log_artifact(run_id, str(split))
    number = register.register(run_id, model, "challenger")
    assert run_judge(model, number) == 1
    assert "refused: leakage: 7 of 600 test tiles were learned from" in capsys.readouterr().out


def test_a_file_that_was_changed_after_registration_is_found(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = challenge(store, model, wrong=30)
    folder = files_of(model, number)
    assert run_judge(model, number) == 0
    network = next(folder.rglob("model.onnx"))
    network.write_bytes(network.read_bytes() + b" ")
    assert run_judge(model, number) == 1
    assert "model.onnx differ from what was registered" in capsys.readouterr().out


def test_a_file_that_would_be_unpickled_is_refused_though_it_was_registered(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = challenge(store, model, wrong=30)
    folder = files_of(model, number)
    (folder / "extra.pkl").write_bytes(b"cos\nsystem\n")
    told = json.dumps(register.listed(folder))
    MlflowClient().set_model_version_tag(model, number, versions.FILES, told)
    assert run_judge(model, number) == 1
    assert "files: extra.pkl could be executed" in capsys.readouterr().out


def test_a_network_that_its_run_has_not_trained_is_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As somebody may make a version by MLflow's API, with the figures of a better run."""
    number = challenge(store, model, wrong=30)
    folder = files_of(model, number)
    network = next(folder.rglob("model.onnx"))
    network.write_bytes(network.read_bytes() + b" ")
    told = json.dumps(register.listed(folder))
    MlflowClient().set_model_version_tag(model, number, versions.FILES, told)
    assert run_judge(model, number) == 1
    assert "model.onnx is not the network that its run has trained" in capsys.readouterr().out
    MlflowClient().set_model_version_tag(model, number, versions.FILES, "no JSON")
    assert run_judge(model, number) == 1
    assert "files: their sha256 was not recorded" in capsys.readouterr().out


def test_what_is_not_stored_refuses(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = challenge(store, model, wrong=30)
    run_id = versions.run_of(versions.get(model, number))
    MlflowClient().delete_model_version_tag(model, number, versions.FILES)
    MlflowClient().delete_tag(run_id, "code.commit")
    assert run_judge(model, number) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "files: their sha256 was not recorded" in told
    assert "size_mb: the candidate has no such figure" in told
    assert "lineage: the run does not say code.commit" in told


@pytest.mark.parametrize(
    ("commit", "refusal"),
    [
        ("unknown", "lineage: the commit of the code is unknown: train where git knows it, or"),
        (f"{'a' * 40}-dirty", f"committed: the code differed from its commit {'a' * 12}: commit"),
    ],
)
def test_code_that_no_commit_holds_is_refused_unless_that_is_accepted_and_entered(
    store: Path,
    model: str,
    commit: str,
    refusal: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run_id = make_run(store, tags=TAGS | {"code.commit": commit})
    number = register.register(run_id, model, "challenger")
    assert run_judge(model, number) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert f"refused: {refusal}" in told
    assert told.count("refused: ") == 1
    file = tmp_path / "gates.toml"
    file.write_text(
        "[accuracy]\nfloor = 0.9\nwhy = 'x'\n"
        "[lineage]\noff = 'no git here'\n[committed]\noff = 'no git here'\n"
    )
    assert run_judge(model, number, "--gates", str(file)) == 0
    assert run_judge(model, number, "--accept-uncommitted") == 0
    assert run_promote(model) == 1
    assert run_promote(model, "--accept-uncommitted") == 0
    noted = f"the code that made it is not committed ({commit[:12]}), which was accepted"
    assert noted in ledger.entries(model)[-1].verdict


def test_a_commit_needs_no_acceptance(store: Path, model: str) -> None:
    version = versions.get(model, challenge(store, model, wrong=30))
    verdict = judge.judge(version, None, gates.load(), accept_uncommitted=True)
    assert "not committed" not in str(verdict)


def test_other_classes_are_another_interface(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    challenge(store, model, wrong=30)
    assert run_promote(model) == 0
    renamed = make_predictions(wrong=10).rename(columns={"p/SeaLake": "p/Lake"})
    renamed["label"] = renamed["label"].replace("SeaLake", "Lake")
    number = challenge(store, model, wrong=10)
    run_id = versions.run_of(versions.get(model, number))
    file = store / "renamed" / "predictions.parquet"
    file.parent.mkdir()
    renamed.to_parquet(file)
    MlflowClient().log_artifact(run_id, str(file))
    assert run_judge(model, number) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "signature: it tells Forest, River, Lake apart, and the champion" in told
    assert CLASSES[2] in told


def test_a_gate_that_is_switched_off_is_shown_in_the_ledger(
    store: Path, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(
        "[accuracy]\nfloor = 0.9\nwhy = 'x'\n[data_validation]\noff = 'tiles of the old suite'\n"
    )
    number = challenge(store, model, wrong=30, validation="failed")
    assert run_promote(model, number) == 1
    assert run_promote(model, number, "--gates", str(file)) == 0
    verdict = ledger.entries(model)[-1].verdict
    assert "data_validation off (tiles of the old suite)" in verdict


def test_a_whole_test_fold_is_judged(store: Path, model: str) -> None:
    classes = [f"c{k}" for k in range(10)]
    frames = [make_predictions(range(5400), wrong, classes) for wrong in (300, 200)]
    numbers = []
    for frame in frames:
        numbers.append(challenge(store, model, wrong=30))
        run_id = versions.run_of(versions.get(model, numbers[-1]))
        (store / "large").mkdir(exist_ok=True)
        frame.to_parquet(store / "large" / "predictions.parquet")
        MlflowClient().log_artifact(run_id, str(store / "large" / "predictions.parquet"))
    candidate, champion = (versions.get(model, number) for number in reversed(numbers))
    started = time.monotonic()
    verdict = judge.judge(candidate, champion, gates.load())
    assert verdict.passed, verdict.refusals
    print(f"judged 5,400 tiles of 10 classes in {time.monotonic() - started:.1f} s")
