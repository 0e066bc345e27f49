"""Files that are whole, whatever happens while they are written, until nobody asks for them."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from eurosat.config import KEPT_DAYS


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


def forget(root: Path) -> None:
    """Remove what stands in ``root`` and was not touched for `KEPT_DAYS`."""
    for path in list(root.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
