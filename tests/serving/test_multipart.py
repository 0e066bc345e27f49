"""Multipart forms, parsed from memory."""

import pytest
import requests

from serving.multipart import (
    MAX_PART_HEADER_BYTES,
    MAX_PART_HEADERS,
    MAX_PARTS,
    MalformedForm,
    read_files,
)

CONTENT_TYPE = "multipart/form-data; boundary=edge"
HEADER = b'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\n'


def form(*parts: bytes, end: bytes = b"--edge--\r\n") -> bytes:
    """Return a form of parts, each of which has its headers, an empty line and its data."""
    return b"".join(b"--edge\r\n" + part + b"\r\n" for part in parts) + end


def part(data: bytes, header: bytes = HEADER) -> bytes:
    return header + b"\r\n" + data


@pytest.mark.parametrize("count", [1, 2, 32])
def test_the_files_of_a_client_are_returned_in_order(count: int) -> None:
    contents = [bytes([number]) * number * 100 for number in range(count)]
    files = [("files", (f"é {number}.jpg", data)) for number, data in enumerate(contents)]
    sent = requests.Request("POST", "http://localhost", files=files, data={"field": "x"}).prepare()
    assert isinstance(sent.body, bytes)
    assert read_files(sent.headers["content-type"], sent.body) == contents


def test_a_file_may_hold_line_ends_and_parts_of_a_boundary() -> None:
    for data in (b"", b"\r\n", b"\r\n--edg", b"--edge", b"\r\n--edge\r", b"\r\n--edge-x"):
        assert read_files(CONTENT_TYPE, form(part(data), part(b"next"))) == [data, b"next"]


def test_only_parts_with_a_filename_are_files() -> None:
    field = part(b"x", b'Content-Disposition: form-data; name="file"\r\n')
    encoded = part(b"y", b"content-disposition: form-data; name=f; filename*=UTF-8''%C3%A9\r\n")
    assert read_files(CONTENT_TYPE, form(field, encoded, part(b"z", b""))) == [b"y"]


def test_the_boundary_may_be_quoted() -> None:
    body = form(part(b"x"))
    assert read_files('multipart/form-data; charset=utf-8; boundary="edge"', body) == [b"x"]


def test_as_many_parts_as_allowed_are_read() -> None:
    assert len(read_files(CONTENT_TYPE, form(*[part(b"x")] * MAX_PARTS))) == MAX_PARTS


LONG_HEADER = b"X: " + b"x" * MAX_PART_HEADER_BYTES + b"\r\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "closing boundary is missing"),
        (form(part(b"x"), end=b""), "closing boundary is missing"),
        (form(part(b"x"), end=b"--edge-"), "closing boundary is missing"),
        (form(part(b"x"))[:60], "closing boundary is missing"),
        (b"text" + form(part(b"x")), "malformed"),
        (form(part(b"x", b"no header\r\n")), "malformed"),
        (form(part(b"x", b"X: x\r\n" * MAX_PART_HEADERS + HEADER)), "malformed"),
        (form(part(b"x", LONG_HEADER + HEADER)), "malformed"),
        (form(part(b"x", HEADER * 2)), "two Content-Disposition headers"),
        (form(*[part(b"x")] * (MAX_PARTS + 1)), f"over {MAX_PARTS} parts"),
        (form(part(b"\r\n--edgeX" * (MAX_PARTS + 1))), f"over {MAX_PARTS} parts"),
        (form(part(b"x"), end=b"--edge" + b" " * 9999), "spaces after a boundary"),
        (form(part(b"x"), end=b"--edge\t--"), "spaces after a boundary"),
    ],
)
def test_malformed_forms_are_rejected_in_plain_words(body: bytes, message: str) -> None:
    with pytest.raises(MalformedForm, match=message):
        read_files(CONTENT_TYPE, body)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 71])
def test_a_boundary_has_1_to_70_characters(boundary: str) -> None:
    with pytest.raises(MalformedForm, match="the boundary must have 1 to 70 characters"):
        read_files(f"multipart/form-data{boundary}", form(part(b"x")))
