"""Fitting: reproducible, configurable, and stopped where training cannot go on."""

import dataclasses
from pathlib import Path

import lightning
import pytest
import torch

from eurosat import tracking
from eurosat.config import TrainConfig, compose
from eurosat.data.loaders import TileDataModule
from eurosat.data.pack import Pack
from eurosat.data.prepare import PreparedData, prepare
from eurosat.data.split import make_split
from eurosat.errors import NonFiniteLoss
from eurosat.evaluation.calibration import softmax
from eurosat.evaluation.metrics import evaluate
from eurosat.models import pretrained
from eurosat.models.network import load, save
from eurosat.models.predict import logits as logits_of
from eurosat.training.fit import FitResult, fit
from tests.support.recipes import TINY


def quick_fit(config: TrainConfig, data: PreparedData) -> FitResult:
    with tracking.run("e", "r", system_metrics=False) as run:
        return fit(config, data, run)


@pytest.mark.usefixtures("tracking_store")
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny_config: TrainConfig, tiny_data: PreparedData
) -> None:
    first, second = (quick_fit(tiny_config, tiny_data).network.state_dict() for _ in range(2))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)
    other = quick_fit(dataclasses.replace(tiny_config, seed=1), tiny_data).network.state_dict()
    assert any(not torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.usefixtures("tracking_store")
def test_the_log_lines_of_a_trial_have_its_number_and_the_last_one_has_no_time_left(
    tiny_config: TrainConfig, tiny_data: PreparedData, caplog: pytest.LogCaptureFixture
) -> None:
    tags = {"kind": "trial", "trial.number": 7}
    with (
        caplog.at_level("INFO", "eurosat.training.callbacks"),
        tracking.run("e", "r", system_metrics=False, tags=tags) as run,
    ):
        fit(tiny_config, tiny_data, run)
    first, last = (line for line in caplog.messages if "val_accuracy" in line)
    assert first.startswith("trial 7: epoch 1/2 ")
    assert first.endswith(" s left")
    assert last.endswith(" images/s")


@pytest.mark.usefixtures("tracking_store")
def test_profile_true_logs_a_trace_and_a_table_of_operators(tiny_data: PreparedData) -> None:
    config = compose([*TINY, "profile=true"])
    assert config.digest == compose(TINY).digest
    with tracking.run("e", "r", system_metrics=False) as run:
        fit(config, tiny_data, run)
    with tracking.artifact(run.run_id, "profile") as folder:
        assert "conv" in (folder / "operators.txt").read_text()
        assert (folder / "trace.json").stat().st_size > 10_000


@pytest.mark.usefixtures("tracking_store")
def test_trained_weights_beat_a_start_from_scratch_at_an_equal_budget(
    tiny_data: PreparedData, tmp_path: Path
) -> None:
    """The weights come from other synthetic tiles of the same classes."""
    other_data = prepare(compose([*TINY, "data.synthetic.seed=9", "data.synthetic.tiles=1000"]))
    config = compose([*TINY, "data.synthetic.seed=9", "trainer.epochs=6"])
    weights = tmp_path / "w.safetensors"
    save(quick_fit(config, other_data).network, weights)
    overrides = [*TINY, "trainer.epochs=2", "augment.cutmix=0"]
    scratch = quick_fit(compose(overrides), tiny_data)
    for changes in ("optim.freeze_epochs=1", "optim.layer_decay=0.5"):
        tuned = quick_fit(compose([*overrides, f"weights={weights}", changes]), tiny_data)
        assert tuned.best["val_accuracy"] > scratch.best["val_accuracy"] + 0.1, changes


@pytest.mark.usefixtures("tracking_store")
def test_freeze_epochs_train_the_head_alone(tiny_data: PreparedData) -> None:
    config = compose([*TINY, "trainer.epochs=1", "optim.freeze_epochs=1", "optim.ema=0"])
    torch.manual_seed(0)
    before = pretrained.create(
        config.model,
        "none",
        classes=tiny_data.pack.classes,
        bands=3,
        tile_size=(32, 32),
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    save(before, Path("start.safetensors"))
    config = dataclasses.replace(config, weights="start.safetensors")
    after = quick_fit(config, tiny_data).network.backbone.state_dict()
    for name, value in before.backbone.state_dict().items():
        assert torch.equal(value, after[name]) == (not name.startswith("fc.")), name


@pytest.mark.usefixtures("tracking_store")
def test_training_learns(tiny_data: PreparedData) -> None:
    config = compose([*TINY, "trainer.epochs=12", "augment.cutmix=0"])
    fitted = quick_fit(config, tiny_data)
    assert fitted.history[-1]["train_loss"] < 0.7 * fitted.history[0]["train_loss"]
    assert fitted.best["val_accuracy"] > 0.3, "ten classes: chance is 0.1"
    assert fitted.best["val_accuracy"] == max(row["val_accuracy"] for row in fitted.history)
    loader = TileDataModule(tiny_data.pack, tiny_data.split, batch_size=2, seed=0).val_dataloader()
    logits, labels = logits_of(fitted.network, loader)
    expected = evaluate(labels, softmax(logits), tiny_data.pack.classes)
    assert fitted.best["val_accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert fitted.best["val_macro_f1"] == pytest.approx(expected["macro_f1"], abs=1e-6)


@pytest.mark.usefixtures("tracking_store")
def test_early_stopping_ends_a_training_that_does_not_improve(tiny_data: PreparedData) -> None:
    config = compose([*TINY, "trainer.epochs=30", "trainer.patience=2", "optim.lr=1e-9"])
    assert len(quick_fit(config, tiny_data).history) < 30


class InfiniteWeights(lightning.Callback):
    """Makes the network return infinity from the second epoch on."""

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        if trainer.current_epoch == 1:
            torch.nn.init.constant_(module.get_parameter("network.backbone.fc.weight"), torch.inf)


@pytest.mark.usefixtures("tracking_store")
def test_a_training_that_diverges_logs_its_best_weights(
    tiny_config: TrainConfig, tiny_data: PreparedData
) -> None:
    with (
        pytest.raises(NonFiniteLoss),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        fit(tiny_config, tiny_data, run, extra_callbacks=[InfiniteWeights()])
    with tracking.artifact(run.run_id, "last_good/weights.safetensors") as file:
        last_good = load(file)
    loader = TileDataModule(tiny_data.pack, tiny_data.split, batch_size=2, seed=0).val_dataloader()
    logits, labels = logits_of(last_good, loader)
    best = tracking.get(run.run_id).metrics["val_accuracy"]
    assert (logits.argmax(axis=1) == labels).mean() == pytest.approx(best, abs=1e-6)


@pytest.mark.real_data
@pytest.mark.usefixtures("tracking_store")
def test_one_epoch_on_the_real_tiles_learns(real_pack: Pack) -> None:
    config = compose([*TINY, "data=eurosat", "trainer.epochs=1", "optim.batch_size=16"])
    split = make_split(real_pack.table, per_class=300)
    data = PreparedData(pack=real_pack, split=split, validation="missing")
    assert quick_fit(config, data).best["val_accuracy"] > 0.4, "ten classes: chance is 0.1"
