"""A killed training resumes in the same run and ends with the same weights, bit for bit."""

import random
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
import safetensors.torch
import torch

from eurosat import tracking
from eurosat.config import TrainConfig, compose
from eurosat.data.prepare import PreparedData
from eurosat.errors import ModelError
from eurosat.models.pretrained import find_weights
from eurosat.runtime import exit_codes
from eurosat.training.callbacks import RunLogger
from eurosat.training.checkpoints import CheckpointSlot, acquire
from eurosat.training.fit import fit
from eurosat.training.resume import with_current_names
from tests.support.processes import start
from tests.support.recipes import TINY

FINGERPRINTS = {"data.fingerprint": "d", "split.fingerprint": "s"}


def weights_of(run_id: str) -> dict[str, torch.Tensor]:
    with tracking.artifact(run_id, "weights.safetensors") as file:
        return safetensors.torch.load_file(file)


def runs() -> list[str]:
    client = mlflow.MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    ordered = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [run.info.run_id for run in ordered]


def count(log: Path, words: str) -> int:
    return log.read_text().count(words) if log.exists() else 0


def kill_until_done(arguments: Sequence[str], log: Path, kills: int, epoch_s: float) -> None:
    """Kill the training at random moments, then let it end.

    Each kill comes up to ``epoch_s``, the time of an epoch, after training has started; every other
    one waits for a completed epoch first.
    """
    delays = random.Random(3)
    for number in range(kills):
        starts, epochs = count(log, "training in") + 1, count(log, ": epoch ") + number % 2
        process = start("eurosat.train", *arguments, log=log)
        while count(log, "training in") < starts or count(log, ": epoch ") < epochs:
            time.sleep(0.02)
            assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(delays.uniform(0, epoch_s))
        assert process.poll() is None, "the training ended too soon to be killed"
        process.kill()
        process.wait()
    process = start("eurosat.train", *arguments, log=log)
    assert process.wait() == exit_codes.OK, log.read_text()[-2000:]


