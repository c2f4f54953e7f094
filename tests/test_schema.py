"""A dictionary becomes a dataclass, and a wrong one an error that names the key."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from lumen import schema
from lumen.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    spokes: Annotated[int, Meta(ge=3)] = 32
    tyre: Literal["road", "gravel"] = "road"


@dataclass(frozen=True, kw_only=True)
class Bicycle:
    name: str
    front: Wheel = Wheel()
    rear: Wheel | None = None
    gears: tuple[int, ...] = ()


def test_nested_dataclasses_lists_and_defaults_are_read():
    bicycle = schema.read(Bicycle, {"name": "b", "rear": {"spokes": 36}, "gears": [11, 34]}, "b.toml")
    assert bicycle == Bicycle(name="b", front=Wheel(), rear=Wheel(spokes=36), gears=(11, 34))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "b", "geers": []},
            "unknown key 'geers'. Did you mean 'gears'? Known here: name, front, rear, gears.",
        ),
        ({"name": "b", "rear": {"spoke": 3}}, "b.toml: unknown key 'rear.spoke'. Did you mean 'spokes'?"),
        ({"name": 3}, "b.toml: name: wanted str, found 3."),
        ({"name": "b", "front": {"spokes": 2}}, "b.toml: front.spokes: wanted int >= 3, found 2."),
        ({"name": "b", "front": {"spokes": True}}, "b.toml: front.spokes: wanted int, found True."),
        (
            {"name": "b", "front": {"tyre": "gravl"}},
            "tyre must be one of road, gravel; found 'gravl'. Did you mean 'gravel'?",
        ),
        ({"name": "b", "front": 3}, "b.toml: front: wanted object, found 3."),
        ({"name": "b", "gears": [11, "x"]}, "b.toml: gears[1]: wanted int, found 'x'."),
        ({"name": "b", "gears": {}}, "b.toml: gears: Expected array, got object."),
        ({}, "b.toml: the top level: the key 'name' is missing."),
    ],
)
def test_a_wrong_value_is_refused_by_its_dotted_key(data, message):
    with pytest.raises(ConfigError) as refused:
        schema.read(Bicycle, data, "b.toml")
    assert message in str(refused.value)


def test_the_caller_chooses_the_error():
    with pytest.raises(CheckpointError, match="manifest"):
        schema.read(Bicycle, {"nmae": "b"}, "manifest.json", CheckpointError)
