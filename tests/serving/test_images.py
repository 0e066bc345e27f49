"""Tiles as files, good and bad, for the tests of serving."""

import pytest

from serving.client import reason


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"message": "Failed to predict data \'x\'. \\nError: row 0: no"}', "row 0: no"),
        ('{"message": "no echo"}', "no echo"),
        ("not JSON", "not JSON"),
        ("[]", "[]"),
    ],
)
def test_the_reason_is_what_follows_the_echo(body: str, expected: str) -> None:
    assert reason(body) == expected


def test_the_reason_names_the_tile_where_it_is_known() -> None:
    body = '{"message": "x \\nError: row 1: too large"}'
    assert reason(body, ["a.png", "b.png"]) == "b.png: too large"
    assert reason(body, ["a.png"]) == "row 1: too large"
