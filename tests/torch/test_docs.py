"""docs/pytorch.md: every program runs and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.*?)\n|^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", TEXT, re.M | re.S)


def programs():
    """The section, the source and the output of each program."""
    section = ""
    for heading, source, output in BLOCKS:
        section = heading or section
        if source:
            yield pytest.param(source, output, id=section)


def test_every_program_has_its_output():
    assert len(list(programs())) == TEXT.count("```python") == TEXT.count("```text") >= 12


# What PyTorch's exporter and its forward-mode rules warn of on their own account.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("source", "output"), list(programs()))
def test_program(source, output):
    for library in ("torchvision", "onnx", "onnxscript"):
        if library in source or (library == "onnxscript" and "torch.onnx" in source):
            pytest.importorskip(library)
    torch._dynamo.reset()
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(PAGE), "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == output
    torch._dynamo.reset()
