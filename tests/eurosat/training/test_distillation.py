"""Distillation: the targets, which run is the teacher, and which teachers are refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from eurosat import tracking, train
from eurosat.config import TrainConfig, compose
from eurosat.data import bands
from eurosat.data.prepare import PreparedData
from eurosat.data.split import make_split
from eurosat.errors import ConfigError, DataError, ModelError, TrackingError
from eurosat.models.compute import Compute
from eurosat.training import distillation, launch
from tests.support.recipes import TINY

PACKAGED_TEACHER = ("distill.teacher=efficientnet-lite", "distill.share=0")
CPU = Compute(device="cpu", bf16=False, channels_last=True)


def student(*overrides: str) -> TrainConfig:
    return compose([*TINY, "trainer.epochs=1", *overrides])


@pytest.fixture(scope="module")
def taught(store: Path, tiny_data: PreparedData) -> tuple[Path, str]:
    """A tracking store with one finished run of the recipe `resnet18-quick`, and the run's id."""
    config = compose([*TINY, "recipe=resnet18-quick", "trainer.epochs=1"])
    with tracking.run("eurosat", "t", system_metrics=False, tags={"kind": "train"}) as run:
        train.train(config, tiny_data, run)
    return store / "mlflow.db", run.run_id


@pytest.fixture
def teacher(taught: tuple[Path, str], tracking_store: str, tmp_path: Path) -> str:
    """The id of that run, in a copy of its tracking store for one test."""
    database, run_id = taught
    shutil.copy(database, tmp_path / "mlflow.db")
    return run_id


