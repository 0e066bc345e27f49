"""A training run: what it computes, what it logs, and when it is refused."""

import dataclasses
from pathlib import Path

import lightning
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml

from eurosat import tracking, train
from eurosat.config import OptimConfig, TrainConfig, compose, from_mapping
from eurosat.data import validation_record
from eurosat.data.loaders import TileDataModule, TileLoader, band_statistics
from eurosat.data.pack import Pack
from eurosat.data.prepare import PreparedData, prepare
from eurosat.data.split import make_split
from eurosat.errors import DataError, NonFiniteLoss
from eurosat.evaluation.calibration import softmax
from eurosat.evaluation.metrics import evaluate
from eurosat.models import pretrained, quantise
from eurosat.models.compute import choose_compute
from eurosat.models.network import load, save
from eurosat.models.predict import logits as logits_of
from eurosat.models.predict import logits_and_first_view
from eurosat.runtime import exit_codes, hardware
from eurosat.training.fit import FitResult, fit
from eurosat.training.optimizers import make_optimizer, one_cycle
from tests.support.networks import build as build_network
from tests.support.recipes import TINY

ARTIFACTS = {
    "config.yaml",
    "split.csv",
    "predictions.parquet",
    "weights.safetensors",
    "model.onnx",
    "figures/confusion.png",
    "figures/curves.png",
    "figures/reliability.png",
    "logs/train.log",
    "figures/explained.png",
    "calibration.json",
}


