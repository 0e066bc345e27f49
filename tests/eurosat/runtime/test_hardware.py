"""What the machine is told and asked before a training."""

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


HELD = """
import ctypes
import numpy as np
import psutil
from eurosat.runtime import hardware
if not hasattr(ctypes.CDLL(None), "malloc_trim"):
    raise SystemExit(3)
blocks = [np.ones(100_000, np.uint8) for _ in range(2000)]
kept = blocks[::10]  # so that nothing can be cut off at an end
del blocks
held = psutil.Process().memory_info().rss
hardware.malloc_trim()
print((held - psutil.Process().memory_info().rss) // 10**6)
"""


def measured(code: str, *flags: str) -> int:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    assert measured(FAULTS, "keep") < measured(FAULTS) / 10  # pages asked for


def test_memory_between_blocks_in_use_is_given_back() -> None:
    assert measured(HELD) > 100, "of 180 MB"


def test_the_hardware_is_described_in_one_line() -> None:
    line = hardware.describe_hardware()
    assert f"{hardware.cores()} cores" in line
    assert "\n" not in line
