"""Check the files of a registered version before any code among them runs.

Whoever trains may write every file of a version. So its code must be a ``serving/pyfunc.py`` that
this project has released, its ``MLmodel`` may name nothing else to run or to install, and all other
files are data.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from eurosat.errors import ModelError
from eurosat.runtime.digests import sha256_of

FILES_TAG = "model.files"
"""Tag of a version: sha256 and size of each of its files at registration, as JSON."""
ADDED_BY_MLFLOW = "registered_model_meta"
"""A file that MLflow adds to a version's files when they are downloaded."""
NAMES = re.compile(
    r"MLmodel|[\w-]+\.py|conda\.yaml|python_env\.yaml|requirements\.txt"
    r"|(serving_)?input_example\.json|artifacts/lineage\.json|artifacts/[\w.-]+\.onnx"
    rf"|{ADDED_BY_MLFLOW}"
)
"""Files of a version, by their paths in its folder."""
LOADERS = ("mlflow.pyfunc.loaders.code_model",)
PYFUNC_KEYS = {
    "artifacts",
    "cloudpickle_version",
    "code",
    "config",
    "env",
    "loader_module",
    "model_code_path",
    "python_version",
    "streamable",
}
"""Keys of the flavor python_function that `registry.register` writes; ``code`` is empty."""
ENVIRONMENT = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
PACKAGES = {
    "mlflow",
    "numpy",
    "onnxruntime",
    "pandas",
    "pillow",
    "pyyaml",
    "rasterio",
    "simplejpeg",
    "cloudpickle",
    "pip",
    "python",
    "setuptools",
    "wheel",
}
"""Packages that a version may have installed for itself, from the package index."""
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(\[[\w,]+\])?\s*((==|<=|=)\s*[\w.!+-]+)?")
MAX_TEXT_BYTES = 1_000_000
"""Size of MLmodel and of each file of requirements."""
REMEDY = "register its run again with `python -m registry.register`"


def check(folder: Path) -> dict[str, str]:
    """Check the files of a version; return the sha256 of each by its path in ``folder``.

    The file that MLflow adds to a download is left out.

    Raises:
        ModelError: the folder holds another file, code that was not released, or an ``MLmodel`` or
            requirements that `registry.register` does not write.
    """
    sha256_by_name = dict(_digests(folder))
    code = [name for name in sha256_by_name if name.endswith(".py")]
    if len(code) != 1 or sha256_by_name[code[0]] not in released_code():
        names = ", ".join(code) or "no .py file"
        raise ModelError(f"{names}: not the code that this project has released: {REMEDY}")
    _check_mlmodel(folder, code[0])
    for name in ("requirements.txt", *ENVIRONMENT.values()):
        if name in sha256_by_name:
            _check_packages(folder, name)
    return sha256_by_name


def check_unchanged(actual: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare the sha256 of files with those of before, both by path.

    Raises:
        ModelError: a file was changed, added or removed.
    """
    if changed := sorted({name for name, _ in actual.items() ^ expected.items()}):
        raise ModelError(f"{', '.join(changed[:3])} differ from what was registered: {REMEDY}")


def read_manifest(text: str) -> dict[str, tuple[str, int]]:
    """Return sha256 and size in bytes of each file, by its path, from the text of FILES_TAG.

    Raises:
        ValueError: it is no such text.
    """
    try:
        files = json.loads(text)
        return {str(name): (str(sha256), int(size)) for name, (sha256, size) in files.items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"no list of files: {error}") from error


def released_code() -> frozenset[str]:
    """Return the sha256 of each released ``serving/pyfunc.py``."""
    text = resources.files("eurosat.models").joinpath("released_code.txt").read_text()
    return frozenset(line.split()[0] for line in text.splitlines() if not line.startswith("#"))


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or NAMES.fullmatch(name)):
            raise ModelError(f"a version has no file {name[:100]!r}: {REMEDY}")
        if path.is_file() and name != ADDED_BY_MLFLOW:
            yield name, sha256_of(path)


def _check_mlmodel(folder: Path, code: str) -> None:
    """Raise ModelError unless MLmodel loads ``code`` alone."""
    model = _read_yaml(folder / "MLmodel")
    flavors = model.get("flavors")
    flavors = flavors if isinstance(flavors, dict) else {}
    flavor = flavors.get("python_function")
    if not isinstance(flavor, dict) or len(flavors) != 1 or not flavor.keys() <= PYFUNC_KEYS:
        raise ModelError(f"MLmodel has other flavors, or other keys, than a version has: {REMEDY}")
    example = model.get("saved_input_example_info") or {}
    faults = {
        "loader_module": flavor.get("loader_module") not in LOADERS,
        "model_code_path": Path(str(flavor.get("model_code_path"))).name != code,
        "code": bool(flavor.get("code")),
        "env": flavor.get("env") != ENVIRONMENT,
        "artifacts": not _are_artifacts(flavor.get("artifacts")),
        "saved_input_example_info": not isinstance(example, dict)
        or not {example.get("artifact_path"), example.get("serving_input_path")}
        <= {None, "input_example.json", "serving_input_example.json"},
        "resources": bool(model.get("resources")),
    }
    if wrong := [name for name, is_wrong in faults.items() if is_wrong]:
        raise ModelError(f"MLmodel has {', '.join(wrong)} that no version has: {REMEDY}")


def _are_artifacts(artifacts: Any) -> bool:
    """Return whether each artifact is a file of the version."""
    return isinstance(artifacts, dict) and all(
        isinstance(artifact, dict)
        and artifact.keys() <= {"path", "uri"}
        and NAMES.fullmatch(str(artifact.get("path")))
        for artifact in artifacts.values()
    )


def _check_packages(folder: Path, name: str) -> None:
    """Raise ModelError if a file of requirements names anything but a known package."""
    file = folder / name
    if name == "requirements.txt":
        lines: list[Any] = _read_text(file).splitlines()
    elif name == "python_env.yaml":
        content = _read_yaml(file)
        lines = list(content.get("build_dependencies") or [])
        lines += [
            line for line in content.get("dependencies") or [] if line != "-r requirements.txt"
        ]
    else:
        content = _read_yaml(file)
        if content.get("channels") != ["conda-forge"]:
            raise ModelError(f"{name} has other channels than conda-forge: {REMEDY}")
        dependencies = list(content.get("dependencies") or [])
        lines = [line for line in dependencies if not isinstance(line, dict)]
        for group in dependencies:
            if isinstance(group, dict):
                lines += group.get("pip") or [] if group.keys() == {"pip"} else [group]
    for line in lines:
        match = REQUIREMENT.fullmatch(str(line).strip())
        if str(line).strip() and (match is None or match[1].lower() not in PACKAGES):
            raise ModelError(f"{name} would install {str(line)[:100]!r}: {REMEDY}")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ModelError(f"{file.name} is no YAML: {REMEDY}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} is no mapping: {REMEDY}")
    return content


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise ModelError(f"{file.name} is over {MAX_TEXT_BYTES} bytes: {REMEDY}")
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file.name} cannot be read: {REMEDY}") from error
