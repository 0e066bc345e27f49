"""Precision and memory layout in which this machine computes fastest."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from eurosat.models.network import NetworkSpec


log = logging.getLogger(__name__)

PROBE_BATCH, PROBE_ROUNDS = 32, 3
"""Large enough to fill two cores, small enough that all modes take about two seconds."""
CLEARLY_FASTER = 1.5


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

    from eurosat.models import cpu_convolutions
    from eurosat.models.network import build_untrained

    network = build_untrained(spec).train()
    tiles = torch.randint(0, 256, (PROBE_BATCH, spec.bands, *spec.tile_size), dtype=torch.uint8)
    fastest = dict.fromkeys(modes, float("inf"))
    for _ in range(PROBE_ROUNDS):
        for mode in modes:
            network.to(memory_format=mode.memory_format)  # type: ignore[call-overload]
            batch = tiles.contiguous(memory_format=mode.memory_format)
            started = time.perf_counter()
            with mode.autocast(), cpu_convolutions.fast():
                loss = network(batch).float().square().mean()
            loss.backward()
            fastest[mode] = min(fastest[mode], time.perf_counter() - started)
    return {mode: PROBE_BATCH / seconds for mode, seconds in fastest.items()}


def _name(mode: Compute) -> str:
    return f"{'bf16' if mode.bf16 else 'fp32'} {'NHWC' if mode.channels_last else 'NCHW'}"
