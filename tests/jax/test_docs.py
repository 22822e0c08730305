"""docs/jax.md: every program runs and prints what stands below it."""

from __future__ import annotations

import pytest
from tests.documents import check, programs

PROGRAMS = programs("docs/jax.md")


def test_all_are_here():
    assert len(PROGRAMS) == 7


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"line {program.line}")
def test_program(program, tmp_path):
    check(program, tmp_path)
