"""Checks of this machine: interpreter, packages, processors, tiles, disk, secrets."""

import hashlib
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

from eurosat.data import sources
from eurosat.doctor.checks import Failed, NotApplicable
from eurosat.doctor.context import Visit
from eurosat.errors import DataError
from eurosat.runtime import env_file, hardware
from eurosat.runtime.cache import cache_root
from eurosat.storage.store import is_bucket

PYTHON = (3, 11)
"""Of pyproject.toml: the lock is compiled for it."""
SETUP = "install what is pinned: `make setup`"
SECRETS = "EUROSAT_SECRETS"
ROOT = "EUROSAT_ROOT"
EUROSAT_CLASSES = {
    "AnnualCrop": 3000,
    "Forest": 3000,
    "HerbaceousVegetation": 3000,
    "Highway": 2500,
    "Industrial": 2500,
    "Pasture": 2000,
    "PermanentCrop": 2500,
    "Residential": 3000,
    "River": 2500,
    "SeaLake": 3000,
}
"""Tiles of each class, Helber et al. 2019."""
EUROSAT_RGB = "8c2d76c5506ab263f3fff7333cc7c84fa844266b697e4da0b711ddc8cf39675f"
"""Fingerprint of the genuine 27,000 RGB tiles, whatever archive they lie in."""
OTHERS = 0o077
"""Bits of a mode that let anyone but the owner in."""
MOST_NAMED = 3


def python(visit: Visit) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != PYTHON:
        raise Failed(
            f"Python {version}, not {'.'.join(map(str, PYTHON))}", "`make setup PYTHON=python3.11`"
        )
    return f"Python {version} at {sys.executable}"


def lock(visit: Visit) -> str:
    """What is installed against the lock of the checkout."""
    from packaging.requirements import Requirement

    if not visit.lock.exists():
        raise NotApplicable(f"no {visit.lock.name} beside this package: it is not in a checkout")
    wanted = [Requirement(line) for line in re.findall(r"^\w[^\\#]*", visit.lock.read_text(), re.M)]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    differ = []
    for one in wanted:
        try:
            installed = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed == "missing" or not one.specifier.contains(installed, prereleases=True):
            differ.append(f"{one.name} {installed}, not {str(one.specifier)[2:]}")
    if differ:
        raise Failed(f"{len(differ)} of {len(wanted)} packages differ: {_few(differ)}", SETUP)
    return f"the {len(wanted)} packages of {visit.lock.name}"


def torch_pair(visit: Visit) -> str:
    """The operators of torchvision are compiled against one release and build of torch."""
    try:
        import torch
        import torchvision

        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        versions = " with ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision"))
        raise Failed(
            f"{versions}: {error}", f"{SETUP} (both come from one index, as wheels of one build)"
        ) from error
    assert kept.tolist() == [0]
    return f"torch {torch.__version__} with torchvision {torchvision.__version__}"


def cores(visit: Visit) -> str:
    """As many threads as cores: more of them wait for each other."""
    import torch

    have, threads = hardware.cores(), torch.get_num_threads()
    quota = cpu_quota()
    usable = min(have, math.ceil(quota)) if quota else have
    told = f"{usable} cores, {threads} threads of torch"
    if threads > usable:
        why = f" (a quota of {quota:g} of {have} cores)" if quota and quota < have else ""
        raise Failed(told + why, f"set OMP_NUM_THREADS={usable} and trainer.threads={usable}")
    return told


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the container has; None where nothing limits it."""
    try:
        quota, period = (root / "cpu.max").read_text().split()  # cgroup v2
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def gpu(visit: Visit) -> str:
    """It multiplies as the CPU does."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists():
            raise Failed(
                f"this machine has an NVIDIA driver, and torch {torch.__version__} cannot use it",
                "compare `nvidia-smi`'s CUDA version with torch.version.cuda, and look at "
                "CUDA_VISIBLE_DEVICES",
            )
        raise NotApplicable("no GPU: networks train and answer on the CPU")
    square = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64) / 4096
    if not torch.allclose(square @ square, (square.cuda() @ square.cuda()).cpu(), rtol=1e-2):
        raise Failed(
            "the GPU multiplies otherwise than the CPU", "test its memory, or leave it out"
        )
    free, total = (each / 2**30 for each in torch.cuda.mem_get_info())
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free"


