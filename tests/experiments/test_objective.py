"""One trial: it is trained once, however its process ends."""

from collections.abc import Callable

import pytest

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.data.prepare import PreparedData
from eurosat.training.checkpoints import CheckpointSlot, acquire
from experiments import objective
from experiments.objective import SweepJob, TrialResult, TrialSpec
from experiments.settings import SweepConfig
from tests.support.recipes import TINY


def kill(_: object) -> None:
    raise SystemExit


@pytest.mark.parametrize(
    "killed", ["before it reported the result", "before it deleted the checkpoint"]
)
@pytest.mark.usefixtures("tracking_store")
def test_a_trial_that_was_killed_after_its_end_is_not_trained_again(
    tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    settings = SweepConfig(trials=1, trial_epochs=1, study="s")
    started: list[tracking.Run] = []
    with tracking.run("eurosat", "parent", system_metrics=False) as parent:
        job = SweepJob(sweep=settings, study="s", overrides=TINY, parent=parent.journal)

        def train_trial(on_end: Callable[[TrialResult], None] = lambda _: None) -> TrialResult:
            return objective.train_trial(
                job,
                TrialSpec(number=0, params={}),
                tiny_data,
                lambda *_: None,
                lambda run, _: started.append(run),
                on_end=on_end,
            )

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            if killed == "before it reported the result":
                train_trial(on_end=kill)
            patch.setattr(CheckpointSlot, "remove", kill)
            train_trial()
        reported: list[TrialResult] = []
        result = train_trial(on_end=reported.append)
        assert reported == [result]
    assert len(started) == 1
    assert result.state == "complete"
    run = tracking.get(started[0].run_id)
    assert (run.status, run.run_id) == ("FINISHED", result.run_id)
    assert result.values == (run.metrics["best_val_accuracy"],)


@pytest.mark.usefixtures("tracking_store")
def test_a_pruned_trial_that_was_killed_before_it_reported_stays_pruned(
    tiny_data: PreparedData,
) -> None:
    settings = SweepConfig(trials=1, trial_epochs=2, study="s")
    with tracking.run("eurosat", "parent", system_metrics=False) as parent:
        job = SweepJob(sweep=settings, study="s", overrides=TINY, parent=parent.journal)
        reasons: list[str | None] = ["pruned", None]

        def train_trial(on_end: Callable[[TrialResult], None]) -> TrialResult:
            return objective.train_trial(
                job,
                TrialSpec(number=0, params={}),
                tiny_data,
                lambda *_: reasons.pop(0),
                lambda *_: None,
                on_end=on_end,
            )

        with pytest.raises(SystemExit):
            train_trial(kill)
        result = train_trial(lambda _: None)
    assert result.state == "pruned"
    assert reasons == [None], "it was not trained again"
    run = tracking.get(result.run_id)
    assert (run.status, run.tags["pruned.epoch"]) == ("KILLED", "1")


@pytest.mark.usefixtures("tracking_store")
def test_a_training_that_was_killed_before_its_run_existed_gets_a_run(
    tiny_config: TrainConfig,
) -> None:
    with pytest.raises(SystemExit), acquire(tiny_config, {"a": "b"}) as checkpoint:
        checkpoint.start_or_resume()
        raise SystemExit  # before the journal of that name exists
    with acquire(tiny_config, {"a": "b"}) as checkpoint:
        assert checkpoint.journal is None
        journal = checkpoint.start_or_resume()
        with tracking.run("e", "r", journal=journal, system_metrics=False) as run:
            pass
    assert tracking.get(run.journal).run_id == run.run_id
