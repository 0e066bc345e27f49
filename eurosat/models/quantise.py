"""The served network in whole numbers of 8 bits: several times as fast on CPUs that have VNNI."""

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
CALIBRATION_BATCH = 64
MAX_LOSS = 0.002
"""Accuracy on the test fold that the quantised form may lack, or it is not kept."""

Tiles = npt.NDArray[np.uint8]


class _Batches:
    """What ONNX Runtime's calibration asks for its inputs, one batch after another."""

    def __init__(self, tiles_NHWC: Tiles) -> None:
        starts = range(0, len(tiles_NHWC), CALIBRATION_BATCH)
        batches = (tiles_NHWC[start : start + CALIBRATION_BATCH] for start in starts)
        self._batches: Iterator[dict[str, Tiles]] = ({export.VIEWS: batch} for batch in batches)

    def get_next(self) -> dict[str, Tiles] | None:
        return next(self._batches, None)


def calibration_tiles(data: "PreparedData") -> Tiles:
    """A draw of the train fold, always the same."""
    drawn = np.random.default_rng(0).permutation(data.split.indices("train"))
    tiles_NHWC: Tiles = data.pack.tiles_NHWC[np.sort(drawn[:CALIBRATION_TILES])]
    return tiles_NHWC


def export_int8(
    network: "Network",
    tiles_NHWC: Tiles,
    file: Path,
    metadata: Mapping[str, str] | None = None,
    alone: bytes | None = None,
) -> None:
    """Write ``file``, of the same inputs and outputs as `eurosat.models.export.export_onnx` writes;
    ``alone`` is as there.

    Weights are rounded to int8 per channel, activations to uint8 over the range that they take on
    ``tiles_NHWC``, which are tiles of the train fold.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        plain, folded, whole = (
            Path(folder) / f"{name}.onnx" for name in ("plain", "folded", "int8")
        )
        plain.write_bytes(alone or export.export_core(network))
        with logs.only_errors():  # it advises what has just been done
            quant_pre_process(str(plain), str(folded), skip_symbolic_shape=True)
            quantize_static(
                str(folded),
                str(whole),
                _Batches(tiles_NHWC),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        made = export.wrap_with_tta(onnx.load(str(whole)), network, metadata or {})
        onnx.save(made, str(file))
