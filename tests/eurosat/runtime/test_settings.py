"""Settings check their values, and one error names every fault."""

import dataclasses
import pickle
from dataclasses import field
from typing import Annotated

import numpy as np
import pytest
from pydantic import Field

from eurosat.errors import ConfigError
from eurosat.runtime.settings import from_mapping, settings


@settings("scene.tile")
class Tile:
    size: Annotated[int, Field(ge=16, le=512)] = 64
    scale: Annotated[float, Field(gt=0)] | None = None


@settings("scene")
class Scene:
    name: str
    tile: Tile = field(default_factory=Tile)

    def __post_init__(self) -> None:
        if self.name == "nowhere":
            raise ConfigError("scene.name must be a place; got nowhere")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """A dataclass of the standard library, as other folders have them."""

    names: list[str]
    share: float = 0.5
    tile: Tile = field(default_factory=Tile)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"size": 8}, "scene.tile.size must be at least 16; got 8"),
        ({"size": 1000}, "scene.tile.size must be at most 512; got 1000"),
        ({"size": True}, "scene.tile.size must be int; got True"),
        ({"size": 64.0}, "scene.tile.size must be int; got 64.0"),
        ({"size": "64"}, "scene.tile.size must be int; got '64'"),
        ({"scale": 0}, "scene.tile.scale must be above 0; got 0"),
        ({"scale": float("nan")}, "scene.tile.scale must be above 0; got nan"),
        ({"scale": True}, "scene.tile.scale must be float; got True"),
        ({"sise": 64}, "unknown key scene.tile.sise: did you mean size?"),
        ({"moon": 64}, "unknown key scene.tile.moon: known: size, scale"),
    ],
)
def test_a_fault_reads_the_same_from_a_file_and_from_python(
    values: dict[str, object], fault: str
) -> None:
    for make in (
        lambda: Tile(**values),  # type: ignore[arg-type]
        lambda: from_mapping(Tile, values, "scene.tile"),
        lambda: from_mapping(Scene, {"name": "x", "tile": values}, "scene"),
        lambda: from_mapping(Plain, {"names": [], "tile": values}, "scene"),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == fault


def test_all_faults_of_all_sections_are_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Scene, {"tile": {"size": 1, "scale": "big"}, "nmae": "x"}, "scene")
    assert str(caught.value) == (
        "unknown key scene.nmae: did you mean name?; missing key scene.name; "
        "scene.tile.size must be at least 16; got 1; scene.tile.scale must be float; got 'big'"
    )


def test_a_section_that_is_no_mapping_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^scene\.tile must be a mapping; got 5$"):
        from_mapping(Scene, {"name": "x", "tile": 5}, "scene")
    with pytest.raises(ConfigError, match=r"^the configuration must be a mapping; got \[5\]$"):
        from_mapping(Scene, [5])  # type: ignore[arg-type]


def test_a_check_of_several_values_raises_its_own_message() -> None:
    message = r"^scene\.name must be a place; got nowhere$"
    with pytest.raises(ConfigError, match=message):
        Scene(name="nowhere")
    with pytest.raises(ConfigError, match=message):
        from_mapping(Scene, {"name": "nowhere"})
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Scene(name="here"), name="nowhere")


def test_a_plain_dataclass_is_checked_too() -> None:
    plain = from_mapping(Plain, {"names": ["a"], "share": 1, "tile": {"size": 32}})
    assert plain == Plain(names=["a"], share=1.0, tile=Tile(size=32))
    assert isinstance(plain.share, float)
    with pytest.raises(ConfigError, match=r"^names\.0 must be str; got 1; share must be float"):
        from_mapping(Plain, {"names": [1], "share": "half"})


def test_settings_are_frozen_dataclasses_that_can_be_sent_to_another_process() -> None:
    scene = Scene(name="here", tile=Tile(size=32, scale=np.float64(2)))
    assert pickle.loads(pickle.dumps(scene)) == scene
    assert dataclasses.asdict(scene) == {"name": "here", "tile": {"size": 32, "scale": 2.0}}
    assert dataclasses.replace(scene, name="there").tile == scene.tile
    assert not hasattr(scene, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.name = "there"  # type: ignore[misc]
