"""Judgements of stored versions: leaks, changed files, other interfaces, lost lineage."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from eurosat.models.version_files import FILES_TAG
from registry import gates, judge, ledger, register, versions
from tests.support.registry import (
    CLASSES,
    REGISTRY,
    TAGS,
    exit_code,
    make_predictions,
    make_run,
    record_files,
    register_challenger,
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
    first = register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    better, worse = (register_challenger(store, model, wrong=wrong) for wrong in (10, 60))
    capsys.readouterr()
    assert run_judge(model, better) == 0
    printed = capsys.readouterr().out
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
        assert gate in printed
    assert run_judge(model, worse) == 1
    printed = capsys.readouterr().out
    assert "refused: accuracy: 0.9000 is under the champion's limit 0.9500" in printed
    assert "difference: worse than the champion, 0 tiles won and 30 lost" in printed
    assert run_judge(model, worse, "--against", better) == 1
    assert run_judge(model, first, "--against", worse) == 0
    assert "verdict" not in versions.get(model, better).tags
    assert len(ledger.entries(model)) == 1


def test_test_tiles_that_were_used_in_training_are_refused(
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
    assert "refused: leakage: 7 of 600 test tiles were used in training" in capsys.readouterr().out


def test_a_file_that_was_changed_after_registration_is_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = register_challenger(store, model, wrong=30)
    folder = files_of(model, number)
    assert run_judge(model, number) == 0
    network = next(folder.rglob("model.onnx"))
    network.write_bytes(network.read_bytes() + b" ")
    assert run_judge(model, number) == 1
    assert "model.onnx differ from what was registered" in capsys.readouterr().out


def test_a_pickle_is_refused_even_if_it_was_registered(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = register_challenger(store, model, wrong=30)
    folder = files_of(model, number)
    (folder / "extra.pkl").write_bytes(b"cos\nsystem\n")
    record_files(model, number, folder)
    assert run_judge(model, number) == 1
    assert "files: a version has no file 'extra.pkl'" in capsys.readouterr().out


def test_other_code_is_refused_even_if_it_was_registered(
    store: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer records the digests of the version that they create."""
    number = register_challenger(store, model, wrong=30)
    folder = files_of(model, number)
    with (folder / "pyfunc.py").open("a") as code:
        code.write(f"\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    record_files(model, number, folder)
    assert run_judge(model, number) == 1
    assert "files: pyfunc.py: not the code that this project has released" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "ran").exists()


def test_a_network_that_its_run_did_not_train_is_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody could create such a version by MLflow's API, with the metrics of a better run."""
    number = register_challenger(store, model, wrong=30)
    folder = files_of(model, number)
    network = next(folder.rglob("model.onnx"))
    network.write_bytes(network.read_bytes() + b" ")
    record_files(model, number, folder)
    assert run_judge(model, number) == 1
    assert "model.onnx is not the network that its run has trained" in capsys.readouterr().out
    MlflowClient().set_model_version_tag(model, number, FILES_TAG, "no JSON")
    assert run_judge(model, number) == 1
    assert "files: their sha256 was not recorded" in capsys.readouterr().out


def test_missing_evidence_is_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = register_challenger(store, model, wrong=30)
    run_id = versions.run_of(versions.get(model, number))
    MlflowClient().delete_model_version_tag(model, number, FILES_TAG)
    MlflowClient().delete_tag(run_id, "code.commit")
    assert run_judge(model, number) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "files: their sha256 was not recorded" in printed
    assert "size_mb: the candidate has no such metric" in printed
    assert "lineage: the run lacks the tags code.commit" in printed


@pytest.mark.parametrize(
    ("commit", "refusal"),
    [
        ("unknown", "lineage: the commit of the code is unknown: train in a git checkout, or"),
        (f"{'a' * 40}-dirty", f"committed: the code differed from its commit {'a' * 12}: commit"),
    ],
)
def test_uncommitted_code_is_refused_unless_it_is_accepted_which_the_ledger_records(
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
    printed = " ".join(capsys.readouterr().out.split())
    assert f"refused: {refusal}" in printed
    assert printed.count("refused: ") == 1
    file = tmp_path / "gates.toml"
    file.write_text(
        "[accuracy]\nfloor = 0.9\nwhy = 'x'\n"
        "[lineage]\noff = 'no git here'\n[committed]\noff = 'no git here'\n"
    )
    assert run_judge(model, number, "--gates", str(file)) == 0
    assert run_judge(model, number, "--accept-uncommitted") == 0
    assert run_promote(model) == 1
    assert run_promote(model, "--accept-uncommitted") == 0
    note = f"the code of this model is not committed ({commit[:12]}), which was accepted"
    assert note in ledger.entries(model)[-1].verdict


def test_committed_code_gets_no_note(store: Path, model: str) -> None:
    version = versions.get(model, register_challenger(store, model, wrong=30))
    verdict = judge.judge_version(version, None, gates.load(), accept_uncommitted=True)
    assert "not committed" not in str(verdict)


def test_other_classes_than_the_champions_are_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    renamed = make_predictions(wrong=10).rename(columns={"p/SeaLake": "p/Lake"})
    renamed["label"] = renamed["label"].replace("SeaLake", "Lake")
    number = register_challenger(store, model, wrong=10)
    run_id = versions.run_of(versions.get(model, number))
    file = store / "renamed" / "predictions.parquet"
    file.parent.mkdir()
    renamed.to_parquet(file)
    MlflowClient().log_artifact(run_id, str(file))
    assert run_judge(model, number) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "signature: its classes are Forest, River, Lake, the champion" in printed
    assert f"a model of its own: `python -m registry.register {run_id} --model NAME`" in printed
    assert CLASSES[2] in printed


def test_a_gate_that_is_switched_off_is_shown_in_the_ledger(
    store: Path, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(
        "[accuracy]\nfloor = 0.9\nwhy = 'x'\n[data_validation]\noff = 'tiles of the old suite'\n"
    )
    number = register_challenger(store, model, wrong=30, validation="failed")
    assert run_promote(model, number) == 1
    assert run_promote(model, number, "--gates", str(file)) == 0
    verdict = ledger.entries(model)[-1].verdict
    assert "data_validation off (tiles of the old suite)" in verdict


def test_a_whole_test_fold_is_judged(store: Path, model: str) -> None:
    classes = [f"c{k}" for k in range(10)]
    frames = [make_predictions(range(5400), wrong, classes) for wrong in (300, 200)]
    numbers = []
    for frame in frames:
        numbers.append(register_challenger(store, model, wrong=30))
        run_id = versions.run_of(versions.get(model, numbers[-1]))
        (store / "large").mkdir(exist_ok=True)
        frame.to_parquet(store / "large" / "predictions.parquet")
        MlflowClient().log_artifact(run_id, str(store / "large" / "predictions.parquet"))
    candidate, champion = (versions.get(model, number) for number in reversed(numbers))
    started = time.monotonic()
    verdict = judge.judge_version(candidate, champion, gates.load())
    assert verdict.passed, verdict.refusals
    print(f"judged 5,400 tiles of 10 classes in {time.monotonic() - started:.1f} s")
