"""Write the tables of README.md and docs/benchmarks.md from the committed reports.

`python -m benchmarks.tables` writes all of them, `python -m benchmarks.tables bench-serving` those
made from that report. A report that was measured on uncommitted code is refused.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import drawings, measured_code
from benchmarks.reports import REPORTS, ROOT
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """The part of a page between `<!-- NAME -->` and `<!-- /NAME -->`."""

    name: str
    reports: tuple[str, ...]
    """Names of the files in `reports/` that it is made from, without `.json`."""
    draw: Callable[..., str]
    """Takes the reports in this order, and returns Markdown."""
    marked: bool = True
    """Whether a line below says at which commits it was measured, and what has changed since."""


def _of_report(name: str, draw: Callable[[Any], str]) -> Section:
    return Section(name=name, reports=(name,), draw=draw)


SECTIONS: Mapping[Path, tuple[Section, ...]] = {
    README: (
        Section(
            name="reasons",
            reports=("results", "bench-tracking", "bench-registry", "bench-serving"),
            draw=drawings.reasons,
            marked=False,  # each reason links to a table that is
        ),
        Section(name="results", reports=("results",), draw=drawings.results_summary),
        Section(
            name="benchmarks",
            reports=("bench-serving", "bench-train", "bench-tracking", "bench-platform"),
            draw=drawings.benchmarks_summary,
        ),
    ),
    BENCHMARKS: (
        _of_report("main-job", drawings.main_job),
        _of_report("results", drawings.results),
        _of_report("studies", drawings.studies),
        _of_report("bench-train", drawings.bench_train),
        _of_report("bench-convolutions", drawings.bench_convolutions),
        _of_report("bench-tracking", drawings.bench_tracking),
        _of_report("bench-sweep", drawings.bench_sweep),
        _of_report("bench-serving", drawings.bench_serving),
        _of_report("bench-overload", drawings.bench_overload),
        _of_report("bench-precisions", drawings.bench_precisions),
        _of_report("bench-registry", drawings.bench_registry),
        _of_report("bench-platform", drawings.bench_platform),
        _of_report("verdict", drawings.verdict),
    ),
}
"""Each page with tables from reports, and its sections."""


def load(name: str) -> Any:
    """Return the report `reports/NAME.json`.

    Raises:
        ConfigError: the file is missing.
    """
    file = REPORTS / f"{name}.json"
    if not file.exists():
        raise ConfigError(f"{file} is missing: run the benchmark that writes it")
    return json.loads(file.read_text())


def rewrite(page: Path, text: str, only: Sequence[str] = ()) -> str:
    """Return ``text`` of ``page`` with its sections drawn from the reports.

    Args:
        page: a key of ``SECTIONS``.
        text: its contents.
        only: reports; sections that are made from none of them stay. Empty: draw every section.
    """
    for section in SECTIONS[page]:
        if only and not {*only} & {*section.reports}:
            continue
        reports = {name: load(name) for name in section.reports}
        body = section.draw(*reports.values())
        if section.marked and (mark := _mark(reports)):
            body = f"{body}\n\n*{mark}*"
        begin, end = f"<!-- {section.name} -->", f"<!-- /{section.name} -->"
        before, opening, rest = text.partition(begin)
        _, closing, after = rest.partition(end)
        if not (opening and closing):
            raise ConfigError(f"{page.name} lacks the markers {begin} and {end}: add both")
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def _mark(reports: Mapping[str, Any]) -> str:
    """Return the commits of the reports, and what has changed since; empty if none names one."""
    with_commit = {name: report for name, report in reports.items() if name != "verdict"}
    if len(with_commit) == 1:
        return measured_code.mark(*next(iter(with_commit.items())))
    return measured_code.mark_all(with_commit) if with_commit else ""


def without_changes(text: str) -> str:
    """Return the text of a page without what its marks say of the changes since.

    The rest is the same in every clone, also in a shallow one and without git.
    """
    return re.sub(r"^(\*Measured at [^;*]*);[^*]*\*$", r"\1.*", text, flags=re.MULTILINE)


def refusals(names: Sequence[str]) -> list[str]:
    """Return one line for each report that was measured on uncommitted code."""
    return [
        f"reports/{name}.json was measured on uncommitted code ({', '.join(commits)}): "
        "commit, then run its benchmark again"
        for name in names
        if (commits := measured_code.uncommitted(load(name)))
    ]


def main(argv: Sequence[str]) -> int:
    every = list(
        dict.fromkeys(name for page in SECTIONS.values() for s in page for name in s.reports)
    )
    parser = cli.parser(
        "benchmarks.tables", "Write the tables of README.md and docs/benchmarks.md."
    )
    parser.add_argument(
        "reports", nargs="*", metavar="REPORT", help="draw only what is made from these reports"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if unknown := [name for name in args.reports if name not in every]:
        raise ConfigError(f"no table is made from {', '.join(unknown)}: choose {', '.join(every)}")
    if lines := refusals(args.reports or every):
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        return exit_codes.BAD_INPUT
    for page in SECTIONS:
        page.write_text(rewrite(page, page.read_text(), args.reports))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
