"""Learning from a teacher: what it answers, which one it is, and which is refused."""

import dataclasses

import numpy as np
import pytest

from eurosat import distill, launch, machine, tracking, train
from eurosat.config import TrainConfig, compose
from eurosat.errors import DataError, TrackingError
from eurosat.prepare import Prepared
from eurosat.split import make_split
from tests.conftest import TINY

CPU = machine.Compute(device="cpu", bf16=False, channels_last=True)


def student(*more: str) -> TrainConfig:
    return compose([*TINY, "trainer.epochs=1", *more])


@pytest.fixture
def teacher(tracking_store: str, tiny_data: Prepared) -> str:
    """A finished run of the recipe `resnet18-quick`, whatever it has learned."""
    config = compose([*TINY, "recipe=resnet18-quick", "trainer.epochs=1"])
    with tracking.run("eurosat", "t", system_metrics=False, tags={"kind": "train"}) as run:
        train.train(config, tiny_data, run)
    return run.run_id


def test_targets_are_the_teachers_answers_and_the_labels_in_their_shares(
    teacher: str, tiny_data: Prepared
) -> None:
    rows = tiny_data.split.indices("train")
    labels = np.eye(10)[tiny_data.pack.labels[rows]]
    given = f"distill.teacher=runs:/{teacher}"

    def told(*more: str) -> np.ndarray:
        found = distill.targets(student(given, *more), tiny_data, CPU)
        assert found is not None
        assert not found[tiny_data.split.indices("test")].any()
        return found[rows]

    alone, mixed = told("distill.share=1"), told("distill.share=0.5")
    np.testing.assert_allclose(told("distill.share=0"), labels)
    np.testing.assert_allclose(alone.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(mixed, (alone + labels) / 2, atol=1e-6)
    softer = told("distill.share=1", "distill.temperature=10")
    assert softer.max(axis=1).mean() < alone.max(axis=1).mean()
    assert (softer.argmax(axis=1) == alone.argmax(axis=1)).all()
    assert distill.targets(student(), tiny_data, CPU) is None


def test_a_recipe_stands_for_its_latest_finished_run_and_a_continued_run_keeps_it(
    teacher: str, tiny_data: Prepared
) -> None:
    config = student("distill.teacher=resnet18-quick")
    with tracking.run("eurosat", "s", system_metrics=False) as run:
        fitted = launch.fit(config, tiny_data, run)
    assert fitted.history
    assert tracking.get(run.run_id).tags[distill.TEACHER] == teacher
    elsewhere = dataclasses.replace(config, experiment="elsewhere")
    settled = distill.settled(elsewhere, tiny_data, tracking.attach(run.run_id, ""))
    assert settled.distill.teacher == f"runs:/{teacher}"


@pytest.mark.usefixtures("tracking_store")
def test_a_recipe_without_a_finished_run_is_refused(tiny_data: Prepared) -> None:
    config = student("distill.teacher=efficientnet-lite0")
    with pytest.raises(TrackingError, match="no finished run of that recipe .* train it first"):
        distill.targets(config, tiny_data, CPU)


def test_a_teacher_of_another_split_is_refused(teacher: str, tiny_data: Prepared) -> None:
    other = make_split(tiny_data.pack.table, seed=1)
    config = student(f"distill.teacher=runs:/{teacher}")
    with pytest.raises(DataError, match="may have learned from tiles of this test fold"):
        distill.targets(config, dataclasses.replace(tiny_data, split=other), CPU)
