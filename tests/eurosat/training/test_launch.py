"""One network trained by several processes: the same curve, the same guarantees."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain

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
from tests.support import paths
from tests.support.recipes import TINY

PLAIN = ("augment.dihedral=false", "augment.cutmix=0", "optim.lr=0.005")
"""Without augmentation, which each rank draws for itself, and calm: rounding does not grow."""
GROUP_NORM = ("model.name=resnet18", "model.norm=group")
ROOT = str(paths.ROOT)
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
def test_two_processes_follow_the_curve_of_one_where_norms_do_not_see_the_batch(
    tiny_data: PreparedData,
) -> None:
    changes = (*GROUP_NORM, *PLAIN)
    alone, loss_alone = fitted(tiny_data, *changes)
    together, loss_together = fitted(tiny_data, *changes, *TWO)
    assert len(loss_alone) == len(loss_together) > 1
    np.testing.assert_allclose(loss_together, loss_alone, rtol=1e-4)
    for one, other in zip(alone.history, together.history, strict=True):
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
    assert "RANK" not in os.environ


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store")
def test_two_processes_with_batch_norm_are_as_accurate_as_one() -> None:
    """Each process normalises by its own half of the batch: other curves, the same accuracy."""
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
    """What ends a training in the middle."""


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store")
def test_two_processes_that_were_cut_short_end_as_if_they_never_were(
    tiny_data: PreparedData,
) -> None:
    """Each rank goes on with its own random state."""
    changes = ("trainer.epochs=4", "augment.cutmix=0.5", "optim.name=adamw", "optim.lr=1e-3")
    config = compose([*TINY, *changes, *TWO])

    def cut(epoch: int, _: object) -> None:
        if epoch == 2:
            raise Cut

    whole, _ = fitted(tiny_data, *changes, *TWO)
    with pytest.raises(Cut), acquire(config, tiny_data.fingerprints) as saved:
        journal = saved.start_or_resume()
        with tracking.run("e", "r", journal=journal, system_metrics=False) as run:
            launch.fit(config, tiny_data, run, cut, saved)
    with acquire(config, tiny_data.fingerprints) as saved:
        assert saved.start_or_resume() == journal
        with tracking.run("e", "r", resume=journal, system_metrics=False) as run:
            continued = launch.fit(config, tiny_data, run, None, saved)
    assert [row["val_loss"] for row in continued.history] == [
        row["val_loss"] for row in whole.history
    ]
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(continued.network.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.usefixtures("tracking_store")
def test_a_loss_that_is_not_finite_ends_all_processes(tiny_data: PreparedData) -> None:
    with pytest.raises(NonFiniteLoss, match="lower it"):
        fitted(tiny_data, "optim.lr=1e30", "optim.warmup=0", *TWO)


@pytest.mark.usefixtures("tracking_store")
def test_ray_workers_train_and_hand_their_weights_back(tiny_data: PreparedData) -> None:
    """In a process of its own, as a user would: Ray leaves daemons to the one that started it."""
    changes = (*GROUP_NORM, *PLAIN)
    alone, _ = fitted(tiny_data, *changes)
    command = [sys.executable, "-m", "eurosat.train", *TINY, *changes, *TWO, "launcher=ray"]
    own = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tracking.get(done.stdout.split()[-1])
    assert run.status == "FINISHED"
    assert float(run.metrics["epochs"]) == len(alone.history)
    assert run.metrics["best_val_loss"] == pytest.approx(alone.best["val_loss"], rel=1e-3)
    assert run.metrics["best_train_loss"] == pytest.approx(alone.best["train_loss"], rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=20 must be a multiple of .*devices=3"):
        compose([*TINY, "trainer.devices=3"])


@pytest.mark.parametrize("tiles", [50, 61, 120])
def test_ranks_share_every_batch_and_none_is_left_without_tiles(
    tiny_pack: Pack, tiles: int
) -> None:
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
        joined = [sorted(one + other) for one, other in zip(*shares, strict=True)]
        if seed is not None:
            assert joined == whole
        assert sorted(chain(*joined)) == sorted(chain(*whole))
