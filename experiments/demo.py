"""The main job, one command: validate, sweep, register, gate, promote, serve, score.

Every step is a command that a user can run alone; this module strings them together.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from eurosat import tracking
from eurosat.config import DataConfig, TrainConfig, compose
from eurosat.errors import ConfigError, DataError, EuroSATError
from eurosat.runtime import cli, exit_codes

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MODEL = "eurosat"
CHAMPION = f"models:/{MODEL}@champion"
READY_S = 120
"""The server is up in about 8 s on two idle cores."""
TRAINED_PER_S, TAUGHT_PER_S = 250, 350
"""Tiles a ResNet18 learns from, and tiles the packaged teacher is asked about, on two cores with
bf16: the log of `python -m eurosat.train data=eurosat` tells of 257 to 281 and 16,199 in 46 s."""

USAGE = """
usage: python -m experiments.demo [data=synthetic|eurosat|folder] [recipe=NAME] [key=value ...]

  trials=6   trial_epochs=N   workers=1   space=resnet18   as for `python -m experiments.sweep`
  tiles=3                                    tiles of the test fold to score over REST
  report=reports/demo.json                   where the figures go
  accept_new_data=false                      judge by floors where the champion saw other tiles
  accept_uncommitted=false                   code that git does not hold may make a champion
  and any key of the recipe
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    trials: int = 6
    trial_epochs: int | None = None
    """None is 1 for the recipe ``demo`` and 2 for all others."""
    workers: int = 1
    space: str = "resnet18"
    tiles: int = 3
    report: str = "reports/demo.json"
    accept_new_data: bool = False
    """Let the floors alone judge where the champion was tested on other tiles."""
    accept_uncommitted: bool = False
    """Let a version pass whose code is of no commit; a model of synthetic tiles always may."""

    def __post_init__(self) -> None:
        if not 1 <= self.tiles <= 1000:
            raise ConfigError(f"tiles must be in [1, 1000]; got {self.tiles}")
        if self.trials < 1:
            raise ConfigError(f"trials must be 1 or more; got {self.trials}")


def main(argv: Sequence[str]) -> int:
    settings, recipe = split_arguments(cli.overrides(argv, USAGE))
    started = time.monotonic()
    os.chdir(ROOT)  # where MLproject, mlflow.db and mlruns are
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)  # of the `mlflow run` that started this: not for the steps
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    config = compose(recipe)
    log.info(say_how_long(config, settings))
    uncommitted = settings.accept_uncommitted or config.data.source == "synthetic"
    if not uncommitted:
        check_commit(tracking.code_commit())

    step(1, "validate the tiles against their expectations")
    if not validated(config, recipe):
        print("validation failed: nothing is trained on these tiles")
        return exit_codes.NEGATIVE
    step(2, f"sweep: {settings.trials} short trials, then the best refitted in full")
    project(
        "sweep",
        config,
        data=config.data.source,
        recipe=config.recipe,
        trials=settings.trials,
        trial_epochs=settings.trial_epochs,
        workers=settings.workers,
        space=settings.space,
        overrides=without(recipe, "data", "recipe"),
    )
    sweep_run = tracking.latest_run(config.experiment, kind="sweep")
    step(3, "register the refit as a version of the model")
    call(sys.executable, "-m", "registry.register", sweep_run)
    challenger = alias_version("challenger")
    step(4, "judge it against the champion, and promote it or say why not")
    told = ["--accept-new-data"] if settings.accept_new_data or toy_champion() else []
    told += ["--accept-uncommitted"] if uncommitted else []
    promoted = call(sys.executable, "-m", "registry.promote", *told, negative_is_an_answer=True)
    champion = alias_version("champion")
    if champion is None:
        print(f"version {challenger} was refused and there is no champion: nothing to serve")
        return exit_codes.NEGATIVE
    step(5, f"serve {CHAMPION} with mlflow models serve, and score tiles of the test fold")
    run_id = tracking.resolve_run(CHAMPION)
    scored = serve_and_score(run_id, settings.tiles)

    champion_run, sweep_metrics = tracking.get(run_id), tracking.get(sweep_run).metrics
    report = {
        "data": champion_run.params["data.source"],
        "trials": int(sum(v for k, v in sweep_metrics.items() if k.startswith("trials_"))),
        "best_val_accuracy": sweep_metrics["best_val_accuracy"],
        "test_accuracy": champion_run.metrics["test_accuracy"],
        "macro_f1": champion_run.metrics["test_macro_f1"],
        "macro_auprc": champion_run.metrics["test_macro_auprc"],
        "champion_version": champion,
        "seconds": round(time.monotonic() - started, 1),
        "scored": scored,
    } | context(champion_run, challenger, promoted == exit_codes.OK)
    file = Path(settings.report)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    show(report, file)
    return exit_codes.OK


