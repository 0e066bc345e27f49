"""Ask a network that `eurosat.export` wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.progress import track

TILES = "tiles_NHWC"
"""What it is given: uint8 (N, H, W, C)."""
ERRORS_ALONE = 3
"""ONNX Runtime's level of what it writes on stderr: it warns that ``tta`` is free to be given."""


def opened(file: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ALONE
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def answers(file: Path, tiles_NHWC: npt.NDArray[np.uint8], batch: int = 32) -> Any:
    """(N, K) probabilities, float32."""
    session = opened(file)
    told: list[Any] = []
    starts = range(0, len(tiles_NHWC), batch)
    for start in track(starts, len(starts), f"asking {file.name}", f"x {batch} tiles"):
        told += session.run(["probabilities"], {TILES: tiles_NHWC[start : start + batch]})
    return np.concatenate(told)
