import numpy as np
import numpy.typing as npt
import pytest

from eurosat.data.synthetic import CLASSES, render
from eurosat.errors import ConfigError

LABELS = {name: label for label, name in enumerate(CLASSES)}
TILES_PER_CLASS = 30


@pytest.fixture(scope="module")
def tiles() -> npt.NDArray[np.uint8]:
    """(10, 30, 64, 64, 3) tiles without haze or ambiguous content."""
    return np.array(
        [
            [render(label, index, difficulty=0) for index in range(TILES_PER_CLASS)]
            for label in range(len(CLASSES))
        ]
    )


def test_classes_are_eurosats_ten_in_alphabetical_order() -> None:
    assert len(CLASSES) == 10
    assert list(CLASSES) == sorted(CLASSES)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_class_is_drawn_as_uint8_rgb_of_the_requested_size(size: int) -> None:
    for label in range(len(CLASSES)):
        tile = render(label, 3, size=size)
        assert tile.shape == (size, size, 3)
        assert tile.dtype == np.uint8
        assert tile.flags.c_contiguous


@pytest.mark.parametrize("difficulty", [0.0, 1.0, 2.0])
def test_a_tile_depends_only_on_its_arguments_not_on_the_order_of_calls(
    difficulty: float,
) -> None:
    keys = [(label, index) for label in range(len(CLASSES)) for index in range(2)]
    forwards = {key: render(*key, difficulty=difficulty).tobytes() for key in keys}
    backwards = {key: render(*key, difficulty=difficulty).tobytes() for key in reversed(keys)}
    assert forwards == backwards


def test_another_label_index_seed_or_difficulty_gives_another_tile() -> None:
    variants = [
        render(1, 5),
        render(2, 5),
        render(1, 6),
        render(1, 5, seed=1),
        render(1, 5, difficulty=2),
    ]
    assert len({tile.tobytes() for tile in variants}) == len(variants)


def test_no_two_of_300_tiles_are_equal(tiles: npt.NDArray[np.uint8]) -> None:
    flat = tiles.reshape(-1, *tiles.shape[2:])
    assert len({tile.tobytes() for tile in flat}) == len(flat) == 300


def test_forest_is_darkest_where_land_is_green(tiles: npt.NDArray[np.uint8]) -> None:
    mean = tiles.mean(axis=(1, 2, 3))
    forest = mean[LABELS["Forest"]]
    assert forest[1] > forest[0]  # green over red
    land = [label for name, label in LABELS.items() if name not in ("Forest", "SeaLake")]
    assert np.min(mean[land].sum(axis=1)) > forest.sum()


def test_texture_is_lowest_on_water_and_highest_in_built_up_areas(
    tiles: npt.NDArray[np.uint8],
) -> None:
    steps = np.abs(np.diff(tiles.astype(float), axis=3)).mean(axis=(1, 2, 3, 4))
    order = [CLASSES[label] for label in np.argsort(steps)]
    assert order[0] == "SeaLake"
    assert set(order[-2:]) == {"Industrial", "Residential"}


def test_difficulty_reduces_contrast(tiles: npt.NDArray[np.uint8]) -> None:
    label = LABELS["Industrial"]
    hard = np.array([render(label, index, difficulty=2) for index in range(TILES_PER_CLASS)])
    assert hard.std() < tiles[label].std()


def test_size_changes_the_sampling_but_not_the_scene() -> None:
    label = LABELS["AnnualCrop"]
    fine = render(label, 0, size=128, difficulty=0).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    coarse = render(label, 0, size=64, difficulty=0)
    assert np.abs(fine - coarse).mean() < 4  # of 255: the rest is noise and the edges of fields


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": 10}, "label of a synthetic tile must be in [0, 9]; got 10"),
        ({"label": -1}, "label of a synthetic tile must be in [0, 9]; got -1"),
        ({"index": -1}, "index of a synthetic tile must be in [0, inf]; got -1"),
        ({"seed": -1}, "seed of a synthetic tile must be in [0, inf]; got -1"),
        ({"size": 8}, "size of a synthetic tile must be in [16, 256]; got 8"),
        ({"difficulty": -0.1}, "difficulty of a synthetic tile must be in [0, 2]; got -0.1"),
        ({"difficulty": 2.5}, "difficulty of a synthetic tile must be in [0, 2]; got 2.5"),
        ({"difficulty": float("nan")}, "difficulty of a synthetic tile must be in [0, 2]; got nan"),
    ],
)
def test_an_argument_out_of_range_is_refused_with_its_limits(
    arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        render(**{"label": 0, "index": 0, **arguments})  # type: ignore[arg-type]
    assert str(caught.value) == message
