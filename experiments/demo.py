"""The whole job in one command: validate, sweep, register, promote, serve and classify tiles.

Every step is a command that a user can run alone; this module runs them in order.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.table import Table

from eurosat import tracking
from eurosat.config import TrainConfig, compose
from eurosat.data.sources import open_source
from eurosat.errors import ConfigError, EuroSATError, TrackingError
from eurosat.runtime import cli, exit_codes, tables
from eurosat.runtime.settings import settings
from experiments.demo_serving import serve_and_score

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MODEL_NAME = "eurosat"
DEMO_TILES = ("data.synthetic.tiles=2000", "data.synthetic.difficulty=0")
"""What the recipe ``demo`` trains on, so that the gates are passed after minutes on any machine."""
BEST_METRIC = "test_accuracy"
"""The metric by which the page of the runs is sorted."""
TRAINED_TILES_PER_S, TEACHER_TILES_PER_S = 250, 350
"""Speed of training a ResNet18, and of the packaged teacher, on two cores with bf16: the log of
`python -m eurosat.train data=eurosat` shows 257 to 281, and 16,199 tiles in 46 s."""

USAGE = """
usage: python -m experiments.demo [data=synthetic|eurosat|folder] [recipe=NAME] [key=value ...]

  trials=6   trial_epochs=N   workers=1   space=auto       as for `python -m experiments.sweep`
  tiles=3                                    tiles of the test fold to classify over REST
  model=eurosat                              registered model; for data=folder: the folder's name
  report=reports/demo.json                   file for the results
  accept_new_data=false                      if the champion saw other tiles: use fixed limits only
  accept_uncommitted=false                   promote although the code is not committed to git
  and any key of the recipe
