"""MLproject, Makefile, README and the verbs are held against each other."""

import importlib.util
import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from eurosat.config import CONF, TrainConfig, compose
from eurosat.errors import ConfigError
from experiments.demo import DemoConfig, check_commit, say_how_long, split_arguments
from experiments.settings import SweepConfig, take

ROOT = Path(__file__).resolve().parents[1]
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRIES: dict[str, dict[str, object]] = PROJECT["entry_points"]
README = (ROOT / "README.md").read_text()


def module_of(entry: str) -> str:
    words = str(ENTRIES[entry]["command"]).split()
    assert words[:2] == ["python", "-m"]
    return words[2]


def defaults(entry: str) -> dict[str, str]:
    parameters = ENTRIES[entry]["parameters"]
    assert isinstance(parameters, dict)
    given = {"run": "0" * 32, "version": "1", "why": "because"}
    return {
        name: str(spec.get("default", given.get(name))) if isinstance(spec, dict) else given[name]
        for name, spec in parameters.items()
    }


def test_the_promised_entry_points_are_there() -> None:
    promised = {"main", "validate", "train", "sweep", "evaluate", "register"}
    assert set(ENTRIES) == promised | {
        "doctor",
        "judge",
        "promote",
        "receive",
        "rollback",
        "serve",
        "serve-ray",
        "serve-stock",
    }


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_names_a_module_and_uses_its_parameters(entry: str) -> None:
    assert importlib.util.find_spec(module_of(entry))
    used = set(re.findall(r"{(\w+)}", str(ENTRIES[entry]["command"])))
    assert used == set(defaults(entry))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_is_in_the_readme_with_its_command(entry: str) -> None:
    assert f"| `{entry}` | `python -m {module_of(entry)}" in README


@pytest.mark.parametrize("entry", ["train", "sweep", "main"])
def test_the_parameters_of_recipe_verbs_are_keys_they_know(entry: str) -> None:
    words = shlex.split(str(ENTRIES[entry]["command"]).format(**defaults(entry)))[3:]
    given = [word for word in words if not word.startswith("overrides=")]
    if entry == "sweep":
        settings, given = take(SweepConfig, given)
        assert settings == SweepConfig(), "MLproject's defaults are the verb's"
    if entry == "main":
        demo, given = split_arguments(given)
        assert demo == replace(DemoConfig(), trial_epochs=1)
    assert isinstance(compose(given), TrainConfig)


def test_a_recipe_is_chosen_by_the_data_unless_it_is_said() -> None:
    assert split_arguments([])[1] == ["data=synthetic", "recipe=demo"]
    assert split_arguments(["data=eurosat"])[1] == ["data=eurosat", "recipe=resnet18-quick"]
    said = ["data=eurosat", "recipe=demo"]
    assert split_arguments(said)[1] == said


@pytest.mark.parametrize("commit", ["unknown", f"{'a' * 40}-dirty"])
def test_the_main_job_on_real_tiles_ends_at_once_on_code_that_the_gates_would_refuse(
    commit: str,
) -> None:
    check_commit("a" * 40)
    with pytest.raises(ConfigError, match=r"commit first, or say accept_uncommitted=true"):
        check_commit(commit)


def test_the_time_that_is_announced_holds_that_of_asking_a_teacher() -> None:
    def announced(*overrides: str) -> str:
        settings, recipe = split_arguments(["data=eurosat", "trials=1", *overrides])
        return say_how_long(compose(recipe), settings)

    taught, alone = announced(), announced("distill.teacher=none", "distill.features=0")
    minutes = [int(re.findall(r"about (\d+) min", said)[0]) for said in (taught, alone)]
    assert minutes[0] == minutes[1] + 1
    assert "a teacher asked once" in taught
    assert "teacher" not in alone


def test_every_recipe_is_in_the_docs() -> None:
    told = (ROOT / "docs" / "training.md").read_text()
    for file in (CONF / "recipe").glob("*.yaml"):
        assert f"| `{file.stem}`" in told


def test_make_help_lists_every_target_that_is_told_to_users() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  make ([\w-]+) +\S", said.stdout, re.MULTILINE))
    told = subprocess.run(["make", "-pn", "help"], cwd=ROOT, capture_output=True, text=True)
    phony = re.search(r"^\.PHONY: (.*)$", told.stdout, re.MULTILINE)
    assert phony
    assert listed == set(phony.group(1).split()) - {"wrk"}  # a part of others
    named = set(re.findall(r"`make ([\w-]+)", README))
    assert named <= listed


def test_paths_that_the_readme_and_docs_link_to_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_main_jobs_report_holds_what_was_promised() -> None:
    report = json.loads((ROOT / "reports" / "main-job.json").read_text())
    promised = {
        "data",
        "trials",
        "test_accuracy",
        "macro_f1",
        "macro_auprc",
        "champion_version",
        "seconds",
        "scored",
    }
    assert promised <= set(report)
    assert report["data"] == "eurosat"
    for row in report["scored"]:
        assert set(row) == {"tile", "expected", "label", "confidence", "model_version"}
