"""Augmentation moves and mixes tiles, and changes nothing else."""

import pytest
import torch

from eurosat.augment import augment, cutmix, dihedral, dihedral_views, jitter
from eurosat.config import AugmentConfig


def tiles(count: int = 64, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)


def test_every_tile_becomes_one_of_its_eight_views_and_all_eight_occur() -> None:
    one = tiles(1)
    many = one.expand(400, -1, -1, -1)
    views = {view.contiguous().numpy().tobytes() for view in dihedral_views(one)}
    seen = {tile[None].contiguous().numpy().tobytes() for tile in dihedral(many)}
    assert len(views) == 8
    assert seen == views


def test_tiles_that_are_not_square_are_only_flipped() -> None:
    one = tiles(1, (8, 6))
    assert len(dihedral_views(one)) == 4
    assert dihedral(one.expand(50, -1, -1, -1)).shape == (50, 3, 8, 6)


def test_cutmix_mixes_targets_by_the_area_of_the_pasted_box() -> None:
    torch.manual_seed(1)
    plain = torch.arange(16).view(16, 1, 1, 1).expand(16, 1, 10, 10).float()
    targets = torch.eye(16)
    for _ in range(20):
        mixed, soft = cutmix(plain, targets)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(16))
        for row in range(16):
            own = (mixed[row] == row).float().mean()
            torch.testing.assert_close(soft[row, row], own)


def test_jitter_scales_level_and_spread_and_stays_in_range() -> None:
    changed = jitter(tiles().float(), 0.3, 0.3)
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert not torch.equal(changed, tiles().float())
    torch.testing.assert_close(jitter(tiles().float(), 0.0, 0.0), tiles().float())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_augment_follows_its_configuration(share: float) -> None:
    config = AugmentConfig(dihedral=False, cutmix=share)
    given, targets = tiles(), torch.eye(64)
    out, soft = augment(given, targets, config)
    assert torch.equal(out, given.float()) == (share == 0)
    assert torch.equal(soft, targets) == (share == 0)
