"""The cache of this machine: where it stands, and how long it keeps what nobody uses."""

import contextlib
import os
import shutil
import time
from pathlib import Path

MAX_AGE_DAYS = 14
"""What nobody came back for is removed from the cache after so long: states of trainings that
were cut short, what teachers have told, journals that wait for nothing."""


def cache_root() -> Path:
    """EUROSAT_CACHE, or ~/.cache/eurosat: where this machine keeps packs, states and journals."""
    return Path(os.environ.get("EUROSAT_CACHE") or "~/.cache/eurosat").expanduser()


def prune_expired(root: Path) -> None:
    """Remove what stands in ``root`` and was not touched for `MAX_AGE_DAYS`."""
    for path in list(root.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - path.stat().st_mtime > MAX_AGE_DAYS * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
