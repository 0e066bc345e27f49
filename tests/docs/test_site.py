"""The pages of docs are one site: each is in its tree, its links lead somewhere, and it builds."""

import html
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.markdown import DOCS, anchors, blocks, links, pages, toctree_entries
from tests.support.paths import ROOT

HELP = runpy.run_path(str(DOCS / "extensions" / "command_help.py"))
COMMAND = re.compile(r"python -m ([\w.]+)")
GUIDES = [DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))]
INTERNAL = {"pytest", "pip"}
BUILD_TIMEOUT_S = 900


def all_commands() -> set[str]:
    return {command for folder in HELP["FOLDERS"] for command in HELP["commands"](folder)}


def test_every_page_is_in_the_tree_of_the_site() -> None:
    reached, waiting = set[Path](), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += toctree_entries(page)
    assert reached == set(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert file.exists(), f"there is no {link}"
        if anchor:
            assert anchor in anchors(file), f"{file.name} has no heading for {link}"


def test_the_reference_has_every_command_that_the_project_names() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"].values()
    named = set(COMMAND.findall(" ".join(entry["command"] for entry in project)))
    for page in set(pages()) - {ROOT / "CHANGELOG.md"}:  # names what there was
        named |= set(COMMAND.findall(page.read_text()))
    named = {name for name in named if not name.startswith("benchmarks.")} - INTERNAL
    assert len(named) > 20
    assert named <= all_commands()
    directives = [block.text for block in blocks(DOCS / "reference" / "commands.md")]
    languages = [block.language for block in blocks(DOCS / "reference" / "commands.md")]
    assert sorted(languages) == sorted(f"{{command-help}} {name}" for name in HELP["FOLDERS"])
    assert not any(directives)


def test_every_module_of_the_reference_exists() -> None:
    for page in (DOCS / "reference" / "python").glob("*.md"):
        for module in re.findall(r"automodule:: ([\w.]+)", page.read_text()):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_pages_name_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    known = {name for target in targets for name in target.split()}
    for page in pages():
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.M))
        assert named <= known, page.name


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_shows_every_command(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", DOCS, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    page = (tmp_path / "reference" / "commands.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for command in all_commands():
        assert f"python -m {command} " in text


@pytest.mark.slow
def test_the_guides_use_flags_that_the_commands_have() -> None:
    lines = [
        line for guide in GUIDES for line in re.findall(r"python -m [^\n`]*", guide.read_text())
    ]
    assert len(lines) > 20
    for line in lines:
        help_text = " ".join(HELP["help_pages"](COMMAND.findall(line)[0]).values())
        offered = set(re.findall(r"--[a-z][a-z-]*", help_text))
        assert set(re.findall(r" (--[a-z][a-z-]*)", line)) <= offered, line
