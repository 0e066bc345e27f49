"""Folds get their shares, and tiles of one place are never in two folds."""

import io

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from eurosat.data.duplicates import check_no_leak, find_duplicates, perceptual_hash
from eurosat.data.pack import Pack
from eurosat.data.split import FOLDS, make_split, split_fingerprint
from eurosat.errors import DataError


def table(classes: dict[str, int], groups: dict[int, int] | None = None) -> pd.DataFrame:
    """A table with a count of tiles per class; ``groups`` maps a row to the row it duplicates."""
    names = [name for name, count in sorted(classes.items()) for _ in range(count)]
    group = np.arange(len(names))
    for row, first in (groups or {}).items():
        group[row] = first
    paths = [f"{name}/{number}.jpg" for number, name in enumerate(names)]
    return pd.DataFrame({"path": paths, "class": names, "group": group})


@pytest.mark.parametrize(
    ("protocol", "shares"), [("60/20/20", (0.6, 0.2, 0.2)), ("80/20", (0.7, 0.1, 0.2))]
)
def test_each_fold_gets_its_share_of_every_class(protocol: str, shares: tuple[float, ...]) -> None:
    tiles = table({"a": 300, "b": 200, "c": 50})
    split = make_split(tiles, protocol)
    for name, count in (("a", 300), ("b", 200), ("c", 50)):
        folds = split.folds[tiles["class"] == name]
        for fold, share in zip(FOLDS, shares, strict=True):
            assert (folds == fold).sum() == pytest.approx(share * count, abs=1)


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    tiles = table({"a": 50, "b": 50})
    assert make_split(tiles, seed=3).fingerprint == make_split(tiles, seed=3).fingerprint
    assert make_split(tiles, seed=3).fingerprint != make_split(tiles, seed=4).fingerprint


def test_per_class_limits_only_the_train_fold_evenly_nested_and_seeded() -> None:
    tiles = table({"a": 50, "b": 80})
    full = make_split(tiles)
    few, more = (make_split(tiles, per_class=count) for count in (5, 20))
    for split, count in ((few, 5), (more, 20)):
        rows = split.indices("train")
        assert [int((tiles["class"].iloc[rows] == name).sum()) for name in "ab"] == [count] * 2
        for fold in ("val", "test"):
            np.testing.assert_array_equal(split.indices(fold), full.indices(fold))
    assert set(few.indices("train")) < set(more.indices("train")) < set(full.indices("train"))
    assert len({few.fingerprint, more.fingerprint, full.fingerprint}) == 3
    other = make_split(tiles, seed=1, per_class=5)
    assert set(other.indices("train")) != set(few.indices("train"))
    with pytest.raises(DataError, match="class a has 30 training tiles, fewer than .*per_class=31"):
        make_split(tiles, per_class=31)


def test_adding_a_class_does_not_change_the_folds_of_the_earlier_ones() -> None:
    small, large = table({"a": 50, "b": 50}), table({"a": 50, "b": 50, "c": 50})
    np.testing.assert_array_equal(make_split(small).folds, make_split(large).folds[:100])


def test_the_fingerprint_does_not_depend_on_the_order_of_the_tiles() -> None:
    fingerprint = split_fingerprint(["a/1", "b/1"], ["train", "test"])
    assert fingerprint == split_fingerprint(["b/1", "a/1"], ["test", "train"])


@pytest.mark.parametrize("seed", range(8))
def test_duplicates_are_in_one_fold_even_across_classes(seed: int) -> None:
    tiles = table({"a": 40, "b": 40}, {7: 3, 50: 3, 60: 45, 79: 45})
    split = make_split(tiles, seed=seed)
    assert len(set(split.folds[[3, 7, 50]])) == 1
    assert len(set(split.folds[[45, 60, 79]])) == 1
    assert split.num_duplicates == 4
    assert set(split.folds) == set(FOLDS)


def test_a_class_with_too_few_different_tiles_is_refused() -> None:
    with pytest.raises(DataError, match="class b has 2 different tiles, at least 3"):
        make_split(table({"a": 10, "b": 3}, {12: 11}))


def test_three_tiles_of_a_class_go_to_three_folds() -> None:
    split = make_split(table({"a": 3, "b": 3}))
    assert sorted(split.folds[:3]) == ["test", "train", "val"]


def test_a_duplicate_in_two_folds_is_refused() -> None:
    folds = np.array(["train", "train", "test"], dtype=object)
    with pytest.raises(DataError, match="1 duplicate tiles are in two folds"):
        check_no_leak(np.array([0, 1, 0]), folds)
    check_no_leak(np.array([0, 0, 2]), folds)


def scenes(count: int, size: int = 80) -> npt.NDArray[np.uint8]:
    """Random images of different places: smooth blobs of colour with a little texture."""
    rng = np.random.default_rng(5)
    blobs = rng.integers(40, 200, (count, 6, 6, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(blob).resize((size, size))) for blob in blobs]
    textured = np.stack(smooth) + rng.normal(0, 4, (count, size, size, 3))
    return np.clip(textured, 0, 255).astype(np.uint8)


def group_duplicates(tiles: npt.NDArray[np.uint8]) -> list[int]:
    digests = np.array([tile.tobytes() for tile in tiles], dtype=object)
    duplicates = find_duplicates(tiles, digests, perceptual_hash(tiles))
    return [int(group) for group in duplicates.group]


def test_exact_shifted_and_recompressed_copies_are_grouped_and_other_tiles_are_not() -> None:
    places = scenes(6)
    tiles = places[:, 8:72, 8:72].copy()
    shifted = places[1, 10:74, 5:69]
    file = io.BytesIO()
    Image.fromarray(tiles[2]).save(file, "JPEG", quality=75)
    recompressed = np.asarray(Image.open(file))
    all_tiles = np.concatenate([tiles, [tiles[0], shifted, recompressed]])
    assert group_duplicates(all_tiles) == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_different_calm_lakes_are_different_places() -> None:
    rng = np.random.default_rng(0)
    lakes = np.clip(rng.normal(60, 2, (8, 64, 64, 3)), 0, 255).astype(np.uint8)
    assert group_duplicates(lakes) == list(range(8))


def test_a_chain_of_duplicates_is_one_group() -> None:
    place = scenes(1, 90)[0]
    steps = np.stack([place[2 * k : 2 * k + 64, 2 * k : 2 * k + 64] for k in range(4)])
    assert group_duplicates(steps) == [0, 0, 0, 0]


@pytest.mark.real_data
def test_no_place_of_the_real_tiles_is_in_two_folds(real_pack: Pack) -> None:
    split = make_split(real_pack.table)
    group = real_pack.table["group"].to_numpy(np.int64)
    check_no_leak(group, split.folds)
    assert split.num_duplicates == 7
    sizes = {fold: len(split.indices(fold)) for fold in FOLDS}
    assert sum(sizes.values()) == 27_000
    assert sizes["test"] == pytest.approx(5400, abs=3)
    assert split.fingerprint.startswith("e611e86c8270"), "metrics in reports/ refer to this split"


def test_synthetic_tiles_have_no_duplicates(tiny_pack: Pack) -> None:
    assert (tiny_pack.num_exact_duplicates, tiny_pack.num_near_duplicates) == (0, 0)
