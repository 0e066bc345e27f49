"""Starting from the weights of a run: which run it is, and when it is refused as a leak."""

import dataclasses
from pathlib import Path

import mlflow
import pytest
import torch

from eurosat import tracking, train
from eurosat.config import TrainConfig, compose
from eurosat.data.prepare import PreparedData
from eurosat.data.split import make_split
from eurosat.errors import DataError, TrackingError
from eurosat.models import pretrained
from eurosat.training import launch
from eurosat.training.fit import FitResult
from tests.support.recipes import TINY


@pytest.fixture
def earlier(tracking_store: str, tiny_data: PreparedData) -> str:
    """A finished run on the tiny tiles."""
    with tracking.run("e", "earlier", system_metrics=False) as run:
        train.train(compose([*TINY, "trainer.epochs=1"]), tiny_data, run)
    return run.run_id


def fitted(config: TrainConfig, data: PreparedData) -> tuple[FitResult, str]:
    with tracking.run("e", "later", system_metrics=False) as run:
        return launch.fit(config, data, run), run.run_id


def starting_from(reference: str, *overrides: str) -> TrainConfig:
    return compose([*TINY, "trainer.epochs=1", "optim.lr=1e-9", f"weights={reference}", *overrides])


def test_a_training_starts_from_the_weights_of_a_run_and_records_its_id(
    earlier: str, tiny_data: PreparedData
) -> None:
    result, run_id = fitted(starting_from(f"runs:/{earlier}", "optim.ema=0"), tiny_data)
    assert tracking.get(run_id).tags[pretrained.START_TAG] == earlier
    with tracking.artifact(earlier, "weights.safetensors") as file:
        start = pretrained._from_file(file, "it").backbone
    learned = dict(result.network.backbone.named_parameters())
    for name, value in learned.items():
        torch.testing.assert_close(value.detach(), start[name], rtol=0, atol=1e-5)


def test_a_resumed_run_keeps_its_initial_run_after_the_alias_has_moved(
    earlier: str, tiny_data: PreparedData
) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("m")
    source = f"runs:/{earlier}/weights.safetensors"
    client.create_model_version("m", source, earlier)
    client.set_registered_model_alias("m", "champion", "1")
    config = starting_from("models:/m@champion")
    with tracking.run("e", "later", system_metrics=False) as run:
        assert pretrained.resolve_initial_run(config, tiny_data, run).weights == f"runs:/{earlier}"
        client.create_model_version("m", source, run.run_id)
        client.set_registered_model_alias("m", "champion", "2")
        assert pretrained.resolve_initial_run(config, tiny_data, run).weights == f"runs:/{earlier}"


def test_a_run_trained_on_tiles_of_this_test_fold_is_refused(
    earlier: str, tiny_data: PreparedData
) -> None:
    other = dataclasses.replace(tiny_data, split=make_split(tiny_data.pack.table, seed=1))
    with pytest.raises(DataError, match=r"was trained on \d+ of the 40 tiles of this test fold"):
        fitted(starting_from(f"runs:/{earlier}"), other)


@pytest.mark.usefixtures("tracking_store")
def test_a_run_without_a_split_is_refused(tiny_data: PreparedData, tmp_path: Path) -> None:
    with tracking.run("e", "bare", system_metrics=False) as bare:
        bare.log_text("", "weights.safetensors")
    with pytest.raises(TrackingError, match=r"split\.csv"):
        fitted(starting_from(f"runs:/{bare.run_id}"), tiny_data)
