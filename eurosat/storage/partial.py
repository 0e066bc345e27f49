"""Downloads in chunks that survive the process: the next one fetches only what is missing."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eurosat.errors import StorageError
from eurosat.storage.checksums import file_crc32c
from eurosat.storage.folder import FolderStore
from eurosat.storage.object_store import ObjectInfo

UNFINISHED = ".unfinished"
"""Subfolder of the download folder that holds unfinished objects."""


class PartialDownload:
    """One object that arrives in chunks, and a record of the chunks that are complete."""

    def __init__(self, folder: Path, info: ObjectInfo, chunk_bytes: int) -> None:
        name = hashlib.sha256(f"{info.key} {info.generation}".encode()).hexdigest()[:32]
        self._file = folder / UNFINISHED / name
        self._record = self._file.with_suffix(".pieces")
        self._info, self._chunk_bytes = info, chunk_bytes
        self._target = FolderStore(folder).file(info.key)

    def missing(self) -> list[int]:
        """Return the byte offsets of the chunks that are still to be fetched."""
        complete: set[str] = set()
        if self._info.generation and self._file.exists() and self._record.exists():
            complete = set(self._record.read_text().split())
        offsets = range(0, self._info.size or 1, self._chunk_bytes)
        return [offset for offset in offsets if str(offset) not in complete]

    def open(self, advance: Callable[[int], None]) -> "ProgressFile":
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return ProgressFile(self._file, "r+", advance)

    def mark_complete(self, offset: int) -> None:
        if self._info.size > self._chunk_bytes:
            with self._record.open("a") as record:
                record.write(f"{offset}\n")

    def finish(self, url: str) -> None:
        """Verify the checksum and move the file into place.

        Raises:
            StorageError: the checksum differs; what was downloaded is deleted.
        """
        self.open(lambda _: None).close()  # creates the file of an empty object
        actual = file_crc32c(self._file)
        self._record.unlink(missing_ok=True)
        if actual != self._info.crc32c:
            self._file.unlink()
            raise StorageError(
                f"{url} came with crc32c {actual}, and the bucket says {self._info.crc32c}: "
                "run the command again; if it happens again, upload the file anew"
            )
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file.replace(self._target)


class ProgressFile(io.FileIO):
    """An unbuffered file that reports how many bytes are read and written.

    With a mode that has ``+`` it is created where it is missing.
    """

    def __init__(self, file: Path, mode: str, advance: Callable[[int], None]) -> None:
        extra = os.O_CREAT if "+" in mode else 0
        super().__init__(file, mode, opener=lambda name, flags: os.open(name, flags | extra, 0o666))
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._advance(len(data))
        return data

    def write(self, chunk: Any, /) -> int:
        remaining = memoryview(chunk)
        while remaining:
            remaining = remaining[super().write(remaining) or 0 :]
        self._advance(len(chunk))
        return len(chunk)
