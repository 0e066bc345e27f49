"""Small networks for tests."""

from typing import Literal

import torch

from eurosat.config import ModelConfig
from eurosat.models.network import Network
from eurosat.models.pretrained import create

STEMS: tuple[Literal["stock", "small"], ...] = ("stock", "small")


def build(
    name: str = "test_resnet",
    weights: str = "none",
    classes: int = 4,
    bands: int = 3,
    input_size: int | None = None,
    views: Literal[1, 8] = 1,
    stem: Literal["stock", "small"] = "stock",
) -> Network:
    torch.manual_seed(0)
    return create(
        ModelConfig(name=name, input_size=input_size, tta_views=views, stem=stem),
        weights,
        classes=[f"c{k}" for k in range(classes)],
        bands=bands,
        tile_size=(32, 32),
        mean=[100.0] * bands,
        std=[50.0] * bands,
    )
