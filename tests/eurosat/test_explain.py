"""Explanations: heat maps lie on the evidence, and a page needs no other file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eurosat import explain, tracking, train
from eurosat.config import ModelConfig, compose
from eurosat.data.prepare import PreparedData
from eurosat.errors import DataError
from eurosat.evaluation import gradcam
from eurosat.models.network import Network
from eurosat.models.pretrained import create
from eurosat.runtime import exit_codes
from tests.support.markup import assert_page_is_inert
from tests.support.recipes import TINY


def texture_finder() -> Network:
    """Train a network for a few steps to tell a patch of stripes from one of dots."""
    torch.manual_seed(0)
    net = create(
        ModelConfig(name="test_resnet"),
        "none",
        classes=["stripes", "dots"],
        bands=3,
        tile_size=(64, 64),
        mean=[60.0] * 3,
        std=[60.0] * 3,
    )
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(60):
        tiles, labels, _ = patches(step)
        loss: Any = torch.nn.functional.cross_entropy(net(tiles), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def patches(seed: int, count: int = 16) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return tiles, labels (0 stripes, 1 dots), and whether the patch is in the right half."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(20, 60, (count, 3, 64, 64)).astype(np.float32)
    labels, right = rng.integers(0, 2, count), rng.integers(0, 2, count)
    for tile, label, side in zip(tiles, labels, right, strict=True):
        top, left = rng.integers(4, 40), rng.integers(2, 10) + 34 * side
        patch = tile[:, top : top + 20, left : left + 20]
        if label:
            patch[:, ::4, ::4] = 250
        else:
            patch[:, ::4] = 250
    return torch.from_numpy(tiles), torch.from_numpy(labels), right


def test_heat_lies_on_the_evidence() -> None:
    net = texture_finder()
    tiles, labels, right = patches(999, 64)
    assert (net(tiles).argmax(dim=1) == labels).float().mean() > 0.95
    heat = gradcam.heat_maps(net, tiles, labels.numpy())
    assert heat.shape == (64, 64, 64)
    assert np.min(heat) >= 0
    assert np.max(heat) <= 1
    on_right = heat[:, :, 32:].sum(axis=(1, 2)) > heat[:, :, :32].sum(axis=(1, 2))
    assert (on_right == right).mean() > 0.8


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", None), ("test_vit", 160), ("test_efficientnet", None)]
)
def test_convolutions_and_transformers_can_be_explained(name: str, size: int | None) -> None:
    net = create(
        ModelConfig(name=name, input_size=size),
        "none",
        classes=["a", "b", "c"],
        bands=3,
        tile_size=(64, 64),
        mean=[100.0] * 3,
        std=[50.0] * 3,
    )
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    first, second = gradcam.explain(net, tiles, ["a/x.jpg", "y.jpg"], ["a", None])
    assert first.heat.shape[0] == first.heat.shape[1]
    assert second.heat_expected is None
    assert (first.heat_expected is None) == (first.label == "a")


@pytest.mark.usefixtures("tracking_store")
def test_a_page_is_written_and_stored_in_the_run(
    tiny_data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([*TINY, "trainer.epochs=1"])
    with tracking.run("e", "r", system_metrics=False) as run:
        train.train(config, tiny_data, run)
    file = tmp_path / "Forest" / "mine <b>.png"
    file.parent.mkdir()
    Image.fromarray(tiny_data.pack.tiles_NHWC[0]).save(file)
    tile_name = tiny_data.pack.table["path"].iloc[7]
    args = [run.run_id, str(file), tile_name, "--out", str(tmp_path / "page")]
    assert explain.main([*args, "--log-level", "warning"]) == exit_codes.OK
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[:2]]
    assert [row[1] for row in rows] == ["Forest", tile_name.split("/")[0]]
    text = (tmp_path / "page/explained.html").read_text()
    assert text.count("<img") >= 4
    assert "mine &lt;b&gt;.png" in text
    assert 'src="data:image/png;base64,' in text
    assert_page_is_inert(text)
    with Image.open(tmp_path / "page/explained.png") as picture:
        assert picture.width > 500
    assert explain.main([run.run_id, tile_name, "--log-level", "warning"]) == exit_codes.OK
    with tracking.artifact(run.run_id, "explanations") as folder:
        first, second = folder.iterdir()
        for page in (first, second):
            assert {file.name for file in page.iterdir()} == {"explained.html", "explained.png"}

    with pytest.raises(DataError, match="Nowhere/x.jpg is neither a file nor a tile of synthetic"):
        explain.main([run.run_id, "Nowhere/x.jpg"])
    Image.new("RGB", (20, 20)).save(file)
    with pytest.raises(DataError, match=r"is \(20, 20, 3\), the network was trained on \(32, 32"):
        explain.main([run.run_id, str(file)])
