"""The cache folder of this machine, and the removal of what is not used any more."""

import contextlib
import os
import shutil
import time
from pathlib import Path

MAX_AGE_DAYS = 14
"""Age at which unused files are removed: checkpoints of interrupted trainings, outputs of
teachers, journals that are completely uploaded."""


def cache_root() -> Path:
    """Return EUROSAT_CACHE or ~/.cache/eurosat: the folder of packs, checkpoints and journals."""
    return Path(os.environ.get("EUROSAT_CACHE") or "~/.cache/eurosat").expanduser()


def prune_expired(root: Path) -> None:
    """Remove the files and folders in ``root`` that did not change for `MAX_AGE_DAYS`."""
    for path in list(root.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # another process removed it first
            if time.time() - path.stat().st_mtime > MAX_AGE_DAYS * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
