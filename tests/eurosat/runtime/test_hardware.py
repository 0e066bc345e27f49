"""Settings of the memory allocator take effect."""

import subprocess
import sys

import pytest

from eurosat.runtime import hardware

FAULTS = """
import ctypes, resource, sys
import numpy as np
from eurosat.runtime import hardware
if not hasattr(ctypes.CDLL(None), "mallopt"):
    raise SystemExit(3)
if "keep" in sys.argv:
    hardware.disable_malloc_trim()
def step():
    return [np.ones(16_000_000, np.uint8) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


TRIMMED = """
import ctypes
import numpy as np
import psutil
from eurosat.runtime import hardware
if not hasattr(ctypes.CDLL(None), "malloc_trim"):
    raise SystemExit(3)
blocks = [np.ones(100_000, np.uint8) for _ in range(2000)]
used = blocks[::10]  # so that the free memory lies between used blocks
del blocks
before = psutil.Process().memory_info().rss
hardware.malloc_trim()
print((before - psutil.Process().memory_info().rss) // 10**6)
"""


def measured(code: str, *flags: str) -> int:
    """Run ``code`` in its own process and return the number that it prints."""
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_without_trimming_a_step_reuses_the_memory_of_the_last_one() -> None:
    assert measured(FAULTS, "keep") < measured(FAULTS) / 10  # pages asked for


def test_trimming_returns_free_memory_between_used_blocks() -> None:
    assert measured(TRIMMED) > 100, "of 180 MB"


def test_the_hardware_is_described_in_one_line() -> None:
    line = hardware.describe_hardware()
    assert f"{hardware.cores()} cores" in line
    assert "\n" not in line
