"""Names lead to factories; a wrong name is answered with the nearest known one and the way to add another."""

from importlib.metadata import EntryPoint

import pytest

from gigamil import registry
from gigamil.errors import ConfigError
from gigamil.registry import Registry


def make() -> "Registry[type]":
    return Registry("encoder", "gigamil.nothing")


def test_a_registered_factory_is_found_and_unchanged() -> None:
    known = make()

    @known.register("mine")
    class Mine:
        pass

    assert Mine.__name__ == "Mine"
    assert known["mine"] is Mine
    assert known.names() == ["mine"]


def test_a_second_factory_of_a_name_is_refused() -> None:
    known = make()
    known.register("mine")(int)
    with pytest.raises(ConfigError, match="encoder 'mine' is registered twice"):
        known.register("mine")(float)
    assert known["mine"] is int


def test_an_unknown_name_lists_the_known_ones() -> None:
    known = make()
    known.register("resnet18")(int)
    known.register("small_cnn")(float)
    with pytest.raises(ConfigError) as caught:
        known["resnet81"]
    assert str(caught.value) == (
        "no encoder 'resnet81'; did you mean 'resnet18'? Known: resnet18, small_cnn. "
        "Your own: register it in a module and start with `--plugin MODULE`."
    )
    with pytest.raises(ConfigError, match=r"no encoder 'xyz'\. Known: resnet18, small_cnn\."):
        known["xyz"]


def test_an_entry_point_of_the_group_is_loaded_once_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("ordered", "collections:OrderedDict", "gigamil.nothing")

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "gigamil.nothing"
        return [point] if name in (None, "ordered") else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    known = make()
    known.register("mine")(int)
    assert known.names() == ["mine", "ordered"]
    assert known["ordered"].__name__ == "OrderedDict"
    with pytest.raises(ConfigError, match="did you mean 'ordered'"):
        known["orderd"]
