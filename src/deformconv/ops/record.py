"""Frozen dataclasses that are quick to import.

`dataclass` writes methods for each class and compiles them, a millisecond for the fields of a spec. A record's are written
here, once for all. To everybody else a record is a dataclass: type checkers, `fields` and `replace` take it for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["record"]


def _init(self: Any, **values: Any) -> None:
    given = {**self._defaults, **values}
    if given.keys() != self._expected:
        raise TypeError(f"{type(self).__name__} was made of {', '.join(values)}; expected {', '.join(self._expected)}.")
    for name, value in given.items():
        object.__setattr__(self, name, value)
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _eq(self: Any, other: Any) -> Any:
    return self._values == other._values if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    """The hash of the fields, kept: each call asks for its spec's, to find its plan."""
    found: int | None = self.__dict__.get("_hash")
    if found is None:
        found = hash(self._values)
        object.__setattr__(self, "_hash", found)
    return found


def _getstate(self: Any) -> dict[str, Any]:
    """Without the hash, which is another one in another process."""
    return {name: value for name, value in vars(self).items() if name != "_hash"}


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"


def _setattr(self: Any, name: str, value: Any) -> None:
    raise FrozenInstanceError(f"`{name}` of {type(self).__name__} was set; expected no change: make another by `replace`.")


def _delattr(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"`{name}` of {type(self).__name__} was deleted; expected no change.")


if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, kw_only: bool, eq: bool = True) -> Callable[[type], type]:
        """`dataclass(frozen=True, kw_only=True)`, the only kind of record; without `eq` each is equal to itself alone."""

        def made(cls: type) -> type:
            dataclass(init=False, repr=False, eq=False)(cls)
            given = [field for field in fields(cls) if field.init]
            cls._expected = dict.fromkeys(field.name for field in given).keys()
            cls._defaults = {field.name: field.default for field in given if field.default is not MISSING}
            cls.__init__, cls.__repr__, cls.__setattr__, cls.__delattr__ = _init, _repr, _setattr, _delattr
            if eq:
                names = tuple(field.name for field in fields(cls))
                cls._values = property(attrgetter(*names))
                cls.__eq__, cls.__hash__, cls.__getstate__ = _eq, _hash, _getstate
            return cls

        return made
