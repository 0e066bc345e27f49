"""The pages that people read first name only what exists."""

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from experiments import demo
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
FRONT = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
    "benchmarks/README.md",
)
PAGES = [
    *(ROOT / name for name in FRONT),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
LINUX = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux"} | {
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def every_page(test: Any) -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(
        test
    )


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M)}


@every_page
def test_what_a_page_links_to_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


@every_page
def test_the_make_targets_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):.*?## ", (ROOT / "Makefile").read_text(), re.M))
    lines = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(?!#).*", text, re.M)
    named = {name for line in lines for name in re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", line)}
    assert named <= targets, f"{page.name} names {sorted(named - targets)}"
    ours = (
        r"python -m ((?:benchmarks|deploy|eurosat|expectations|experiments|registry|serving)[\w.]*)"
    )
    for module in re.findall(ours, text):
        assert importlib.util.find_spec(module.rstrip(".")), f"{page.name} names {module}"


def test_the_paths_that_contributors_are_sent_to_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:toml|yml|yaml|md))`", text)
    assert len(named) >= 15
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_readme_is_read_in_minutes() -> None:
    assert 130 <= len(README.splitlines()) <= 160
    assert README.index("source .venv/bin/activate") < README.index("python -m serving.server")


def test_the_readme_names_the_versions_of_python_that_the_project_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirements,) = re.findall(r"^Python (.*?) and `make`", README, re.M)
    supported = SpecifierSet(project["requires-python"])
    versions = re.findall(r"3\.\d+", requirements)
    assert versions == [f"3.{minor}" for minor in range(20) if f"3.{minor}" in supported]


def locked(name: str) -> set[str]:
    """Return the packages that a lock installs on Linux x86_64 with Python 3.11."""
    lines = re.findall(r"^([A-Za-z0-9][^\\\n]*?) *\\$", (ROOT / name).read_text(), re.M)
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(LINUX)
    }


def test_the_readme_says_how_many_packages_are_installed() -> None:
    product, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert f"with {len(product)} pinned" in README
    assert f"are {len(dev - product)} more packages" in README


def test_the_sample_of_the_demo_is_what_the_demo_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (sample,) = re.findall(r"^```text\n(.*?)^```", README, re.M | re.S)
    row = {"tile": "River/River_1.jpg", "expected": "River", "label": "River", "confidence": 0.9}
    report = {"data": "synthetic", "trials": 6, "promoted": True, "best_val_accuracy": 0.5}
    report |= {"champion_version": "1", "challenger_version": "1", "seconds": 150.0}
    report |= {"test_accuracy": 0.5, "macro_f1": 0.5, "macro_auprc": 0.5}
    report["scored"] = [row | {"model_version": "1"}]
    demo.print_report(report, Path("reports/demo.json"), "eurosat")
    printed = capsys.readouterr().out

    def labels(text: str) -> list[str]:
        return [
            line.strip("│┃ ").partition("│")[0].strip()
            for line in text.splitlines()
            if line[:1] in "│┃"
        ]

    wanted_rows = [label for label in labels(sample) if not re.match(r"\w+/\w+\.jpg", label)]
    assert len(wanted_rows) >= 6
    assert set(wanted_rows) <= set(labels(printed))
    assert re.match(r" *the main job on data=(synthetic|eurosat)\n", sample)


def test_the_citation_file_is_valid_and_agrees_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation), "keys that the format requires"
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in project["authors"]
    ]
    (article,) = citation["references"]
    assert {"type", "title", "authors"} <= set(article)
    pages = f"{article['volume']}({article['issue']}), {article['start']}-{article['end']}"
    assert pages in README
    assert str(article["year"]) in README


def test_the_templates_of_issues_have_what_the_site_requires() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert [template.stem for template in templates] == ["bug", "idea"]
    for template in templates:
        _, head, body = template.read_text().split("---\n", 2)
        assert {"name", "about"} <= set(yaml.safe_load(head))
        assert body.strip()


@pytest.mark.parametrize(
    "term", ["ECE", "view", "pp", "private memory", "macro F1", "AUPRC", "seeds"]
)
def test_the_glossary_explains_the_terms_of_the_tables(term: str) -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    assert re.search(rf"^\| \**{term}\** \| \w", glossary, re.M)
