"""The network as one ONNX file: uint8 pixels in, probabilities out."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eurosat.errors import ModelError
from eurosat.network import Network

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of a probability between torch and ONNX Runtime, both in float32."""


class _Served(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        logits: Tensor = self.network(tiles_NHWC.permute(0, 3, 1, 2))
        return logits.softmax(dim=1)


def export_onnx(network: Network, file: Path, metadata: Mapping[str, str] | None = None) -> float:
    """Write ``file`` and return the largest difference from torch on random tiles.

    Input ``tiles_NHWC`` uint8 (N, H, W, C), output ``probabilities`` float32 (N, K); the
    metadata carry ``classes``, ``tile_size``, ``bands`` and ``views`` as JSON.

    Raises:
        ModelError: the file answers otherwise than the network.
    """
    import onnx

    spec = network.spec
    served = _Served(network).eval().cpu()
    shape = (3, *spec.tile_size, spec.bands)
    tiles = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    tiles_NHWC = torch.from_numpy(tiles)
    try:
        _export(served, tiles_NHWC, file)
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"torch cannot export {spec.name} to ONNX ({str(error).splitlines()[0]}): its weights "
            "are in the run, but it cannot be served; take another model.name"
        ) from error
    model = onnx.load(str(file))
    described = {
        "classes": json.dumps(spec.classes),
        "tile_size": json.dumps(spec.tile_size),
        "bands": json.dumps(spec.bands),
        "views": json.dumps(spec.views),
    }
    onnx.helper.set_model_props(model, described | dict(metadata or {}))
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
    return _check(served, file, tiles_NHWC)


def _export(served: nn.Module, tiles_NHWC: Tensor, file: Path) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            served, (tiles_NHWC,), str(file), dynamo=True, external_data=False,
            opset_version=OPSET, input_names=["tiles_NHWC"], output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("tiles", min=1)},),
        )  # fmt: skip


def _check(served: nn.Module, file: Path, tiles_NHWC: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        worst = 0.0
        for batch in (tiles_NHWC, tiles_NHWC[:1]):
            (answered,) = session.run(None, {"tiles_NHWC": batch.numpy()})
            worst = max(worst, float(np.abs(answered - served(batch).numpy()).max()))
    if not worst <= TOLERANCE:
        raise ModelError(
            f"{file} differs from the network by {worst:.1e}, over the {TOLERANCE:.0e} allowed: "
            "train in float32 or report this backbone"
        )
    return worst
