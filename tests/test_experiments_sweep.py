"""A sweep: one parent, a child per trial with its true status, the best refitted in full."""

from pathlib import Path

import optuna
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from eurosat import cli, tracking
from eurosat.config import CONF, compose
from eurosat.errors import ConfigError, EuroSATError
from experiments import space, sweep
from tests.conftest import TINY

SWEEP = (*TINY, "trials=3", "trial_epochs=2", "trainer.epochs=3")


def children(parent: Run) -> list[Run]:
    found = MlflowClient().search_runs(
        [parent.info.experiment_id], f"tags.`{tracking.PARENT}` = '{parent.info.run_id}'"
    )
    return list(found)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_trials_stand_below_their_parent_and_the_best_is_refitted(
    workers: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [*SWEEP, f"workers={workers}", f"storage=sqlite:///{tmp_path}/study.db"]
    assert sweep.main([*given, "pruner=none", "log_level=warning"]) == cli.OK
    said = capsys.readouterr().out.splitlines()
    client = MlflowClient()
    parent = client.get_run(said[-2].removeprefix("sweep "))
    refit_id = said[-1].removeprefix("run ")

    assert parent.info.status == "FINISHED"
    assert parent.data.tags[tracking.BEST_RUN] == refit_id
    assert tracking.resolve_run(parent.info.run_id) == refit_id
    below = {
        kind: [c for c in children(parent) if c.data.tags["kind"] == kind]
        for kind in ("trial", "refit")
    }
    assert len(below["trial"]) == 3
    assert [c.info.run_id for c in below["refit"]] == [refit_id]

    study = optuna.load_study(
        study_name=f"sweep-{parent.info.run_id}", storage=f"sqlite:///{tmp_path}/study.db"
    )
    by_run = {t.user_attrs["run_id"]: t for t in study.trials}
    assert set(by_run) == {c.info.run_id for c in below["trial"]}
    for child in below["trial"]:
        trial = by_run[child.info.run_id]
        assert child.info.status == "FINISHED"
        assert child.info.experiment_id == parent.info.experiment_id
        assert float(child.data.params["optim.lr"]) == pytest.approx(trial.params["optim.lr"])
        assert child.data.params["trainer.epochs"] == "2"
        history = client.get_metric_history(child.info.run_id, "val_accuracy")
        assert [p.step for p in history] == [0, 1]
        assert [p.value for p in history] == pytest.approx(list(trial.intermediate_values.values()))
        assert not [name for name in child.data.metrics if name.startswith("test_")], (
            "a trial must not look at the test fold"
        )
    refit = below["refit"][0]
    assert refit.data.params["trainer.epochs"] == "3"
    assert float(refit.data.params["optim.lr"]) == pytest.approx(study.best_params["optim.lr"])
    assert refit.data.metrics["test_accuracy"] == parent.data.metrics["test_accuracy"]
    assert parent.data.metrics["best_val_accuracy"] == study.best_value
    with tracking.artifact(parent.info.run_id, "figures") as folder:
        assert (folder / "history.png").stat().st_size > 10_000


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_pruned_trial_says_so_and_a_diverged_one_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class AfterOne(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 1

    (tmp_path / "wild.yaml").write_text(
        "optim.lr: {choices: [0.1]}\noptim.clip_norm: {choices: [0.0]}\n"
    )
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: AfterOne())
    given = [*SWEEP, f"space={tmp_path}/wild.yaml", "refit=false", "log_level=warning"]
    assert sweep.main(given) == cli.OK
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("3 trials: 2 finished, 1 pruned, 0 failed")
    parent = MlflowClient().get_run(said[-1].removeprefix("sweep "))
    statuses = {c.data.tags["trial.number"]: c for c in children(parent)}
    assert [statuses[n].info.status for n in "012"] == ["FINISHED", "KILLED", "FINISHED"]
    assert statuses["1"].data.tags["pruned"] == "true"
    assert statuses["1"].data.tags["pruned.epoch"] == "1"
    assert "pruned" not in statuses["0"].data.tags
    assert parent.data.metrics["trials_pruned"] == 1


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_without_a_finished_trial_fails_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "wild.yaml").write_text("optim.lr: {low: 1.0e+29, high: 1.0e+30}\n")
    given = [*SWEEP, f"space={tmp_path}/wild.yaml", "optim.warmup=0", "log_level=error"]
    with pytest.raises(EuroSATError, match=r"none of 3 trials finished \(3 failed\)"):
        sweep.main(given)
    parent = tracking.latest_run("eurosat", kind="sweep")
    assert tracking.get(parent).status == "FAILED"
    states = [c.info.status for c in children(MlflowClient().get_run(parent))]
    assert states == ["FAILED"] * 3


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_the_recipe_itself_is_the_first_trial(tmp_path: Path) -> None:
    sweep.main([*SWEEP, "trials=1", "refit=false", "study=first", "log_level=warning"])
    study = optuna.load_study(study_name="first", storage="sqlite:///optuna.db")
    assert study.trials[0].params["optim.lr"] == compose().optim.lr
    with pytest.raises(ConfigError, match="study 'first' is already in sqlite:///optuna.db"):
        sweep.main([*SWEEP, "trials=1", "refit=false", "study=first", "log_level=warning"])


@pytest.mark.parametrize("name", sorted(file.stem for file in space.SPACES.glob("*.yaml")))
def test_every_space_fits_the_recipes(name: str) -> None:
    recipes = sorted(file.stem for file in (CONF / "recipe").glob("*.yaml"))
    edges = [
        {
            k: v.low if isinstance(v, space.Range) else v.choices[0]
            for k, v in space.load(name).items()
        },
        {
            k: v.high if isinstance(v, space.Range) else v.choices[-1]
            for k, v in space.load(name).items()
        },
    ]
    for recipe in recipes:
        for values in edges:
            compose([f"recipe={recipe}", *sweep.as_overrides(values)])


@pytest.mark.parametrize(
    "entry",
    ["5", "{low: 1}", "{low: 2, high: 1}", "{low: 0, high: 1, log: true}", "{choices: []}",
     "{low: 0, high: 1, step: 2}", "{choices: [1], more: 2}"],
)  # fmt: skip
def test_a_space_with_a_fault_is_refused_by_name(tmp_path: Path, entry: str) -> None:
    (tmp_path / "s.yaml").write_text(f"optim.lr: {entry}\n")
    with pytest.raises(ConfigError, match="s.yaml: optim.lr must be"):
        space.load(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["trials=0"], r"trials must be in \[1, 10000\]; got 0"),
        (["workers=two"], "workers must be int; got 'two'"),
        (["pruner=axe"], "pruner must be 'median' or 'none'"),
        (["space=none"], "no search space 'none': known are resnet18"),
        (["optim.lrr=1"], "unknown key optim.lrr"),
    ],
)
@pytest.mark.usefixtures("tracking_store")
def test_a_fault_in_the_arguments_is_named(given: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep.main([*TINY, *given, "log_level=error"])


def test_an_empty_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump([]))
    with pytest.raises(ConfigError, match="holds no keys and values"):
        space.load(str(tmp_path / "s.yaml"))
