"""docs/pytorch.md, deploy.md, detection.md and attention.md: every program runs and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"pytorch.md": 13, "deploy.md": 4, "detection.md": 4, "attention.md": 3}  # and the fewest programs in each
BLOCK = re.compile(r"^## (.*?)\n|^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def programs(page):
    """The source and the output of each program, named after its section."""
    section = ""
    for heading, source, output in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        section = heading or section
        if source:
            yield pytest.param(source, output, id=section)


@pytest.mark.parametrize(("page", "fewest"), PAGES.items())
def test_every_program_has_its_output(page, fewest):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert len(list(programs(page))) == text.count("```python") == text.count("```text") >= fewest


# What PyTorch's exporter, its forward-mode rules and torchvision's layer under a tracer warn of on their own account.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("source", "output"), [program for page in PAGES for program in programs(page)])
def test_program(source, output, tmp_path, monkeypatch):
    for library in ("torchvision", "onnx", "onnxscript", "openvino", "transformers"):
        if library in source or (library == "onnxscript" and "torch.onnx" in source):
            pytest.importorskip(library)
    if "deformconv.studies.detection" in source:
        pytest.importorskip("lightning_fabric")
    if "onnxruntime" in source:
        pytest.importorskip("onnxruntime", minversion="1.25")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == output
    torch._dynamo.reset()
