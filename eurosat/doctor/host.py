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
from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Failed, NotApplicable
from eurosat.errors import DataError
from eurosat.runtime import env_file, hardware
from eurosat.runtime.cache import cache_root
from eurosat.storage import is_bucket

PYTHONS = ((3, 11), (3, 12), (3, 13))
"""The version in pyproject.toml, for which the lock is compiled."""
SETUP = "install the pinned packages: `make setup`"
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
"""Fingerprint of the genuine 27,000 RGB tiles, in whatever archive."""
GROUP_AND_OTHERS = 0o077
"""Bits of a file's mode that give access to anyone but the owner."""
MAX_LISTED = 3
"""How many faults a message lists before "and N more"."""


def python(context: DoctorContext) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] not in PYTHONS:
        supported = ", ".join(".".join(map(str, python)) for python in PYTHONS)
        raise Failed(
            f"Python {version} is none of {supported}", "remove .venv, then run `make setup`"
        )
    return f"Python {version} at {sys.executable}"


def lock(context: DoctorContext) -> str:
    """Compare the installed packages with the lock of the checkout."""
    from packaging.requirements import Requirement

    file = context.lock_file
    if not file.exists():
        raise NotApplicable(f"no {file.name} beside this package: it is not in a checkout")
    lines = re.findall(r"^\w[^\\#]*", file.read_text(), re.M)
    pinned = [Requirement(line) for line in lines]
    pinned = [package for package in pinned if not package.marker or package.marker.evaluate()]
    faults = []
    for package in pinned:
        installed = _installed_version(package.name)
        if installed is None or not package.specifier.contains(installed, prereleases=True):
            expected = str(package.specifier).removeprefix("==")
            faults.append(f"{package.name} {installed or 'missing'}, not {expected}")
    if faults:
        raise Failed(f"{len(faults)} of {len(pinned)} packages differ: {_first_few(faults)}", SETUP)
    return f"the {len(pinned)} packages of {file.name}"


def torch_pair(context: DoctorContext) -> str:
    """Run an operator of torchvision, which is compiled against one build of torch."""
    try:
        import torch
        import torchvision

        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        versions = " with ".join(
            f"{name} {_installed_version(name) or '(missing)'}" for name in ("torch", "torchvision")
        )
        raise Failed(
            f"{versions}: {error}", f"{SETUP} (both come from one index, as wheels of one build)"
        ) from error
    assert kept.tolist() == [0]
    return f"torch {torch.__version__} with torchvision {torchvision.__version__}"


