"""Augment whole batches on the training device."""

import torch
from torch import Tensor

from eurosat.config import AugmentConfig


def dihedral(tiles_NCHW: Tensor) -> Tensor:
    """Return each tile in one of its eight flips and turns (four if H differs from W).

    One draw chooses the view of the first tile, and the others follow in a cycle. Tiles are in
    random order, so that each gets any view, and all views occur equally often in a batch.
    """
    count = 8 if tiles_NCHW.shape[-1] == tiles_NCHW.shape[-2] else 4
    first = int(torch.randint(count, ()))
    turned_NCHW = torch.empty_like(tiles_NCHW)
    for position in range(min(count, len(tiles_NCHW))):
        subset, view = tiles_NCHW[position::count], (first + position) % count
        if axes := [axis for axis, bit in ((-1, 1), (-2, 2)) if view & bit]:
            subset = subset.flip(axes)
        turned_NCHW[position::count] = subset.transpose(-1, -2) if view & 4 else subset
    return turned_NCHW


def jitter(tiles_NCHW: Tensor, brightness: float, contrast: float) -> Tensor:
    """Change brightness and contrast of each tile at random; pixels stay in [0, 255].

    ``brightness`` and ``contrast`` are the largest relative changes of the tile's mean and of the
    spread around it.
    """
    gain, spread = (
        1 + amount * (2 * torch.rand(len(tiles_NCHW), 1, 1, 1, device=tiles_NCHW.device) - 1)
        for amount in (brightness, contrast)
    )
    mean = tiles_NCHW.mean(dim=(1, 2, 3), keepdim=True)
    return ((tiles_NCHW - mean) * spread + mean * gain).clamp(0, 255)


def tint(tiles_NCHW: Tensor, amount: float) -> Tensor:
    """Scale each band of each tile by up to ``amount``; pixels stay in [0, 255]."""
    shape = (*tiles_NCHW.shape[:2], 1, 1)
    gain = 1 + amount * (2 * torch.rand(shape, device=tiles_NCHW.device) - 1)
    return (tiles_NCHW * gain).clamp(0, 255)


def mixup(tiles_NCHW: Tensor, targets_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Blend each tile with another one, by a share uniform in [0, 1] (Zhang et al. 2018)."""
    partner = torch.randperm(len(tiles_NCHW), device=tiles_NCHW.device)
    share = float(torch.rand(()))
    mixed_NCHW = torch.lerp(tiles_NCHW, tiles_NCHW[partner], share)
    return mixed_NCHW, torch.lerp(targets_NK, targets_NK[partner], share)


def cutmix(tiles_NCHW: Tensor, targets_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Paste one box of another tile into each and mix the targets by area (Yun et al. 2019)."""
    height, width = tiles_NCHW.shape[-2:]
    partner = torch.randperm(len(tiles_NCHW), device=tiles_NCHW.device)
    share, x, y = torch.rand(3).tolist()  # area and centre of the box
    half_h, half_w = height * share**0.5 / 2, width * share**0.5 / 2
    top, bottom = (int(min(max(y * height + s * half_h, 0), height)) for s in (-1, 1))
    left, right = (int(min(max(x * width + s * half_w, 0), width)) for s in (-1, 1))
    mixed = tiles_NCHW.clone()
    mixed[:, :, top:bottom, left:right] = tiles_NCHW[partner, :, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return mixed, (1 - pasted) * targets_NK + pasted * targets_NK[partner]


def augment(tiles_NCHW: Tensor, targets_NK: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Return augmented float tiles in [0, 255] and targets of uint8 tiles and (N, K) targets."""
    if config.dihedral:
        tiles_NCHW = dihedral(tiles_NCHW)
    tiles_NCHW = tiles_NCHW.float()
    if config.brightness or config.contrast:
        tiles_NCHW = jitter(tiles_NCHW, config.brightness, config.contrast)
    if config.colour:
        tiles_NCHW = tint(tiles_NCHW, config.colour)
    if mixing := config.cutmix + config.mixup:
        draw = float(torch.rand(()))
        if draw < config.cutmix:
            return cutmix(tiles_NCHW, targets_NK)
        if draw < mixing:
            return mixup(tiles_NCHW, targets_NK)
    return tiles_NCHW, targets_NK
