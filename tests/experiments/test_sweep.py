"""Sweeps: one parent run, a child per trial with its true status, the best refitted in full."""

import contextlib
import os
import shlex
import signal
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from eurosat import tracking
from eurosat.config import compose
from eurosat.errors import ConfigError, EuroSATError, NonFiniteLoss
from eurosat.runtime import exit_codes
from experiments import objective, sweep
from experiments.objective import SweepJob
from experiments.settings import SweepConfig
from tests.support import processes
from tests.support.paths import ROOT
from tests.support.recipes import TINY
from tests.support.sweeps import (
    SWEEP,
    check_all_complete,
    child_runs,
    load_trials,
    start_sweep,
    wait_until,
)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_trials_are_children_of_the_sweep_and_the_best_is_refitted(
    workers: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = [*SWEEP, f"workers={workers}", f"storage=sqlite:///{tmp_path}/study.db"]
    assert sweep.main([*settings, "pruner=none", "log_level=warning"]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    client = MlflowClient()
    parent = client.get_run(lines[-2].removeprefix("sweep "))
    refit_id = lines[-1].removeprefix("run ")

    assert parent.info.status == "FINISHED"
    assert parent.data.tags[tracking.BEST_RUN] == refit_id
    assert tracking.resolve_run(parent.info.run_id) == refit_id
    runs = child_runs(parent)
    trial_runs = [run for run in runs if run.data.tags["kind"] == "trial"]
    [refit] = [run for run in runs if run.data.tags["kind"] == "refit"]
    assert len(trial_runs) == 3
    assert refit.info.run_id == refit_id

    study = optuna.load_study(
        study_name=f"sweep-{parent.info.run_id}", storage=f"sqlite:///{tmp_path}/study.db"
    )
    trial_by_run = {trial.user_attrs["run_id"]: trial for trial in study.trials}
    assert set(trial_by_run) == {run.info.run_id for run in trial_runs}
    for run in trial_runs:
        trial = trial_by_run[run.info.run_id]
        assert run.info.status == "FINISHED"
        assert run.info.experiment_id == parent.info.experiment_id
        assert float(run.data.params["optim.lr"]) == pytest.approx(trial.params["optim.lr"])
        assert run.data.params["trainer.epochs"] == "2"
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [p.step for p in history] == [0, 1]
        assert [p.value for p in history] == pytest.approx(list(trial.intermediate_values.values()))
        assert not [name for name in run.data.metrics if name.startswith("test_")], (
            "a trial must not use the test fold"
        )
    assert refit.data.params["trainer.epochs"] == "3"
    assert float(refit.data.params["optim.lr"]) == pytest.approx(study.best_params["optim.lr"])
    assert refit.data.metrics["test_accuracy"] == parent.data.metrics["test_accuracy"]
    assert parent.data.metrics["best_val_accuracy"] == study.best_value
    with tracking.artifact(parent.info.run_id, "figures") as folder:
        plots = ["history"]
        if len({trial.value for trial in study.trials}) > 1:
            plots += ["importances", "parallel_coordinates"]
        assert {file.stem for file in folder.iterdir()} == set(plots)
        assert all(file.stat().st_size > 10_000 for file in folder.iterdir())


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_the_best_trial_has_one_number_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = [*SWEEP, storage, "study=s", "trials=2", "trial_epochs=1", "trainer.epochs=1"]
    assert sweep.main([*settings, "log_level=warning"]) == exit_codes.OK
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    number = study.best_trial.number
    assert f"best is trial {number} with validation accuracy" in capsys.readouterr().out
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    assert parent.data.tags[sweep.REFITTED_TAG] == str(number)
    [best] = [
        run
        for run in child_runs(parent)
        if run.data.tags["kind"] == "trial" and run.data.tags["trial.number"] == str(number)
    ]
    assert best.info.run_name == f"trial {number}"
    assert best.data.metrics["best_val_accuracy"] == study.best_value


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_resumed_sweep_refits_the_same_best_trial_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = [*SWEEP, storage, "study=s", "trials=1", "log_level=warning"]
    assert sweep.main(settings) == exit_codes.OK

    def diverge(*_: object) -> None:
        raise NonFiniteLoss("the loss of epoch 1 is nan")

    monkeypatch.setattr(objective, "_fit", diverge)
    assert sweep.main(["resume=s", storage, "trials=2", "log_level=warning"]) == exit_codes.OK
    assert [trial.state.name for trial in load_trials(tmp_path)] == ["COMPLETE", "FAIL"]
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    kinds = sorted(run.data.tags["kind"] for run in child_runs(parent))
    assert kinds == ["refit", "trial", "trial"]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_registers_its_refit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{ROOT}")
    settings = [*SWEEP, f"storage=sqlite:///{tmp_path}/study.db", "trials=1", "register=true"]
    assert sweep.main([*settings, "log_level=warning"]) == exit_codes.OK
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    [version] = MlflowClient().search_model_versions("name = 'eurosat'")
    assert version.run_id == parent.data.tags[tracking.BEST_RUN]
    assert "champion" not in version.aliases, "only a promotion sets that alias"


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_the_run_of_a_pruned_trial_is_killed_with_the_epoch_in_a_tag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class PruneTrial1(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 1

    (tmp_path / "wild.yaml").write_text(
        "optim.lr: {choices: [0.1]}\noptim.clip_norm: {choices: [0.0]}\n"
    )
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: PruneTrial1())
    settings = [*SWEEP, f"space={tmp_path}/wild.yaml", "refit=false", "log_level=warning"]
    assert sweep.main(settings) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 trials: 2 finished, 1 pruned, 0 failed")
    parent = MlflowClient().get_run(lines[-1].removeprefix("sweep "))
    runs = {run.data.tags["trial.number"]: run for run in child_runs(parent)}
    assert [runs[number].info.status for number in "012"] == ["FINISHED", "KILLED", "FINISHED"]
    assert runs["1"].data.tags["pruned"] == "true"
    assert runs["1"].data.tags["pruned.epoch"] == "1"
    assert "pruned" not in runs["0"].data.tags
    assert parent.data.metrics["trials_pruned"] == 1


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_without_a_finished_trial_fails_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "wild.yaml").write_text("optim.lr: {low: 1.0e+29, high: 1.0e+30}\n")
    wild = [f"space={tmp_path}/wild.yaml", "optim.lr=2e29", "optim.warmup=0"]
    settings = [*SWEEP, *wild, "log_level=error"]
    with pytest.raises(EuroSATError, match=r"none of 3 trials finished \(3 failed\)"):
        sweep.main(settings)
    parent = tracking.latest_run("eurosat", kind="sweep")
    assert tracking.get(parent).status == "FAILED"
    statuses = [run.info.status for run in child_runs(MlflowClient().get_run(parent))]
    assert statuses == ["FAILED"] * 3


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_the_recipe_itself_is_the_first_trial() -> None:
    settings = [*SWEEP, "trials=1", "refit=false", "study=first", "log_level=warning"]
    sweep.main(settings)
    study = optuna.load_study(study_name="first", storage="sqlite:///optuna.db")
    assert study.trials[0].params["optim.lr"] == compose().optim.lr
    with pytest.raises(ConfigError, match="study 'first' is already in sqlite:///optuna.db"):
        sweep.main(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trials=0"], "trials must be at least 1; got 0"),
        (["workers=two"], "workers must be int; got 'two'"),
        (["pruner=axe"], "pruner must be 'asha', 'median' or 'none'; got 'axe'"),
        (["space=none"], "no search space 'none': choose from fine-tuning, resnet18"),
        (["optim.lrr=1"], "unknown key optim.lrr"),
        (["search_space="], "recipe=resnet18-quick names no search_space: give space=NAME"),
    ],
)
@pytest.mark.usefixtures("tracking_store")
def test_the_error_for_an_invalid_argument_names_it(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.main([*TINY, *arguments, "log_level=error"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampler=Guess", "sampler=Guess is unknown: choose from"),
        ("sampler=GridSampler", "sampler=GridSampler cannot be used here"),
        ("minutes=0", "minutes must be above 0"),
        ("target=98", "target must be at most 1; got 98"),
        ("resume=none", "has no study 'none'"),
        ("resume=", "resume= names no study"),
        ("space=fine-tuning", r"outside space=fine-tuning: optim.lr=0.1 \(the space has 0.0001 to"),
    ],
)
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_the_error_for_an_impossible_search_names_the_setting(
    setting: str, message: str, tmp_path: Path
) -> None:
    base = [] if setting.startswith("resume") else SWEEP
    with pytest.raises(ConfigError, match=message):
        sweep.main([*base, setting, f"storage=sqlite:///{tmp_path}/study.db", "log_level=error"])


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_an_interrupted_sweep_prints_the_command_that_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = [*SWEEP, "study=s", storage, "trials=1", "refit=false", "log_level=error"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective, "_fit", interrupt)
        sweep.main(settings)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "to continue: " in line]
    command = shlex.split(line.removeprefix("to continue: "))
    assert command == ["python", "-m", "experiments.sweep", "resume=s", storage]
    assert sweep.main([*command[3:], "log_level=error"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("1 trials: 1 finished")


def test_the_command_that_continues_a_sweep_has_no_password_and_no_default() -> None:
    def command(**settings: str) -> str:
        config = SweepConfig(**settings)  # type: ignore[arg-type]
        return sweep.resume_command(SweepJob(sweep=config, study="s", overrides=(), parent=""))

    assert command() == "python -m experiments.sweep resume=s"
    with_password = command(storage="postgresql://team:secret@127.0.0.1/studies")
    assert "team:***@127.0.0.1/studies" in with_password


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_ends_at_its_target_and_may_start_with_another_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = [*SWEEP, storage, "refit=false", "log_level=warning", "pruner=asha"]
    assert sweep.main([*settings, "study=s", "trials=9", "target=0.05"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("1 trials: 1 finished")
    assert sweep.main(["resume=s", storage, "log_level=warning"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("study s is complete"), "the target was reached"
    warm_start = ["study=t", "trials=2", "from_study=s", "minutes=5"]
    assert sweep.main([*settings, *warm_start]) == exit_codes.OK
    assert len(load_trials(tmp_path, "t")) == 3, "two of its own, and one of study s"
    assert capsys.readouterr().out.startswith("2 trials: ")
    with pytest.raises(ConfigError, match="from_study=u does not exist; the studies are: s, t"):
        sweep.main([*settings, "study=v", "from_study=u"])


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_of_two_objectives_plots_a_pareto_front(tmp_path: Path) -> None:
    (tmp_path / "size.yaml").write_text("model.name: {choices: [test_resnet, test_vit]}\n")
    storage = f"sqlite:///{tmp_path}/study.db"
    settings = [*SWEEP, "study=s", f"storage={storage}", f"space={tmp_path}/size.yaml"]
    settings += ["sampler=NSGAIISampler", "objectives=accuracy,latency", "model.input_size=160"]
    assert sweep.main([*settings, "refit=false", "log_level=warning"]) == exit_codes.OK
    parent = tracking.latest_run("eurosat", kind="sweep")
    for trial in load_trials(tmp_path):
        accuracy, latency = trial.values
        run = tracking.get(trial.user_attrs["run_id"])
        assert run.metrics["latency_ms"] == latency > 0
        assert run.metrics["best_val_accuracy"] == accuracy
    with tracking.artifact(parent, "figures/pareto_front.png") as file:
        assert file.stat().st_size > 10_000


@pytest.mark.parametrize("killed", [pytest.param("driver", marks=pytest.mark.slow), "everything"])
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_that_was_killed_is_resumed_where_it_stopped(tmp_path: Path, killed: str) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = ["study=s", storage, "trials=3", "workers=2", "trial_epochs=12", "pruner=none"]
    first = start_sweep(tmp_path, *SWEEP, *settings, "refit=false")

    def some_ended_and_some_half_done() -> bool:
        trials = load_trials(tmp_path)
        unfinished = [trial for trial in trials if not trial.state.is_finished()]
        return len(unfinished) < len(trials) and any(
            1 < len(trial.intermediate_values) < 9 for trial in unfinished
        )

    wait_until(some_ended_and_some_half_done, first)
    if killed == "driver":
        first.kill()
    else:
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = {t.number: t for t in load_trials(tmp_path) if t.state.is_finished()}

    with pytest.raises(ConfigError, match="keeps the recipe of the study"):
        sweep.main(["resume=s", storage, "optim.lr=1"])
    second = processes.run("experiments.sweep", "resume=s", storage, folder=tmp_path)
    assert second.returncode == exit_codes.OK, second.stderr[-3000:]
    run_by_number = check_all_complete(tmp_path, 3, 12)
    after = {trial.number: trial for trial in load_trials(tmp_path)}
    for number, trial in before.items():
        assert after[number].datetime_complete == trial.datetime_complete, "it was not run again"
    retried = [trial for trial in after.values() if trial.user_attrs.get("retries")]
    assert 1 <= len(retried) <= 2
    for trial in retried:
        assert run_by_number[str(trial.number)].data.tags["trial.retries"] == "1"


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_worker_that_is_killed_is_replaced_and_its_trial_is_retried(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    settings = ["study=s", storage, "trials=2", "workers=2", "trial_epochs=12", "pruner=none"]
    process = start_sweep(tmp_path, *SWEEP, *settings, "refit=false")
    wait_until(lambda: any(len(t.intermediate_values) > 1 for t in load_trials(tmp_path)), process)
    children = psutil.Process(process.pid).children()
    workers = [worker for server in children for worker in server.children()]
    assert len(workers) == 2
    workers[0].kill()
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == exit_codes.OK, stderr[-3000:]
    assert "was killed by signal 9; it is taken up again" in stderr
    assert "2 trials: 2 finished, 0 pruned, 0 failed" in stdout
    check_all_complete(tmp_path, 2, 12)


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_workers_end_after_their_driver_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    settings = ["study=s", f"storage=sqlite:///{tmp_path}/study.db", "workers=2", "trials=2"]
    long_epochs = "trainer.repeats_per_epoch=10000"
    driver = start_sweep(tmp_path, *SWEEP, *settings, "refit=false", long_epochs)
    client = MlflowClient()

    def trial_runs() -> list[Run]:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, "tags.kind = 'trial'"))

    def both_are_training() -> bool:
        return sum("train_loss_step" in run.data.metrics for run in trial_runs()) == 2

    try:
        wait_until(both_are_training, driver)
        workers = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "another driver would wait for them"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    assert [run.info.status for run in trial_runs()] == ["KILLED"] * 2
    assert not any(trial.intermediate_values for trial in load_trials(tmp_path))
