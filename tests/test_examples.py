"""Every example runs, without a warning, and shows what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name: str) -> str:
    path = EXAMPLES / name
    if "import torch" in path.read_text() and find_spec("torch") is None:
        pytest.skip("needs PyTorch")
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def number_after(text: str, output: str) -> float:
    found = re.search(re.escape(text) + r"\s*([+-]?[\d.]+)", output)
    assert found, f"{text!r} is not in:\n{output}"
    return float(found[1])


def test_all_are_tested():
    """Here, or where what they need is tested."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix}
    assert len(names) >= 4 and all(f'"{name}"' in tests for name in names), names


@pytest.mark.slow
def test_classic():
    output = output_of("classic.py")
    assert output.count(": True") == 3 and "False" not in output
    assert output.endswith("gradients: (10, 18, 100, 100) (10, 9, 100, 100)\n")


@pytest.mark.slow
def test_swap_and_train():
    output = output_of("swap_and_train.py")
    assert "left as they were: offset_conv.weight, offset_conv.bias" in output
    assert "same outputs after the swap: True" in output
    assert number_after("steps more, deformable:", output) < 0.3
    assert 0.05 < number_after("offsets learned: up to", output) <= 3


@pytest.mark.slow
def test_internimage():
    output = output_of("internimage.py")
    for name, millions in (("internimage_t", 29.2), ("flash_internimage_t", 29.1)):
        assert number_after(f"\n{name}:", "\n" + output) == millions
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), a step later ([\d.]+)", output) for loss in loss]
    assert len(losses) == 4 and losses[1] < losses[0] and losses[3] < losses[2]


@pytest.mark.slow
def test_numpy_gradient():
    output = output_of("numpy_gradient.py")
    assert number_after("dy", output) == pytest.approx(2.5, abs=0.03)
    assert number_after("dx", output) == pytest.approx(-1.25, abs=0.03)
    assert number_after("error", output) < 0.03
