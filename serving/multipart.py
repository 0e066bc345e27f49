"""Read the files of a multipart form (RFC 7578) whose whole body is in memory."""

import re

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

MAX_BOUNDARY_LENGTH = 70
"""RFC 2046, section 5.1.1."""
MAX_PARTS = 1000
MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 4096
"""Size of one header of a part."""
FILENAME = re.compile(rb";\s*filename\*?=", re.IGNORECASE)


class MalformedForm(ValueError):
    """The body is not a multipart form; the message never quotes the body."""


def read_files(content_type: str, body: bytes) -> list[bytes]:
    """Return the contents of the parts that have a filename, in order.

    The time is bounded by the size of ``body``, whatever it holds: the parser visits single bytes
    only at a boundary, in the headers of a part, and in spaces after a boundary.

    Raises:
        MalformedForm: the body is not a complete form, or exceeds a limit of this module.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_BOUNDARY_LENGTH:
        raise MalformedForm(f"the boundary must have 1 to {MAX_BOUNDARY_LENGTH} characters")
    delimiter = b"\r\n--" + boundary
    if body.count(delimiter) > MAX_PARTS:
        raise MalformedForm(f"over {MAX_PARTS} parts")
    if delimiter + b" " in body or delimiter + b"\t" in body:
        raise MalformedForm("spaces after a boundary")
    collector = _FileCollector()
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": collector.on_part_begin,
            "on_header_field": collector.on_header_field,
            "on_header_value": collector.on_header_value,
            "on_headers_finished": collector.on_headers_finished,
            "on_part_data": collector.on_part_data,
            "on_part_end": collector.on_part_end,
            "on_end": collector.on_end,
        },
        max_header_count=MAX_PART_HEADERS,
        max_header_size=MAX_PART_HEADER_BYTES,
    )
    try:
        parser.write(body)
    except FormParserError as error:
        raise MalformedForm("a boundary or a part's headers are malformed") from error
    if not collector.complete:
        raise MalformedForm("the closing boundary is missing")
    return collector.files


class _FileCollector:
    """Callbacks of the parser."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.complete = False
        self._header_name = b""
        self._disposition = b""
        self._is_file = False
        self._chunks: list[bytes] = []

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._chunks = []

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name = data[start:end].lower()

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header_name == b"content-disposition":
            if self._disposition:
                raise MalformedForm("a part has two Content-Disposition headers")
            self._disposition = data[start:end]

    def on_headers_finished(self) -> None:
        self._is_file = FILENAME.search(self._disposition) is not None

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._chunks.append(data[start:end])

    def on_part_end(self) -> None:
        if self._is_file:
            self.files.append(b"".join(self._chunks))

    def on_end(self) -> None:
        self.complete = True
