"""Run a network that `eurosat.models.export` wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.runtime.progress import track

TILES = "tiles_NHWC"
"""Input of the network: uint8 (N, H, W, C)."""
TTA = "tta"
"""Optional input, a bool: whether to average over all flips and turns."""
LOG_ERRORS_ONLY = 3
"""ONNX Runtime's log level for errors alone: it warns that the input ``tta`` is optional."""


def open_session(file: Path, threads: int = 0) -> Any:
    """Return an ONNX Runtime session on the CPU; 0 threads means one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_ERRORS_ONLY
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def probabilities(
    file: Path, tiles_NHWC: npt.NDArray[np.uint8], batch: int = 32, *, one_view: bool = False
) -> Any:
    """Return float32 probabilities, (N, K), with the network's own views or with ``one_view``."""
    session = open_session(file)
    has_tta = any(node.name == TTA for node in session.get_overridable_initializers())
    options = {TTA: np.array(False)} if one_view and has_tta else {}
    outputs: list[Any] = []
    starts = range(0, len(tiles_NHWC), batch)
    for start in track(starts, len(starts), f"running {file.name}", f"x {batch} tiles"):
        inputs = {TILES: tiles_NHWC[start : start + batch]} | options
        outputs += session.run(["probabilities"], inputs)
    return np.concatenate(outputs)
