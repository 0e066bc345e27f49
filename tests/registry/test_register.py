"""Registration of training runs as versions."""

import json
from pathlib import Path

import onnx
import pytest

from eurosat.errors import ConfigError, ModelError, TrackingError
from eurosat.runtime import cli
from registry import ledger, register, versions
from registry.actor import actor
from tests.support.registry import (
    CLASSES,
    REGISTRY,
    TAGS,
    exit_code,
    make_network,
    make_predictions,
    make_run,
    run_promote,
)

pytestmark = REGISTRY


@pytest.fixture(scope="module")
def run_id(store: Path) -> str:
    return make_run(store)


@pytest.fixture(scope="module")
def number(run_id: str) -> str:
    return register.register(run_id, "eurosat", "challenger")


def model_folder(number: str, model: str = "eurosat") -> Path:
    return Path(str(versions.get(model, number).source).removeprefix("file://"))


def test_a_run_becomes_the_challenger(run_id: str, number: str) -> None:
    challenger = versions.by_alias("eurosat", "challenger")
    assert challenger is not None
    assert (str(challenger.version), challenger.run_id) == (number, run_id)
    assert challenger.tags["data.fingerprint"] == TAGS["data.fingerprint"]


def test_the_command_prints_the_number_alone_and_registers_a_run_once(
    run_id: str, number: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(register.main, [run_id])
    printed = capfd.readouterr()
    assert stopped.value.code == 0
    assert printed.out.strip() == number
    assert f"version {number} already wraps run {run_id}" in printed.err
    assert len(versions.all_of("eurosat")) == 1


def test_the_command_says_what_became_of_the_version(
    store: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def outcome(wrong: int, *, promoted: bool) -> str:
        run = make_run(store, make_predictions(wrong=wrong))
        assert exit_code(register.main, run, "--model", model) == 0
        assert "is not judged yet: `python -m registry.promote" in capfd.readouterr().err
        assert run_promote(model) == (0 if promoted else 1)
        capfd.readouterr()
        assert exit_code(register.main, run, "--model", model) == 0
        return capfd.readouterr().err

    assert f"{model} version 1 is the champion" in outcome(30, promoted=True)
    refused = outcome(60, promoted=False)
    assert f"{model} version 2 was refused by the gates and is not served: refused: accu" in refused


def test_the_records_name_the_account_and_not_the_user_of_the_machine(
    store: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    assert actor() == "root"
    assert actor("ann") == "ann"
    number = register.register(make_run(store), model, "challenger")
    assert versions.get(model, number).tags["registered.by"] == "root"
    assert run_promote(model, "--by", "ann") == 0
    (entry,) = ledger.entries(model)
    assert (entry.actor, entry.registered_by) == ("ann", "root")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    assert actor() == "root", "a local store checks no account"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert actor() == "ada"
    assert actor("ada") == "ada"
    assert actor("ann") == "ada on behalf of ann"


def test_the_model_folder_has_its_lineage_and_no_pickle(run_id: str, number: str) -> None:
    files = [file for file in model_folder(number).rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"MLmodel", "pyfunc.py", "model.onnx", "lineage.json"}
    assert not [file for file in files if file.suffix in (".pkl", ".pickle", ".pt", ".joblib")]
    # Protocol 2 and later start with \x80 and the protocol's number.
    assert not [file for file in files if file.read_bytes()[:1] == b"\x80"]
    lineage = json.loads((model_folder(number) / "artifacts" / "lineage.json").read_text())
    assert lineage["run_id"] == run_id
    assert lineage["classes"] == CLASSES
    assert lineage["metrics"] == {"test_accuracy": 0.95}
    for name, value in TAGS.items():
        assert lineage[name.replace(".", "_")] == value


def test_the_model_pins_its_requirements_as_the_lock_does(number: str) -> None:
    pinned = (model_folder(number) / "requirements.txt").read_text().splitlines()
    locked = (register.ROOT / "requirements.lock").read_text()
    assert len(pinned) == len(register.PYFUNC_REQUIREMENTS)
    for pin in pinned:
        assert f"\n{pin} " in locked


def test_the_signature_is_one_binary_column(number: str) -> None:
    import mlflow.pyfunc  # warns: see pytestmark

    loaded = mlflow.pyfunc.load_model(f"models:/eurosat/{number}")
    assert [(spec.name, spec.type.name) for spec in loaded.metadata.signature.inputs] == [
        ("image", "binary")
    ]
    assert len(loaded.predict(loaded.input_example)) == 1


@pytest.mark.parametrize("missing", ["model.onnx", "predictions.parquet", "config.yaml"])
def test_a_run_without_an_artifact_is_refused(store: Path, missing: str) -> None:
    with pytest.raises(TrackingError, match=f"lacks {missing}"):
        register.register(make_run(store, leave_out=missing), "other", "challenger")


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_a_run_that_did_not_finish_is_refused(store: Path, status: str) -> None:
    with pytest.raises(TrackingError, match=f"is {status}: only a FINISHED"):
        register.register(make_run(store, status=status), "other", "challenger")


def test_a_run_without_a_tag_is_refused(store: Path) -> None:
    tags = {k: v for k, v in TAGS.items() if k != "data.fingerprint"}
    with pytest.raises(TrackingError, match=r"lacks the tag data\.fingerprint"):
        register.register(make_run(store, tags=tags), "other", "challenger")


def test_predictions_of_other_classes_are_refused(store: Path) -> None:
    predictions = make_predictions(classes=["Forest", "River", "Pasture"])
    with pytest.raises(ModelError, match="knows the classes Forest, River, SeaLake but"):
        register.register(make_run(store, predictions), "other", "challenger")


def test_predictions_without_a_column_are_refused(store: Path) -> None:
    predictions = make_predictions().drop(columns="sha256")
    with pytest.raises(ModelError, match="lacks sha256"):
        register.register(make_run(store, predictions), "other", "challenger")


def test_a_network_of_another_interface_is_refused(tmp_path: Path) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a network")
    with pytest.raises(ModelError, match="ONNX Runtime cannot open"):
        register.describe_network(junk)
    network = onnx.load(make_network(tmp_path / "model.onnx"))
    del network.metadata_props[:]
    onnx.save(network, tmp_path / "bare.onnx")
    with pytest.raises(ModelError, match="no readable metadata property 'classes'"):
        register.describe_network(tmp_path / "bare.onnx")
    network.graph.output[0].name = network.graph.node[-1].output[0] = "other"
    onnx.save(network, tmp_path / "renamed.onnx")
    with pytest.raises(ModelError, match="export it again"):
        register.describe_network(tmp_path / "renamed.onnx")


@pytest.mark.parametrize("alias", ["champion", "previous"])
def test_registration_cannot_bypass_the_gates(run_id: str, alias: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.promote"):
        register.register(run_id, "eurosat", alias)


def test_an_unknown_run_is_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(register.main, ["0" * 32])
    assert stopped.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "0" * 32 in errors[0]


def test_pins_come_from_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# c\none==1 ; python_version < '3' \\\n    --hash=x\none==2 \\\n    --hash=y\n"
    )
    assert register.pinned_requirements(["one"], lock) == ["one==2"]
    with pytest.raises(ConfigError, match="does not pin two"):
        register.pinned_requirements(["one", "two"], lock)
    lock.write_text("???\n")
    with pytest.raises(ConfigError, match="not a requirement"):
        register.pinned_requirements(["one"], lock)
    with pytest.raises(ConfigError, match="cannot be read"):
        register.pinned_requirements(["one"], tmp_path / "none")
