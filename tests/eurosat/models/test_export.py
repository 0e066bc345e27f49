"""The exported graph: optional views, energy, class maps, and INT8."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from eurosat.evaluation import calibration
from eurosat.models import onnx_session
from eurosat.models.export import export_onnx
from eurosat.models.network import Network, dihedral_views
from eurosat.models.quantise import export_int8
from tests.support.networks import build

Tiles = npt.NDArray[np.uint8]


def tiles(count: int, side: int = 32) -> Tiles:
    drawn = np.random.default_rng(0).integers(0, 256, (count, side, side, 3))
    return drawn.astype(np.uint8)


@torch.inference_mode()
def logits(net: Network, tiles_NHWC: Tiles) -> npt.NDArray[np.float64]:
    """Return logits before calibration, averaged over the network's own views."""
    tiles_NCHW = torch.from_numpy(tiles_NHWC).permute(0, 3, 1, 2)
    return net.eval().logits(tiles_NCHW).double().numpy()


def run(file: Path, tiles_NHWC: Tiles, **options: Any) -> dict[str, npt.NDArray[np.float32]]:
    session = onnx_session.open_session(file)
    names = [node.name for node in session.get_outputs()]
    inputs = {"tiles_NHWC": tiles_NHWC}
    inputs |= {name: np.array(value) for name, value in options.items()}
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("views", [1, 8])
def test_the_input_tta_is_optional_and_defaults_to_the_networks_own_views(
    tmp_path: Path, views: Any
) -> None:
    net = build(views=views)
    net.temperature.fill_(1.7)
    file = tmp_path / "m.onnx"
    export_onnx(net, file)
    batch = tiles(5)
    with net.single_view():
        single = calibration.softmax(logits(net, batch) / 1.7)
    tiles_NCHW = torch.from_numpy(batch).permute(0, 3, 1, 2)
    with net.single_view(), torch.inference_mode():
        each = [net.eval().logits(view).double().numpy() for view in dihedral_views(tiles_NCHW)]
    averaged = calibration.softmax(np.mean(each, axis=0) / 1.7)
    outputs = {tta: run(file, batch, tta=tta)["probabilities"] for tta in (True, False)}
    np.testing.assert_allclose(outputs[True], averaged, atol=1e-5)
    np.testing.assert_allclose(outputs[False], single, atol=1e-5)
    np.testing.assert_array_equal(run(file, batch)["probabilities"], outputs[views > 1])


def test_energy_is_that_of_the_logits_before_calibration(tmp_path: Path) -> None:
    net = build(views=8)
    net.temperature.fill_(0.5)
    export_onnx(net, tmp_path / "m.onnx")
    batch = tiles(4)
    expected = calibration.energy(logits(net, batch))
    np.testing.assert_allclose(run(tmp_path / "m.onnx", batch)["energy"], expected, atol=1e-4)


def test_the_mean_of_a_class_map_is_its_logit(tmp_path: Path) -> None:
    """As in Zhou et al. (2016); the maps are those of the first view."""
    net = build(input_size=96, views=8)
    export_onnx(net, tmp_path / "m.onnx")
    batch = tiles(3)
    with net.single_view():
        single = logits(net, batch)
    maps = run(tmp_path / "m.onnx", batch)["activation"]
    assert maps.shape[:2] == (3, 4)
    assert maps.shape[2] * maps.shape[3] > 1
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), single, atol=1e-3)


def test_a_transformer_has_no_class_maps(tmp_path: Path) -> None:
    export_onnx(build("test_vit", input_size=160), tmp_path / "m.onnx")
    assert set(run(tmp_path / "m.onnx", tiles(2))) == {"probabilities", "energy"}


def test_int8_gives_nearly_the_same_outputs_from_a_smaller_file(
    tmp_path: Path,
) -> None:
    net = build("resnet18", views=8)
    fp32, int8 = tmp_path / "m.onnx", tmp_path / "m.int8.onnx"
    export_onnx(net, fp32)
    export_int8(net, tiles(64), int8, {"run_id": "r"})
    batch = tiles(32)
    expected, quantised = run(fp32, batch), run(int8, batch)
    assert quantised.keys() == expected.keys()
    for name, values in expected.items():
        spread = float(np.max(values) - np.min(values))
        assert np.abs(quantised[name] - values).max() < 0.1 * max(spread, 0.1), name
    assert int8.stat().st_size < 0.3 * fp32.stat().st_size
    metadata = onnx_session.open_session(int8).get_modelmeta().custom_metadata_map
    assert metadata["run_id"] == "r"