def tiles(visit: Visit) -> str:
    """Read as files, every byte against its checksum; nothing is decoded or packed."""
    from eurosat.data.pack import dataset_fingerprint
    from eurosat.runtime.progress import track

    if not (root := visit.environ.get(ROOT)):
        raise NotApplicable(f"{ROOT} is not set: data=eurosat downloads its tiles when first used")
    if is_bucket(root):
        raise NotApplicable(f"{ROOT} is a bucket: verbs compare each tile that they bring from it")
    remedy = f"let {ROOT} name whole tiles, or unset it to have them downloaded"
    try:
        place = sources.find_eurosat(Path(root).expanduser())
        source = sources.open_place(place, "eurosat")
        paths = source.paths
        digests = [
            hashlib.sha256(source.read(path)).hexdigest()
            for path in track(paths, len(paths), "reading tiles", "tiles")
        ]
    except DataError as error:
        raise Failed(str(error), remedy) from error
    counts = Counter(path.split("/")[0] for path in paths)
    fingerprint = dataset_fingerprint(list(paths), digests)
    told = f"{len(paths):,} tiles of {len(counts)} classes in {place}, {fingerprint[:12]}"
    if wrong := [
        f"{name} {counts[name]}, not {EUROSAT_CLASSES.get(name, 0)}"
        for name in sorted({*counts, *EUROSAT_CLASSES})
        if counts[name] != EUROSAT_CLASSES.get(name, 0)
    ]:
        raise Failed(f"{told}: {_few(wrong)}", remedy)
    if fingerprint == EUROSAT_RGB:
        return f"{told}: the genuine ones"
    if all(path.endswith((".tif", ".tiff")) for path in paths):
        return f"{told}: of thirteen bands no fingerprint is known to compare with"
    raise Failed(f"{told}, not {EUROSAT_RGB[:12]}: some tiles were changed", remedy)


def disk(visit: Visit) -> str:
    """Room where packs, journals, runs and temporary files are written."""
    places = {
        "EUROSAT_CACHE": cache_root(),
        "here": visit.folder,
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    free, least = {}, visit.free_gb
    for name, folder in places.items():
        there = next(one for one in (folder, *folder.parents) if one.exists())
        free[f"{name} ({folder})"] = shutil.disk_usage(there).free / 1e9
    if short := [f"{name} has {gb:.1f} GB free" for name, gb in free.items() if gb < least]:
        raise Failed(
            f"{_few(short)}, {least:g} are wanted",
            "make room (`make clean` removes what runs left here), or name another disk",
        )
    return f"{min(free.values()):.1f} GB free or more, {least:g} are wanted"


def secrets(visit: Visit) -> str:
    """Nobody else can read the files of passwords: they are closed, or the folder they lie in."""
    env, named = visit.folder / env_file.FILE, visit.environ.get(SECRETS)
    files, closed = [env] if env.exists() else [], False
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise Failed(f"{SECRETS}={named} is no folder", f"`make platform`, or unset {SECRETS}")
        closed = not folder.stat().st_mode & OTHERS
        files += sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise NotApplicable(f"no {env_file.FILE} here, and {SECRETS} is not set or is empty")
    modes = {file: file.stat().st_mode & 0o777 for file in files if file == env or not closed}
    if wide := {file: mode for file, mode in modes.items() if mode & OTHERS}:
        told = [f"{file} has mode {mode:o}" for file, mode in wide.items()]
        raise Failed(
            f"{_few(told)}: others of this machine can read it, 600 is wanted",
            f"chmod 600 {shlex.join(map(str, wide))}",
        )
    if foreign := [file for file in files if file.stat().st_uid != os.geteuid()]:
        told = [f"{file} is owned by user {file.stat().st_uid}" for file in foreign]
        raise Failed(
            f"{_few(told)}; they should be yours",
            f"chown {os.geteuid()} {shlex.join(map(str, foreign))}",
        )
    return f"{len(files)} files, their owner's alone"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(missing)"


def _few(faults: list[str]) -> str:
    more = len(faults) - MOST_NAMED
    return "; ".join(faults[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