def split_arguments(overrides: Sequence[str]) -> tuple[DemoConfig, list[str]]:
    """The demo's own settings, and what is left for the recipe.

    Without a word about the recipe, synthetic tiles get ``demo``, all others ``resnet18-quick``.
    """
    from experiments.settings import take

    settings, rest = take(DemoConfig, overrides)
    data = next((one for one in rest if one.startswith("data=")), "data=synthetic")
    if data not in rest:
        rest = [data, *rest]
    if not any(one.startswith("recipe=") for one in rest):
        rest = [*rest, f"recipe={'demo' if data == 'data=synthetic' else 'resnet18-quick'}"]
    if settings.trial_epochs is None:
        epochs = 1 if "recipe=demo" in rest else 2
        settings = dataclasses.replace(settings, trial_epochs=epochs)
    return settings, rest


def say_how_long(config: TrainConfig, settings: DemoConfig) -> str:
    """What is ahead, before anything is measured; the sweep then logs a live estimate."""
    tiles = config.data.synthetic.tiles if config.data.source == "synthetic" else 27_000
    seen = settings.trials * (settings.trial_epochs or 0) + config.trainer.epochs
    minutes = 1 + seen * tiles * 0.65 / TRAINED_PER_S / 60  # train and val folds
    taught = ""
    if config.distill.teacher != "none":  # of the train fold; what it told is kept for the others
        minutes += tiles * 0.6 / TAUGHT_PER_S / 60
        taught = "a teacher asked once, "
    return (
        f"data={config.data.source}: {taught}{settings.trials} trials of {settings.trial_epochs} "
        f"epochs, then {config.trainer.epochs}: about {minutes:.0f} min for {tiles:,} tiles and a "
        "ResNet18 on two cores with bf16; the sweep says how long is left as it goes"
    )


def step(number: int, what: str) -> None:
    print(f"\n== {number}/5 {what}", flush=True)


def check_commit(commit: str) -> None:
    """Before an hour is spent on a version that the gates would refuse.

    Raises:
        ConfigError: the code is of no commit.
    """
    if commit == "unknown" or commit.endswith("-dirty"):
        raise ConfigError(
            f"the commit of the code is {commit}, and the gates refuse what no commit can make "
            "again: commit first, or say accept_uncommitted=true"
        )


def validated(config: TrainConfig, recipe: Sequence[str]) -> bool:
    """Run the validation; False is its negative verdict."""
    try:
        project("validate", config, data=config.data.source, overrides=of_data(recipe))
    except EuroSATError:
        last = tracking.get(tracking.latest_run(config.experiment, kind="validate"))
        if last.tags.get("data.validation") == "failed":  # `mlflow run` has one code for all
            return False
        raise
    return True


def toy_champion() -> bool:
    """Whether the present champion was trained on synthetic tiles, and may yield to others."""
    if alias_version("champion") is None:
        return False
    return tracking.get(tracking.resolve_run(CHAMPION)).params["data.source"] == "synthetic"


def of_data(overrides: Sequence[str]) -> list[str]:
    return [one for one in overrides if one.startswith("data.")]


def without(overrides: Sequence[str], *keys: str) -> list[str]:
    return [one for one in overrides if one.split("=", 1)[0] not in keys]


def project(
    entry: str, config: TrainConfig, *, overrides: Sequence[str], **parameters: Any
) -> None:
    """`mlflow run . -e ENTRY`."""
    given = {name: str(value) for name, value in parameters.items()}
    if overrides:
        given["overrides"] = shlex.join(overrides)
    flags = [part for name, value in given.items() for part in ("-P", f"{name}={value}")]
    call(
        "mlflow",
        "run",
        ".",
        "-e",
        entry,
        "--env-manager",
        "local",
        "--experiment-name",
        config.experiment,
        *flags,
    )


def call(*command: str, negative_is_an_answer: bool = False) -> int:
    """Run a step with its output shown.

    Raises:
        EuroSATError: it failed.
    """
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"$ {shlex.join(shown)}", flush=True)
    code = subprocess.run(command).returncode
    if code == exit_codes.OK or (code == exit_codes.NEGATIVE and negative_is_an_answer):
        return code
    raise EuroSATError(f"the step `{shlex.join(shown)}` ended with code {code}: see above")


def alias_version(alias: str) -> str | None:
    return tracking.alias_version(MODEL, alias)


