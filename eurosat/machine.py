"""What this machine is, and how it computes fastest."""

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger(__name__)

PROBE_BATCH, PROBE_STEPS = 32, 2
"""Large enough to fill two cores, small enough that all modes take about two seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    device: str
    bf16: bool
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext():
            yield


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """One line for reports: processor, cores, memory, GPU."""
    import psutil

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    memory = psutil.virtual_memory().total / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores()} cores, {memory:.0f} GiB{gpu}"


def choose_compute(
    network: nn.Module, bands: int, size: tuple[int, int], precision: str
) -> Compute:
    """Take a GPU where there is one; on a CPU time a few training steps in each mode.

    ``precision`` is 'fp32', 'bf16' or 'auto'; the choice and its speeds are logged.
    """
    if torch.cuda.is_available():
        bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported())
        return Compute(device="cuda", bf16=bf16, channels_last=True)
    modes = [
        Compute(device="cpu", bf16=bf16, channels_last=channels_last)
        for bf16, channels_last in ((False, False), (False, True), (True, True))
        if precision == "auto" or bf16 == (precision == "bf16")
    ]
    speeds = {mode: _images_per_s(network, bands, size, mode) for mode in modes}
    best = max(speeds, key=lambda mode: speeds[mode])
    told = ", ".join(f"{_name(mode)} {speed:,.0f}" for mode, speed in speeds.items())
    log.info("training in %s on the CPU (images/s probed: %s)", _name(best), told)
    return best


def _images_per_s(network: nn.Module, bands: int, size: tuple[int, int], mode: Compute) -> float:
    state = {key: value.clone() for key, value in network.state_dict().items()}
    format_before = torch.contiguous_format
    network.to(memory_format=mode.memory_format).train()  # type: ignore[call-overload]
    tiles = torch.randint(0, 256, (PROBE_BATCH, bands, *size), dtype=torch.uint8)
    tiles = tiles.contiguous(memory_format=mode.memory_format)
    fastest = float("inf")
    for _ in range(1 + PROBE_STEPS):  # the first warms up
        started = time.perf_counter()
        with mode.autocast():
            loss = network(tiles).float().square().mean()
        loss.backward()
        fastest = min(fastest, time.perf_counter() - started)
    network.zero_grad(set_to_none=True)
    network.to(memory_format=format_before)  # type: ignore[call-overload]
    network.load_state_dict(state)  # batch norm has counted the probe
    return PROBE_BATCH / fastest


def _name(mode: Compute) -> str:
    return f"{'bf16' if mode.bf16 else 'fp32'} {'NHWC' if mode.channels_last else 'NCHW'}"
