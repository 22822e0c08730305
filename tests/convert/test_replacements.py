"""Functions of ours in a library's modules: in those that are loaded, in those that come later, and in none afterwards."""

from __future__ import annotations

import importlib
import sys

import pytest

from deformconv.convert.replacements import Change, replace

SOURCE = """
class Layer:
    def forward(self):
        return "theirs"

    def also(self):
        return Layer.__name__

def function():
    return "theirs"
"""
CHANGES = [
    Change("", "function", lambda theirs: lambda: f"ours, not {theirs()}"),
    Change("Layer", "forward", lambda theirs: lambda self: f"ours, not {theirs(self)}"),
    Change("Layer", "added", lambda nothing: property(lambda layer: nothing), added=True),
]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package with two modules of the same text and one that fails, and the import of each."""
    name = "replaced_library"
    folder = tmp_path / name
    folder.mkdir()
    for file, text in {"__init__": "", "first": SOURCE, "second": SOURCE, "broken": SOURCE + "1 / 0"}.items():
        (folder / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield lambda module: importlib.import_module(f"{name}.{module}")
    assert sys.meta_path == finders
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def said(module):
    layer = module.Layer()
    return module.function(), layer.forward(), hasattr(layer, "added")


OURS, THEIRS = ("ours, not theirs", "ours, not theirs", True), ("theirs", "theirs", False)


def test_modules_of_now_and_of_later(library):
    first = library("first")
    before = dict(vars(first)), dict(vars(first.Layer))
    end = replace({f"replaced_library.{name}": CHANGES for name in ("first", "second", "absent")})
    second = library("second")
    assert said(first) == said(second) == OURS
    assert second.__spec__.loader.get_source(second.__name__) == SOURCE and "exec_module" not in vars(second.__loader__)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        library("absent")
    end()
    assert said(first) == said(second) == THEIRS
    assert before == (dict(vars(first)), dict(vars(first.Layer)))
    assert all(vars(first.Layer)[name] is value for name, value in before[1].items() if name != "__dict__")


def test_what_is_imported_after_the_end(library):
    replace({"replaced_library.first": CHANGES})()
    assert said(library("first")) == THEIRS


def test_a_module_that_is_loaded_again(library):
    first = library("first")
    end = replace({"replaced_library.first": CHANGES})
    importlib.reload(first)
    assert said(first) == OURS
    again = first.Layer
    end()
    assert said(first) == THEIRS and first.Layer is again


def test_what_a_module_lacks_is_left_alone(library):
    changes = [Change("", "other", None), Change("Layer", "backward", None), Change("Other", "forward", None, added=True)]
    first = library("first")
    before = dict(vars(first))
    end = replace({"replaced_library.first": changes})
    assert vars(first) == before
    end()
    assert vars(first) == before


def test_a_module_whose_import_fails(library):
    end = replace({"replaced_library.broken": CHANGES})
    with pytest.raises(ZeroDivisionError):
        library("broken")
    assert "replaced_library.broken" not in sys.modules
    end()


def test_two_at_once(library):
    ends = [replace({f"replaced_library.{name}": CHANGES}) for name in ("first", "second")]
    first, second = library("first"), library("second")
    assert said(first) == said(second) == OURS
    ends[0]()
    assert (said(first), said(second)) == (THEIRS, OURS)
    ends[1]()
    assert said(second) == THEIRS
