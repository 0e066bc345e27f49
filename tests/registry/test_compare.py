"""Two versions on one page: their figures, chance, and the tiles on which they differ."""

from pathlib import Path

import pytest

from eurosat.errors import ModelError
from eurosat.runtime import exit_codes
from registry import compare, register, versions
from tests.support.registry import REGISTRY, challenge, make_predictions, make_run

pytestmark = REGISTRY


def test_a_page_shows_both_and_the_tiles_on_which_they_differ(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = challenge(store, "pair", wrong=0)
    other = challenge(store, "pair", wrong=12)
    file = tmp_path / "page.html"
    assert compare.main([one, other, "--model", "pair", "--out", str(file)]) == exit_codes.OK
    assert str(file) in capsys.readouterr().out
    page = file.read_text()
    assert "On the 600 test tiles that both were tested on" in page
    assert "The first alone has 12 right, the second alone 0" in page
    assert "<h2>12 tiles on which they differ</h2>" in page
    assert page.count("<figure>") == 12
    accuracy = page.partition("<th>accuracy</th>")[2].partition("</tr>")[0]
    assert accuracy == '<td class="n better">1.0000</td><td class="n worse">0.9800</td>'
    assert "pair 1: Forest 0.94" in page


def test_what_a_page_is_made_of_cannot_write_in_it(store: Path) -> None:
    frames = [make_predictions(range(50), wrong) for wrong in (0, 5)]
    for frame in frames:
        frame["tile"] = "<script>alert(1)</script>"
    numbers = [register.register(make_run(store, frame), "named", "challenger") for frame in frames]
    page = compare.page(*(versions.get("named", number) for number in numbers))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_versions_of_other_tiles_are_not_laid_side_by_side(store: Path) -> None:
    numbers = [challenge(store, "apart", 0, tiles) for tiles in (range(10), range(100, 110))]
    with pytest.raises(ModelError, match="no tile in common"):
        compare.page(*(versions.get("apart", number) for number in numbers))
