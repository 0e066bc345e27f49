"""crc32c checksums in Base64, big-endian, as Google's API gives them."""

import base64
from pathlib import Path
from typing import IO, Any

READ_BYTES = 1 << 20


def file_crc32c(file: Path) -> str:
    with file.open("rb") as stream:
        return stream_crc32c(stream)


def stream_crc32c(stream: IO[bytes]) -> str:
    """Return the checksum of what is left to read in ``stream``."""
    from google_crc32c import Checksum

    checksum = Checksum()
    for chunk in iter(lambda: stream.read(READ_BYTES), b""):
        checksum.update(chunk)
    return base64.b64encode(checksum.digest()).decode()


class ChecksumWriter:
    """Forwards writes to ``out``, and computes their size and crc32c."""

    def __init__(self, out: Any) -> None:
        from google_crc32c import Checksum

        self._out, self._checksum, self.size = out, Checksum(), 0

    def write(self, data: bytes) -> int:
        self._out.write(data)
        self._checksum.update(data)
        self.size += len(data)
        return len(data)

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self._checksum.digest()).decode()
