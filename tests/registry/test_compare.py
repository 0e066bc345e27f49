"""Two versions on one page: their metrics, their difference, and the tiles on which they differ."""

import subprocess
from pathlib import Path

import pytest

from eurosat.errors import ModelError
from eurosat.runtime import exit_codes
from registry import compare, register, versions
from tests.support.paths import ROOT
from tests.support.registry import REGISTRY, make_predictions, make_run, register_challenger

pytestmark = REGISTRY


def test_a_page_shows_both_and_the_tiles_on_which_they_differ(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = register_challenger(store, "pair", wrong=0)
    second = register_challenger(store, "pair", wrong=12)
    file = tmp_path / "page.html"
    assert compare.main([first, second, "--model", "pair", "--out", str(file)]) == exit_codes.OK
    assert str(file) in capsys.readouterr().out
    page = file.read_text()
    assert "On the 600 test tiles that both were tested on" in page
    assert "12 are right only in the first, 0 only in the second" in page
    assert "<h2>12 tiles on which they differ</h2>" in page
    assert page.count("<figure>") == 12
    accuracy = page.partition("<th>accuracy</th>")[2].partition("</tr>")[0]
    assert accuracy == '<td class="n better">1.0000</td><td class="n worse">0.9800</td>'
    assert "pair 1: Forest 0.94" in page


def test_without_out_the_page_goes_to_the_reports_which_git_ignores(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = [register_challenger(store, "unnamed", wrong) for wrong in (0, 5)]
    assert compare.main([*numbers, "--model", "unnamed"]) == exit_codes.OK
    name = "reports/compared-1-2.html"
    assert capsys.readouterr().out == f"written to {name}\n"
    assert (store / name).stat().st_size > 1000
    subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=True)


def test_a_page_escapes_the_names_of_tiles(store: Path) -> None:
    frames = [make_predictions(range(50), wrong) for wrong in (0, 5)]
    for frame in frames:
        frame["tile"] = "<script>alert(1)</script>"
    numbers = [register.register(make_run(store, frame), "named", "challenger") for frame in frames]
    page = compare.render_page(*(versions.get("named", number) for number in numbers))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_versions_without_common_test_tiles_are_not_compared(store: Path) -> None:
    numbers = [
        register_challenger(store, "apart", 0, tiles) for tiles in (range(10), range(100, 110))
    ]
    with pytest.raises(ModelError, match="no tile in common"):
        compare.render_page(*(versions.get("apart", number) for number in numbers))
