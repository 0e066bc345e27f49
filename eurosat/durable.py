"""Files that are whole, whatever happens while they are written."""

import os
from pathlib import Path


def replace(file: Path, data: bytes) -> None:
    """Write ``data`` beside ``file``, force it to the disk, and put it in its place by one rename.

    A process that is killed, or a full disk (OSError), leaves the file as it was.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
