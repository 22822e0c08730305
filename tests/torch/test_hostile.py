"""Hostile inputs, each in a process of its own: it ends well, with the numbers of the definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.torch.hostile import KINDS

PROGRAM = Path(__file__).with_name("hostile.py")
# Some kinds in a process, since a process takes seconds to start: the last line tells how far one that crashed came.
GROUPS = [KINDS[i : i + 10] for i in range(0, len(KINDS), 10)]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", GROUPS, ids=", ".join)
def test_survived(kinds):
    done = subprocess.run([sys.executable, PROGRAM, *kinds], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.splitlines() == [f"survived {kind}" for kind in kinds], f"exit code {done.returncode}\n{done.stderr}"
    assert done.returncode == 0
