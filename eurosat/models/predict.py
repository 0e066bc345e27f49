"""Run a network on the tiles of a fold."""

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
    """Return logits before calibration, (N, K), and labels, (N,); on a GPU if there is one."""
    (logits_NK,), labels = run_over(
        network, batches, lambda tiles_NCHW: (network.logits(tiles_NCHW),)
    )
    return logits_NK, labels


def logits_and_first_view(network: Network, batches: TileLoader) -> tuple[Floats, Floats, Labels]:
    """Return logits over all views and of the first view, each (N, K), and labels, (N,).

    Each tile is passed through the network once per view.
    """

    def run_batch(tiles_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        views = network.logits_per_view(tiles_NCHW)
        return views.mean(dim=0), views[0]

    (logits_NK, first_NK), labels = run_over(network, batches, run_batch)
    return logits_NK, first_NK, labels


def run_over(
    network: Network, batches: TileLoader, run_batch: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[list[Floats], Labels]:
    """Return the outputs of ``run_batch`` over all batches, each as one array, and the labels.

    The network is in evaluation mode, on a GPU if there is one, and is moved back afterwards.
    """
    outputs, labels = [], []
    original_device = network.mean.device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)  # not in inference mode: weights moved there can never be trained
    with torch.inference_mode(), cpu_convolutions.fast():
        for tiles_NCHW, batch_labels in track(
            batches, len(batches), "predicting", f"x {batches.batch_size} tiles"
        ):
            results = run_batch(tiles_NCHW.to(device))
            outputs.append([result.double().cpu().numpy() for result in results])
            labels.append(batch_labels.cpu().numpy())
    network.to(original_device)
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)], np.concatenate(labels)
