"""Data Docs: what the page shows, and which folders may be replaced."""

import shutil
from pathlib import Path

import pytest

from eurosat.errors import ConfigError, EuroSATError
from expectations.data_docs import MARKER, DatasetSummary, check_target, publish, render_page
from expectations.verdict import ExpectationResult, Verdict

DATASET = DatasetSummary(
    source="folder",
    fingerprint="ab" * 32,
    num_tiles=3,
    reference="my district",
    near_duplicates=True,
    validated_at="2025-01-01T00:00:00+00:00",
)


def test_the_page_escapes_what_it_quotes_and_counts_the_tiles_that_it_leaves_out() -> None:
    tiles = [(f"<b>/{number}.png", "<script>alert(1)</script>") for number in range(203)]
    result = ExpectationResult(
        name="blank", description="1 < 2", success=False, observed="", tiles=tuple(tiles)
    )
    html = render_page(Verdict(results=(result,), suite=""), DATASET, [])
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;b&gt;/199.png" in html
    assert "/200.png" not in html
    assert "3 more" in html


def test_data_docs_replace_their_own_folder_and_no_other(tmp_path: Path) -> None:
    check_target(tmp_path / "new")
    check_target(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="would be lost"):
        check_target(tmp_path)
    (tmp_path / MARKER).touch()
    check_target(tmp_path)


def test_new_data_docs_replace_all_pages_of_the_old_ones(tmp_path: Path) -> None:
    site, docs = tmp_path / "site", tmp_path / "docs"
    verdict = Verdict(results=(), suite="")
    for name in ("old", "new"):
        shutil.rmtree(site, ignore_errors=True)
        (site / "validations").mkdir(parents=True)
        (site / "validations" / f"{name}.html").write_text(name)
        publish(docs, verdict, DATASET, site)
    assert [page.name for page in docs.rglob("*.html") if page.name != "index.html"] == ["new.html"]
    assert {path.name for path in tmp_path.iterdir()} == {"site", "docs"}
    check_target(docs)


def test_data_docs_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    docs = publish(tmp_path / "docs", Verdict(results=(), suite=""), DATASET, tmp_path).parent
    before = (docs / "index.html").read_text()
    broken = tmp_path / "site"
    broken.mkdir()
    (broken / "page.html").symlink_to(broken / "missing")
    with pytest.raises(EuroSATError, match="page.html"):
        publish(docs, Verdict(results=(), suite="changed"), DATASET, broken)
    assert (docs / "index.html").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"docs", "site"}