def serve_and_score(run_id: str, count: int) -> list[dict[str, Any]]:
    """Files of ``count`` test tiles of different classes, scored by a server of its own process."""
    import pandas as pd

    with tracking.artifact(run_id, "predictions.parquet") as file:
        tested = pd.read_parquet(file)
    from eurosat.evaluation.recorded import recorded_data

    config = recorded_data(run_id)
    chosen = tested.groupby("label", sort=True).head(1)
    chosen = chosen.iloc[:: max(1, len(chosen) // count)].head(count)
    with tempfile.TemporaryDirectory() as folder:
        names = write_tiles(config, list(chosen["tile"]), Path(folder))
        with served() as (server, url):
            lines = ask(server, url, names)
    answers = {row["tile"]: row for row in map(json.loads, lines)}
    return [
        {"tile": tile, "expected": label}
        | {k: answers[name][k] for k in answers[name] if k != "tile"}
        for name, tile, label in zip(names, chosen["tile"], chosen["label"], strict=True)
    ]


def write_tiles(config: DataConfig, tiles: Sequence[str], folder: Path) -> list[str]:
    from eurosat.data.sources import open_source

    source = open_source(config)
    names = []
    for tile in tiles:
        if tile not in source.paths:
            raise DataError(
                f"{tile}, a test tile of the champion, is not in {source.name} any more"
            )
        (folder / tile.replace("/", "-")).write_bytes(source.read(tile))
        names.append(str(folder / tile.replace("/", "-")))
    return names


@contextmanager
def served() -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`mlflow models serve` in a process group of its own, stopped after the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        "mlflow",
        "models",
        "serve",
        "-m",
        CHAMPION,
        "--env-manager",
        "local",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    print(f"$ {shlex.join(command)}", flush=True)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )
        try:
            yield process, f"http://127.0.0.1:{port}"
        except EuroSATError as error:
            output.seek(0)
            tail = " | ".join(output.read().splitlines()[-5:])
            raise EuroSATError(f"{error}; the server said: {tail}") from error
        finally:
            for ending in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, ending)
                    process.wait(timeout=30)


def ask(server: "subprocess.Popen[str]", url: str, files: Sequence[str]) -> list[str]:
    """One line of JSON a file, from `python -m serving.client`, which waits for the server.

    Raises:
        EuroSATError: the server died, was not ready in time, or refused.
    """
    command = [sys.executable, "-m", "serving.client", "--url", url, "--wait", str(READY_S), *files]
    print(f"$ {shlex.join(['python', *command[1:7], 'FILES'])}", flush=True)
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with Console(stderr=True).status("waiting for the server"):
        while client.poll() is None:
            if server.poll() is not None:
                client.terminate()
                raise EuroSATError(f"the server ended with code {server.returncode}")
            time.sleep(0.2)
    said, complained = client.communicate()
    if client.returncode:
        raise EuroSATError(f"scoring failed: {complained.strip()[-300:]}")
    log.info("answers came from process %d on %s", server.pid, url)
    return said.splitlines()


def context(champion: tracking.RunRecord, challenger: str | None, promoted: bool) -> dict[str, Any]:
    """What a reader needs to judge the figures, beyond the report's promised keys."""
    return {
        "challenger_version": challenger,
        "promoted": promoted,
        "recipe": champion.params["recipe"],
        "split": champion.params["data.protocol"],
        "split_fingerprint": champion.tags["split.fingerprint"],
        "data_fingerprint": champion.tags["data.fingerprint"],
        "seed": int(champion.params["seed"]),
        "epochs": int(champion.metrics["epochs"]),
        "train_seconds": round(champion.metrics["train_seconds"], 1),
        "views": int(champion.params["model.tta_views"]),
        "hardware": champion.tags["compute.hardware"],
        "precision": champion.tags["compute.precision"],
        "commit": champion.tags["code.commit"],
    }


def show(report: dict[str, Any], file: Path) -> None:
    from rich.table import Table

    table = Table(title=f"the main job on data={report['data']}", show_header=False)
    verdict = (
        "promoted" if report["promoted"] else f"version {report['challenger_version']} refused"
    )
    rows = {
        "trials": report["trials"],
        "best trial": f"validation accuracy {report['best_val_accuracy']:.4f}",
        "champion": f"{MODEL} version {report['champion_version']} ({verdict})",
        "test accuracy": f"{report['test_accuracy']:.4f}",
        "macro F1": f"{report['macro_f1']:.4f}",
        "macro AUPRC": f"{report['macro_auprc']:.4f}",
        "time": f"{report['seconds']:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    scored = Table("tile", "expected", "label", "confidence", "version", title="scored over REST")
    for row in report["scored"]:
        scored.add_row(
            row["tile"],
            row["expected"],
            row["label"],
            f"{row['confidence']:.3f}",
            str(row["model_version"]),
        )
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print()
    console.print(table)
    console.print(scored)
    python = Path(sys.executable)
    where = python.parent.relative_to(ROOT) if python.is_relative_to(ROOT) else python.parent
    console.print(f"figures: {file}", highlight=False)
    console.print(
        f"look around: {where}/mlflow ui   (then open http://127.0.0.1:5000)", highlight=False
    )


if __name__ == "__main__":
    cli.run_command(main)
