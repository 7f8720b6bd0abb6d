"""Named choices: views, datasets, models, distillation strategies.

An entry registers itself with a decorator; its package finds it by importing every module in the
package, so that adding an entry is adding one file.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from tmkd_ray.errors import UserError

T = TypeVar("T")


class UnknownNameError(UserError):
    """No entry has this name; the message lists the choices and the nearest one."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is spelled most like `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


class Registry(Generic[T]):
    """Maps names to entries of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds its target as `name`.

        Raises:
            ValueError: `name` is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called `name`.

        Raises:
            UnknownNameError: there is none.
        """
        if name in self._entries:
            return self._entries[name]
        guess = nearest(name, self._entries)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise UnknownNameError(f"unknown {self.kind} {name!r}.{hint} Choices: {', '.join(self.names())}")

    def names(self) -> list[str]:
        """Return the names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def import_submodules(package: str, path: Iterable[str]) -> None:
    """Import every module directly in `package`, so that their entries register themselves."""
    for module in sorted(info.name for info in pkgutil.iter_modules(list(path))):
        importlib.import_module(f"{package}.{module}")
