"""The network as one ONNX file: uint8 pixels in, probabilities out.

The graph holds the network once. Before it, a switch turns tiles into all of their flips and turns
where that is asked for; after it, their logits are averaged, calibrated, and told as probabilities.
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
from eurosat.models.onnx_session import TILES, open_session

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of a probability between torch and ONNX Runtime, both in float32."""
SAME_LOGIT = 1e-3
"""Largest difference of a logit from the mean of its class's map, for the map to explain it."""
BEFORE_FIRST = int(np.iinfo(np.int64).min)
"""ONNX's end of a slice that goes backwards to the first element."""
VIEWS, LOGITS, MAPS = "views_NHWC", "view_logits", "view_maps"
"""Tensors of the graph: what the network in it is given, and what it gives."""


class _OneView(nn.Module):
    """Tiles to logits before calibration and, where the head is an average and one layer, to the
    map of each class that its logit is the mean of (Zhou et al. 2016).
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.mapped = False
        head: Any = network.backbone.get_classifier()  # type: ignore[operator]
        self.head = head if isinstance(head, nn.Linear) else None

    def features(self, views_NHWC: Tensor) -> Tensor:
        backbone: Any = self.network.backbone
        prepared = self.network.preprocess(views_NHWC.permute(0, 3, 1, 2))
        features: Tensor = backbone.forward_features(prepared)
        return features

    def forward(self, views_NHWC: Tensor) -> tuple[Tensor, ...]:
        backbone: Any = self.network.backbone
        features = self.features(views_NHWC)
        logits = backbone.forward_head(features)
        if not self.mapped or self.head is None:
            return (logits,)
        weight = self.head.weight[:, :, None, None]
        return logits, functional.conv2d(features, weight, self.head.bias)

    @torch.inference_mode()
    def find_maps(self, views_NHWC: Tensor) -> None:
        """Tell maps too, if the logits are their means."""
        features = self.features(views_NHWC)
        if self.head is None or features.ndim != 4 or features.shape[1] != self.head.in_features:
            return
        self.mapped = True
        logits, maps = self(views_NHWC)
        self.mapped = bool((maps.mean(dim=(2, 3)) - logits).abs().max() < SAME_LOGIT)


def export_onnx(
    network: Network,
    file: Path,
    metadata: Mapping[str, str] | None = None,
    alone: bytes | None = None,
) -> float:
    """Write ``file`` and return the largest difference from torch on random tiles.

    Input ``tiles_NHWC`` uint8 (N, H, W, C); ``tta``, a bool that need not be given, says whether to
    look at all flips and turns, as the network itself does where its spec has more than one view.
    Outputs ``probabilities`` (N, K), ``energy`` (N,) of the logits before calibration, and for a
    network whose head is an average and one layer ``activation`` (N, K, h, w), where each class was
    seen. The metadata carry ``classes``, ``tile_size``, ``bands`` and ``views`` as JSON.
    ``alone`` is the network as `export_core` has made it, which takes seconds; None makes it here.

    Raises:
        ModelError: the file answers otherwise than the network.
    """
    import onnx

    network = network.eval().cpu()
    model = onnx.load_from_string(alone or export_core(network))
    onnx.save(wrap_with_tta(model, network, metadata or {}), str(file))
    return _check(network, file)


def export_core(network: Network) -> bytes:
    """The network alone as an ONNX model: views of tiles to logits and maps."""
    module = _OneView(network.cpu()).eval()
    tiles_NHWC = torch.from_numpy(_random_tiles(network.spec))
    module.find_maps(tiles_NHWC)
    outputs = [LOGITS, MAPS] if module.mapped else [LOGITS]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
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
                "served; take another model.name"
            ) from error
        return file.read_bytes()


def wrap_with_tta(
    model: "ModelProto", network: Network, metadata: Mapping[str, str]
) -> "ModelProto":
    """``model`` of `export_core` between the switch of views and the average of their answers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    spec, graph = network.spec, model.graph
    count = len(spec.classes)
    before = [
        helper.make_node("Shape", [TILES], ["tile_count"], start=0, end=1),
        helper.make_node(
            "If", ["tta"], [VIEWS], then_branch=_all_views(spec), else_branch=_as_it_is()
        ),
    ]
    after = [
        helper.make_node("Concat", ["any", "tile_count", "class_count"], ["per_view"], axis=0),
        helper.make_node("Reshape", [LOGITS, "per_view"], ["logits_VNK"]),
        helper.make_node("ReduceMean", ["logits_VNK", "first_axis"], ["logits"], keepdims=0),
        helper.make_node("Div", ["logits", "temperature"], ["calibrated"]),
        helper.make_node("Softmax", ["calibrated"], ["probabilities"], axis=1),
        helper.make_node("ReduceLogSumExp", ["logits", "last_axis"], ["knowing"], keepdims=0),
        helper.make_node("Neg", ["knowing"], ["energy"]),
    ]
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", count]),
        helper.make_tensor_value_info("energy", TensorProto.FLOAT, ["N"]),
    ]
    if any(output.name == MAPS for output in graph.output):
        after.append(helper.make_node("Slice", [MAPS, "none", "tile_count"], ["activation"]))
        shape: list[str | int | None] = ["N", count, "h", "w"]
        outputs.append(helper.make_tensor_value_info("activation", TensorProto.FLOAT, shape))
    constants = {
        "any": np.array([-1]),
        "none": np.array([0]),
        "class_count": np.array([count]),
        "first_axis": np.array([0]),
        "last_axis": np.array([1]),
        "temperature": network.temperature.numpy().astype(np.float32),
        "tta": np.array(spec.tta_views > 1),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    tiles: list[str | int | None] = ["N", *spec.tile_size, spec.bands]
    whole = helper.make_graph(
        [*before, *graph.node, *after],
        spec.name,
        [  # an input with an initializer need not be given
            helper.make_tensor_value_info(TILES, TensorProto.UINT8, tiles),
            helper.make_tensor_value_info("tta", TensorProto.BOOL, []),
        ],
        outputs,
        [*graph.initializer, *initializers],
    )
    made = helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version)
    described = {
        "classes": spec.classes,
        "tile_size": spec.tile_size,
        "bands": spec.bands,
        "views": spec.tta_views,
    }
    told = {name: json.dumps(value) for name, value in described.items()} | dict(metadata)
    helper.set_model_props(made, told)
    onnx.checker.check_model(made)
    return made


