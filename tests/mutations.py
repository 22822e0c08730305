"""Mistakes in the text of modules, one at a time, which tests are to notice."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest


class Mutation(NamedTuple):
    """A mistake in the text of a module."""

    what: str
    module: str
    old: str
    new: str


def load(mutation: Mutation, names: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import these modules anew, the mistake in one of them; each imports those before it."""
    for name in names:
        text = inspect.getsource(importlib.import_module(name))
        if name == mutation.module:
            assert mutation.old in text, "the text has changed: find the place again"
            text = text.replace(mutation.old, mutation.new)
        file = folder / f"{name}.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)  # type: ignore[union-attr]
