"""Which code each report in `reports/` measured, at which commit, and whether it changed since."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.reports import ROOT

TRAINING = ("eurosat/conf", "eurosat/data", "eurosat/models", "eurosat/training")
MEASURED_CODE: Mapping[str, tuple[str, ...]] = {
    "main-job": ("eurosat", "expectations", "experiments", "registry", "serving"),
    "results": (*TRAINING, "eurosat/evaluation", "eurosat/train.py"),
    "studies": (*TRAINING, "eurosat/evaluation", "eurosat/train.py"),
    "bench-train": TRAINING,
    "bench-convolutions": ("eurosat/models/cpu_convolutions.py",),
    "bench-tracking": ("eurosat/tracking",),
    "bench-sweep": (*TRAINING, "experiments"),
    "bench-serving": ("serving",),
    "bench-overload": ("serving",),
    "bench-precisions": ("eurosat/models",),
    "bench-registry": ("registry", "serving"),
    "bench-platform": ("eurosat/tracking", "deploy"),
}
"""Each report that names commits -> the files and folders that it measures."""

DIRTY = "-dirty"
UNKNOWN = "unknown"
"""Suffix and value that `eurosat.tracking.code_commit` writes where no commit holds the code."""
SHORT = 7
"""Digits of a commit that a page shows."""


def commits(report: Any) -> list[str]:
    """Return the commits that a report names, at whatever depth, each once, in their order."""
    if isinstance(report, Mapping):
        names = [report["commit"]] if "commit" in report else []
        names += commits([value for key, value in report.items() if key != "commit"])
    elif isinstance(report, list):
        names = [name for value in report for name in commits(value)]
    else:
        names = []
    return list(dict.fromkeys(names))


def uncommitted(report: Any) -> list[str]:
    """Return the commits of a report that do not hold the code that it measured."""
    return [name for name in commits(report) if name.endswith(DIRTY) or name == UNKNOWN]


def changed_paths(commit: str, paths: Iterable[str]) -> list[str] | None:
    """Return the paths that differ from ``commit``; None if the repository does not know it."""
    commit = commit.removesuffix(DIRTY)
    if _git("cat-file", "-e", f"{commit}^{{commit}}"):
        return None
    return [path for path in paths if _git("diff", "--quiet", commit, "--", path)]


def mark(name: str, report: Any) -> str:
    """Return where a report was measured and, after a semicolon, what has changed since.

    The part before the semicolon depends on the report alone, the rest on this repository.
    """
    measured_at = f"Measured at {_in_words(report)}"
    changes = [changed_paths(commit, MEASURED_CODE[name]) for commit in commits(report)]
    if None in changes:
        return f"{measured_at}; unknown commit."
    changed = {path for paths in changes for path in paths or ()}
    if not changed:
        return f"{measured_at}."
    paths = [path for path in MEASURED_CODE[name] if path in changed]
    return f"{measured_at}; {', '.join(paths)} {_have(paths)} changed since."


def mark_all(reports: Mapping[str, Any]) -> str:
    """Return the mark of a table that is made from several reports."""
    measured_at = ", ".join(f"{_in_words(report)} ({name})" for name, report in reports.items())
    since = {name: mark(name, report).partition("; ")[2] for name, report in reports.items()}
    unknown = [name for name, change in since.items() if change.startswith(UNKNOWN)]
    changed = [name for name, change in since.items() if change and name not in unknown]
    parts = [f"Measured at {measured_at}"]
    if changed:
        parts.append(f"the code of {', '.join(changed)} has changed since")
    if unknown:
        parts.append(f"unknown commit of {', '.join(unknown)}")
    return f"{'; '.join(parts)}."


def _in_words(report: Any) -> str:
    names = [name.removesuffix(DIRTY)[:SHORT] for name in commits(report)]
    return f"{', '.join(names)}{' with uncommitted changes' if uncommitted(report) else ''}"


def _have(paths: Sequence[str]) -> str:
    return "has" if len(paths) == 1 else "have"


def _git(*command: str) -> int:
    """Return git's exit status; 127 if git is missing."""
    try:
        process = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, check=False)
    except OSError:
        return 127
    return process.returncode
