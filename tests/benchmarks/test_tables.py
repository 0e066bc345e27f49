"""The tables of the README."""

from benchmarks import tables
from tests.support.paths import ROOT


def test_the_tables_of_the_readme_are_those_of_the_reports() -> None:
    readme = (ROOT / "README.md").read_text()
    assert tables.rewrite(readme) == readme, "run `python -m benchmarks.tables`"
