"""The rules of docs/design.md on names, and that importing does nothing.

Who may import whom stands in pyproject.toml for import-linter, which `make lint` runs.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "eurosat"
FOLDERS = (LIBRARY, "experiments", "registry", "serving", "expectations", "deploy")
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"}
SLOW_TO_IMPORT = {"torch", "lightning", "timm", "mlflow", "great_expectations", "ray"}
"""Each takes more than half a second: a command's ``--help`` does not wait for it."""

IMPORT_ALL = """
import importlib, json, logging, os, sys, threading

def state():
    return {
        "files": sorted(os.path.join(at, name) for at, folders, files in os.walk(".")
                        for name in folders + files),
        "cwd": os.getcwd(),
        "root handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "root level": logging.getLogger().level,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI"),
    }

faults, before = [], state()
for name in json.load(sys.stdin):
    try:
        importlib.import_module(name)
    except BaseException as error:
        faults.append(f"import {name} raised {type(error).__name__}: {error}")
    after = state()
    faults += [
        f"import {name} changed {key} from {before[key]} to {after[key]}"
        for key in before if before[key] != after[key]
    ]
    before = after
sys.__stdout__.write("\\n" + json.dumps(faults))
"""


def sources(folder: str) -> list[Path]:
    """Every module of a folder, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def all_sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sources(folder)]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def verbs() -> list[str]:
    """The modules of ours that MLproject's entry points run."""
    project = ROOT / "MLproject"
    if not project.exists():
        return []
    points = yaml.safe_load(project.read_text())["entry_points"].values()
    named = {
        name for point in points for name in re.findall(r"python3? -m ([\w.]+)", point["command"])
    }
    return sorted(name for name in named if name.split(".")[0] in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_holds_modules(folder: str) -> None:
    assert sources(folder), f"{folder}/ holds no module"


def test_no_module_has_a_name_that_says_nothing() -> None:
    found = [path for path in all_sources() if EMPTY_NAMES & {*path.with_suffix("").parts}]
    assert not found


def test_importing_every_module_does_nothing(tmp_path: Path) -> None:
    names = [module_name(path) for path in all_sources() if path.stem != "__main__"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    asked = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        input=json.dumps(names),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert asked.returncode == 0, asked.stderr
    printed, _, faults = asked.stdout.rpartition("\n")
    assert not json.loads(faults), "\n".join(json.loads(faults))
    assert not printed.strip(), f"importing printed {printed.strip()!r}"


def test_mlproject_names_verbs_that_exist() -> None:
    assert (ROOT / "MLproject").exists(), "the table of contents is missing"
    assert verbs(), "MLproject runs no module of ours"
    known = {module_name(path) for path in all_sources()}
    assert not [name for name in verbs() if not known & {name, f"{name}.__main__"}]


@pytest.mark.parametrize("verb", verbs())
def test_help_is_printed_without_waiting_for_heavy_imports(verb: str) -> None:
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", verb, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert asked.stdout.strip(), "the help is empty"
    imported = {*re.findall(r"^import time:.*\|\s*(\w+)[\w.]*$", asked.stderr, re.MULTILINE)}
    assert LIBRARY in imported, "the imports could not be read"
    slow = sorted(SLOW_TO_IMPORT & imported)
    assert not slow, f"python -m {verb} --help waits for {slow}"


def test_the_wheel_holds_the_library_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == [LIBRARY]
    assert not {"include", "force-include", "only-include"} & {*wheel}
