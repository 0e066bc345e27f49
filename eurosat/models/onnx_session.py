"""Ask a network that `eurosat.models.export` wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.runtime.progress import track

TILES = "tiles_NHWC"
"""What it is given: uint8 (N, H, W, C)."""
TTA = "tta"
"""Whether to look at all flips and turns; need not be given."""
ERRORS_ALONE = 3
"""ONNX Runtime's level of what it writes on stderr: it warns that ``tta`` is free to be given."""


def open_session(file: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; with 0 threads, it takes one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ALONE
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def probabilities(
    file: Path, tiles_NHWC: npt.NDArray[np.uint8], batch: int = 32, *, one_view: bool = False
) -> Any:
    """(N, K) probabilities, float32, of all the views that it takes or of ``one_view``."""
    session = open_session(file)
    turns = any(node.name == TTA for node in session.get_overridable_initializers())
    given = {TTA: np.array(False)} if one_view and turns else {}
    told: list[Any] = []
    starts = range(0, len(tiles_NHWC), batch)
    for start in track(starts, len(starts), f"asking {file.name}", f"x {batch} tiles"):
        seen = {TILES: tiles_NHWC[start : start + batch]}
        told += session.run(["probabilities"], seen | given)
    return np.concatenate(told)
