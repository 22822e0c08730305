"""Functions of ours in the place of another library's, in its modules that are loaded and in those that are imported later."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["Change", "replace"]

_ABSENT = object()


class Change(NamedTuple):
    """An attribute of a class in a module (of the module itself for ""), and what makes ours of theirs.

    A module that lacks the class or the attribute, as another version of a library may, is left as it is. One that is `added`
    is made of None where there is none, and deleted afterwards.
    """

    owner: str
    name: str
    ours: Callable[[Any], Any]
    added: bool = False


def replace(changes: Mapping[str, Sequence[Change]]) -> Callable[[], None]:
    """Make changes, by the names of modules: at once in those that are loaded, and in others when they have been imported.

    What is returned puts the very same objects back that were there, and leaves modules that are imported afterwards alone.
    """
    replacements = _Replacements(changes)
    sys.meta_path.insert(0, replacements)
    for name in changes:
        module = sys.modules.get(name)
        if module is not None:
            replacements.change(module, again=False)
    return replacements.end


class _Replacements(MetaPathFinder):
    """Finds the modules that are to be changed where the other finders find them, and changes them once they have run."""

    def __init__(self, changes: Mapping[str, Sequence[Change]]) -> None:
        self._changes = changes
        self._lock = threading.Lock()
        self._ended = False
        self._theirs: dict[str, list[tuple[Any, str, Any]]] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._changes:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._change_after(spec.loader)
                return spec
        return None

    def _change_after(self, loader: Any) -> None:
        """Have the next module that a loader runs changed."""
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            self.change(module, again=True)

        loader.exec_module = exec_module

    def change(self, module: ModuleType, again: bool) -> None:
        """Make a module's changes; `again` where it has just run, so that nothing of ours is left in it."""
        with self._lock:
            if self._ended or (module.__name__ in self._theirs and not again):
                return
            theirs = self._theirs[module.__name__] = []
            for change in self._changes[module.__name__]:
                owner: Any = getattr(module, change.owner, None) if change.owner else module
                found = _ABSENT if owner is None else vars(owner).get(change.name, _ABSENT)
                if owner is not None and (found is not _ABSENT or change.added):
                    setattr(owner, change.name, change.ours(None if found is _ABSENT else found))
                    theirs.append((owner, change.name, found))

    def end(self) -> None:
        """Put back what was there."""
        with self._lock:
            self._ended = True
            sys.meta_path.remove(self)
            for theirs in self._theirs.values():
                for owner, name, found in theirs:
                    if found is _ABSENT:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, found)
