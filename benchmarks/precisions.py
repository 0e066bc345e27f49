"""bench-forms: one trained network in the forms that could be served, in turn.

`python -m benchmarks.precisions RUN [--rounds 5]` takes the weights of a finished training run,
and looks at each tile of the test fold once. Writes reports/bench-forms.json.
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
PRUNED_SHARE = 0.5
"""Share of the convolutions' weights that are zeroed, the smallest of all (Han et al. 2015)."""
BF16_MB = 2 / 1e6
"""Of a weight."""

Tiles = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    name: str
    description: str
    size_mb: float
    predict: Callable[[Tiles], npt.NDArray[np.float32]]
    """Probabilities (N, K) of tiles (N, H, W, C)."""


def onnx_variant(name: str, what: str, file: Path) -> Variant:
    session = onnx_session.open_session(file)

    def answer(tiles_NHWC: Tiles) -> npt.NDArray[np.float32]:
        given = {onnx_session.TILES: tiles_NHWC, "tta": np.array(False)}
        told: npt.NDArray[np.float32] = session.run(["probabilities"], given)[0]
        return told

    return Variant(name=name, description=what, size_mb=file.stat().st_size / 1e6, predict=answer)


def torch_variant(
    name: str, what: str, net: network.Network, *, bf16: bool, compiled: bool
) -> Variant:
    net = copy.deepcopy(net).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backbone: Any = torch.compile(net.backbone) if compiled else net.backbone

    @torch.inference_mode()
    def answer(tiles_NHWC: Tiles) -> npt.NDArray[np.float32]:
        tiles_NCHW = torch.from_numpy(tiles_NHWC).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = backbone(net.preprocess(tiles_NCHW))
        told: npt.NDArray[np.float32] = (logits.float() / net.temperature).softmax(dim=1).numpy()
        return told

    weights = sum(weight.numel() for weight in net.parameters())
    return Variant(
        name=name, description=what, size_mb=weights * BF16_MB * (1 if bf16 else 2), predict=answer
    )


def pruned(net: network.Network) -> network.Network:
    """A copy whose smallest weights of convolutions are zero."""
    from torch.nn.utils import prune

    net = copy.deepcopy(net)
    layers = [(one, "weight") for one in net.modules() if isinstance(one, torch.nn.Conv2d)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=PRUNED_SHARE)
    for layer, name in layers:
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
    return net


def make_variants(net: network.Network, data: PreparedData, folder: Path) -> list[Variant]:
    whole, int8, half = (folder / f"{name}.onnx" for name in ("fp32", "int8", "pruned"))
    export.export_onnx(net, whole)
    quantise.export_int8(net, quantise.calibration_tiles(data), int8)
    export.export_onnx(pruned(net), half)
    return [
        onnx_variant("fp32", "ONNX Runtime, float32", whole),
        onnx_variant("int8", "ONNX Runtime, INT8 (static, per channel)", int8),
        torch_variant("bf16", "torch, bf16, channels_last", net, bf16=True, compiled=False),
        torch_variant("compiled", "torch.compile, float32", net, bf16=False, compiled=True),
        onnx_variant(
            "pruned", f"ONNX Runtime, float32, {PRUNED_SHARE:.0%} of the weights zero", half
        ),
    ]


def time_variant(form: Variant, tiles_NHWC: Tiles) -> tuple[float, float]:
    """Images a second in batches, and milliseconds of one tile (median)."""
    batch, one = tiles_NHWC[:BATCH], tiles_NHWC[:1]
    form.predict(batch)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < TURN_S:
        form.predict(batch)
        count += BATCH
    rate = count / (time.perf_counter() - started)
    took: list[float] = []
    form.predict(one)
    until = time.perf_counter() + TURN_S / 2
    while time.perf_counter() < until:
        started = time.perf_counter()
        form.predict(one)
        took.append(1000 * (time.perf_counter() - started))
    return rate, statistics.median(took)


def measure(net: network.Network, data: PreparedData, rounds: int) -> list[dict[str, Any]]:
    test = data.split.indices("test")
    tiles_NHWC, labels = data.pack.tiles_NHWC[test], data.pack.labels[test]
    with tempfile.TemporaryDirectory() as folder:
        made = make_variants(net, data, Path(folder))
        accuracy = {}
        for form in made:
            starts = range(0, len(test), BATCH)
            answers = [form.predict(tiles_NHWC[start : start + BATCH]) for start in starts]
            accuracy[form.name] = float((np.concatenate(answers).argmax(axis=1) == labels).mean())
            print(f"{form.name}: accuracy {accuracy[form.name]:.4f}", flush=True)
        turns: dict[str, list[tuple[float, float]]] = {form.name: [] for form in made}
        for number in range(rounds):
            shift = number % len(made)
            for form in [*made[shift:], *made[:shift]]:
                turns[form.name].append(time_variant(form, tiles_NHWC))
            print(f"round {number + 1} of {rounds}", flush=True)
    return [
        {
            **reports.speed(form.name, [rate for rate, _ in turns[form.name]]),
            "what": form.description,
            "accuracy": round(accuracy[form.name], 4),
            "size_mb": round(form.size_mb, 1),
            "p50_ms": round(statistics.median(ms for _, ms in turns[form.name]), 2),
        }
        for form in made
    ]


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "benchmarks.precisions", "A trained network in the forms that could be served."
    )
    parser.add_argument("run", help="a training run of the real tiles, or models:/...")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    started = reports.now()
    run = tracking.get(tracking.resolve_run(args.run))
    with tracking.artifact(run.run_id, "weights.safetensors") as file:
        net = network.load(file)
    given = [f"{name}={run.params[name]}" for name in ("data.protocol", "seed")]
    config = compose([f"data={run.params['data.source']}", *given, "data.allow_unvalidated=true"])
    rows = measure(net, prepare(config), args.rounds)
    by_arm = {row["arm"]: row for row in rows}
    lost = by_arm["fp32"]["accuracy"] - by_arm["int8"]["accuracy"]
    goals = [
        reports.goal("serving.int8_accuracy_lost", lost, quantise.MAX_ACCURACY_LOSS, at_most=True)
    ]
    reports.write(
        "forms",
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