@pytest.mark.usefixtures("tracking_store")
def test_a_run_holds_all_that_evaluates_and_serves_it(
    tiny_pack: Pack, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train.main([*TINY, "log_level=warning"]) == exit_codes.OK
    run_id = capsys.readouterr().out.split()[-1]
    run = tracking.get(run_id)
    assert run.status == "FINISHED"
    with tracking.artifact(run_id, "") as folder:
        files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        assert files - {"model.int8.onnx"} == ARTIFACTS
        lost = run.metrics["test_accuracy"] - run.metrics["int8_accuracy"]
        assert ("model.int8.onnx" in files) == (lost <= quantise.MAX_ACCURACY_LOSS), (
            "logged only if accurate"
        )
        config = from_mapping(TrainConfig, yaml.safe_load((folder / "config.yaml").read_text()))
        split = pd.read_csv(folder / "split.csv")
        predicted = pd.read_parquet(folder / "predictions.parquet")
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert config == compose(TINY)
    for tag in ("data.fingerprint", "split.fingerprint", "code.commit", "config.digest"):
        assert run.tags[tag]
    assert run.tags["data.fingerprint"] == tiny_pack.fingerprint
    assert run.tags["data.validation"] == "missing"
    assert run.params["model.name"] == "test_resnet"

    assert list(split.columns) == ["tile", "sha256", "class", "fold"]
    assert len(split) == 200
    tested = split[split["fold"] == "test"]
    assert list(predicted["tile"]) == list(tested["tile"])
    assert list(predicted["sha256"]) == list(tested["sha256"])

    probabilities = predicted[[f"p/{name}" for name in tiny_pack.classes]].to_numpy()
    labels = np.array([tiny_pack.classes.index(name) for name in predicted["label"]])
    for name, value in evaluate(labels, probabilities, tiny_pack.classes).items():
        assert run.metrics[f"test_{name}"] == pytest.approx(value, abs=1e-5)
    rows = [list(tiny_pack.table["path"]).index(tile) for tile in predicted["tile"]]
    (served,) = session.run(["probabilities"], {"tiles_NHWC": tiny_pack.tiles_NHWC[rows]})
    np.testing.assert_allclose(served, probabilities, atol=1e-4)


@pytest.mark.usefixtures("tracking_store")
def test_a_gallery_that_cannot_be_drawn_costs_a_warning_and_not_the_training(
    tiny_config: TrainConfig,
    tiny_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def gallery(*_: object) -> None:
        raise AttributeError("'ConvPatchEmbed' object has no attribute 'grid_size'")

    monkeypatch.setattr("eurosat.evaluation.gradcam.gallery", gallery)
    with tracking.run("e", "r", system_metrics=False) as run:
        train.train(tiny_config, tiny_data, run)
    assert caplog.text.count("no figures/explained.png") == 1
    assert "no attribute 'grid_size'" in caplog.text
    with tracking.artifact(run.run_id, "") as folder:
        names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert names - {"model.int8.onnx"} == ARTIFACTS - {"figures/explained.png"}


@pytest.mark.usefixtures("tracking_store")
def test_weights_and_predictions_are_logged_before_figures_are_drawn(
    tiny_config: TrainConfig, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confusion_matrix(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("eurosat.evaluation.plots.confusion_matrix", confusion_matrix)
    with (
        pytest.raises(ZeroDivisionError),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        train.train(tiny_config, tiny_data, run)
    with tracking.artifact(run.run_id, "") as folder:
        names = {file.name for file in folder.iterdir()}
    assert {"weights.safetensors", "predictions.parquet", "calibration.json"} <= names


@pytest.mark.parametrize(
    ("lost", "tiles", "words"),
    [
        (11, 5400, "11 more of the 5,400 test tiles are wrong than in FP32, and at most 10 (0.2%)"),
        (3, 1000, "3 more of the 1,000 test tiles"),
        (2, 1000, None),
        (3, 1500, None),
        (1, 96, "and at most 0"),
        (-1, 96, None),
    ],
)
def test_an_int8_model_is_refused_by_the_number_of_tiles_that_it_loses(
    lost: int, tiles: int, words: str | None
) -> None:
    refusal = train.int8_refusal(lost, tiles)
    assert (refusal is None) == (words is None)
    assert (words or "") in (refusal or "")


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
@pytest.mark.parametrize(
    "changes",
    [
        ["optim.name=adamw", "optim.lr=1e-3", "optim.ema=0", "optim.clip_norm=1"],
        ["trainer.precision=bf16", "augment.brightness=0.2", "augment.contrast=0.2"],
        ["trainer.precision=auto", "model.input_size=48", "model.tta_views=8"],
    ],
)
def test_every_setting_trains(tiny_data: PreparedData, changes: list[str]) -> None:
    config = compose([*TINY, "trainer.epochs=1", *changes])
    with tracking.run("e", "r", system_metrics=False) as run:
        tested = train.train(config, tiny_data, run)
    assert 0 <= tested["test_accuracy"] <= 1
    assert ("test_one_view_accuracy" in tested) == (config.model.tta_views == 8)
    if config.model.tta_views == 8:
        with tracking.artifact(run.run_id, "weights.safetensors") as file:
            net = load(file)
        with net.single_view():
            single, labels = logits_of(
                net, TileLoader(tiny_data.pack, tiny_data.split.indices("test"))
            )
        assert tested["test_one_view_accuracy"] == (single.argmax(axis=1) == labels).mean()


def test_one_pass_over_the_tiles_gives_the_logits_of_all_views_and_of_the_first(
    tiny_data: PreparedData,
) -> None:
    net = build_network(classes=10, views=8)
    batches = TileLoader(tiny_data.pack, tiny_data.split.indices("test"))
    passes: list[int] = []
    net.backbone.register_forward_hook(lambda _module, _inputs, output: passes.append(len(output)))
    mean, first, labels = logits_and_first_view(net, batches)
    assert len(passes) == 8 * len(batches), "the first view is not computed twice"
    expected, expected_labels = logits_of(net, batches)
    with net.single_view():
        single, _ = logits_of(net, batches)
    np.testing.assert_array_equal(mean, expected)
    np.testing.assert_array_equal(first, single)
    np.testing.assert_array_equal(labels, expected_labels)
    assert abs(first - mean).max() > 1e-3, "one view is not the mean of eight"


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
@pytest.mark.parametrize("changes", [["optim.freeze_epochs=1"], ["optim.layer_decay=0.5"]])
def test_trained_weights_beat_a_start_from_scratch_at_an_equal_budget(
    tiny_data: PreparedData, tmp_path: Path, changes: list[str]
) -> None:
    """The weights come from other synthetic tiles of the same classes."""
    other_data = prepare(compose([*TINY, "data.synthetic.seed=9", "data.synthetic.tiles=1000"]))
    with tracking.run("e", "r", system_metrics=False) as run:
        config = compose([*TINY, "data.synthetic.seed=9", "trainer.epochs=6"])
        save(fit(config, other_data, run).network, tmp_path / "w.safetensors")
    overrides = [*TINY, "trainer.epochs=2", "augment.cutmix=0"]
    scratch = quick_fit(compose(overrides), tiny_data)
    tuned = quick_fit(
        compose([*overrides, f"weights={tmp_path / 'w.safetensors'}", *changes]), tiny_data
    )
    assert tuned.best["val_accuracy"] > scratch.best["val_accuracy"] + 0.1


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


@pytest.mark.usefixtures("tracking_store")
def test_a_loss_that_is_not_finite_fails_the_run_and_names_the_rate(
    tiny_data: PreparedData,
) -> None:
    config = compose([*TINY, "optim.lr=1e30", "optim.warmup=0"])
    with (
        pytest.raises(NonFiniteLoss, match=r"optim.lr=1e\+30: lower it"),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        train.train(config, tiny_data, run)
    assert tracking.get(run.run_id).status == "FAILED"
    with tracking.artifact(run.run_id, "logs/train.log"):
        pass


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


def test_training_requires_a_validation_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose([*TINY, f"data.cache={tmp_path}", "data.allow_unvalidated=false"])
    with pytest.raises(DataError, match=r"was never validated: run `python -m expectations"):
        prepare(config)
    allowed = dataclasses.replace(config.data, allow_unvalidated=True)
    prepared = prepare(dataclasses.replace(config, data=allowed))
    assert prepared.validation == "missing"
    assert "training on it anyway" in caplog.text
    for success, state in ((False, "failed"), (True, "passed")):
        validation_record.write(
            validation_record.ValidationRecord(
                fingerprint=prepared.pack.fingerprint,
                success=success,
                expectations=2,
                failed=() if success else ("balance",),
                suite="s",
                validated_at="now",
            ),
            tmp_path,
        )
        if success:
            assert prepare(config).validation == state
        else:
            with pytest.raises(DataError, match="failed balance"):
                prepare(config)


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": "x"}'])
def test_a_damaged_validation_record_is_refused(tmp_path: Path, content: str) -> None:
    file = validation_record.record_path("abc", tmp_path)
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(DataError, match="is not a validation record"):
        validation_record.read("abc", tmp_path)


def test_the_schedule_rises_to_its_peak_and_falls_to_zero() -> None:
    shares = [one_cycle(step, total=100, warmup=0.2) for step in range(101)]
    assert max(shares) == pytest.approx(1)
    assert 19 <= int(np.argmax(shares)) <= 20
    assert shares[:20] == sorted(shares[:20])
    assert shares[-1] == pytest.approx(0, abs=1e-6)
    assert one_cycle(0, total=10, warmup=0) == 1


def test_weight_decay_leaves_biases_and_norms_alone() -> None:
    network = build_network()
    optimizer = make_optimizer(network, OptimConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all(p.ndim > 1 for p in group["params"]) == (group["weight_decay"] == 0.1)
        assert all(p.ndim == 1 for p in group["params"]) == (group["weight_decay"] == 0)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, network.parameters()))


def test_every_epoch_has_each_tile_once_in_its_own_order(tiny_pack: Pack) -> None:
    rows = np.arange(100)
    first, second, again = (TileLoader(tiny_pack, rows, 20, seed) for seed in (1, 2, 1))
    orders = [
        [int(t) for _, labels in batches for t in labels] for batches in (first, second, again)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(tiny_pack.labels[rows].tolist())
    first.epoch = 1
    assert [int(t) for _, labels in first for t in labels] != orders[0]


def test_evaluation_has_every_tile_and_training_only_full_batches(tiny_pack: Pack) -> None:
    rows = np.arange(50)
    assert [len(labels) for _, labels in TileLoader(tiny_pack, rows, 20)] == [20, 20, 10]
    assert [len(labels) for _, labels in TileLoader(tiny_pack, rows, 20, seed=0)] == [20, 20]
    assert [len(labels) for _, labels in TileLoader(tiny_pack, rows, 64, seed=0)] == [50]
    passes = [
        labels for _, labels in TileLoader(tiny_pack, rows[:6], 4, seed=0, repeats_per_epoch=4)
    ]
    assert [len(labels) for labels in passes] == [4] * 6
    labels = np.sort(np.concatenate(passes))
    np.testing.assert_array_equal(labels, np.sort(np.repeat(tiny_pack.labels[rows[:6]], 4)))


def test_preloaded_batches_are_those_of_the_pack(tiny_pack: Pack) -> None:
    rows = np.arange(30, 90)
    streamed, preloaded = (
        TileLoader(tiny_pack, rows, 20, seed=1),
        TileLoader(tiny_pack, rows, 20, seed=1),
    )
    preloaded.preload(torch.device("cpu"))
    assert preloaded.nbytes == 60 * 32 * 32 * 3
    for (tiles, labels), batch in zip(streamed, preloaded, strict=True):
        assert torch.equal(batch[0], tiles)
        assert torch.equal(batch[1], labels)
        assert batch[0].is_contiguous(memory_format=torch.channels_last)


def test_batches_are_channels_last_views_of_the_pack(tiny_pack: Pack) -> None:
    tiles, labels = next(iter(TileLoader(tiny_pack, np.arange(8), 8)))
    assert tiles.shape == (8, 3, 32, 32)
    assert tiles.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(tiles.permute(0, 2, 3, 1).numpy(), tiny_pack.tiles_NHWC[:8])
    assert labels.tolist() == tiny_pack.labels[:8].tolist()


def test_band_statistics_are_those_of_the_pixels(tiny_pack: Pack) -> None:
    mean, std = band_statistics(tiny_pack, np.arange(200))
    pixels = tiny_pack.tiles_NHWC.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(std, pixels.std(axis=0), atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used without a probe")
@pytest.mark.parametrize(("precision", "bf16"), [("fp32", False), ("bf16", True)])
def test_a_configured_precision_is_used(precision: str, bf16: bool) -> None:
    compute = choose_compute(build_network().spec, precision)
    assert (compute.device, compute.bf16) == ("cpu", bf16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used without a probe")
def test_the_probe_runs_once_per_process(caplog: pytest.LogCaptureFixture) -> None:
    spec = dataclasses.replace(build_network().spec, drop_rate=0.123)
    with caplog.at_level("INFO"):
        assert choose_compute(spec, "auto") == choose_compute(spec, "auto")
    assert caplog.text.count("images/s probed: fp32 NCHW") == 1


@pytest.mark.real_data
@pytest.mark.usefixtures("tracking_store")
def test_one_epoch_on_the_real_tiles_learns(real_pack: Pack) -> None:
    config = compose([*TINY, "data=eurosat", "trainer.epochs=1", "optim.batch_size=64"])
    data = PreparedData(pack=real_pack, split=make_split(real_pack.table), validation="missing")
    assert quick_fit(config, data).best["val_accuracy"] > 0.4, "ten classes: chance is 0.1"


def test_the_hardware_is_described_in_one_line() -> None:
    line = hardware.describe_hardware()
    assert f"{hardware.cores()} cores" in line
    assert "\n" not in line
