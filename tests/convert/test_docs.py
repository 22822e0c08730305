"""docs/gluon.md: the program for PyTorch, on the file that the MXNet program before it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.documents import check, programs

DATA = Path(__file__).parent / "data"


@pytest.mark.slow
def test_the_same_net_in_pytorch_prints_what_it_printed_in_mxnet(tmp_path):
    pytest.importorskip("torch")
    (theirs, ours) = (program for program in programs("docs/gluon.md") if "net.params" in program.source)
    assert ours.imports("torch") and ours.text == theirs.text
    shutil.copy(DATA / "docs.params", tmp_path / "net.params")
    check(ours, tmp_path)
