"""Batches of tiles: their order, their size and their memory."""

import numpy as np
import torch

from eurosat.data.loaders import TileLoader, band_statistics
from eurosat.data.pack import Pack


def test_every_epoch_has_each_tile_once_in_its_own_order(tiny_pack: Pack) -> None:
    rows = np.arange(100)
    first, second, again = (TileLoader(tiny_pack, rows, 20, seed) for seed in (1, 2, 1))
    orders = [
        [int(t) for _, labels in batches for t in labels] for batches in (first, second, again)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(tiny_pack.labels[rows].tolist())
    first.epoch = 1
    assert [int(t) for _, labels in first for t in labels] != orders[0]


def test_evaluation_has_every_tile_and_training_only_full_batches(tiny_pack: Pack) -> None:
    rows = np.arange(50)
    assert [len(labels) for _, labels in TileLoader(tiny_pack, rows, 20)] == [20, 20, 10]
    assert [len(labels) for _, labels in TileLoader(tiny_pack, rows, 20, seed=0)] == [20, 20]
    assert [len(labels) for _, labels in TileLoader(tiny_pack, rows, 64, seed=0)] == [50]
    passes = [
        labels for _, labels in TileLoader(tiny_pack, rows[:6], 4, seed=0, repeats_per_epoch=4)
    ]
    assert [len(labels) for labels in passes] == [4] * 6
    labels = np.sort(np.concatenate(passes))
    np.testing.assert_array_equal(labels, np.sort(np.repeat(tiny_pack.labels[rows[:6]], 4)))


def test_preloaded_batches_are_those_of_the_pack(tiny_pack: Pack) -> None:
    rows = np.arange(30, 90)
    streamed, preloaded = (
        TileLoader(tiny_pack, rows, 20, seed=1),
        TileLoader(tiny_pack, rows, 20, seed=1),
    )
    preloaded.preload(torch.device("cpu"))
    assert preloaded.nbytes == 60 * 32 * 32 * 3
    for (tiles, labels), batch in zip(streamed, preloaded, strict=True):
        assert torch.equal(batch[0], tiles)
        assert torch.equal(batch[1], labels)
        assert batch[0].is_contiguous(memory_format=torch.channels_last)


def test_batches_are_channels_last_views_of_the_pack(tiny_pack: Pack) -> None:
    tiles, labels = next(iter(TileLoader(tiny_pack, np.arange(8), 8)))
    assert tiles.shape == (8, 3, 32, 32)
    assert tiles.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(tiles.permute(0, 2, 3, 1).numpy(), tiny_pack.tiles_NHWC[:8])
    assert labels.tolist() == tiny_pack.labels[:8].tolist()


def test_band_statistics_are_those_of_the_pixels(tiny_pack: Pack) -> None:
    mean, std = band_statistics(tiny_pack, np.arange(200))
    pixels = tiny_pack.tiles_NHWC.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(std, pixels.std(axis=0), atol=1e-3)
