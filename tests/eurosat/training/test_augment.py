"""Augmentation moves and mixes tiles, and changes nothing else."""

import pytest
import torch

from eurosat.config import AugmentConfig
from eurosat.models.network import dihedral_views
from eurosat.training.augment import augment, cutmix, dihedral, jitter, mixup, tint


def tiles(count: int = 64, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)


def test_every_tile_becomes_one_of_its_eight_views_and_all_eight_occur() -> None:
    tile = tiles(1)
    many = tile.expand(400, -1, -1, -1)
    views = {view.contiguous().numpy().tobytes() for view in dihedral_views(tile)}
    seen = {view[None].contiguous().numpy().tobytes() for view in dihedral(many)}
    assert len(views) == 8
    assert seen == views


def test_a_batch_of_one_tile_gets_any_view() -> None:
    tile = tiles(1)
    seen = {dihedral(tile).contiguous().numpy().tobytes() for _ in range(100)}
    assert len(seen) == 8


def test_dihedral_keeps_the_order_and_memory_layout_of_tiles() -> None:
    many = tiles(20).contiguous(memory_format=torch.channels_last)
    turned = dihedral(many)
    assert turned.is_contiguous(memory_format=torch.channels_last)
    for before, after in zip(many, turned, strict=True):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


def test_tiles_that_are_not_square_are_only_flipped() -> None:
    tile = tiles(1, (8, 6))
    assert len(dihedral_views(tile)) == 4
    assert dihedral(tile.expand(50, -1, -1, -1)).shape == (50, 3, 8, 6)


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
    batch, targets = tiles(), torch.eye(64)
    out, soft = augment(batch, targets, config)
    assert torch.equal(out, batch.float()) == (share == 0)
    assert torch.equal(soft, targets) == (share == 0)


def test_mixup_blends_tiles_and_targets_by_the_same_share() -> None:
    torch.manual_seed(0)
    levels = torch.arange(16.0)
    batch, targets = levels.view(16, 1, 1, 1).expand(16, 3, 4, 4), torch.eye(16)
    mixed, shares = mixup(batch, targets)
    assert (shares.sum(dim=1) - 1).abs().max() < 1e-6
    assert ((shares > 0).sum(dim=1) == 2).sum() >= 12, "nearly every tile has a partner"
    torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ levels)


def test_a_tint_changes_each_band_by_itself_and_stays_within_bounds() -> None:
    batch = torch.full((200, 3, 2, 2), 100.0)
    changed = tint(batch, 0.2)
    assert changed.min() >= 80
    assert changed.max() <= 120
    assert (changed.std(dim=1) > 1).float().mean() > 0.9, "bands move apart"
    assert (changed.flatten(2).std(dim=2) == 0).all(), "a band moves as a whole"
    assert tint(torch.full((50, 3, 2, 2), 255.0), 0.5).max() == 255


def test_batches_are_mixed_in_their_shares() -> None:
    torch.manual_seed(0)
    config = AugmentConfig(dihedral=False, cutmix=0.3, mixup=0.3)
    batch = torch.arange(8).view(8, 1, 1, 1).expand(8, 3, 6, 6).to(torch.uint8) * 30
    kinds = {"whole": 0, "cut": 0, "blended": 0}
    for _ in range(400):
        mixed, shares = augment(batch, torch.eye(8), config)
        if (shares.max(dim=1).values == 1).all():
            kinds["whole"] += 1
        else:
            unblended = torch.isin(mixed, 30 * torch.arange(8.0)).all()
            kinds["cut" if unblended else "blended"] += 1
    assert 100 < kinds["whole"] < 220
    assert 80 < kinds["blended"] < 160
