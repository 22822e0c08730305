"""docs/gluon.md: the programs for MXNet run and print what it shows."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from tests.documents import ROOT, check, programs

PROGRAMS = [program for program in programs("docs/gluon.md") if not program.imports("torch")]


def test_torch_is_absent_from_this_environment():
    assert find_spec("torch") is None


def test_all_are_here_or_in_the_torch_environments_tests():
    assert len(PROGRAMS) == 8 and len(programs("docs/gluon.md")) == 9


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"line {program.line}")
def test_program(program, tmp_path):
    check(program, tmp_path)
    if "net.params" in program.source:
        # From these bytes the PyTorch program after it is tested, where MXNet is absent.
        kept = ROOT / "tests" / "convert" / "data" / "docs.params"
        assert (tmp_path / "net.params").read_bytes() == kept.read_bytes()
