"""docs/testing.md names, for each promise, tests that exist in the target that it says."""

import re

from tests.support.paths import ROOT

NAMED = re.compile(r"`(docker: )?(test_\w+)`")


def marks_by_test() -> dict[str, str]:
    """Return the decorators of every test, and the marks of its module."""
    found = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        text = file.read_text()
        module_marks = "".join(re.findall(r"^pytestmark = .*$", text, re.MULTILINE))
        for decorators, name in re.findall(
            r"((?:^@[^\n]*\n(?:^[ )\]][^\n]*\n)*)*)^def (test_\w+)", text, re.M
        ):
            found[name] = module_marks + decorators
    return found


def test_every_promise_names_a_short_test_and_its_long_forms_exist() -> None:
    marks = marks_by_test()
    rows = [
        line.strip("| ").split(" | ")
        for line in (ROOT / "docs" / "testing.md").read_text().splitlines()
        if NAMED.search(line)
    ]
    assert len(rows) >= 20
    for promise, short, *long in rows:
        names = NAMED.findall(short)
        assert names, f"{promise}: no short form"
        for docker, name in names:
            assert name in marks, f"{promise}: {name} does not exist"
            is_only_slow = re.search(r"^@pytest\.mark\.(slow|docker)\b", marks[name], re.MULTILINE)
            assert not docker, promise
            assert not is_only_slow, f"{promise}: {name} is not in make test"
        for docker, name in NAMED.findall(" ".join(long)):
            assert name in marks, f"{promise}: {name} does not exist"
            expected = "docker" if docker else "slow"
            assert f"mark.{expected}" in marks[name], (
                f"{promise}: {name} is not in make test-{expected}"
            )
