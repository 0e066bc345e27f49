"""A server runs and serves the files of a version that were judged, and no others."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from eurosat.models.version_files import FILES_TAG
from registry import versions
from serving import hot_swap
from serving.hot_swap import SelfTestFailed
from tests.support.registry import (
    REGISTRY,
    make_network,
    record_files,
    register_challenger,
    run_promote,
)

pytestmark = REGISTRY


@pytest.fixture
def champion(store: Path, model: str) -> str:
    """Register and promote a version; return its URI."""
    number = register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    return f"models:/{model}/{number}"


def stored_files(store: Path, uri: str) -> Path:
    """Return the folder of a version's files in the artifact store."""
    _, model, number = uri.split("/")
    run_id = versions.run_of(versions.get(model, number))
    return next(store.glob(f"mlruns/*/{run_id}/artifacts/model"))


def change_network(file: Path) -> None:
    """Replace a network by one that knows the classes in another order."""
    make_network(file, classes=("SeaLake", "River", "Forest"))


def test_the_files_that_were_judged_are_served(champion: str) -> None:
    loaded = hot_swap.load(champion, {})
    assert loaded.version == champion.rpartition("/")[2]
    loaded.files.close()


def test_code_that_was_changed_after_the_judgement_does_not_run(
    store: Path, champion: str, tmp_path: Path
) -> None:
    with (stored_files(store, champion) / "pyfunc.py").open("a") as code:
        code.write(f"\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(SelfTestFailed, match="not the code that this project has released"):
        hot_swap.load(champion, {})
    assert not (tmp_path / "ran").exists()


def test_a_network_that_was_changed_after_the_judgement_is_not_served(
    store: Path, champion: str
) -> None:
    change_network(stored_files(store, champion) / "artifacts" / "model.onnx")
    with pytest.raises(SelfTestFailed, match=r"model\.onnx differ from what was registered"):
        hot_swap.load(champion, {})
    import mlflow.pyfunc

    with pytest.raises(ValueError, match="has the sha256"):
        mlflow.pyfunc.load_model(champion)


def test_digests_that_were_changed_too_differ_from_the_ledger(
    store: Path, model: str, champion: str
) -> None:
    folder = stored_files(store, champion)
    change_network(folder / "artifacts" / "model.onnx")
    number = champion.rpartition("/")[2]
    record_files(model, number, folder)
    with pytest.raises(SelfTestFailed, match="differs from what the ledger says was judged"):
        hot_swap.load(champion, {})
    MlflowClient().delete_model_version_tag(model, number, FILES_TAG)
    with pytest.raises(SelfTestFailed, match="has lost its tag"):
        hot_swap.load(champion, {})