def cores(context: DoctorContext) -> str:
    """Compare torch's threads with the cores: more threads than cores wait for each other."""
    import torch

    available, threads = hardware.cores(), torch.get_num_threads()
    quota = cpu_quota()
    usable = min(available, math.ceil(quota)) if quota else available
    state = f"{usable} cores, {threads} threads of torch"
    if threads > usable:
        limited = quota and quota < available
        reason = f" (a quota of {quota:g} of {available} cores)" if limited else ""
        raise Failed(state + reason, f"set OMP_NUM_THREADS={usable} and trainer.threads={usable}")
    return state


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the container's CPU quota in cores, or None if there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()  # cgroup v2
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def gpu(context: DoctorContext) -> str:
    """Multiply two matrices on the GPU and compare the product with the CPU's."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists():
            raise Failed(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it",
                "compare `nvidia-smi`'s CUDA version with torch.version.cuda, and check "
                "CUDA_VISIBLE_DEVICES",
            )
        raise NotApplicable("no GPU: networks train and predict on the CPU")
    square = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64) / 4096
    if not torch.allclose(square @ square, (square.cuda() @ square.cuda()).cpu(), rtol=1e-2):
        raise Failed(
            "the GPU computes another matrix product than the CPU",
            "test its memory, or hide it: CUDA_VISIBLE_DEVICES=",
        )
    free, total = (num_bytes / 2**30 for num_bytes in torch.cuda.mem_get_info())
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free"


def tiles(context: DoctorContext) -> str:
    """Count the tiles under EUROSAT_ROOT and compare their fingerprint; nothing is decoded."""
    from eurosat.data.pack import dataset_fingerprint
    from eurosat.runtime.progress import track

    if not (root := context.environ.get(ROOT)):
        raise NotApplicable(f"{ROOT} is not set: data=eurosat downloads its tiles on first use")
    if is_bucket(root):
        raise NotApplicable(f"{ROOT} is a bucket: each tile is verified when it is downloaded")
    remedy = f"set {ROOT} to the complete tiles, or unset it to have them downloaded"
    try:
        place = sources.find_eurosat(Path(root).expanduser())
        source = sources.open_path(place, "eurosat")
        paths = source.paths
        digests = [
            hashlib.sha256(source.read(path)).hexdigest()
            for path in track(paths, len(paths), "reading tiles", "tiles")
        ]
    except DataError as error:
        raise Failed(str(error), remedy) from error
    counts = Counter(path.split("/")[0] for path in paths)
    fingerprint = dataset_fingerprint(list(paths), digests)
    summary = f"{len(paths):,} tiles of {len(counts)} classes in {place}, {fingerprint[:12]}"
    if faults := [
        f"{name} {counts[name]}, not {EUROSAT_CLASSES.get(name, 0)}"
        for name in sorted({*counts, *EUROSAT_CLASSES})
        if counts[name] != EUROSAT_CLASSES.get(name, 0)
    ]:
        raise Failed(f"{summary}: {_first_few(faults)}", remedy)
    if fingerprint == EUROSAT_RGB:
        return f"{summary}: the genuine tiles"
    if all(path.endswith((".tif", ".tiff")) for path in paths):
        return f"{summary}: not compared, we have no fingerprint of the thirteen-band tiles"
    raise Failed(f"{summary}, not {EUROSAT_RGB[:12]}: some tiles were changed", remedy)


def disk(context: DoctorContext) -> str:
    """Check the free space for packs, journals, runs and temporary files."""
    folders = {
        "EUROSAT_CACHE": cache_root(),
        "here": context.folder,
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    free_gb, required_gb = {}, context.min_free_gb
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_gb[f"{name} ({folder})"] = shutil.disk_usage(existing).free / 1e9
    if faults := [
        f"{name} has {gb:.1f} GB free" for name, gb in free_gb.items() if gb < required_gb
    ]:
        raise Failed(
            f"{_first_few(faults)}; {required_gb:g} GB are required",
            "make room (`make clean` removes what runs left here), or use another disk: set "
            "EUROSAT_CACHE or TMPDIR",
        )
    return f"at least {min(free_gb.values()):.1f} GB free, {required_gb:g} GB are required"


def secrets(context: DoctorContext) -> str:
    """Check that nobody else can read the files with passwords: by their mode or their folder's."""
    env, named = context.folder / env_file.FILE, context.environ.get(SECRETS)
    files, folder_is_private = [env] if env.exists() else [], False
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise Failed(
                f"{SECRETS}={named} is not a folder", f"`make platform`, or unset {SECRETS}"
            )
        folder_is_private = not folder.stat().st_mode & GROUP_AND_OTHERS
        files += sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise NotApplicable(f"no {env_file.FILE} here, and {SECRETS} is not set or is empty")
    exposed = {file: file.stat().st_mode & 0o777 for file in files}
    if folder_is_private:
        exposed = {file: mode for file, mode in exposed.items() if file == env}
    exposed = {file: mode for file, mode in exposed.items() if mode & GROUP_AND_OTHERS}
    if exposed:
        faults = [f"{file} has mode {mode:o}" for file, mode in exposed.items()]
        raise Failed(
            f"{_first_few(faults)}: other users of this machine can read it, mode 600 is required",
            f"chmod 600 {shlex.join(map(str, exposed))}",
        )
    if foreign := [file for file in files if file.stat().st_uid != os.geteuid()]:
        faults = [f"{file} is owned by user {file.stat().st_uid}" for file in foreign]
        raise Failed(
            f"{_first_few(faults)}; you should own it",
            f"chown {os.geteuid()} {shlex.join(map(str, foreign))}",
        )
    return f"{len(files)} files, readable by their owner alone"


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_few(faults: list[str]) -> str:
    more = len(faults) - MAX_LISTED
    return "; ".join(faults[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
