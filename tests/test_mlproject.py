"""MLproject, Makefile, docs/commands.md and the commands agree."""

import importlib.util
import json
import re
import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml

from eurosat.config import CONF, TrainConfig, compose
from eurosat.errors import ConfigError
from experiments.demo import (
    DEMO_TILES,
    DemoConfig,
    check_commit,
    estimate_duration,
    split_arguments,
)
from experiments.settings import SweepConfig, split_settings
from tests.support.paths import ROOT

PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRIES: dict[str, dict[str, object]] = PROJECT["entry_points"]
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def module_of(entry: str) -> str:
    words = str(ENTRIES[entry]["command"]).split()
    assert words[:2] == ["python", "-m"]
    return words[2]


def defaults(entry: str) -> dict[str, str]:
    parameters = ENTRIES[entry]["parameters"]
    assert isinstance(parameters, dict)
    required = {"run": "0" * 32, "version": "1", "why": "because"}
    return {
        name: str(spec.get("default", required.get(name)))
        if isinstance(spec, dict)
        else required[name]
        for name, spec in parameters.items()
    }


def test_the_entry_points_are_complete() -> None:
    promised = {"main", "validate", "train", "sweep", "evaluate", "register"}
    assert set(ENTRIES) == promised | {
        "doctor",
        "judge",
        "promote",
        "receive",
        "rollback",
        "serve",
        "serve-ray",
        "serve-mlflow",
    }


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_names_a_module_and_uses_its_parameters(entry: str) -> None:
    assert importlib.util.find_spec(module_of(entry))
    used = set(re.findall(r"{(\w+)}", str(ENTRIES[entry]["command"])))
    assert used == set(defaults(entry))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_is_in_the_docs_with_its_command(entry: str) -> None:
    assert f"| `{entry}` | `python -m {module_of(entry)}" in COMMANDS


def test_the_docs_name_no_entry_point_or_module_that_does_not_exist() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \| `python", COMMANDS, re.M)) == set(ENTRIES)
    for module in re.findall(r"`python -m ([\w.]+)", COMMANDS):
        assert importlib.util.find_spec(module), f"docs/commands.md names {module}"


@pytest.mark.parametrize("entry", ["train", "sweep", "main"])
def test_parameters_of_commands_with_recipes_are_valid_keys(entry: str) -> None:
    words = shlex.split(str(ENTRIES[entry]["command"]).format(**defaults(entry)))[3:]
    arguments = [word for word in words if not word.startswith("overrides=")]
    if entry == "sweep":
        settings, arguments = split_settings(SweepConfig, arguments)
        assert settings == SweepConfig(), "MLproject has the command's defaults"
    if entry == "main":
        demo, arguments = split_arguments(arguments)
        assert demo == replace(DemoConfig(), trial_epochs=1)
    assert isinstance(compose(arguments), TrainConfig)


def test_the_data_choose_the_recipe_unless_one_is_named() -> None:
    assert split_arguments([])[1] == ["data=synthetic", "recipe=demo", *DEMO_TILES]
    few = ["data=synthetic", "recipe=demo", "data.synthetic.tiles=10"]
    assert split_arguments(few)[1] == [*few, DEMO_TILES[1]]
    assert split_arguments(["data=eurosat"])[1] == ["data=eurosat", "recipe=resnet18-quick"]
    arguments = ["data=eurosat", "recipe=demo"]
    assert split_arguments(arguments)[1] == arguments


def test_the_demo_gives_tiles_of_a_folder_a_model_of_their_own() -> None:
    folder = ["data=folder", "data.root=/my/land cover.zip"]
    assert split_arguments(folder)[0].champion == "models:/land-cover@champion"
    assert split_arguments([*folder, "model=mine"])[0].model == "mine"
    assert split_arguments(["data=eurosat"])[0].model == "eurosat"


@pytest.mark.parametrize("commit", ["unknown", f"{'a' * 40}-dirty"])
def test_the_main_job_on_real_tiles_ends_at_once_on_code_that_the_gates_would_refuse(
    commit: str,
) -> None:
    check_commit("a" * 40)
    with pytest.raises(ConfigError, match=r"commit first, or set accept_uncommitted=true"):
        check_commit(commit)


def test_the_time_that_is_announced_holds_that_of_asking_a_teacher() -> None:
    def announced(*overrides: str) -> str:
        settings, recipe = split_arguments(["data=eurosat", "trials=1", *overrides])
        return estimate_duration(compose(recipe), settings)

    taught, alone = announced(), announced("distill.teacher=none", "distill.features=0")
    minutes = [int(re.findall(r"about (\d+) min", said)[0]) for said in (taught, alone)]
    assert minutes[0] == minutes[1] + 1
    assert "one pass of the teacher" in taught
    assert "teacher" not in alone


def test_every_recipe_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    for file in (CONF / "recipe").glob("*.yaml"):
        assert f"| `{file.stem}`" in page


def test_make_help_lists_every_target_for_users() -> None:
    help_text = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = set(re.findall(r"^  make ([\w-]+) +\S", help_text.stdout, re.MULTILINE))
    database = subprocess.run(["make", "-pn", "help"], cwd=ROOT, capture_output=True, text=True)
    phony = re.search(r"^\.PHONY: (.*)$", database.stdout, re.MULTILINE)
    assert phony
    assert listed == set(phony.group(1).split()) - {"wrk"}  # a step of other targets


def test_the_report_of_the_main_job_is_complete() -> None:
    report = json.loads((ROOT / "reports" / "main-job.json").read_text())
    required = {
        "data",
        "trials",
        "test_accuracy",
        "macro_f1",
        "macro_auprc",
        "champion_version",
        "seconds",
        "scored",
    }
    assert required <= set(report)
    assert report["data"] == "eurosat"
    for row in report["scored"]:
        assert set(row) == {"tile", "expected", "label", "confidence", "model_version"}
