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