def test_targets_mix_the_teachers_probabilities_and_the_labels_by_share(
    teacher: str, tiny_data: PreparedData
) -> None:
    rows = tiny_data.split.indices("train")
    labels = np.eye(10)[tiny_data.pack.labels[rows]]
    reference = f"distill.teacher=runs:/{teacher}"

    def train_targets(*overrides: str) -> np.ndarray:
        targets = distillation.targets(student(reference, *overrides), tiny_data, CPU)
        assert targets is not None
        assert not targets[tiny_data.split.indices("test")].any()
        return targets[rows]

    pure, mixed = train_targets("distill.share=1"), train_targets("distill.share=0.5")
    np.testing.assert_allclose(pure.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(mixed, (pure + labels) / 2, atol=1e-6)
    softer = train_targets("distill.share=1", "distill.temperature=10")
    assert softer.max(axis=1).mean() < pure.max(axis=1).mean()
    assert (softer.argmax(axis=1) == pure.argmax(axis=1)).all()
    assert distillation.targets(student(), tiny_data, CPU) is None


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_features_are_the_teachers_principal_axes_and_are_cached(
    teacher: str, tiny_data: PreparedData, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    rows = tiny_data.split.indices("train")
    config = student(f"distill.teacher=runs:/{teacher}", "distill.features=5", "distill.share=0")
    shutil.rmtree(config.data.cache_dir / "teachers", ignore_errors=True)
    with caplog.at_level("INFO"):
        first, second = (distillation.targets(config, tiny_data, CPU) for _ in range(2))
    assert first is not None
    assert second is not None
    assert caplog.text.count("running the teacher") == 1
    np.testing.assert_array_equal(first, second)
    labels = np.eye(10)[tiny_data.pack.labels[rows]]
    np.testing.assert_array_equal(first[rows][:, :10], labels, "share=0 leaves the labels")
    axes = first[rows][:, 10:]
    assert axes.shape[1] <= distillation.MAX_AXES
    np.testing.assert_allclose(axes.mean(axis=0), 0, atol=1e-4)
    assert axes.std() == pytest.approx(1, rel=1e-3)
    spread = axes.var(axis=0)
    assert (np.diff(spread) <= 1e-6).all(), "largest variance first"
    covariance = np.cov(axes, rowvar=False)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    (cached,) = (config.data.cache_dir / "teachers").glob("*.npz")
    cached.write_bytes(damage)
    again = distillation.targets(config, tiny_data, CPU)
    assert again is not None
    np.testing.assert_allclose(again, first, atol=1e-5)


@pytest.mark.usefixtures("tracking_store")
def test_the_packaged_network_teaches_its_features(tiny_data: PreparedData) -> None:
    losses = []
    for weight in (1e-9, 20):
        config = student(*PACKAGED_TEACHER, f"distill.features={weight}", "trainer.epochs=3")
        with tracking.run("eurosat", "s", system_metrics=False) as run:
            launch.fit(config, tiny_data, run)
        metrics = tracking.get(run.run_id).metrics
        losses.append(metrics["train_features_loss"])
        assert 1 < metrics["train_loss"] < 3, "the loss of the classes alone"
    assert losses[1] < 0.97 * losses[0], losses


@pytest.mark.usefixtures("tracking_store")
def test_a_teacher_without_share_and_features_does_not_run(
    tiny_data: PreparedData, caplog: pytest.LogCaptureFixture
) -> None:
    assert distillation.targets(student(*PACKAGED_TEACHER), tiny_data, CPU) is None
    assert "running the teacher" not in caplog.text


@pytest.mark.parametrize("settings", [["data.reflectance_max=5000"], ["data.dtype=uint16"]])
@pytest.mark.usefixtures("tracking_store")
def test_the_teacher_runs_again_for_tiles_that_are_decoded_differently(
    tiny_data: PreparedData, caplog: pytest.LogCaptureFixture, settings: list[str]
) -> None:
    overrides = (*PACKAGED_TEACHER, "distill.features=1")
    distillation.targets(student(*overrides), tiny_data, CPU)
    caplog.clear()
    with caplog.at_level("INFO"):
        distillation.targets(student(*overrides, *settings), tiny_data, CPU)
    assert "running the teacher" in caplog.text


@pytest.mark.usefixtures("tracking_store")
def test_the_packaged_network_refuses_four_bands(
    tiny_data: PreparedData,
) -> None:
    four = np.asarray(tiny_data.pack.tiles_NHWC)[..., [0, 1, 2, 2]]
    pack = dataclasses.replace(tiny_data.pack, tiles_NHWC=four, fingerprint="four")
    with pytest.raises(ModelError, match="data have 4: set distill.teacher=none"):
        distillation.targets(
            student(*PACKAGED_TEACHER, "distill.features=1"),
            dataclasses.replace(tiny_data, pack=pack),
            CPU,
        )


def test_the_packaged_network_has_no_probabilities_to_distill() -> None:
    with pytest.raises(
        ConfigError, match=r"distill.share=0.9 .*efficientnet-lite does not know our"
    ):
        student("distill.teacher=efficientnet-lite", "distill.features=5")


@pytest.mark.usefixtures("tracking_store")
def test_the_packaged_network_takes_the_colours_targets_13_bands(
    tiny_data: PreparedData,
) -> None:
    tiles_NHWC = np.asarray(tiny_data.pack.tiles_NHWC)
    wide = np.zeros((*tiles_NHWC.shape[:3], 13), np.uint8)
    wide[..., bands.rgb_indices()] = tiles_NHWC
    pack = dataclasses.replace(tiny_data.pack, tiles_NHWC=wide, fingerprint="thirteen")
    config = student(*PACKAGED_TEACHER, "distill.features=1")
    targets_13 = distillation.targets(config, dataclasses.replace(tiny_data, pack=pack), CPU)
    targets_3 = distillation.targets(config, tiny_data, CPU)
    assert targets_13 is not None
    assert targets_3 is not None
    np.testing.assert_allclose(targets_13, targets_3, atol=1e-3)


def create_run(data: PreparedData, recipe: str, **tags: str) -> None:
    """Create a finished run with the tags and params of a teacher."""
    with tracking.run(
        "eurosat", "p", system_metrics=False, tags={"kind": "train", **data.fingerprints, **tags}
    ) as run:
        run.log_params({"recipe": recipe})


def test_a_recipe_means_its_latest_finished_run_and_a_resumed_run_keeps_its_teacher(
    tracking_store: str, teacher: str, tiny_data: PreparedData
) -> None:
    config = student("distill.teacher=resnet18-quick")
    create_run(tiny_data, "another")
    create_run(tiny_data, "resnet18-quick", kind="trial")
    create_run(tiny_data, "resnet18-quick", **{"split.fingerprint": "other"})
    with pytest.raises(ZeroDivisionError), tracking.run("eurosat", "p") as failed:
        failed.set_tags({"kind": "train", **tiny_data.fingerprints})
        failed.log_params({"recipe": "resnet18-quick"})
        raise ZeroDivisionError
    with tracking.run("eurosat", "s", system_metrics=False) as run:
        fitted = launch.fit(config, tiny_data, run)
        assert fitted.history
        assert run.tag(distillation.TEACHER_TAG) == teacher, (
            "unfinished and unrelated runs are skipped"
        )
        create_run(tiny_data, "resnet18-quick")
        assert distillation.find_teacher(config, tiny_data) != teacher, "a later run is found"
        resolved = distillation.resolve_teacher(config, tiny_data, run)
    assert resolved.distill.teacher == f"runs:/{teacher}", "the teacher it started with"


def refused(config: TrainConfig, data: PreparedData) -> None:
    with tracking.run("eurosat", "s", system_metrics=False) as run:
        launch.fit(config, data, run)


@pytest.mark.usefixtures("tracking_store")
def test_a_recipe_without_a_finished_run_is_refused(tiny_data: PreparedData) -> None:
    with pytest.raises(TrackingError, match="no finished run of that recipe .* train it first"):
        refused(student("distill.teacher=efficientnet-lite0"), tiny_data)


def test_a_teacher_of_another_split_is_refused(teacher: str, tiny_data: PreparedData) -> None:
    other = dataclasses.replace(tiny_data, split=make_split(tiny_data.pack.table, seed=1))
    with pytest.raises(DataError, match="may have learned from tiles of this test fold"):
        refused(student(f"distill.teacher=runs:/{teacher}"), other)


def test_a_teacher_of_other_classes_is_refused(teacher: str, tiny_data: PreparedData) -> None:
    classes = tuple("abcdefghij")
    pack = dataclasses.replace(tiny_data.pack, classes=classes, fingerprint="letters")
    with pytest.raises(
        ModelError, match="has the classes AnnualCrop, .* and 3 bands; the data have a, b, c"
    ):
        refused(
            student(f"distill.teacher=runs:/{teacher}"),
            dataclasses.replace(tiny_data, pack=pack),
        )
