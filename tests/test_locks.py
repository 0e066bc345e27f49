"""The locks are complete, hashed, name no index, and agree with pyproject.toml and conda.yaml."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PRODUCT, DEV = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
PEERS = sorted((ROOT / "benchmarks").rglob("*.lock"))
LOCKS = [pytest.param(lock, id=lock.name) for lock in (PRODUCT, DEV, *PEERS)]
SUPPORTED = ("3.11", "3.12", "3.13")
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def entries(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """Return every requirement of a lock with its hashes."""
    joined = re.sub(r"\\\n\s*", " ", lock.read_text())
    requirements = []
    for line in joined.splitlines():
        text = line.split(" #")[0].strip()
        if text and not text.startswith("#"):
            requirement = text.split(" --hash=")[0]
            requirements.append((Requirement(requirement), SHA256.findall(text)))
    return requirements


def version(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    return pin.version


def conda() -> dict[str, Any]:
    environment: dict[str, Any] = yaml.safe_load((ROOT / "conda.yaml").read_text())
    return environment


def conda_python() -> str:
    (python,) = (
        part.removeprefix("python=")
        for part in conda()["dependencies"]
        if isinstance(part, str) and part.startswith("python=")
    )
    return str(python)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_is_pinned_and_hashed(lock: Path) -> None:
    assert len(entries(lock)) > 50, f"{lock.name} was not read"
    for requirement, hashes in entries(lock):
        operators = [pin.operator for pin in requirement.specifier]
        assert operators == ["=="], f"{requirement} is not pinned"
        assert "*" not in version(requirement), f"{requirement} is not one release"
        assert requirement.url is None, f"{requirement} is a URL"
        assert hashes, f"{requirement} has no sha256"


@pytest.mark.parametrize("lock", LOCKS)
def test_no_lock_names_an_index_or_a_host(lock: Path) -> None:
    index = re.compile(r"://|--(extra-)?index|--find-links|--trusted-host|^\s*-[fi]\b")
    for number, line in enumerate(lock.read_text().splitlines(), start=1):
        assert not index.search(line), f"{lock.name}:{number}: {line}"


def test_the_product_lock_is_part_of_the_development_lock() -> None:
    """Same releases on the same platforms; development tools may need more platforms."""
    dev = entries(DEV)
    for product, hashes in entries(PRODUCT):
        identity = (product.name, product.specifier, product.extras)
        assert any(
            (requirement.name, requirement.specifier, requirement.extras) == identity
            and platforms(product) <= platforms(requirement)
            and set(dev_hashes) == set(hashes)
            for requirement, dev_hashes in dev
        ), f"{product} differs or is missing"


def platforms(requirement: Requirement) -> set[tuple[str, ...]]:
    """Return the platforms on which the requirement's marker is true."""
    return {
        platform
        for platform in itertools.product(
            ("linux", "darwin", "win32"),
            ("CPython", "PyPy"),
            ("x86_64", "arm64", "aarch64"),
            SUPPORTED,
        )
        if requirement.marker is None
        or requirement.marker.evaluate(
            {
                "sys_platform": platform[0],
                "platform_system": {"win32": "Windows"}.get(platform[0], platform[0].title()),
                "os_name": "nt" if platform[0] == "win32" else "posix",
                "platform_python_implementation": platform[1],
                "implementation_name": platform[1].lower(),
                "platform_machine": platform[2],
                "python_version": platform[3],
                "python_full_version": f"{platform[3]}.0",
            }
        )
    }


def test_the_product_lock_contains_no_development_tool() -> None:
    product = {canonicalize_name(requirement.name) for requirement, _ in entries(PRODUCT)}
    assert not product & {"pytest", "ruff", "mypy", "pre-commit"}


@pytest.mark.parametrize("python", SUPPORTED)
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_every_dependency_is_satisfied_by_the_lock(platform: str, python: str) -> None:
    environment: dict[str, str] = {key: str(value) for key, value in default_environment().items()}
    environment |= {
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[platform],
        "python_version": python,
        "python_full_version": f"{python}.0",
    }

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    pinned = {
        canonicalize_name(requirement.name): version(requirement)
        for requirement, _ in entries(PRODUCT)
        if applies(requirement)
    }
    for text in pyproject()["project"]["dependencies"]:
        dependency = Requirement(text)
        if applies(dependency):
            locked = pinned.get(canonicalize_name(dependency.name))
            assert locked, f"{dependency} is not in {PRODUCT.name}"
            assert dependency.specifier.contains(locked), f"{dependency} is locked at {locked}"


@pytest.mark.parametrize("lock", [pytest.param(lock, id=lock.name) for lock in PEERS])
def test_the_lock_of_a_peer_satisfies_its_requirements(lock: Path) -> None:
    pinned = {
        canonicalize_name(requirement.name): version(requirement)
        for requirement, _ in entries(lock)
        if requirement.marker is None or requirement.marker.evaluate()
    }
    for line in lock.with_suffix(".in").read_text().splitlines():
        if text := line.split("#")[0].strip():
            dependency = Requirement(text)
            if dependency.marker and not dependency.marker.evaluate():
                continue
            locked = pinned.get(canonicalize_name(dependency.name))
            assert locked, f"{dependency} is not in {lock.name}"
            assert dependency.specifier.contains(locked), f"{dependency} is locked at {locked}"


@pytest.mark.parametrize("lock", [pytest.param(lock, id=lock.name) for lock in PEERS])
def test_a_peer_uses_the_same_releases_as_the_product(lock: Path) -> None:
    """Otherwise a benchmark would compare releases."""
    product, peer = (
        {
            canonicalize_name(requirement.name): version(requirement)
            for requirement, _ in entries(file)
            if requirement.marker is None or requirement.marker.evaluate()
        }
        for file in (PRODUCT, lock)
    )
    names = ("torch", "torchvision", "timm", "onnxruntime", "numpy", "pillow", "uvicorn", "uvloop")
    shared = {canonicalize_name(name) for name in names} & set(peer)
    assert shared >= {"torch", "timm", "numpy", "pillow"}
    for name in sorted(shared):
        assert peer[name] == product[name], f"{name} {peer[name]} in {lock.name}"


def test_every_lower_bound_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed, "pyproject.toml has no list of dependencies"
    bounds = [line for line in listed[1].splitlines() if ">=" in line]
    assert len(bounds) == len(pyproject()["project"]["dependencies"]), "a lower bound is missing"
    for line in bounds:
        assert re.search(r'",\s+# \S', line), f"no reason beside: {line.strip()}"


def test_conda_installs_the_product_lock_and_nothing_else() -> None:
    environment = conda()
    assert environment["name"] == "eurosat"
    assert environment["channels"] == ["conda-forge"]
    assert environment["dependencies"] == [
        f"python={conda_python()}",
        "pip",
        {"pip": [f"-r {PRODUCT.name}"]},
    ]


def test_conda_ci_and_pyproject_agree_on_the_python_versions() -> None:
    supported = SpecifierSet(pyproject()["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported] == list(SUPPORTED)
    assert conda_python() in SUPPORTED
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert tested == list(SUPPORTED)
    for job in workflow["jobs"].values():
        used = [
            step["with"]["python-version"]
            for step in job["steps"]
            if "python-version" in step.get("with", {})
        ]
        assert used, "a job does not name its Python"
        assert set(used) <= {"${{ env.PYTHON_VERSION }}", "${{ matrix.python }}"}
