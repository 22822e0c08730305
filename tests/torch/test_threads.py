"""`torch.set_num_threads` limits the kernels for tensors, on whichever threads they run; what asks deformconv alone wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import re
import torch
import deformconv
x, offset, weight = torch.ones(1, 32, 64, 64), torch.zeros(1, 18, 64, 64), torch.ones(32, 32, 3, 3)
for number in (3, 1):
    torch.set_num_threads(number)
    deformconv.torch.deform_conv2d(x, offset, weight, padding=1)
    print(*set(re.findall(r"shared out to (\\d+) thread", deformconv.explain(x, offset, weight, padding=1))))
numbers = [tensor.numpy() for tensor in (x, offset, weight)]
print(*set(re.findall(r"shared out to (\\d+) thread", deformconv.explain(*numbers, padding=1))))
deformconv.set_num_threads(2)
print(*set(re.findall(r"shared out to (\\d+) thread", deformconv.explain(x, offset, weight, padding=1))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "4"}, ["3", "1", "4", "2"]),  # which a NumPy caller follows
        ({"OMP_NUM_THREADS": "4", "DEFORMCONV_THREADS": "own"}, ["3", "1", "4", "2"]),
        ({"DEFORMCONV_NUM_THREADS": "2"}, ["2", "2", "2", "2"]),
    ],
    ids=str,
)
def test_whose_number_counts(variables, expected):
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, expected), done.stderr
