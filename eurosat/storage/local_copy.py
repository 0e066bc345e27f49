"""Local copies of objects: download what is missing or changed, and nothing else."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from eurosat.storage.folder import FolderStore, disk_errors
from eurosat.storage.object_store import WORKERS, ObjectInfo, ObjectStore
from eurosat.storage.partial import UNFINISHED


def mirror(store: ObjectStore, folder: Path, suffixes: tuple[str, ...] = ()) -> int:
    """Make ``folder`` hold the files of ``store`` (those with ``suffixes``), and no others.

    Returns the number of files that were downloaded: a file with the right checksum is kept.
    """
    with _exclusive(folder):
        objects = [
            info
            for info in store.list_objects()
            if not suffixes or PurePosixPath(info.key).suffix.lower() in suffixes
        ]
        local = FolderStore(folder)
        expected = {info.key for info in objects}
        for info in local.list_objects():
            if info.key not in expected:
                local.delete(info.key)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)  # its last file may have been deleted
        downloaded = _fetch(store, objects, folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of objects overwritten since
    return downloaded


def fetch(store: ObjectStore, objects: Sequence[ObjectInfo], folder: Path) -> int:
    """Download the objects whose copy in ``folder`` is missing or has another checksum.

    Returns the number of files that were downloaded.
    """
    with _exclusive(folder):
        return _fetch(store, objects, folder)


def _fetch(store: ObjectStore, objects: Sequence[ObjectInfo], folder: Path) -> int:
    local = FolderStore(folder)

    def is_current(info: ObjectInfo) -> bool:
        copy = local.find(info.key)
        return (
            copy is not None
            and copy.size == info.size
            and local.checksum(copy) == store.checksum(info)
        )

    with ThreadPoolExecutor(WORKERS) as pool:
        current = list(pool.map(is_current, objects))
    changed = [info for info, is_same in zip(objects, current, strict=True) if not is_same]
    store.download(changed, folder)
    return len(changed)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Create the folder and let one process at a time fill it; the others wait."""
    from filelock import FileLock

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield
