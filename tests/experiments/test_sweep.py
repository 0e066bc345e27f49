"""A sweep: one parent, a child per trial with its true status, the best refitted in full."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from eurosat import tracking
from eurosat.config import CONF, TrainConfig, compose
from eurosat.data.prepare import PreparedData
from eurosat.errors import ConfigError, EuroSATError, NonFiniteLoss
from eurosat.runtime import exit_codes
from eurosat.training.checkpoints import CheckpointSlot, acquire
from experiments import drivers, objective, search, space, sweep
from experiments.objective import Job, Outcome, Task
from experiments.search import Search, create
from experiments.settings import SweepConfig
from experiments.sweep_progress import View
from tests.support.mlflow_server import free_port
from tests.support.paths import ROOT
from tests.support.recipes import TINY
from tests.support.sweeps import SWEEP, check_whole, children, saying, trials, until


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_trials_stand_below_their_parent_and_the_best_is_refitted(
    workers: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [*SWEEP, f"workers={workers}", f"storage=sqlite:///{tmp_path}/study.db"]
    assert sweep.main([*given, "pruner=none", "log_level=warning"]) == exit_codes.OK
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
        drawn = ["history"]
        if len({trial.value for trial in study.trials}) > 1:
            drawn += ["importances", "parallel_coordinates"]
        assert {file.stem for file in folder.iterdir()} == set(drawn)
        assert all(file.stat().st_size > 10_000 for file in folder.iterdir())


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_that_goes_on_refits_its_best_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = [*SWEEP, storage, "study=s", "trials=1", "log_level=warning"]
    assert sweep.main(given) == exit_codes.OK

    def diverges(*_: object) -> None:
        raise NonFiniteLoss("the loss of epoch 1 is nan")

    monkeypatch.setattr(objective, "_trained", diverges)
    assert sweep.main(["resume=s", storage, "trials=2", "log_level=warning"]) == exit_codes.OK
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "FAIL"]
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    assert sorted(c.data.tags["kind"] for c in children(parent)) == ["refit", "trial", "trial"]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_registers_its_refit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{ROOT}")
    given = [*SWEEP, f"storage=sqlite:///{tmp_path}/study.db", "trials=1", "register=true"]
    assert sweep.main([*given, "log_level=warning"]) == exit_codes.OK
    parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
    [version] = MlflowClient().search_model_versions("name = 'eurosat'")
    assert version.run_id == parent.data.tags[tracking.BEST_RUN]
    assert "champion" not in version.aliases, "that is for the gate to say"


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
    assert sweep.main(given) == exit_codes.OK
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
            compose([f"recipe={recipe}", *objective.as_overrides(values)])


@pytest.mark.parametrize(
    "entry",
    [
        "5",
        "{low: 1}",
        "{low: 2, high: 1}",
        "{low: 0, high: 1, log: true}",
        "{choices: []}",
        "{low: 0, high: 1, step: 2}",
        "{choices: [1], more: 2}",
    ],
)
def test_a_space_with_a_fault_is_refused_by_name(tmp_path: Path, entry: str) -> None:
    (tmp_path / "s.yaml").write_text(f"optim.lr: {entry}\n")
    with pytest.raises(ConfigError, match="s.yaml: optim.lr must be"):
        space.load(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["trials=0"], r"trials must be in \[1, 10000\]; got 0"),
        (["workers=two"], "workers must be int; got 'two'"),
        (["pruner=axe"], "pruner must be 'asha' or 'median' or 'none'"),
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


@pytest.mark.parametrize("killed", [pytest.param("driver", marks=pytest.mark.slow), "everything"])
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_that_was_killed_goes_on_where_it_stood(tmp_path: Path, killed: str) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = ["study=s", storage, "trials=4", "workers=2", "trial_epochs=30", "pruner=none"]
    first = saying(tmp_path, *SWEEP, *given, "refit=false")

    def under_way() -> bool:
        held = trials(tmp_path)
        return any(t.state.is_finished() for t in held) and any(
            3 < len(t.intermediate_values) < 25 for t in held if not t.state.is_finished()
        )

    until(under_way, first)
    if killed == "driver":
        first.kill()
    else:
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = {t.number: t for t in trials(tmp_path) if t.state.is_finished()}

    with pytest.raises(ConfigError, match="keeps the recipe it has"):
        sweep.main(["resume=s", storage, "optim.lr=1"])
    again = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", "resume=s", storage],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert again.returncode == exit_codes.OK, again.stderr[-3000:]
    by_number = check_whole(tmp_path, 4, 30)
    after = {t.number: t for t in trials(tmp_path)}
    for number, trial in before.items():
        assert after[number].datetime_complete == trial.datetime_complete, "it was not run again"
    retried = [t for t in after.values() if t.user_attrs.get("retries")]
    assert 1 <= len(retried) <= 2
    for trial in retried:
        assert by_number[str(trial.number)].data.tags["trial.retries"] == "1"


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_worker_that_is_killed_is_replaced_and_its_trial_taken_up(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = ["study=s", storage, "trials=3", "workers=2", "trial_epochs=30", "pruner=none"]
    process = saying(tmp_path, *SWEEP, *given, "refit=false")
    until(lambda: any(len(t.intermediate_values) > 3 for t in trials(tmp_path)), process)
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()
    said, complaint = process.communicate(timeout=180)
    assert process.returncode == exit_codes.OK, complaint[-3000:]
    assert "was killed by signal 9; it is taken up again" in complaint
    assert "3 trials: 3 finished, 0 pruned, 0 failed" in said
    check_whole(tmp_path, 3, 30)


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_workers_end_after_their_driver_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    given = ["study=s", f"storage=sqlite:///{tmp_path}/study.db", "workers=2", "trials=2"]
    driver = saying(tmp_path, *SWEEP, *given, "refit=false", "trainer.repeats_per_epoch=10000")
    client = MlflowClient()

    def runs() -> list[Run]:
        experiments = [one.experiment_id for one in client.search_experiments()]
        return list(client.search_runs(experiments, "tags.kind = 'trial'"))

    try:
        until(lambda: sum("train_loss_step" in r.data.metrics for r in runs()) == 2, driver)
        workers = psutil.Process(driver.pid).children()
        driver.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "another driver waits for them"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    assert [run.info.status for run in runs()] == ["KILLED"] * 2
    assert not any(trial.intermediate_values for trial in trials(tmp_path))


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_trial_is_given_up_after_two_retries(tmp_path: Path) -> None:
    settings = SweepConfig(trials=1, study="s", storage=f"sqlite:///{tmp_path}/study.db")
    job = Job(sweep=settings, study="s", overrides=(), parent="")
    study = create(job, space.load("resnet18"), {})
    asked = Search(job, study)
    for retry in range(3):
        task = asked.next()
        assert task
        assert (task.number, task.retries) == (0, retry)
        asked.died(0, "its worker was killed")
    assert asked.next() is None
    assert study.trials[0].state.name == "FAIL"


def searching(folder: Path, **settings: Any) -> tuple[Job, optuna.Study]:
    made = SweepConfig(study="s", storage=f"sqlite:///{folder}/study.db", **settings)
    job = Job(sweep=made, study="s", overrides=(), parent="")
    return job, create(job, space.load("resnet18"), {})


@pytest.mark.usefixtures("tracking_store")
def test_an_orderly_end_of_a_driver_is_no_retry(tmp_path: Path) -> None:
    job, study = searching(tmp_path, trials=1)
    for _ in range(4):
        driver = Search(job, study)
        task = driver.next()
        assert task
        assert (task.number, task.retries) == (0, 0)
        assert Search(job, study).next() is None, "its driver lives"
        driver.release()
    driver = Search(job, study)
    assert driver.next()
    driver.died(0, "its worker was killed")
    assert Search(job, study).next() is None, "it waits for the driver that lives"
    again = driver.next()
    assert again
    assert again.retries == 1


@pytest.mark.usefixtures("tracking_store")
def test_minutes_are_those_of_the_whole_study(tmp_path: Path) -> None:
    job, study = searching(tmp_path, trials=5, minutes=1)
    driver = Search(job, study)
    assert driver.over() is None
    assert driver.next()
    assert driver.epoch(0, 0, {"val_accuracy": 0.5}) is None
    driver._began -= 61
    assert driver.epoch(0, 1, {"val_accuracy": 0.5}) == "stopped: its 1 minutes are over"
    with drivers.owned(study):
        study.set_user_attr(drivers.SPENT, 59.0)
    assert study.user_attrs[drivers.SPENT] < 59, "the driver that ends tells what it has spent"
    study.set_user_attr(drivers.SPENT, 61.0)
    driver = Search(job, study)
    assert driver.over() == "its 1 minutes are over"
    assert driver.next() is None


@pytest.mark.usefixtures("tracking_store")
@pytest.mark.parametrize(("epochs", "rung"), [(3, 1), (5, 2)])
def test_successive_halving_counts_whole_epochs(tmp_path: Path, epochs: int, rung: int) -> None:
    job, study = searching(tmp_path, trials=2, trial_epochs=epochs, pruner="asha")
    driver = Search(job, study)
    assert driver.next()
    assert driver.next()
    for epoch in range(rung):
        assert driver.epoch(0, epoch, {"val_accuracy": 0.6}) is None
        told = driver.epoch(1, epoch, {"val_accuracy": 0.5})
        assert told == ("pruned" if epoch + 1 == rung else None)


def drive_elsewhere(storage: str, skew_s: float) -> None:
    """The owner of a study on a machine with another clock."""
    real = time.time
    time.time = lambda: real() + skew_s
    socket.gethostname = lambda: "elsewhere"
    drivers.BEAT_S = 1
    with drivers.owned(optuna.load_study(study_name="s", storage=storage)):
        time.sleep(600)


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
def test_whether_a_study_is_owned_is_told_by_no_clock_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    monkeypatch.setattr(drivers, "STALE_S", 3)
    monkeypatch.setattr(drivers, "LISTEN_S", 0.1)
    job, study = searching(tmp_path)
    assert not drivers.is_owned(study)
    context = multiprocessing.get_context("spawn")
    far = context.Process(target=drive_elsewhere, args=(job.sweep.storage, skew_s))
    far.start()
    try:
        until(lambda: drivers.OWNER in study.user_attrs, None)
        assert drivers.is_owned(study), "it lives"
    finally:
        far.kill()
        far.join()
    assert not drivers.is_owned(study), "it has died"
    with drivers.owned(study):
        assert drivers.is_owned(study)
    assert not drivers.is_owned(study), "it ended, and its process lives on"


def test_of_drivers_that_find_a_study_deserted_in_the_same_moment_one_concludes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, study = searching(tmp_path)
    both, seen = threading.Barrier(2), drivers.is_owned

    def look(study: optuna.Study) -> bool:
        owned = seen(study)
        both.wait(30)
        return owned

    monkeypatch.setattr(drivers, "is_owned", look)
    monkeypatch.setattr(drivers, "me", lambda: json.dumps([threading.current_thread().name, 1, 0]))

    def take(_: int) -> bool:
        return drivers.take(optuna.load_study(study_name="s", storage=job.sweep.storage))

    with ThreadPoolExecutor(2) as machines:
        took = list(machines.map(take, range(2)))
    assert sorted(took) == [False, True]
    monkeypatch.setattr(drivers, "is_owned", seen)
    monkeypatch.setattr(drivers, "STALE_S", 3)
    assert drivers.take(study), "neither went on: the study is deserted again"


def test_a_trial_without_a_driver_is_taken_up_whatever_clock_it_was_begun_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "STALE_S", 2)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    job, study = searching(tmp_path, trials=1)
    with search._quietly():
        study.ask()  # and the process dies
    driver = Search(job, study)
    assert driver.next() is None, "the process may live"
    until(driver.next, None)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING"]


@pytest.mark.usefixtures("tracking_store")
def test_a_trial_that_workers_and_drivers_lose_is_given_up_after_two_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On machines that share nothing but the storage; each driver falls silent."""
    monkeypatch.setattr(search, "STALE_S", 1)
    job, study = searching(tmp_path, trials=1)
    seen: list[int] = []

    def begins(driver: Search) -> bool:
        if task := driver.next():
            with tracking.run("e", "r", system_metrics=False) as run:
                driver.begun(task.number, run.journal)
            seen.append(task.retries)
        return bool(task) or all(trial.state.is_finished() for trial in study.trials)

    for number in range(3):
        monkeypatch.setattr(socket, "gethostname", lambda number=number: f"machine {number}")
        driver = Search(job, study)
        until(partial(begins, driver), None)
        if number == 0:
            driver.died(0, "its worker was killed")
            assert begins(driver)
    assert seen == [0, 1, 2]
    assert "its drivers were lost, 3 times now: it failed" in caplog.text
    assert {trial.state.name for trial in study.trials} == {"FAIL"}


