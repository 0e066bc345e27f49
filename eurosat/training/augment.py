"""Augmentation of whole batches on the training device."""

import torch
from torch import Tensor

from eurosat.config import AugmentConfig


def dihedral(tiles_NCHW: Tensor) -> Tensor:
    """Give each tile one of the eight flips and turns (four where H differs from W).

    The first is drawn, the others follow by their place: of tiles in random order, as those of a
    training are, each has any of them, and a batch has as many of one as of another.
    """
    count = 8 if tiles_NCHW.shape[-1] == tiles_NCHW.shape[-2] else 4
    first = int(torch.randint(count, ()))
    turned_NCHW = torch.empty_like(tiles_NCHW)
    for place in range(min(count, len(tiles_NCHW))):
        some, number = tiles_NCHW[place::count], (first + place) % count
        if flipped := [axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit]:
            some = some.flip(flipped)
        turned_NCHW[place::count] = some.transpose(-1, -2) if number & 4 else some
    return turned_NCHW


def jitter(tiles_NCHW: Tensor, brightness: float, contrast: float) -> Tensor:
    """Scale each tile's level and its spread about the tile's mean; pixels stay in [0, 255]."""
    gain, spread = (
        1 + amount * (2 * torch.rand(len(tiles_NCHW), 1, 1, 1, device=tiles_NCHW.device) - 1)
        for amount in (brightness, contrast)
    )
    mean = tiles_NCHW.mean(dim=(1, 2, 3), keepdim=True)
    return ((tiles_NCHW - mean) * spread + mean * gain).clamp(0, 255)


def tint(tiles_NCHW: Tensor, amount: float) -> Tensor:
    """Scale each band of each tile by itself; pixels stay in [0, 255]."""
    shape = (*tiles_NCHW.shape[:2], 1, 1)
    gain = 1 + amount * (2 * torch.rand(shape, device=tiles_NCHW.device) - 1)
    return (tiles_NCHW * gain).clamp(0, 255)


def mixup(tiles_NCHW: Tensor, targets_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Lay another tile over each, in a share that is even in [0, 1] (Zhang et al. 2018)."""
    partner = torch.randperm(len(tiles_NCHW), device=tiles_NCHW.device)
    share = float(torch.rand(()))
    return torch.lerp(tiles_NCHW, tiles_NCHW[partner], share), torch.lerp(
        targets_NK, targets_NK[partner], share
    )


def cutmix(tiles_NCHW: Tensor, targets_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Paste one box of another tile into each and mix the targets by area (Yun et al. 2019)."""
    height, width = tiles_NCHW.shape[-2:]
    partner = torch.randperm(len(tiles_NCHW), device=tiles_NCHW.device)
    share, x, y = torch.rand(3).tolist()  # of the box, and its centre
    half_h, half_w = height * share**0.5 / 2, width * share**0.5 / 2
    top, bottom = (int(min(max(y * height + s * half_h, 0), height)) for s in (-1, 1))
    left, right = (int(min(max(x * width + s * half_w, 0), width)) for s in (-1, 1))
    mixed = tiles_NCHW.clone()
    mixed[:, :, top:bottom, left:right] = tiles_NCHW[partner, :, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return mixed, (1 - pasted) * targets_NK + pasted * targets_NK[partner]


def augment(tiles_NCHW: Tensor, targets_NK: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """uint8 tiles and (N, K) targets in, float tiles in [0, 255] and mixed targets out."""
    if config.dihedral:
        tiles_NCHW = dihedral(tiles_NCHW)
    tiles_NCHW = tiles_NCHW.float()
    if config.brightness or config.contrast:
        tiles_NCHW = jitter(tiles_NCHW, config.brightness, config.contrast)
    if config.colour:
        tiles_NCHW = tint(tiles_NCHW, config.colour)
    if mixed := config.cutmix + config.mixup:
        drawn = float(torch.rand(()))
        if drawn < config.cutmix:
            return cutmix(tiles_NCHW, targets_NK)
        if drawn < mixed:
            return mixup(tiles_NCHW, targets_NK)
    return tiles_NCHW, targets_NK
