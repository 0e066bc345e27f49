"""The network as one ONNX file: uint8 pixels in, probabilities out.

The graph holds the network once. Before it, the input ``tta`` chooses between the tiles themselves
and all their flips and turns; after it, the logits of all views are averaged and calibrated.
"""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eurosat.errors import ModelError
from eurosat.models.network import Network, NetworkSpec
from eurosat.models.onnx_session import TILES, TTA, open_session

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

OPSET = 20
TOLERANCE = 1e-4
"""Largest accepted difference of a probability between torch and ONNX Runtime in float32."""
MAX_LOGIT_DIFFERENCE = 1e-3
"""A class's map is exported only if its mean differs from the logit by less than this."""
SLICE_TO_START = int(np.iinfo(np.int64).min)
"""End of an ONNX slice that runs backwards to the first element."""
VIEWS, LOGITS, MAPS = "views_NHWC", "view_logits", "view_maps"
"""Names of the input and the outputs of the network inside the graph."""


class _SingleView(nn.Module):
    """Maps views of tiles to logits before calibration and, if the backbone has them, class maps.

    If the head is an average and one linear layer, each logit is the mean of a map of its class
    (Zhou et al. 2016).
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.has_maps = False
        head: Any = network.backbone.get_classifier()  # type: ignore[operator]
        self.head = head if isinstance(head, nn.Linear) else None

    def features(self, views_NHWC: Tensor) -> Tensor:
        backbone: Any = self.network.backbone
        views = self.network.preprocess(views_NHWC.permute(0, 3, 1, 2))
        features: Tensor = backbone.forward_features(views)
        return features

    def forward(self, views_NHWC: Tensor) -> tuple[Tensor, ...]:
        backbone: Any = self.network.backbone
        features = self.features(views_NHWC)
        logits = backbone.forward_head(features)
        if not self.has_maps or self.head is None:
            return (logits,)
        weight = self.head.weight[:, :, None, None]
        return logits, functional.conv2d(features, weight, self.head.bias)

    @torch.inference_mode()
    def detect_maps(self, views_NHWC: Tensor) -> None:
        """Add the maps to the outputs if their means are the logits."""
        features = self.features(views_NHWC)
        if self.head is None or features.ndim != 4 or features.shape[1] != self.head.in_features:
            return
        self.has_maps = True
        logits, maps = self(views_NHWC)
        self.has_maps = bool((maps.mean(dim=(2, 3)) - logits).abs().max() < MAX_LOGIT_DIFFERENCE)


def export_onnx(
    network: Network,
    file: Path,
    metadata: Mapping[str, str] | None = None,
    core: bytes | None = None,
) -> float:
    """Write ``file`` and return the largest difference from torch on random tiles.

    Inputs: ``tiles_NHWC``, uint8 (N, H, W, C), and optionally ``tta``, a bool: whether to average
    over all flips and turns. By default it is true if the network's spec has more than one view.
    Outputs: ``probabilities`` (N, K); ``energy`` (N,) of the logits before calibration; and, if
    the head is an average and one linear layer, ``activation`` (N, K, h, w), the map of each class.
    The metadata hold ``classes``, ``tile_size``, ``bands`` and ``views`` as JSON.
    ``core`` is the result of `export_core`, which takes seconds; None computes it here.

    Raises:
        ModelError: torch cannot export the network, or the file gives other probabilities.
    """
    import onnx

    network = network.eval().cpu()
    model = onnx.load_from_string(core or export_core(network))
    onnx.save(wrap_with_tta(model, network, metadata or {}), str(file))
    return _largest_difference(network, file)


def export_core(network: Network) -> bytes:
    """Return the network as a serialised ONNX model: views of tiles to logits and maps.

    Raises:
        ModelError: torch cannot export it.
    """
    module = _SingleView(network.cpu()).eval()
    tiles_NHWC = torch.from_numpy(_random_tiles(network.spec))
    module.detect_maps(tiles_NHWC)
    outputs = [LOGITS, MAPS] if module.has_maps else [LOGITS]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        file = Path(folder) / "one_view.onnx"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(
                    module,
                    (tiles_NHWC,),
                    str(file),
                    dynamo=True,
                    external_data=False,
                    opset_version=OPSET,
                    input_names=[VIEWS],
                    output_names=outputs,
                    dynamic_shapes=({0: torch.export.Dim("views", min=1)},),
                )
        except torch.onnx.OnnxExporterError as error:
            raise ModelError(
                f"torch cannot export {network.spec.name} to ONNX "
                f"({str(error).splitlines()[0]}): its weights are in the run, but it cannot be "
                "served; set another model.name"
            ) from error
        return file.read_bytes()


def wrap_with_tta(
    model: "ModelProto", network: Network, metadata: Mapping[str, str]
) -> "ModelProto":
    """Return ``model`` of `export_core` with views before it and their average behind it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    spec, graph = network.spec, model.graph
    before = [
        helper.make_node("Shape", [TILES], ["tile_count"], start=0, end=1),
        helper.make_node(
            "If", [TTA], [VIEWS], then_branch=_all_views(spec), else_branch=_identity_view()
        ),
    ]
    after, outputs = _average_views(graph, spec)
    constants = {
        "any_size": np.array([-1]),
        "zero": np.array([0]),
        "class_count": np.array([len(spec.classes)]),
        "first_axis": np.array([0]),
        "last_axis": np.array([1]),
        "temperature": network.temperature.numpy().astype(np.float32),
        TTA: np.array(spec.tta_views > 1),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    tiles_shape: list[str | int | None] = ["N", *spec.tile_size, spec.bands]
    wrapped = helper.make_graph(
        [*before, *graph.node, *after],
        spec.name,
        [  # an input with an initializer is optional
            helper.make_tensor_value_info(TILES, TensorProto.UINT8, tiles_shape),
            helper.make_tensor_value_info(TTA, TensorProto.BOOL, []),
        ],
        outputs,
        [*graph.initializer, *initializers],
    )
    result = helper.make_model(
        wrapped, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    description = {
        "classes": spec.classes,
        "tile_size": spec.tile_size,
        "bands": spec.bands,
        "views": spec.tta_views,
    }
    properties = {name: json.dumps(value) for name, value in description.items()} | dict(metadata)
    helper.set_model_props(result, properties)
    onnx.checker.check_model(result)
    return result


def _average_views(
    graph: "GraphProto", spec: NetworkSpec
) -> "tuple[list[NodeProto], list[ValueInfoProto]]":
    """Return the nodes from the logits of all views to the outputs, and the outputs."""
    from onnx import TensorProto, helper

    count = len(spec.classes)
    nodes = [
        helper.make_node("Concat", ["any_size", "tile_count", "class_count"], ["per_view"], axis=0),
        helper.make_node("Reshape", [LOGITS, "per_view"], ["logits_VNK"]),
        helper.make_node("ReduceMean", ["logits_VNK", "first_axis"], ["logits"], keepdims=0),
        helper.make_node("Div", ["logits", "temperature"], ["calibrated"]),
        helper.make_node("Softmax", ["calibrated"], ["probabilities"], axis=1),
        helper.make_node("ReduceLogSumExp", ["logits", "last_axis"], ["log_sum"], keepdims=0),
        helper.make_node("Neg", ["log_sum"], ["energy"]),
    ]
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", count]),
        helper.make_tensor_value_info("energy", TensorProto.FLOAT, ["N"]),
    ]
    if any(output.name == MAPS for output in graph.output):  # those of the first view
        nodes.append(helper.make_node("Slice", [MAPS, "zero", "tile_count"], ["activation"]))
        shape: list[str | int | None] = ["N", count, "h", "w"]
        outputs.append(helper.make_tensor_value_info("activation", TensorProto.FLOAT, shape))
    return nodes, outputs


def _all_views(spec: NetworkSpec) -> "GraphProto":
    """Return a graph that stacks the views of `network.dihedral_views` on the first axis."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[NodeProto] = []

    def constant(name: str, values: list[int]) -> str:
        tensor = numpy_helper.from_array(np.array(values, np.int64), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    views = [TILES]
    for name, axes in (("across", [2]), ("down", [1]), ("both", [1, 2])):
        backwards = [-1] * len(axes)
        slicing = {"starts": backwards, "ends": [SLICE_TO_START] * len(axes), "axes": axes}
        slicing["steps"] = backwards
        inputs = [constant(f"{name}_{part}", values) for part, values in slicing.items()]
        nodes.append(helper.make_node("Slice", [TILES, *inputs], [name]))
        views.append(name)
    if spec.tile_size[0] == spec.tile_size[1]:
        for name in tuple(views):
            nodes.append(
                helper.make_node("Transpose", [name], [f"{name}_turned"], perm=[0, 2, 1, 3])
            )
            views.append(f"{name}_turned")
    nodes.append(helper.make_node("Concat", views, ["all_views"], axis=0))
    info = helper.make_tensor_value_info("all_views", TensorProto.UINT8, None)
    return helper.make_graph(nodes, "all_views_of_a_tile", [], [info])


def _identity_view() -> "GraphProto":
    from onnx import TensorProto, helper

    node = helper.make_node("Identity", [TILES], ["one_view"])
    info = helper.make_tensor_value_info("one_view", TensorProto.UINT8, None)
    return helper.make_graph([node], "one_view_of_a_tile", [], [info])


def _random_tiles(spec: NetworkSpec) -> Any:
    shape = (3, *spec.tile_size, spec.bands)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@torch.inference_mode()
def _largest_difference(network: Network, file: Path) -> float:
    """Return the largest difference of a probability, with and without TTA, for 1 and 3 tiles.

    Raises:
        ModelError: it is above `TOLERANCE`.
    """
    session = open_session(file)
    tiles_NHWC = _random_tiles(network.spec)
    largest = 0.0
    for batch_NHWC in (tiles_NHWC, tiles_NHWC[:1]):
        tiles_NCHW = torch.from_numpy(batch_NHWC).permute(0, 3, 1, 2)
        inputs = {TILES: batch_NHWC}
        expected = network(tiles_NCHW).softmax(dim=1).numpy()
        (exported,) = session.run(["probabilities"], inputs)
        with network.single_view():
            expected_single = network(tiles_NCHW).softmax(dim=1).numpy()
        (exported_single,) = session.run(["probabilities"], inputs | {TTA: np.array(False)})
        for actual, reference in ((exported, expected), (exported_single, expected_single)):
            largest = max(largest, float(np.abs(actual - reference).max()))
    if not largest <= TOLERANCE:
        raise ModelError(
            f"{file} differs from the network by {largest:.1e}, over the {TOLERANCE:.0e} allowed: "
            "train with trainer.precision=fp32, or report this backbone"
        )
    return largest