def check_killed_training(
    arguments: list[str], tmp_path: Path, epoch_s: float, kills: int = 5
) -> None:
    log = tmp_path / "reference.log"
    reference = start("eurosat.train", *arguments, log=log)
    assert reference.wait() == exit_codes.OK, log.read_text()[-2000:]
    kill_until_done(arguments, tmp_path / "killed.log", kills, epoch_s)
    uninterrupted, resumed = runs()
    assert tracking.get(resumed).status == "FINISHED"
    for name, value in weights_of(uninterrupted).items():
        torch.testing.assert_close(weights_of(resumed)[name], value, rtol=0, atol=0)
    client = mlflow.MlflowClient()
    for metric in ("val_accuracy", "val_loss", "train_loss"):
        expected, actual = (
            {point.step: point.value for point in client.get_metric_history(run, metric)}
            for run in (uninterrupted, resumed)
        )
        assert actual == expected, metric
    assert count(tmp_path / "killed.log", "which was cut short") == kills
    with tracking.artifact(resumed, "logs/train.log") as log:
        assert count(log, "training in") >= 2, "the log of the killed processes is there too"


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return compose([*TINY, f"data.cache={tmp_path}"])


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Limit the size of files, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("tracking_store")
def test_a_full_disk_keeps_the_last_good_state(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with acquire(config, FINGERPRINTS) as slot:
        slot.start_or_resume()
        slot.save({"epoch": 1, "weights": torch.ones(1000)})
        with no_room_beyond(100_000):
            slot.save({"epoch": 2, "weights": torch.ones(1_000_000)})
        assert "the state of epoch 2 could not be written" in caplog.text
        assert (slot.load() or {})["epoch"] == 1
        slot.save({"epoch": 3, "weights": torch.ones(1_000_000)})
        assert (slot.load() or {})["epoch"] == 3


class Trap:
    """Object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._file,)


@pytest.mark.usefixtures("tracking_store")
def test_no_code_in_a_state_or_weights_file_is_executed(
    config: TrainConfig, tmp_path: Path
) -> None:
    executed = tmp_path / "executed"
    with acquire(config, FINGERPRINTS) as slot:
        slot.start_or_resume()
        slot.save({"epoch": Trap(executed)})
        assert slot.load() is None
    torch.save({"weights": Trap(executed)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="is not a weights file"):
        find_weights(str(tmp_path / "weights.safetensors"), "resnet18")
    assert not executed.exists()


@pytest.mark.usefixtures("tracking_store")
@pytest.mark.parametrize(("here", "there", "resumed"), [(2, 5, 5), (5, 2, 5), (0, 3, 3), (3, 0, 3)])
def test_a_training_resumes_from_the_machine_with_more_epochs(
    tmp_path: Path, here: int, there: int, resumed: int
) -> None:
    first = CheckpointSlot(tmp_path / "near", FINGERPRINTS)
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.run("e", "cut short", journal=first.start_or_resume()),
    ):
        if here:
            first.save({"epoch": here})
        raise KeyboardInterrupt
    shutil.copytree(first.directory, tmp_path / "far")
    if there:
        CheckpointSlot(tmp_path / "far", FINGERPRINTS).save({"epoch": there})
    else:
        (tmp_path / "far" / "state.pt").unlink()
    (tmp_path / "near" / ".state.pt.torn").touch()
    again = CheckpointSlot(tmp_path / "near", FINGERPRINTS)
    again.import_from(tmp_path / "far")
    again.start_or_resume()
    assert not list((tmp_path / "near").glob(".*"))
    assert (again.load() or {})["epoch"] == resumed


@pytest.mark.usefixtures("tracking_store")
def test_an_epoch_that_is_trained_again_on_another_machine_keeps_its_first_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_epochs(slot: CheckpointSlot, epochs: range, loss: float) -> str:
        resume = slot.journal
        with tracking.run(
            "e", "r", journal=slot.start_or_resume(), resume=resume, system_metrics=False
        ) as run:
            for epoch in epochs:
                RunLogger(run).log_metrics({"epoch": epoch, "val_loss": loss, "lr_step": 1}, epoch)
            run.log_metrics({"train_seconds": loss})
            raise KeyboardInterrupt

    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "one"))
    first = CheckpointSlot(tmp_path / "one" / "place", FINGERPRINTS)
    with pytest.raises(KeyboardInterrupt):
        log_epochs(first, range(3), 0.5)
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "two"))
    for epochs in (range(2, 4), range(2, 5)):  # again, after a kill there
        second = CheckpointSlot(tmp_path / "two" / "place", FINGERPRINTS)
        second.import_from(first.directory)
        with pytest.raises(KeyboardInterrupt):
            log_epochs(second, epochs, 0.25)
    [run_id] = runs()
    client = mlflow.MlflowClient()
    for name, values in (("val_loss", [0.5] * 3 + [0.25] * 2), ("lr_step", [1] * 5)):
        points = sorted((p.step, p.value) for p in client.get_metric_history(run_id, name))
        assert points == list(enumerate(values))
    seconds = [p.value for p in client.get_metric_history(run_id, "train_seconds")]
    assert seconds == [0.5, 0.25], "metrics of the whole training are logged again"


@pytest.mark.usefixtures("tracking_store")
def test_a_second_training_at_the_same_time_gets_a_slot_of_its_own(
    config: TrainConfig,
) -> None:
    with acquire(config, FINGERPRINTS) as first:
        first.start_or_resume()
        first.save({"epoch": 1})
        with acquire(config, FINGERPRINTS) as second:
            assert second.load() is None
        assert (first.load() or {})["epoch"] == 1


@pytest.mark.usefixtures("tracking_store")
@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_training_ends_like_an_uninterrupted_one(tmp_path: Path, kills: int) -> None:
    settings = ["trainer.epochs=8", "trainer.patience=7", "augment.cutmix=0.5", "optim.ema=0.9"]
    check_killed_training([*TINY, *settings], tmp_path, epoch_s=0.5, kills=kills)


def test_a_state_with_the_names_of_an_earlier_version_is_read_under_the_current_ones() -> None:
    weight, average = torch.ones(1), torch.zeros(1)
    state = {
        "epoch": 2,
        "module": {"network.mean": weight, "retold.weight": weight},
        "callbacks": {
            "Watch": {"seconds": 1.0},
            "KeepBest": {"accuracy": 0.5},
            "MovingAverage": {"average": {"module.retold.weight": average, "n_averaged": weight}},
        },
    }
    current = with_current_names(state)
    assert current["epoch"] == 2
    assert current["module"].keys() == {"network.mean", "feature_projection.weight"}
    assert current["callbacks"].keys() == {"ProgressLogger", "BestWeights", "MovingAverage"}
    averages = current["callbacks"]["MovingAverage"]["average"]
    assert averages.keys() == {"module.feature_projection.weight", "n_averaged"}
    assert with_current_names(current) == current


class Cut(Exception):
    """Ends a training in the middle."""


@pytest.mark.parametrize(
    "settings",
    [
        ["optim.name=adamw", "optim.lr=1e-3", "optim.layer_decay=0.7", "optim.freeze_epochs=1"],
        ["trainer.precision=bf16", "augment.mixup=0.5", "augment.colour=0.2", "optim.ema=0"],
        ["trainer.epochs=30", "trainer.patience=2", "model.drop_rate=0.3", "optim.ema=0"],
        ["trainer.repeats_per_epoch=2", "optim.clip_norm=1", "trainer.precision=bf16"],
        ["distill.teacher=efficientnet-lite", "distill.share=0", "distill.features=5"],
    ],
)
@pytest.mark.usefixtures("tracking_store")
def test_with_any_settings_a_training_cut_after_an_epoch_ends_like_an_uninterrupted_one(
    tiny_data: PreparedData, settings: list[str]
) -> None:
    """Optimisers, frozen stages, mixing, dropout, precision, early stopping, a teacher."""
    config = compose([*TINY, "trainer.epochs=5", *settings])

    def cut(epoch: int, _: object) -> None:
        if epoch == 1:
            raise Cut

    with tracking.run("e", "whole", system_metrics=False) as run:
        uninterrupted = fit(config, tiny_data, run)
    with pytest.raises(Cut), acquire(config, tiny_data.fingerprints) as slot:
        journal = slot.start_or_resume()
        with tracking.run("e", "cut", journal=journal, system_metrics=False) as run:
            fit(config, tiny_data, run, cut, slot)
    with (
        acquire(config, tiny_data.fingerprints) as slot,
        tracking.run("e", "cut", resume=slot.journal, system_metrics=False) as run,
    ):
        resumed = fit(config, tiny_data, run, None, slot)
    assert 2 < len(uninterrupted.history) < 30, "those of thirty epochs stopped early"
    assert [row["val_loss"] for row in resumed.history] == [
        row["val_loss"] for row in uninterrupted.history
    ]
    for name, value in uninterrupted.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.usefixtures("tracking_store", "eurosat_root")
def test_a_training_on_real_tiles_killed_five_times_ends_like_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    check_killed_training(
        ["data=eurosat", "data.allow_unvalidated=true", "trainer.epochs=3", "model.tta_views=1"],
        tmp_path,
        epoch_s=60,
    )
