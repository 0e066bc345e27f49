"""The exported graph: views by a switch, energy, maps, and the form in whole numbers."""

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
    """Before calibration, in the network's own views."""
    tiles_NCHW = torch.from_numpy(tiles_NHWC).permute(0, 3, 1, 2)
    return net.eval().logits(tiles_NCHW).double().numpy()


def ask(file: Path, tiles_NHWC: Tiles, **more: Any) -> dict[str, npt.NDArray[np.float32]]:
    session = onnx_session.open_session(file)
    names = [node.name for node in session.get_outputs()]
    given = {"tiles_NHWC": tiles_NHWC} | {name: np.array(value) for name, value in more.items()}
    return dict(zip(names, session.run(names, given), strict=True))


@pytest.mark.parametrize("views", [1, 8])
def test_the_switch_of_views_may_be_left_as_the_network_was_judged(
    tmp_path: Path, views: Any
) -> None:
    net = build(views=views)
    net.temperature.fill_(1.7)
    file = tmp_path / "m.onnx"
    export_onnx(net, file)
    some = tiles(5)
    with net.single_view():
        alone = calibration.softmax(logits(net, some) / 1.7)
    tiles_NCHW = torch.from_numpy(some).permute(0, 3, 1, 2)
    with net.single_view(), torch.inference_mode():
        each = [net.eval().logits(view).double().numpy() for view in dihedral_views(tiles_NCHW)]
    together = calibration.softmax(np.mean(each, axis=0) / 1.7)
    told = {tta: ask(file, some, tta=tta)["probabilities"] for tta in (True, False)}
    np.testing.assert_allclose(told[True], together, atol=1e-5)
    np.testing.assert_allclose(told[False], alone, atol=1e-5)
    np.testing.assert_array_equal(ask(file, some)["probabilities"], told[views > 1])


def test_energy_is_that_of_the_logits_before_calibration(tmp_path: Path) -> None:
    net = build(views=8)
    net.temperature.fill_(0.5)
    export_onnx(net, tmp_path / "m.onnx")
    some = tiles(4)
    expected = calibration.energy(logits(net, some))
    np.testing.assert_allclose(ask(tmp_path / "m.onnx", some)["energy"], expected, atol=1e-4)


def test_a_class_is_as_likely_as_its_map_is_bright(tmp_path: Path) -> None:
    """The mean of each map is the logit of its class (Zhou et al. 2016), of the tile as it is."""
    net = build(input_size=96, views=8)
    export_onnx(net, tmp_path / "m.onnx")
    some = tiles(3)
    with net.single_view():
        alone = logits(net, some)
    maps = ask(tmp_path / "m.onnx", some)["activation"]
    assert maps.shape[:2] == (3, 4)
    assert maps.shape[2] * maps.shape[3] > 1
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), alone, atol=1e-3)


def test_a_transformer_has_no_maps(tmp_path: Path) -> None:
    export_onnx(build("test_vit", input_size=160), tmp_path / "m.onnx")
    assert set(ask(tmp_path / "m.onnx", tiles(2))) == {"probabilities", "energy"}


def test_whole_numbers_answer_nearly_as_the_network_does_from_a_smaller_file(
    tmp_path: Path,
) -> None:
    net = build("resnet18", views=8)
    whole, int8 = tmp_path / "m.onnx", tmp_path / "m.int8.onnx"
    export_onnx(net, whole)
    export_int8(net, tiles(64), int8, {"run_id": "r"})
    some = tiles(32)
    exact, rounded = ask(whole, some), ask(int8, some)
    assert rounded.keys() == exact.keys()
    for name, values in exact.items():
        spread = float(values.max() - values.min())
        assert np.abs(rounded[name] - values).max() < 0.1 * max(spread, 0.1), name
    assert int8.stat().st_size < 0.3 * whole.stat().st_size
    described = onnx_session.open_session(int8).get_modelmeta().custom_metadata_map
    assert described["run_id"] == "r"
