"""The machine's processors and memory."""

import ctypes
import logging
import os
import platform
from pathlib import Path

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
MAX_MMAP_THRESHOLD = 32 * 2**20
"""Largest value that glibc accepts, in bytes."""
BUSY_SHARE, BUSY_SAMPLE_S = 0.5, 0.3
"""Share of the cores in use from which a machine counts as busy, and how long it is measured."""


def disable_malloc_trim() -> None:
    """Keep freed memory in this process for its next training step.

    By default glibc returns it to the kernel, and each step of a ResNet18 faults in thousands of
    pages again. Does nothing with another C library.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def malloc_trim() -> None:
    """Return the memory that this process has freed to the kernel, from all arenas.

    By default glibc keeps free memory between two used blocks, so that a server grows with each
    version that it loads. Does nothing with another C library.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warn_if_busy() -> None:
    """Log a warning if other programs use this machine: a training is then several times slower.

    Call it before the work begins: all that is measured while this process sleeps is of others.
    """
    import psutil

    if warning := busy_warning(psutil.cpu_percent(BUSY_SAMPLE_S) / 100, psutil.cpu_count() or 1):
        log.warning("%s", warning)


def busy_warning(share: float, machine_cores: int) -> str | None:
    """Return what to say of the ``share`` of the cores that others use, or None if it is small."""
    if share < BUSY_SHARE:
        return None
    return (
        f"other programs use {share:.0%} of the {machine_cores} cores of this machine, so this "
        "will take several times as long: end other trainings, sweeps and tests, or wait for them"
    )


def describe_hardware() -> str:
    """Return processor, cores, memory and GPU in one line, for reports."""
    import psutil
    import torch

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    memory = psutil.virtual_memory().total / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores()} cores, {memory:.0f} GiB{gpu}"
