"""Choose the device, precision and memory layout in which this machine trains fastest."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from eurosat.runtime import atomic, hardware
from eurosat.runtime.progress import track

if TYPE_CHECKING:
    import torch

    from eurosat.models.network import NetworkSpec


log = logging.getLogger(__name__)

PROBE_BATCH, PROBE_ROUNDS = 32, 3
"""Tiles per step and steps per mode: they fill two cores, and all modes take about two seconds."""
MAX_PROBE_SLOWDOWN = 4
"""A mode that takes this many times as long as the fastest one is not timed again."""
MIN_PROBE_SPEEDUP = 1.5
"""A mode replaces the default one only if it is this many times as fast in the probe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Where and how a network computes."""

    device: str
    """'cuda' or 'cpu'."""
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


@lru_cache
def choose_compute(spec: "NetworkSpec", precision: str, *, probe: bool = True) -> Compute:
    """Return the GPU if there is one, else the CPU's fastest mode.

    ``precision`` is 'fp32', 'bf16' or 'auto'. On a CPU a few training steps are timed in each mode
    that it allows, and the choice is logged with the speeds, once per process. The default (bf16
    if the processor multiplies it natively, channels last) is replaced only by a mode that is
    `MIN_PROBE_SPEEDUP` times as fast, since the probe is inexact on a busy machine.

    Without ``probe`` the default is returned untimed: several processes must choose alike.
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
    default = Compute(device="cpu", bf16=bf16, channels_last=True)
    if not probe:
        return default
    speeds = _images_per_s(spec, modes)
    fastest = max(modes, key=lambda mode: speeds[mode])
    if speeds[fastest] > MIN_PROBE_SPEEDUP * speeds[default]:  # or was the machine busy?
        again = _images_per_s(spec, modes)
        speeds = {mode: max(speeds[mode], again[mode]) for mode in modes}
        fastest = max(modes, key=lambda mode: speeds[mode])
    chosen = fastest if speeds[fastest] > MIN_PROBE_SPEEDUP * speeds[default] else default
    measured = ", ".join(f"{_mode_name(mode)} {speed:,.0f}" for mode, speed in speeds.items())
    log.info("training in %s on the CPU (images/s probed: %s)", _mode_name(chosen), measured)
    return chosen


def choose_once(spec: "NetworkSpec", precision: str, file: Path, *, probe: bool) -> Compute:
    """Choose as `choose_compute` does, and store the choice in ``file`` for other processes.

    A probe beside other trainings is inexact, so the workers of a study would choose differently.
    While one process probes, the others wait.
    """
    question = f"{spec} {precision} {probe} {hardware.describe_hardware()}"
    key = hashlib.sha256(question.encode()).hexdigest()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        choices = _stored_choices(file)
        if key not in choices:
            choices[key] = asdict(choose_compute(spec, precision, probe=probe))
            atomic.atomic_write_text(file, json.dumps(choices))
    return Compute(**choices[key])


def _stored_choices(file: Path) -> dict[str, dict[str, Any]]:
    """Return the stored choices; none if the file is missing or damaged."""
    try:
        choices: dict[str, dict[str, Any]] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return choices


def has_bf16() -> bool:
    """Return whether the processor multiplies bf16 matrices natively (AVX-512 BF16 or AMX)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_tile"))


def _images_per_s(spec: "NetworkSpec", modes: list[Compute]) -> dict[Compute, float]:
    """Return the speed of each mode: the fastest of `PROBE_ROUNDS` interleaved training steps."""
    import torch

    from eurosat.models import cpu_convolutions
    from eurosat.models.network import build_untrained

    network = build_untrained(spec).train()
    tiles = torch.randint(0, 256, (PROBE_BATCH, spec.bands, *spec.tile_size), dtype=torch.uint8)
    fastest = dict.fromkeys(modes, float("inf"))
    steps = modes * PROBE_ROUNDS
    for mode in track(steps, len(steps), "choosing the precision", "steps"):
        if MAX_PROBE_SLOWDOWN * min(fastest.values()) < fastest[mode] < float("inf"):
            continue
        network.to(memory_format=mode.memory_format)  # type: ignore[call-overload]
        batch = tiles.contiguous(memory_format=mode.memory_format)
        started = time.perf_counter()
        with mode.autocast(), cpu_convolutions.fast():
            loss = network(batch).float().square().mean()
        loss.backward()
        fastest[mode] = min(fastest[mode], time.perf_counter() - started)
    return {mode: PROBE_BATCH / seconds for mode, seconds in fastest.items()}


def _mode_name(mode: Compute) -> str:
    return f"{'bf16' if mode.bf16 else 'fp32'} {'NHWC' if mode.channels_last else 'NCHW'}"
