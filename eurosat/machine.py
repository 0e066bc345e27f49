"""What this machine is, and how it computes fastest."""

import ctypes
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from eurosat.network import NetworkSpec

log = logging.getLogger(__name__)

PROBE_BATCH, PROBE_ROUNDS = 32, 3
"""Large enough to fill two cores, small enough that all modes take about two seconds."""
CLEARLY_FASTER = 1.5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc takes no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    device: str
    bf16: bool
    channels_last: bool

    @property
    def memory_format(self) -> "torch.memory_format":
        import torch

        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def autocast(self) -> Iterator[None]:
        import torch

        with torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext():
            yield


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next training step.

    By itself glibc gives it back to the kernel, and each step of a ResNet18 faults in thousands of
    pages that the step before has had. Another C library is left as it is.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Hand what this process has freed to the kernel, from the arenas of all its threads.

    By itself glibc keeps what lies between two blocks in use, so that a server grows with each
    version that it loads beside another. Another C library is left as it is.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """One line for reports: processor, cores, memory, GPU."""
    import psutil
    import torch

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    memory = psutil.virtual_memory().total / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores()} cores, {memory:.0f} GiB{gpu}"


@lru_cache
def choose_compute(spec: "NetworkSpec", precision: str, *, probe: bool = True) -> Compute:
    """Take a GPU where there is one; on a CPU time a few training steps in each mode.

    ``precision`` is 'fp32', 'bf16' or 'auto'; the choice and its speeds are logged, once a
    process. The mode that this processor was built for is left only for one that is
    CLEARLY_FASTER: on a machine shared with others a probe of two seconds is a rough guide.
    Without ``probe`` it is taken untried, as by several processes that must choose alike.
    """
    import torch

    if torch.cuda.is_available():
        bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported())
        return Compute(device="cuda", bf16=bf16, channels_last=True)
    modes = [
        Compute(device="cpu", bf16=bf16, channels_last=channels_last)
        for bf16, channels_last in ((False, False), (False, True), (True, True))
        if precision == "auto" or bf16 == (precision == "bf16")
    ]
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16())
    usual = Compute(device="cpu", bf16=bf16, channels_last=True)
    if not probe:
        return usual
    speeds = _images_per_s(spec, modes)
    fastest = max(modes, key=lambda mode: speeds[mode])
    if speeds[fastest] > CLEARLY_FASTER * speeds[usual]:  # or was it another process's work?
        second = _images_per_s(spec, modes)
        speeds = {mode: max(speeds[mode], second[mode]) for mode in modes}
        fastest = max(modes, key=lambda mode: speeds[mode])
    chosen = fastest if speeds[fastest] > CLEARLY_FASTER * speeds[usual] else usual
    told = ", ".join(f"{_name(mode)} {speed:,.0f}" for mode, speed in speeds.items())
    log.info("training in %s on the CPU (images/s probed: %s)", _name(chosen), told)
    return chosen


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself (AVX-512 BF16 or AMX)."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _images_per_s(spec: "NetworkSpec", modes: list[Compute]) -> dict[Compute, float]:
    """Best of PROBE_ROUNDS training steps in each mode, the modes taken in turn."""
    import torch

    from eurosat import convolutions
    from eurosat.network import untrained

    network = untrained(spec).train()
    tiles = torch.randint(0, 256, (PROBE_BATCH, spec.bands, *spec.tile_size), dtype=torch.uint8)
    fastest = dict.fromkeys(modes, float("inf"))
    for _ in range(PROBE_ROUNDS):
        for mode in modes:
            network.to(memory_format=mode.memory_format)  # type: ignore[call-overload]
            batch = tiles.contiguous(memory_format=mode.memory_format)
            started = time.perf_counter()
            with mode.autocast(), convolutions.fast():
                loss = network(batch).float().square().mean()
            loss.backward()
            fastest[mode] = min(fastest[mode], time.perf_counter() - started)
    return {mode: PROBE_BATCH / seconds for mode, seconds in fastest.items()}


def _name(mode: Compute) -> str:
    return f"{'bf16' if mode.bf16 else 'fp32'} {'NHWC' if mode.channels_last else 'NCHW'}"
