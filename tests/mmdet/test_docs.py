"""docs/from-mmcv.md: the programs for mmdetection run and print what it shows."""

from __future__ import annotations

import pytest
from tests.documents import check, programs

PROGRAMS = [program for program in programs("docs/from-mmcv.md") if program.imports("mmdet")]


def test_all_are_here_or_in_the_tests_of_the_readme():
    assert len(PROGRAMS) == 2 and len(programs("docs/from-mmcv.md")) == 3


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"line {program.line}")
def test_program(program, tmp_path):
    check(program, tmp_path, is_quiet=False)  # mmdetection warns of a detector without a checkpoint
