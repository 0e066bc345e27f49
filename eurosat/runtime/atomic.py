"""Atomic writes: a file is either complete or as it was before."""

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to the disk, and rename it to ``file``.

    If the process is killed or ``write`` raises, ``file`` stays as it was.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(file: Path, text: str) -> None:
    atomic_write(file, lambda stream: stream.write(text.encode()))


def atomic_write_private(file: Path, text: str) -> None:
    """Write a file that nobody else can read, not even while it is being written."""
    previous = os.umask(0o077)
    try:
        atomic_write_text(file, text)
    finally:
        os.umask(previous)
