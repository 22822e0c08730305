"""docs/equinox.md: its programs run and print what it shows."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from tests.documents import check, programs

PROGRAMS = programs("docs/equinox.md")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"line {program.line}")
def test_program(program, tmp_path):
    for library in ("torch", "optax"):
        if program.imports(library) and find_spec(library) is None:
            pytest.skip(f"needs {library}")
    check(program, tmp_path)
