"""What a network answers for the tiles of a fold."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eurosat.data.arrays import Floats, Labels
from eurosat.data.loaders import TileLoader
from eurosat.models import cpu_convolutions
from eurosat.models.network import Network
from eurosat.runtime.progress import track


def logits(network: Network, batches: TileLoader) -> tuple[Floats, Labels]:
    """(N, K) logits before calibration, and (N,) labels; on the GPU where there is one."""
    (logits_NK,), labels = run_over(
        network, batches, lambda tiles_NCHW: (network.logits(tiles_NCHW),)
    )
    return logits_NK, labels


def logits_and_first_view(network: Network, batches: TileLoader) -> tuple[Floats, Floats, Labels]:
    """`logits`, those of the first view alone, and labels, in one look at the tiles."""

    def ask(tiles_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        views = network.logits_per_view(tiles_NCHW)
        return views.mean(dim=0), views[0]

    (logits_NK, first_NK), labels = run_over(network, batches, ask)
    return logits_NK, first_NK, labels


def run_over(
    network: Network, batches: TileLoader, ask: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[list[Floats], Labels]:
    """What ``ask`` tells of each tile, with the network in its evaluation mode; and labels."""
    each, labels = [], []
    home = network.mean.device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)  # weights that move in inference mode can never be changed again
    with torch.inference_mode(), cpu_convolutions.fast():
        for tiles_NCHW, batch_labels in track(
            batches, len(batches), "predicting", f"x {batches.batch_size} tiles"
        ):
            each.append([one.double().cpu().numpy() for one in ask(tiles_NCHW.to(device))])
            labels.append(batch_labels.cpu().numpy())
    network.to(home)
    return [np.concatenate(ones) for ones in zip(*each, strict=True)], np.concatenate(labels)
