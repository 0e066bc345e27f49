"""Distribute the tests over the workers of pytest-xdist: a file is run by one worker."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

PLATFORM = "platform"
TOGETHER = {
    "tests/deploy/test_platform.py": PLATFORM,
    "tests/deploy/test_proxy.py": PLATFORM,
    "tests/deploy/test_security.py": PLATFORM,
}
"""Files that share a fixture which takes long to make: one worker runs them all."""
LONGEST_FIRST = (
    PLATFORM,
    "tests/e2e/test_e2e_main_job.py",
    "tests/experiments/test_sweep.py",
    "tests/eurosat/tracking/test_journal.py",
    "tests/registry/test_ledger.py",
    "tests/deploy/test_backup.py",
    "tests/docs/test_tutorial.py",
    "tests/eurosat/training/test_launch.py",
    "tests/serving/test_bad_input.py",
    "tests/serving/test_parity.py",
)
"""The files, or groups of them, that take longest: one that began last would end alone."""


def scope_of(nodeid: str) -> str:
    """Return the file of a test, or the group of files that belong together."""
    file = nodeid.split("::", 1)[0]
    return TOGETHER.get(file, file)


def sort_longest_first(items: list[pytest.Item]) -> None:
    """Move the tests of the longest files to the front, in the order of `LONGEST_FIRST`."""
    rank = {scope: number for number, scope in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(scope_of(item.nodeid), len(rank)))


class FileScheduling(LoadFileScheduling):
    """Gives files to workers in the order of collection."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)