def test_the_view_tells_trials_the_best_and_the_time_left(tmp_path: Path) -> None:
    job, study = searching(tmp_path, trials=4, minutes=10, pruner="asha")
    study.set_user_attr(drivers.SPENT, 240.0)
    seen = View(study, job)
    driver = Search(job, study)
    with seen.shown():
        assert seen.line() == "0 of 4 done, 0 running, about 6 min left"
        tasks = [driver.next() for _ in range(3)]
        seen.heard(0, 0.5)
        assert seen.line() == "0 of 4 done, 3 running, so far 0.5000, about 6 min left"
        assert all(tasks)
        driver.ended(0, Outcome(state="complete", values=(0.75,)))
        driver.ended(1, Outcome(state="pruned"))
        driver.ended(2, Outcome(state="fail"))
        line = "3 of 4 done (1 pruned, 1 fail), 0 running, best 0.7500, about "
        assert seen.line().startswith(line)


def test_the_dashboard_of_make_sweep_ui_shows_the_study(tmp_path: Path) -> None:
    searching(tmp_path, trials=1)
    port, program = free_port(), Path(sys.executable).with_name("optuna-dashboard")

    def shown() -> list[str]:
        with contextlib.suppress(requests.RequestException):
            told = requests.get(f"http://127.0.0.1:{port}/api/studies", timeout=10).json()
            return [one["study_name"] for one in told["study_summaries"]]
        return []

    process = subprocess.Popen(
        [program, f"sqlite:///{tmp_path}/study.db", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: shown() == ["s"], process)
    finally:
        process.terminate()
        process.communicate()


def test_a_driver_that_nobody_has_buried_is_gone() -> None:
    assert not drivers.is_gone(drivers.me())
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    told = json.dumps([socket.gethostname(), dead.pid, psutil.Process(dead.pid).create_time()])
    assert not drivers.is_gone(told)
    dead.kill()
    until(lambda: psutil.Process(dead.pid).status() == psutil.STATUS_ZOMBIE, None)
    assert drivers.is_gone(told)
    dead.communicate()
    assert drivers.is_gone(told)
    assert not drivers.is_gone(json.dumps(["elsewhere", dead.pid, 0])), "only its silence tells"


def test_a_genetic_sampler_gets_generations_within_the_trials() -> None:
    made = search.sampler(SweepConfig(trials=40, sampler="NSGAIISampler"))
    assert isinstance(made, optuna.samplers.NSGAIISampler)
    assert made.population_size == 10


def test_a_password_of_the_storage_is_told_to_nobody(tmp_path: Path) -> None:
    url = "postgresql+psycopg2://team:secret@127.0.0.1:1/studies"
    with pytest.raises(ConfigError) as caught:
        search.storage(url)
    assert "team:***@" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_sweep_ends_at_its_target_and_may_begin_with_another_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"storage=sqlite:///{tmp_path}/study.db"
    given = [*SWEEP, storage, "refit=false", "log_level=warning", "pruner=asha"]
    assert sweep.main([*given, "study=s", "trials=9", "target=0.05"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("1 trials: 1 finished")
    assert sweep.main(["resume=s", storage, "log_level=warning"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("study s is complete"), "the target was reached"
    assert sweep.main([*given, "study=t", "trials=2", "from_study=s", "minutes=5"]) == exit_codes.OK
    assert len(trials(tmp_path, "t")) == 3, "two of its own, and one to begin with"
    assert capsys.readouterr().out.startswith("2 trials: ")
    with pytest.raises(ConfigError, match="from_study=u: there are only"):
        sweep.main([*given, "study=v", "from_study=u"])


@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_two_objectives_end_in_a_pareto_front(tmp_path: Path) -> None:
    (tmp_path / "size.yaml").write_text("model.name: {choices: [test_resnet, test_vit]}\n")
    storage = f"sqlite:///{tmp_path}/study.db"
    given = [*SWEEP, "study=s", f"storage={storage}", f"space={tmp_path}/size.yaml"]
    given += ["sampler=NSGAIISampler", "objectives=accuracy,latency", "model.input_size=160"]
    assert sweep.main([*given, "refit=false", "log_level=warning"]) == exit_codes.OK
    parent = tracking.latest_run("eurosat", kind="sweep")
    for trial in trials(tmp_path):
        accuracy, latency = trial.values
        held = tracking.get(trial.user_attrs["run_id"])
        assert held.metrics["latency_ms"] == latency > 0
        assert held.metrics["best_val_accuracy"] == accuracy
    with tracking.artifact(parent, "figures/pareto_front.png") as file:
        assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sampler=Guess", "sampler=Guess is none of"),
        ("sampler=GridSampler", "sampler=GridSampler cannot be used here"),
        ("minutes=0", "minutes must be above 0"),
        ("target=98", r"target is an accuracy, in \(0, 1\]; got 98"),
        ("resume=none", "has no study 'none'"),
    ],
)
@pytest.mark.usefixtures("tracking_store", "tiny_pack")
def test_a_search_that_cannot_be_is_named(given: str, words: str, tmp_path: Path) -> None:
    base = [] if given.startswith("resume") else SWEEP
    with pytest.raises(ConfigError, match=words):
        sweep.main([*base, given, f"storage=sqlite:///{tmp_path}/study.db", "log_level=error"])


@pytest.mark.parametrize("when", ["before it was told", "before its state was dropped"])
@pytest.mark.usefixtures("tracking_store")
def test_a_trial_that_was_killed_after_its_end_is_not_trained_again(
    tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    settings = SweepConfig(trials=1, trial_epochs=1, study="s")
    with tracking.run("eurosat", "parent", system_metrics=False) as parent:
        job = Job(sweep=settings, study="s", overrides=TINY, parent=parent.journal)
        task, begun = Task(number=0, values={}), []

        def trial(ended: Callable[[Outcome], None] = lambda _: None) -> Outcome:
            return objective.run(
                job,
                task,
                tiny_data,
                lambda *_: None,
                lambda run, _: begun.append(run),
                ended=ended,
            )

        def killed(_: object) -> None:
            raise SystemExit

        with monkeypatch.context() as dying, pytest.raises(SystemExit):
            if when == "before it was told":
                trial(ended=killed)
            dying.setattr(CheckpointSlot, "remove", killed)
            trial()
        told: list[Outcome] = []
        outcome = trial(ended=told.append)
        assert told == [outcome]
    assert len(begun) == 1
    assert outcome.state == "complete"
    held = tracking.get(begun[0].run_id)
    assert (held.status, held.run_id) == ("FINISHED", outcome.run_id)
    assert outcome.values == (held.metrics["best_val_accuracy"],)


@pytest.mark.usefixtures("tracking_store")
def test_a_pruned_trial_that_was_killed_before_it_could_tell_stays_pruned(
    tiny_data: PreparedData,
) -> None:
    settings = SweepConfig(trials=1, trial_epochs=2, study="s")
    with tracking.run("eurosat", "parent", system_metrics=False) as parent:
        job = Job(sweep=settings, study="s", overrides=TINY, parent=parent.journal)
        answers: list[str | None] = ["pruned", None]

        def killed(_: object) -> None:
            raise SystemExit

        def trial(ended: Callable[[Outcome], None]) -> Outcome:
            return objective.run(
                job,
                Task(number=0, values={}),
                tiny_data,
                lambda *_: answers.pop(0),
                lambda *_: None,
                ended=ended,
            )

        with pytest.raises(SystemExit):
            trial(killed)
        outcome = trial(lambda _: None)
    assert outcome.state == "pruned"
    assert answers == [None], "it was not trained again"
    held = tracking.get(outcome.run_id)
    assert (held.status, held.tags["pruned.epoch"]) == ("KILLED", "1")


@pytest.mark.usefixtures("tracking_store")
def test_a_training_killed_before_its_run_was_made_has_one(tiny_config: TrainConfig) -> None:
    with pytest.raises(SystemExit), acquire(tiny_config, {"a": "b"}) as place:
        place.start_or_resume()
        raise SystemExit  # before there is a journal of that name
    with acquire(tiny_config, {"a": "b"}) as place:
        assert place.journal is None
        with tracking.run("e", "r", journal=place.start_or_resume(), system_metrics=False) as run:
            pass
    assert tracking.get(run.journal).run_id == run.run_id
