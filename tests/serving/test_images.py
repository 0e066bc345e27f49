"""The reason in an error response, as the client prints it."""

import pytest

from serving.client import error_reason


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"message": "Failed to predict data \'x\'. \\nError: row 0: no"}', "row 0: no"),
        ('{"message": "no echo"}', "no echo"),
        ("not JSON", "not JSON"),
        ("[]", "[]"),
    ],
)
def test_the_reason_is_what_follows_the_copy_of_the_request(body: str, expected: str) -> None:
    assert error_reason(body) == (expected, None)


def test_the_reason_names_the_tile_if_its_name_is_known() -> None:
    body = '{"message": "x \\nError: row 1: too large"}'
    assert error_reason(body, ["a.png", "b.png"]) == ("b.png: too large", "b.png")
    assert error_reason(body, ["a.png"]) == ("row 1: too large", None)
