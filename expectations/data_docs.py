"""Publish the Data Docs: a page of ours, and Great Expectations' own pages beside it."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eurosat.errors import ConfigError
from eurosat.runtime import templates
from eurosat.storage import disk_errors
from expectations.verdict import Verdict

MARKER = ".data_docs"
"""File that marks a folder as Data Docs of ours, which may be replaced."""
MAX_TILES_ON_PAGE = 200
"""Tiles that the page lists for each failed expectation; result.json lists all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """The facts about the data set that the page shows."""

    source: str
    fingerprint: str
    num_tiles: int
    reference: str
    """Origin of the expected class counts."""
    near_duplicates: bool
    """Whether near duplicates were searched."""
    validated_at: str
    """UTC, ISO 8601."""


def check_target(target: Path) -> None:
    """Raise ConfigError unless ``target`` is absent, empty, or contains Data Docs of ours."""
    if target.is_dir() and (not any(target.iterdir()) or (target / MARKER).is_file()):
        return
    if target.exists():
        raise ConfigError(
            f"docs={target} contains something other than Data Docs, which would be lost: name a "
            "folder that is new or empty"
        )


def publish(target: Path, verdict: Verdict, dataset: DatasetSummary, site: Path) -> Path:
    """Replace ``target`` by new Data Docs; return their index page.

    They are built in a folder beside ``target`` and renamed when they are complete. ``site``
    contains Great Expectations' own pages.

    Raises:
        ConfigError: ``target`` contains something other than Data Docs.
        StorageError: the folder cannot be written.
    """
    check_target(target)
    target = target.resolve()
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".data_docs-") as temporary:
            building = Path(temporary, "docs")
            building.mkdir()
            links = _copy_pages(site, building)
            (building / "index.html").write_text(render_page(verdict, dataset, links), "utf-8")
            (building / MARKER).write_text("expectations.validate wrote and replaces this folder\n")
            if target.exists():
                shutil.rmtree(target)
            building.rename(target)
    return target / "index.html"


def _copy_pages(site: Path, folder: Path) -> list[str]:
    """Copy the pages of ``site``; return their paths.

    Great Expectations' scripts, fonts and images are left out: `offline_view` needs none.
    """
    links = []
    for page in sorted(site.rglob("*.html")):
        link = page.relative_to(site)
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, folder / link)
        links.append(link.as_posix())
    return links


def render_page(verdict: Verdict, dataset: DatasetSummary, links: list[str]) -> str:
    """Return the page as HTML that loads nothing; ``links`` are Great Expectations' pages."""
    return templates.render(
        "expectations",
        "validation.html",
        verdict=verdict,
        dataset=dataset,
        failed=[result for result in verdict.results if not result.success],
        passed=[result for result in verdict.results if result.success],
        max_tiles=MAX_TILES_ON_PAGE,
        links=links,
    )
