"""Several processes train one network with the same losses and guarantees as one process."""

import json
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from eurosat import tracking
from eurosat.config import compose
from eurosat.data.loaders import TileDataModule, TileLoader
from eurosat.data.pack import Pack
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import ConfigError, NonFiniteLoss
from eurosat.models import predict
from eurosat.runtime.distributed import DistributedContext
from eurosat.training import launch
from eurosat.training.checkpoints import acquire
from eurosat.training.fit import FitResult
from tests.support import processes
from tests.support.recipes import TINY

PLAIN = ("augment.dihedral=false", "augment.cutmix=0", "optim.lr=0.005")
"""No augmentation, which differs by rank, and a low rate, so that rounding does not grow."""
GROUP_NORM = ("model.name=resnet18", "model.norm=group")
TWO = ("trainer.devices=2",)


def fitted(data: PreparedData, *changes: str) -> tuple[FitResult, list[float]]:
    """The result, and the training loss by logged step."""
    config = compose([*TINY, *changes])
    with tracking.run("e", "r", system_metrics=False) as run:
        result = launch.fit(config, data, run)
    history = mlflow.MlflowClient().get_metric_history(run.run_id, "train_loss_step")
    return result, [point.value for point in sorted(history, key=lambda point: point.step)]


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eurosat.training.fit.LOG_EVERY_STEPS", 1)


@pytest.mark.usefixtures("tracking_store")
def test_two_processes_have_the_losses_of_one_without_batch_norm(
    tiny_data: PreparedData,
) -> None:
    changes = (*GROUP_NORM, *PLAIN)
    single, single_loss = fitted(tiny_data, *changes)
    parallel, parallel_loss = fitted(tiny_data, *changes, *TWO)
    assert len(single_loss) == len(parallel_loss) > 1
    np.testing.assert_allclose(parallel_loss, single_loss, rtol=1e-4)
    for expected, actual in zip(single.history, parallel.history, strict=True):
        assert actual["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
        assert actual["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert "RANK" not in os.environ


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store")
def test_two_processes_with_batch_norm_are_as_accurate_as_one() -> None:
    """Each process normalises by its own half of the batch: other losses, the same accuracy."""
    config = compose(
        [
            "data=synthetic",
            "data.synthetic.tiles=4000",
            "data.synthetic.difficulty=0",
            "data.allow_unvalidated=true",
            "recipe=demo",
            "trainer.epochs=12",
        ]
    )
    data = prepare(config)
    accuracy = []
    for devices in (1, 2):
        trained = replace(config, trainer=replace(config.trainer, devices=devices))
        with tracking.run("e", "r", system_metrics=False) as run:
            result = launch.fit(trained, data, run)
        loader = TileDataModule(data.pack, data.split, batch_size=2, seed=0).test_dataloader()
        logits, labels = predict.logits(result.network, loader)
        accuracy.append((logits.argmax(axis=1) == labels).mean())
    assert accuracy[0] > 0.95
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.01)


class Cut(Exception):
    """Ends a training in the middle."""


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store")
def test_two_interrupted_processes_end_like_uninterrupted_ones(
    tiny_data: PreparedData,
) -> None:
    """Each rank resumes with its own random state."""
    changes = ("trainer.epochs=4", "augment.cutmix=0.5", "optim.name=adamw", "optim.lr=1e-3")
    config = compose([*TINY, *changes, *TWO])

    def cut(epoch: int, _: object) -> None:
        if epoch == 2:
            raise Cut

    uninterrupted, _ = fitted(tiny_data, *changes, *TWO)
    with pytest.raises(Cut), acquire(config, tiny_data.fingerprints) as slot:
        journal = slot.start_or_resume()
        with tracking.run("e", "r", journal=journal, system_metrics=False) as run:
            launch.fit(config, tiny_data, run, cut, slot)
    with acquire(config, tiny_data.fingerprints) as slot:
        assert slot.start_or_resume() == journal
        with tracking.run("e", "r", resume=journal, system_metrics=False) as run:
            resumed = launch.fit(config, tiny_data, run, None, slot)
    assert [row["val_loss"] for row in resumed.history] == [
        row["val_loss"] for row in uninterrupted.history
    ]
    for name, value in uninterrupted.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.usefixtures("tracking_store")
def test_a_loss_that_is_not_finite_ends_all_processes(tiny_data: PreparedData) -> None:
    with pytest.raises(NonFiniteLoss, match="lower it"):
        fitted(tiny_data, "optim.lr=1e30", "optim.warmup=0", *TWO)


def fit_on_ray(changes: tuple[str, ...], file: Path) -> None:
    """Train, and write the history and the weights' digest to a file."""
    config = compose([*TINY, *changes, *TWO, "launcher=ray"])
    with tracking.run("e", "r", system_metrics=False) as run:
        result = launch.fit(config, prepare(config), run)
    total = sum(float(value.double().sum()) for value in result.network.state_dict().values())
    file.write_text(json.dumps([result.history, total]))


@pytest.mark.usefixtures("tracking_store")
def test_ray_workers_train_and_return_their_weights(
    tiny_data: PreparedData, tmp_path: Path
) -> None:
    """In a process of its own: Ray leaves daemons behind in the process that starts it."""
    changes = (*GROUP_NORM, *PLAIN)
    single, _ = fitted(tiny_data, *changes)
    trained = processes.start_function(fit_on_ray, (changes, tmp_path / "result.json"))
    _, errors = trained.communicate(timeout=300)
    assert trained.returncode == 0, errors[-3000:]
    history, total = json.loads((tmp_path / "result.json").read_text())
    for expected, actual in zip(single.history, history, strict=True):
        assert actual["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
        assert actual["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    weights = single.network.state_dict().values()
    assert total == pytest.approx(sum(float(value.double().sum()) for value in weights), rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=20 must be a multiple of .*devices=3"):
        compose([*TINY, "trainer.devices=3"])


@pytest.mark.parametrize("tiles", [50, 61, 120])
def test_ranks_share_every_batch_and_each_gets_tiles(tiny_pack: Pack, tiles: int) -> None:
    rows = np.arange(tiles)
    for seed in (None, 3):
        whole = [sorted(map(int, labels)) for _, labels in TileLoader(tiny_pack, rows, 20, seed)]
        shares = [
            [labels.tolist() for _, labels in TileLoader(tiny_pack, rows, 20, seed, ranks)]
            for ranks in (
                DistributedContext(rank=0, world_size=2),
                DistributedContext(rank=1, world_size=2),
            )
        ]
        assert len(shares[0]) == len(shares[1]) == len(whole)
        assert all(all(share) for share in shares)
        joined = [sorted(first + second) for first, second in zip(*shares, strict=True)]
        if seed is not None:
            assert joined == whole
        assert sorted(chain(*joined)) == sorted(chain(*whole))
