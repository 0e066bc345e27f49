"""The tables of README.md and docs/benchmarks.md, and the commits that their reports name."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import measured_code, reports, tables
from tests.support.paths import ROOT

NAMES = sorted({name for page in tables.SECTIONS.values() for s in page for name in s.reports})
NO_COMMIT = {"verdict"}
"""Reports about a version of the registry, whose run names its commit."""
UNCOMMITTED = {"bench-train", "bench-convolutions", "bench-platform"}
"""Reports that wait for a measurement on committed code; no other may join them."""


@pytest.mark.parametrize("page", tables.SECTIONS, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_reports(page: Path) -> None:
    text = page.read_text()
    drawn = tables.without_changes(tables.rewrite(page, text))
    assert drawn == tables.without_changes(text), "run `make tables`"


def test_every_report_has_a_table_and_declares_the_code_that_it_measures() -> None:
    files = {file.stem for file in (ROOT / "reports").glob("*.json")} - {"demo"}
    assert files == set(NAMES)
    assert set(NAMES) - NO_COMMIT == set(measured_code.MEASURED_CODE)
    for name, paths in measured_code.MEASURED_CODE.items():
        assert measured_code.commits(tables.load(name)), f"{name} names no commit"
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert not missing, f"{name} measures {missing}"


def test_no_other_report_was_measured_on_uncommitted_code() -> None:
    dirty = {name for name in NAMES if measured_code.uncommitted(tables.load(name))}
    assert dirty <= UNCOMMITTED, "\n".join(tables.refusals(sorted(dirty)))


@pytest.mark.parametrize("commit", [f"{'a' * 40}-dirty", "unknown"])
def test_a_report_of_uncommitted_code_is_refused_in_one_line_and_changes_no_page(
    commit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in NAMES:
        report = tables.load(name)
        if name == "bench-serving":
            report["commit"] = commit
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    page = tmp_path / "README.md"
    page.write_text("<!-- bench-serving -->\nas before\n<!-- /bench-serving -->\n")
    monkeypatch.setattr(tables, "REPORTS", tmp_path)
    (section,) = (s for s in tables.SECTIONS[tables.BENCHMARKS] if s.name == "bench-serving")
    monkeypatch.setattr(tables, "SECTIONS", {page: (section,)})
    assert tables.main(["bench-serving"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: reports/bench-serving.json was measured on uncommitted code ({commit}): "
        "commit, then run its benchmark again"
    )
    assert "as before" in page.read_text()
    report = tables.load("bench-serving") | {"commit": "a" * 40}
    (tmp_path / "bench-serving.json").write_text(json.dumps(report))
    assert tables.main(["bench-serving"]) == 0
    assert "| `server` |" in page.read_text()
    assert "*Measured at aaaaaaa; unknown commit.*" in page.read_text()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measured_code, "ROOT", tmp_path)
    for path in ("serving/app.py", "registry/judge.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(folder: Path) -> str:
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    git(folder, *author, "commit", "--quiet", "--all", "--message", "a change")
    return git(folder, "rev-parse", "HEAD")


def test_a_mark_names_the_measured_code_that_has_changed_since(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    report = {"commit": head}
    assert measured_code.mark("bench-registry", report) == f"Measured at {head[:7]}."
    (repository / "registry" / "judge.py").write_text("2\n")
    changed = f"Measured at {head[:7]}; registry has changed since."
    assert measured_code.mark("bench-registry", report) == changed
    commit(repository)
    assert measured_code.mark("bench-registry", report) == changed
    assert measured_code.mark("bench-serving", report) == f"Measured at {head[:7]}."
    assert measured_code.mark_all({"bench-registry": report, "bench-serving": report}) == (
        f"Measured at {head[:7]} (bench-registry), {head[:7]} (bench-serving); "
        "the code of bench-registry has changed since."
    )
    dirty = measured_code.mark("bench-serving", {"commit": f"{head}-dirty"})
    assert dirty == f"Measured at {head[:7]} with uncommitted changes."


def test_a_commit_that_a_shallow_clone_lacks_and_a_folder_without_git_are_unknown(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git(repository, "rev-parse", "HEAD")
    (repository / "serving" / "app.py").write_text("2\n")
    commit(repository)
    clones = tmp_path_factory.mktemp("clones")
    git(clones, "clone", "--quiet", "--depth=1", repository.as_uri(), "shallow")
    (clones / "bare").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(clones))
    full = measured_code.mark("bench-serving", {"commit": head})
    assert full == f"Measured at {head[:7]}; serving has changed since."
    for folder in ("shallow", "bare"):
        monkeypatch.setattr(measured_code, "ROOT", clones / folder)
        mark = measured_code.mark("bench-serving", {"commit": head})
        assert mark == f"Measured at {head[:7]}; unknown commit."
        marks = [tables.without_changes(f"| 1 |\n\n*{text}*\n") for text in (mark, full)]
        assert marks[0] == marks[1] == f"| 1 |\n\n*Measured at {head[:7]}.*\n"


def test_every_benchmark_draws_its_tables_when_it_ends() -> None:
    recipes = dict(
        re.findall(r"^([\w-]+):[^\n]*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    )
    benchmarks = [target for target in recipes if target.startswith("bench-")]
    assert len(benchmarks) == 11
    drawn = set()
    for target in (*benchmarks, "main-job", "soak-serving"):
        *_, last = recipes[target].splitlines()
        command, _, report = last.strip().rpartition(" ")
        assert command == "$(BIN)/python -m benchmarks.tables"
        assert report in {target, target.removeprefix("bench-"), "bench-overload"}
        drawn.add(report)
    assert drawn == set(NAMES) - NO_COMMIT
    page = tables.BENCHMARKS.read_text()
    assert not [target for target in benchmarks if f"`make {target}" not in page]


def test_a_goal_is_shown_with_its_limit_and_whether_it_was_met() -> None:
    report = {
        "hardware": "a machine",
        "minutes": 10,
        "goals": [
            reports.goal("platform.lost", 0, 0, at_most=True),
            reports.goal("platform.stuck", 2, 0, at_most=True),
            reports.without_goal("platform.search_p95_ms", 812.34),
        ],
        "rows": [{"what": "points acknowledged", "value": 1920000, "unit": ""}],
    }
    (section,) = (s for s in tables.SECTIONS[tables.BENCHMARKS] if s.name == "bench-platform")
    table = section.draw(report)
    assert "| points acknowledged | 1,920,000 |" in table
    assert "| `platform.lost` | 0 | 0 | met |" in table
    assert "| `platform.stuck` | 2 | 0 | **not met** |" in table
    assert "| `platform.search_p95_ms` | 812.34 |  |  |" in table
