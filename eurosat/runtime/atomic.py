"""Files that are whole, whatever happens while they are written, until nobody asks for them."""

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside, force it to the disk, and put it in place by one rename.

    A process that is killed, or whatever ``write`` raises, leaves ``file`` as it was.
    """
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def atomic_write_text(file: Path, text: str) -> None:
    atomic_write(file, lambda opened: opened.write(text.encode()))
