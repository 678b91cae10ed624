"""Names in the YAML -> factories registered by code (a decorator or an entry point); a YAML never imports by path."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from gigamil.errors import ConfigError

Factory = TypeVar("Factory", bound=Callable[..., object])


class Registry(Generic[Factory]):
    """A table of factories of one kind.

    Args:
        kind: what is registered, for messages ("encoder").
        group: entry-point group that is searched for names not registered by a decorator ("gigamil.encoders").
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self._group = group
        self._factories: dict[str, Factory] = {}
        self._families: dict[str, Callable[[str], Factory]] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator that makes a factory known under `name`; a second one of that name is an error."""

        def add(factory: Factory) -> Factory:
            if name in self._factories:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; choose another name")
            self._factories[name] = factory
            return factory

        return add

    def register_family(self, prefix: str) -> Callable[[Callable[[str], Factory]], Callable[[str], Factory]]:
        """Decorator of what gives the factory of every name that begins with "prefix/", from the rest of the name."""

        def add(family: Callable[[str], Factory]) -> Callable[[str], Factory]:
            self._families[prefix] = family
            return family

        return add

    def __getitem__(self, name: str) -> Factory:
        """The factory called `name`.

        Raises:
            ConfigError: no such name; the message lists the known ones and how to add one.
        """
        prefix, slash, rest = name.partition("/")
        if slash and prefix in self._families:
            return self._families[prefix](rest)
        if name not in self._factories:
            for point in entry_points(group=self._group, name=name):
                self._factories[name] = point.load()
        if name in self._factories:
            return self._factories[name]
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(
            f"no {self.kind} '{name}'{hint} Known: {', '.join(self.names())}. "
            f"Your own: register it in a module and start with `--plugin MODULE`."
        )

    def names(self) -> list[str]:
        """Every known name, sorted; a family stands as "prefix/NAME"."""
        families = (f"{prefix}/NAME" for prefix in self._families)
        return sorted({*self._factories, *families, *(point.name for point in entry_points(group=self._group))})


def import_plugins(modules: Sequence[str]) -> None:
    """Import the user's modules, which register encoders, aggregators and losses.

    Args:
        modules: names of installed modules, or of modules in the working directory.
    Raises:
        ConfigError: one cannot be imported.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.insert(0, here)
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--plugin {module}: {error}") from error