"""


@settings()
class DemoConfig:
    trials: Annotated[int, Field(ge=1)] = 6
    trial_epochs: int | None = None
    """None is 1 for the recipe ``demo`` and 2 for all others."""
    workers: int = 1
    space: str = "auto"
    tiles: Annotated[int, Field(ge=1, le=1000)] = 3
    """Tiles of the test fold to classify over REST."""
    model: str = MODEL_NAME
    """Registered model. Tiles of a folder get one of their own, since their classes differ."""
    report: str = "reports/demo.json"
    accept_new_data: bool = False
    """Judge by the fixed limits alone if the champion was tested on other tiles."""
    accept_uncommitted: bool = False
    """Promote although the code is not committed; allowed anyway for synthetic tiles."""

    @property
    def champion(self) -> str:
        return f"models:/{self.model}@champion"


def main(argv: Sequence[str]) -> int:
    options, recipe = split_arguments(cli.overrides(argv, USAGE))
    started = time.monotonic()
    prepare_environment()
    config = compose(recipe)
    log.info(estimate_duration(config, options))
    accept_uncommitted = options.accept_uncommitted or config.data.source == "synthetic"
    if not accept_uncommitted:
        check_commit(tracking.code_commit())
    if unfinished := unfinished_sweep(config):
        print(unfinished)

    print_step(1, "validate: are files, classes and pixels of the tiles as expected?")
    if not tiles_are_valid(config, recipe):
        print("the tiles failed their validation (see above): nothing is trained on them")
        return exit_codes.NEGATIVE
    print_step(2, f"sweep: {options.trials} short trials, then the best one is trained in full")
    sweep_run = run_sweep(options, config, recipe)
    print_step(3, "register: the trained model becomes a version with the alias challenger")
    run_command(sys.executable, "-m", "registry.register", sweep_run, "--model", options.model)
    challenger = tracking.alias_version(options.model, "challenger")
    print_step(4, "promote: the challenger becomes champion if it passes every gate")
    promoted = promote(options, accept_uncommitted)
    champion = tracking.alias_version(options.model, "champion")
    if champion is None:
        print(
            f"version {challenger} was refused (see above) and there is no champion: "
            "nothing to serve"
        )
        return exit_codes.NEGATIVE
    print_step(
        5, f"serve: {options.champion} classifies {options.tiles} tiles of its test fold over REST"
    )
    champion_run = tracking.get(tracking.resolve_run(options.champion))
    scored = serve_and_score(options.champion, champion_run.run_id, options.tiles)

    report = {
        **results(tracking.get(sweep_run).metrics, champion_run),
        "champion_version": champion,
        "seconds": round(time.monotonic() - started, 1),
        "scored": scored,
        "challenger_version": challenger,
        "promoted": promoted,
        **provenance(champion_run),
    }
    file = Path(options.report)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report, file, options.model)
    print_next_steps(config, options)
    return exit_codes.OK


def split_arguments(overrides: Sequence[str]) -> tuple[DemoConfig, list[str]]:
    """Return the demo's own settings, and the overrides of the recipe.

    Without ``recipe=``, synthetic tiles get ``demo`` and all others ``resnet18-quick``. The recipe
    ``demo`` gets the settings of `DEMO_TILES` that the overrides do not name.
    """
    from experiments.settings import split_settings

    options, recipe = split_settings(DemoConfig, overrides)
    data = next((override for override in recipe if override.startswith("data=")), None)
    if data is None:
        data = "data=synthetic"
        recipe = [data, *recipe]
    if not any(override.startswith("recipe=") for override in recipe):
        recipe = [*recipe, f"recipe={'demo' if data == 'data=synthetic' else 'resnet18-quick'}"]
    if data == "data=synthetic" and "recipe=demo" in recipe:
        keys = {override.partition("=")[0] for override in recipe}
        recipe += [setting for setting in DEMO_TILES if setting.partition("=")[0] not in keys]
    if data == "data=folder" and not any(word.startswith("model=") for word in overrides):
        options = dataclasses.replace(options, model=model_of_folder(recipe))
    if options.trial_epochs is None:
        epochs = 1 if "recipe=demo" in recipe else 2
        options = dataclasses.replace(options, trial_epochs=epochs)
    return options, recipe


def model_of_folder(recipe: Sequence[str]) -> str:
    """Return the name of the registered model for tiles of a folder: the name of the folder."""
    roots = [word.partition("=")[2] for word in recipe if word.startswith("data.root=")]
    return re.sub(r"[^\w.-]+", "-", Path(roots[-1]).stem).strip("-") if roots else MODEL_NAME


def unfinished_sweep(config: TrainConfig) -> str | None:
    """Return what to say of the latest sweep of the recipe if it was killed, or None."""
    with contextlib.suppress(TrackingError):
        last = tracking.get(tracking.latest_run(config.experiment, kind="sweep"))
        is_same = last.params.get("recipe") == config.recipe
        if is_same and last.status in ("KILLED", "RUNNING") and (study := last.tags.get("study")):
            return (
                f"the last sweep of recipe={config.recipe} did not finish: this demo begins anew; "
                f"to continue that one instead, press Ctrl-C and run "
                f"`python -m experiments.sweep resume={study}`"
            )
    return None


def prepare_environment() -> None:
    """Go to the project's root, and let the steps find this Python's commands."""
    os.chdir(ROOT)  # MLproject, mlflow.db and mlruns are there
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)  # set by an `mlflow run` of the demo; the steps have their own
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # the output is that of the steps


def estimate_duration(config: TrainConfig, options: DemoConfig) -> str:
    """Return one sentence on the work ahead; the sweep logs a measured estimate later."""
    tiles = 27_000 if config.data.source == "eurosat" else len(open_source(config.data).paths)
    epochs = options.trials * (options.trial_epochs or 0) + config.trainer.epochs
    minutes = 1 + epochs * tiles * 0.65 / TRAINED_TILES_PER_S / 60  # train and val folds
    teacher = ""
    if config.distill.teacher != "none":  # its outputs for the train fold are cached
        minutes += tiles * 0.6 / TEACHER_TILES_PER_S / 60
        teacher = "one pass of the teacher, "
    return (
        f"data={config.data.source}: {teacher}{options.trials} trials of "
        f"{options.trial_epochs} epochs, then {config.trainer.epochs} epochs: about "
        f"{minutes:.0f} min for {tiles:,} tiles and a ResNet18 on two cores with bf16; the sweep "
        "logs the time left as it runs"
    )


def print_step(number: int, description: str) -> None:
    print(f"\n== {number}/5 {description}", flush=True)


def check_commit(commit: str) -> None:
    """Refuse uncommitted code now, not after an hour of training when the gates would.

    Raises:
        ConfigError: the code is not committed.
    """
    if commit == "unknown" or commit.endswith("-dirty"):
        raise ConfigError(
            f"the commit of the code is {commit}, and the gates refuse a model that no commit can "
            "reproduce: commit first, or set accept_uncommitted=true"
        )


def tiles_are_valid(config: TrainConfig, recipe: Sequence[str]) -> bool:
    """Run the validation; return False if it found the tiles invalid."""
    try:
        run_entry_point(
            "validate", config, data=config.data.source, overrides=data_overrides(recipe)
        )
    except EuroSATError:
        last = tracking.get(tracking.latest_run(config.experiment, kind="validate"))
        if last.tags.get("data.validation") == "failed":  # `mlflow run` hides the exit code
            return False
        raise
    return True


def run_sweep(options: DemoConfig, config: TrainConfig, recipe: Sequence[str]) -> str:
    """Run the sweep; return the id of its parent run."""
    run_entry_point(
        "sweep",
        config,
        data=config.data.source,
        recipe=config.recipe,
        trials=options.trials,
        trial_epochs=options.trial_epochs,
        workers=options.workers,
        space=options.space,
        overrides=without_keys(recipe, "data", "recipe"),
    )
    return tracking.latest_run(config.experiment, kind="sweep")


def promote(options: DemoConfig, accept_uncommitted: bool) -> bool:
    """Run the promotion; return whether the challenger became champion."""
    flags = []
    if options.accept_new_data or champion_is_synthetic(options):
        flags.append("--accept-new-data")
    if accept_uncommitted:
        flags.append("--accept-uncommitted")
    command = [sys.executable, "-m", "registry.promote", "--model", options.model, *flags]
    code = run_command(*command, negative_is_ok=True)
    return code == exit_codes.OK


def champion_is_synthetic(options: DemoConfig) -> bool:
    """Return whether the champion was trained on synthetic tiles: any other data may replace it."""
    if tracking.alias_version(options.model, "champion") is None:
        return False
    champion = tracking.get(tracking.resolve_run(options.champion))
    return champion.params["data.source"] == "synthetic"


def data_overrides(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.startswith("data.")]


def without_keys(overrides: Sequence[str], *keys: str) -> list[str]:
    return [override for override in overrides if override.split("=", 1)[0] not in keys]


def run_entry_point(
    entry: str, config: TrainConfig, *, overrides: Sequence[str], **parameters: Any
) -> None:
    """Run `mlflow run . -e ENTRY`.

    Raises:
        EuroSATError: it failed.
    """
    values = {name: str(value) for name, value in parameters.items()}
    if overrides:
        values["overrides"] = shlex.join(overrides)
    flags = ["-e", entry, "--env-manager", "local", "--experiment-name", config.experiment]
    for name, value in values.items():
        flags += ["-P", f"{name}={value}"]
    run_command("mlflow", "run", ".", *flags)


def run_command(*command: str, negative_is_ok: bool = False) -> int:
    """Print and run the command of a step; return its exit code.

    Raises:
        EuroSATError: it failed; with ``negative_is_ok``, a negative verdict is no failure.
    """
    shown = shlex.join(["python" if part == sys.executable else part for part in command])
    print(f"$ {shown}", flush=True)
    code = subprocess.run(command).returncode
    if code == exit_codes.OK or (code == exit_codes.NEGATIVE and negative_is_ok):
        return code
    raise EuroSATError(f"`{shown}` failed with exit code {code}: see its output above")


def results(sweep_metrics: Mapping[str, float], champion: tracking.RunRecord) -> dict[str, Any]:
    """Return the metrics of the sweep and of the champion."""
    trials = sum(value for name, value in sweep_metrics.items() if name.startswith("trials_"))
    return {
        "data": champion.params["data.source"],
        "trials": int(trials),
        "best_val_accuracy": sweep_metrics["best_val_accuracy"],
        "test_accuracy": champion.metrics["test_accuracy"],
        "macro_f1": champion.metrics["test_macro_f1"],
        "macro_auprc": champion.metrics["test_macro_auprc"],
    }


def provenance(champion: tracking.RunRecord) -> dict[str, Any]:
    """Return what a reader needs to reproduce and to judge the metrics."""
    return {
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


def print_report(report: dict[str, Any], file: Path, model: str) -> None:
    verdict = (
        "promoted" if report["promoted"] else f"version {report['challenger_version']} refused"
    )
    summary = Table(title=f"the main job on data={report['data']}", show_header=False)
    summary.add_row("trials", str(report["trials"]))
    summary.add_row("best trial", f"validation accuracy {report['best_val_accuracy']:.4f}")
    summary.add_row("champion", f"{model} version {report['champion_version']} ({verdict})")
    summary.add_row("test accuracy", f"{report['test_accuracy']:.4f}")
    summary.add_row("macro F1", f"{report['macro_f1']:.4f}")
    summary.add_row("macro AUPRC", f"{report['macro_auprc']:.4f}")
    summary.add_row("time", f"{report['seconds']:.0f} s")
    scored = Table("tile", "expected", "label", "confidence", "version", title="scored over REST")
    for row in report["scored"]:
        confidence, version = f"{row['confidence']:.3f}", str(row["model_version"])
        scored.add_row(row["tile"], row["expected"], row["label"], confidence, version)
    print()
    tables.print_table(summary)
    tables.print_table(scored)
    print(f"report: {file}")


def print_next_steps(config: TrainConfig, options: DemoConfig) -> None:
    """Print how to see the runs, best first, and how to serve the champion."""
    python = Path(sys.executable)
    folder = python.parent.relative_to(ROOT) if python.is_relative_to(ROOT) else python.parent
    if not tracking.tracking_uri().startswith("http"):
        print(f"see all runs: {folder}/mlflow ui, then open the next address")
    print(f"runs, best test accuracy first: {tracking.runs_page(config.experiment, BEST_METRIC)}")
    print(f"serve it: {folder}/python -m serving.server --model {options.champion}")


if __name__ == "__main__":
    cli.run_command(main)
