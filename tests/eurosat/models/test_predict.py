"""Running a network over the tiles of a fold."""

import numpy as np

from eurosat.data.loaders import TileLoader
from eurosat.data.prepare import PreparedData
from eurosat.models.predict import logits as logits_of
from eurosat.models.predict import logits_and_first_view
from tests.support.networks import build as build_network


def test_one_pass_over_the_tiles_gives_the_logits_of_all_views_and_of_the_first(
    tiny_data: PreparedData,
) -> None:
    net = build_network(classes=10, views=8)
    batches = TileLoader(tiny_data.pack, tiny_data.split.indices("test"))
    passes: list[int] = []
    net.backbone.register_forward_hook(lambda _module, _inputs, output: passes.append(len(output)))
    mean, first, labels = logits_and_first_view(net, batches)
    assert len(passes) == 8 * len(batches), "the first view is not computed twice"
    expected, expected_labels = logits_of(net, batches)
    with net.single_view():
        single, _ = logits_of(net, batches)
    np.testing.assert_array_equal(mean, expected)
    np.testing.assert_array_equal(first, single)
    np.testing.assert_array_equal(labels, expected_labels)
    assert np.max(abs(first - mean)) > 1e-3, "one view is not the mean of eight"
