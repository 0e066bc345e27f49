"""bench-precisions: one trained network in several precisions, compiled and pruned, in turn.

`python -m benchmarks.precisions RUN [--rounds 5]` takes the weights of a finished training run and
uses one view of each test tile. It writes reports/bench-precisions.json.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import reports
from eurosat import tracking
from eurosat.config import compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.models import export, network, onnx_session, quantise
from eurosat.runtime import cli, exit_codes, logs

BATCH = 32
TURN_S = 2.0
"""Time in batches per turn; single tiles take half of it."""
PRUNED_SHARE = 0.5
"""Share of the convolutions' weights that are set to zero, the smallest (Han et al. 2015)."""
BF16_MB = 2 / 1e6
"""Size of a bf16 weight in MB."""

Tiles = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to serve the network."""

    name: str
    description: str
    size_mb: float
    predict: Callable[[Tiles], npt.NDArray[np.float32]]
    """Maps tiles (N, H, W, C) to probabilities (N, K)."""


def onnx_variant(name: str, description: str, file: Path) -> Variant:
    session = onnx_session.open_session(file)
    one_view = {onnx_session.TTA: np.array(False)}

    def predict(tiles_NHWC: Tiles) -> npt.NDArray[np.float32]:
        inputs = {onnx_session.TILES: tiles_NHWC} | one_view
        probabilities: npt.NDArray[np.float32] = session.run(["probabilities"], inputs)[0]
        return probabilities

    size_mb = file.stat().st_size / 1e6
    return Variant(name=name, description=description, size_mb=size_mb, predict=predict)


def torch_variant(
    name: str, description: str, net: network.Network, *, bf16: bool, compiled: bool
) -> Variant:
    net = copy.deepcopy(net).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backbone: Any = torch.compile(net.backbone) if compiled else net.backbone

    @torch.inference_mode()
    def predict(tiles_NHWC: Tiles) -> npt.NDArray[np.float32]:
        tiles_NCHW = torch.from_numpy(tiles_NHWC).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = backbone(net.preprocess(tiles_NCHW))
        probabilities = (logits.float() / net.temperature).softmax(dim=1)
        array: npt.NDArray[np.float32] = probabilities.numpy()
        return array

    weights = sum(weight.numel() for weight in net.parameters())
    size_mb = weights * BF16_MB * (1 if bf16 else 2)
    return Variant(name=name, description=description, size_mb=size_mb, predict=predict)


def pruned(net: network.Network) -> network.Network:
    """Return a copy whose smallest convolution weights are zero."""
    from torch.nn.utils import prune

    net = copy.deepcopy(net)
    layers = [(layer, "weight") for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=PRUNED_SHARE)
    for layer, name in layers:
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
    return net


def make_variants(net: network.Network, data: PreparedData, folder: Path) -> list[Variant]:
    fp32, int8, half = (folder / f"{name}.onnx" for name in ("fp32", "int8", "pruned"))
    export.export_onnx(net, fp32)
    quantise.export_int8(net, quantise.calibration_tiles(data), int8)
    export.export_onnx(pruned(net), half)
    share = f"{PRUNED_SHARE:.0%}"
    return [
        onnx_variant("fp32", "ONNX Runtime, float32", fp32),
        onnx_variant("int8", "ONNX Runtime, INT8 (static, per channel)", int8),
        torch_variant("bf16", "torch, bf16, channels_last", net, bf16=True, compiled=False),
        torch_variant("compiled", "torch.compile, float32", net, bf16=False, compiled=True),
        onnx_variant("pruned", f"ONNX Runtime, float32, {share} of the weights zero", half),
    ]


def time_variant(variant: Variant, tiles_NHWC: Tiles) -> tuple[float, float]:
    """Return images per second in batches, and the median milliseconds for one tile."""
    batch, tile = tiles_NHWC[:BATCH], tiles_NHWC[:1]
    variant.predict(batch)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < TURN_S:
        variant.predict(batch)
        count += BATCH
    rate = count / (time.perf_counter() - started)
    latencies_ms: list[float] = []
    variant.predict(tile)
    deadline = time.perf_counter() + TURN_S / 2
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        variant.predict(tile)
        latencies_ms.append(1000 * (time.perf_counter() - started))
    return rate, statistics.median(latencies_ms)


def accuracy_of(variant: Variant, tiles_NHWC: Tiles, labels: npt.NDArray[np.int64]) -> float:
    starts = range(0, len(tiles_NHWC), BATCH)
    batches = [variant.predict(tiles_NHWC[start : start + BATCH]) for start in starts]
    return float((np.concatenate(batches).argmax(axis=1) == labels).mean())


def measure(net: network.Network, data: PreparedData, rounds: int) -> list[dict[str, Any]]:
    """Return one row per variant: accuracy on the test fold, size and interleaved speeds."""
    test = data.split.indices("test")
    tiles_NHWC, labels = data.pack.tiles_NHWC[test], data.pack.labels[test]
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(net, data, Path(folder))
        accuracies = {}
        for variant in variants:
            accuracies[variant.name] = accuracy_of(variant, tiles_NHWC, labels)
            print(f"{variant.name}: accuracy {accuracies[variant.name]:.4f}", flush=True)
        timings: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in variants}
        for number in range(rounds):
            shift = number % len(variants)
            for variant in [*variants[shift:], *variants[:shift]]:
                timings[variant.name].append(time_variant(variant, tiles_NHWC))
            print(f"round {number + 1} of {rounds}", flush=True)
    return [
        {
            **reports.speed(variant.name, [rate for rate, _ in timings[variant.name]]),
            "what": variant.description,
            "accuracy": round(accuracies[variant.name], 4),
            "size_mb": round(variant.size_mb, 1),
            "p50_ms": round(statistics.median(ms for _, ms in timings[variant.name]), 2),
        }
        for variant in variants
    ]


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("benchmarks.precisions", "Measure a trained network in several precisions.")
    parser.add_argument(
        "run", help="a training run on the real tiles, as its id or models:/NAME@ALIAS"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    started = reports.now()
    run = tracking.get(tracking.resolve_run(args.run))
    with tracking.artifact(run.run_id, "weights.safetensors") as file:
        net = network.load(file)
    overrides = [f"{name}={run.params[name]}" for name in ("data.protocol", "seed")]
    overrides += [f"data={run.params['data.source']}", "data.allow_unvalidated=true"]
    config = compose(overrides)
    rows = measure(net, prepare(config), args.rounds)
    by_arm = {row["arm"]: row for row in rows}
    lost = by_arm["fp32"]["accuracy"] - by_arm["int8"]["accuracy"]
    goals = [
        reports.goal("serving.int8_accuracy_lost", lost, quantise.MAX_ACCURACY_LOSS, at_most=True)
    ]
    reports.write(
        "precisions",
        started=started,
        n=args.rounds,
        goals=goals,
        rows=rows,
        recipe=run.params["recipe"],
        network=net.spec.name,
    )
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
