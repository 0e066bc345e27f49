"""Settings of the memory allocator take effect, and a busy machine is a warning."""

import os
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


def test_a_busy_machine_is_a_warning_with_the_share_the_cores_and_the_remedy() -> None:
    warning = hardware.busy_warning(0.97, 2)
    assert warning is not None
    assert "other programs use 97% of the 2 cores" in warning
    assert "end other trainings" in warning
    assert hardware.busy_warning(0.4, 2) is None


def test_the_warning_is_logged_while_another_process_computes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "BUSY_SHARE", 0.05 / (os.cpu_count() or 1))
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        hardware.warn_if_busy()
    finally:
        process.kill()
        process.wait()
    assert "other programs use" in caplog.text


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
