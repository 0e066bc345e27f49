"""What the machine is told and asked before a training."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
import numpy as np
from eurosat import machine
if not hasattr(ctypes.CDLL(None), "mallopt"):
    raise SystemExit(3)
if "keep" in sys.argv:
    machine.keep_freed_memory()
def step():
    return [np.ones(16_000_000, np.uint8) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*flags: str) -> int:
    """Pages that ten steps had to ask the kernel for."""
    done = subprocess.run([sys.executable, "-c", FAULTS, *flags], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    assert faults("keep") < faults() / 10
