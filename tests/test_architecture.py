"""The rules of docs/design.md on names, and that importing does nothing.

import-linter checks who may import whom: its contracts are in pyproject.toml, `make lint` runs it.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

LIBRARY = "eurosat"
FOLDERS = (LIBRARY, "experiments", "registry", "serving", "expectations", "deploy")
EMPTY_MODULE_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"}
EMPTY_PARTICIPLES = {
    *("told", "said", "asked", "held", "kept", "seen", "given", "wanted", "heard", "known"),
    *("found", "made", "taken", "settled", "judged", "answered", "shown"),
}
"""They say that something happened to a value, and not what the value is."""
SLOW_TO_IMPORT = {"torch", "lightning", "timm", "mlflow", "great_expectations", "ray"}
"""Each takes more than half a second to import, and ``--help`` must not wait for it."""

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
    """Return every module of a folder, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def all_sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sources(folder)]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def commands() -> list[str]:
    """Return the modules that the entry points of MLproject run."""
    project = ROOT / "MLproject"
    if not project.exists():
        return []
    entry_points = yaml.safe_load(project.read_text())["entry_points"].values()
    modules = {
        name
        for entry_point in entry_points
        for name in re.findall(r"python3? -m ([\w.]+)", entry_point["command"])
    }
    return sorted(name for name in modules if name.split(".")[0] in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_holds_modules(folder: str) -> None:
    assert sources(folder), f"{folder}/ holds no module"


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = [path for path in all_sources() if EMPTY_MODULE_NAMES & {*path.with_suffix("").parts}]
    assert not empty


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each function, class, parameter and module constant."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.lineno, node.id


@pytest.mark.parametrize("folder", [*FOLDERS, "benchmarks", "tests"])
def test_no_function_class_parameter_or_constant_is_named_by_a_participle(folder: str) -> None:
    empty = [
        f"{path}:{line} {name}"
        for path in sources(folder)
        for line, name in names(ast.parse((ROOT / path).read_text()))
        if name.strip("_").lower() in EMPTY_PARTICIPLES
    ]
    assert not empty, "\n".join(empty)


def test_importing_every_module_does_nothing(tmp_path: Path) -> None:
    modules = [module_name(path) for path in all_sources() if path.stem != "__main__"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        input=json.dumps(modules),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    printed, _, faults = process.stdout.rpartition("\n")
    assert not json.loads(faults), "\n".join(json.loads(faults))
    assert not printed.strip(), f"importing printed {printed.strip()!r}"


def test_the_entry_points_of_mlproject_run_modules_that_exist() -> None:
    assert (ROOT / "MLproject").exists(), "MLproject is missing"
    assert commands(), "MLproject runs no module of ours"
    modules = {module_name(path) for path in all_sources()}
    assert not [name for name in commands() if not modules & {name, f"{name}.__main__"}]


@pytest.mark.parametrize("command", commands())
def test_help_is_printed_without_waiting_for_heavy_imports(command: str) -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip(), "the help is empty"
    imported = {*re.findall(r"^import time:.*\|\s*(\w+)[\w.]*$", process.stderr, re.MULTILINE)}
    assert LIBRARY in imported, "the imports could not be read"
    slow = sorted(SLOW_TO_IMPORT & imported)
    assert not slow, f"python -m {command} --help waits for {slow}"


def test_the_wheel_holds_the_library_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == [LIBRARY]
    assert not {"include", "force-include", "only-include"} & {*wheel}