def _all_views(spec: NetworkSpec) -> "GraphProto":
    """As `eurosat.training.augment.dihedral_views`, one after another on the first axis."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[NodeProto] = []

    def constant(name: str, values: list[int]) -> str:
        tensor = numpy_helper.from_array(np.array(values, np.int64), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    views = [TILES]
    for name, axes in (("across", [2]), ("down", [1]), ("both", [1, 2])):
        backwards = [-1] * len(axes)
        slicing = {"starts": backwards, "ends": [BEFORE_FIRST] * len(axes), "axes": axes}
        slicing["steps"] = backwards
        said = [constant(f"{name}_{part}", values) for part, values in slicing.items()]
        nodes.append(helper.make_node("Slice", [TILES, *said], [name]))
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


def _as_it_is() -> "GraphProto":
    from onnx import TensorProto, helper

    node = helper.make_node("Identity", [TILES], ["one_view"])
    info = helper.make_tensor_value_info("one_view", TensorProto.UINT8, None)
    return helper.make_graph([node], "one_view_of_a_tile", [], [info])


def _random_tiles(spec: NetworkSpec) -> Any:
    shape = (3, *spec.tile_size, spec.bands)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@torch.inference_mode()
def _check(network: Network, file: Path) -> float:
    """In its own views, and looking once; a batch, and one tile."""
    session = open_session(file)
    tiles_NHWC = _random_tiles(network.spec)
    worst = 0.0
    for given in ({TILES: tiles_NHWC}, {TILES: tiles_NHWC[:1]}):
        tiles_NCHW = torch.from_numpy(given[TILES]).permute(0, 3, 1, 2)
        (answered,) = session.run(["probabilities"], given)
        expected = network(tiles_NCHW).softmax(dim=1).numpy()
        (once,) = session.run(["probabilities"], given | {"tta": np.array(False)})
        with network.single_view():
            alone = network(tiles_NCHW).softmax(dim=1).numpy()
        for one, other in ((answered, expected), (once, alone)):
            worst = max(worst, float(np.abs(one - other).max()))
    if not worst <= TOLERANCE:
        raise ModelError(
            f"{file} differs from the network by {worst:.1e}, over the {TOLERANCE:.0e} allowed: "
            "train in float32 or report this backbone"
        )
    return worst
