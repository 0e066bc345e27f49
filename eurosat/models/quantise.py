"""Quantise a network to INT8 for serving: several times as fast on CPUs with VNNI."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eurosat.models import export
from eurosat.runtime import logs

if TYPE_CHECKING:
    from eurosat.data.prepare import PreparedData
    from eurosat.models.network import Network

CALIBRATION_TILES = 512
"""Tiles on which the ranges of the activations are measured."""
CALIBRATION_BATCH = 64
MAX_ACCURACY_LOSS = 0.002
"""Largest loss of test accuracy against FP32; with a larger one the INT8 model is not logged."""

Tiles = npt.NDArray[np.uint8]


class _CalibrationReader:
    """Gives ONNX Runtime's calibration its inputs, batch by batch."""

    def __init__(self, tiles_NHWC: Tiles) -> None:
        starts = range(0, len(tiles_NHWC), CALIBRATION_BATCH)
        batches = (tiles_NHWC[start : start + CALIBRATION_BATCH] for start in starts)
        self._batches: Iterator[dict[str, Tiles]] = ({export.VIEWS: batch} for batch in batches)

    def get_next(self) -> dict[str, Tiles] | None:
        return next(self._batches, None)


def calibration_tiles(data: "PreparedData") -> Tiles:
    """Return `CALIBRATION_TILES` random tiles of the train fold; the same in each call."""
    shuffled = np.random.default_rng(0).permutation(data.split.indices("train"))
    tiles_NHWC: Tiles = data.pack.tiles_NHWC[np.sort(shuffled[:CALIBRATION_TILES])]
    return tiles_NHWC


def export_int8(
    network: "Network",
    tiles_NHWC: Tiles,
    file: Path,
    metadata: Mapping[str, str] | None = None,
    core: bytes | None = None,
) -> None:
    """Write ``file`` with the inputs and outputs of `eurosat.models.export.export_onnx`.

    Weights are rounded to int8 per channel, activations to uint8 over the range that they have on
    ``tiles_NHWC``, which are tiles of the train fold. ``core`` is the result of
    `eurosat.models.export.export_core`; None computes it here.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        original, prepared, int8 = (
            Path(folder) / f"{name}.onnx" for name in ("original", "prepared", "int8")
        )
        original.write_bytes(core or export.export_core(network))
        with logs.only_errors():  # it recommends the preparation that was just done
            quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(int8),
                _CalibrationReader(tiles_NHWC),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        model = export.wrap_with_tta(onnx.load(str(int8)), network, metadata or {})
        onnx.save(model, str(file))
