"""The CPU kernels: everything a backend must satisfy, and what is special to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.ops.conv.cases import Call, Case, make
from tests.ops.conv.suite import ConvSuite, in_float64, reference_backward
from tests.tolerances import TOLERANCE, assert_close, error

import deformconv
from deformconv.ops.conv import cpu, reference
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.runtime import threads

# Sizes that leave a rest at every place where the work is cut: tiles, block rows, vectors, panels, blocks of channels.
TAILS = [
    Case("primes", (19, 29), (5, 3), stride=(2, 1), padding=(2, 1), batch=3, in_channels=37, out_channels=53),
    Case("one position", (3, 3), (3, 3), batch=5, in_channels=19, out_channels=17),
    Case("many channels", (5, 4), (1, 1), batch=1, in_channels=1031, out_channels=3),
    Case("deep groups", (6, 5), (3, 3), padding=1, in_channels=150, out_channels=34, groups=2, offset_groups=3),
    Case(
        "many small groups",
        (7, 9),
        (3, 3),
        padding=1,
        in_channels=96,
        out_channels=96,
        groups=32,
        offset_groups=4,
    ),
    Case("depthwise", (11, 13), (3, 3), padding=1, in_channels=83, out_channels=83, groups=83),
    Case(
        "depthwise, own offsets",
        (5, 6),
        (3, 2),
        padding=1,
        in_channels=67,
        out_channels=67,
        groups=67,
        offset_groups=67,
    ),
    Case("depth multiplier", (5, 6), (3, 3), padding=1, in_channels=13, out_channels=39, groups=13),
    Case("large kernel", (12, 11), (7, 7), padding=3, in_channels=9, out_channels=20),
    Case("long line", (1033,), (9,), padding=4, in_channels=5, out_channels=7, batch=1),
    Case("volume", (3, 5, 7), (3, 3, 2), padding=1, in_channels=10, out_channels=11, batch=1),
]
by_tail = pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)


def output(call: Call) -> np.ndarray:
    return cpu.deform_conv(call.spec, *call.arrays)


def gradients(call: Call) -> tuple[np.ndarray, ...]:
    c = call
    return cpu.deform_conv_backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS)


@pytest.fixture(autouse=True)
def threads_afterwards() -> Iterator[None]:
    chosen = threads._chosen_threads
    yield
    threads._chosen_threads = chosen


class TestCpu(ConvSuite):
    backend = cpu

    @pytest.fixture(autouse=True)
    def dirty_scratch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scratch memory full of NaN: a kernel that reads what it has not written gives itself away."""
        clean = threads.scratch

        def scratch(size: int) -> np.ndarray:
            memory = clean(size)
            memory[:] = 255
            return memory

        monkeypatch.setattr(threads, "scratch", scratch)

    @by_tail
    def test_tails(self, case: Case) -> None:
        call = make(case, "float32")
        assert_close(output(call), in_float64(call, reference.deform_conv), "float32")
        expected = in_float64(call, reference_backward)
        for name, actual, right in zip(GRADIENTS, gradients(call), expected, strict=True):
            if right is not None:
                assert_close(actual, right, "float32", name)


@by_tail
def test_results_are_the_same_for_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SHARED_FROM", 0)
    call = make(case, "float32")
    results = []
    for number in (1, 2, 3, 8, 2):
        deformconv.set_num_threads(number)
        results.append([output(call), *gradients(call)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_float32_at_width_1333_and_depth_4608() -> None:
    """The paper's image width, where adding base and offset in float32 alone costs 5e-5; then the largest layer's sum."""
    wide = Case("wide", (3, 1333), (3, 3), padding=1, in_channels=4, out_channels=4, batch=1)
    deep = Case("deep", (3, 3), (3, 3), padding=1, in_channels=512, out_channels=6, batch=1)
    for case in (wide, deep):
        assert error(output(make(case, "float32")), in_float64(make(case, "float32"), reference.deform_conv)) <= 1e-5


@pytest.mark.parametrize("case", [TAILS[0], TAILS[4], TAILS[6], TAILS[8]], ids=lambda case: case.name)
def test_forward_makes_no_column_buffer(case: Case) -> None:
    """A call takes its output, a copy of the input, one of the weight, and 2 MB a thread."""
    call = make(case.but(batch=8), "float32")
    output(call)  # compiled, and each thread's scratch in place
    threads._scratch.memory = np.empty(0, np.uint8)
    deformconv.set_num_threads(1)
    tracemalloc.start()
    try:
        result = output(call)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Copies are padded to whole vectors: a row of zeros for the input, at most a vector a group for the weight.
    weight = call.weight.nbytes * 64 / min(64, 4 * max(1, call.spec.out_channels // call.spec.groups))
    assert peak <= result.nbytes + call.input.nbytes * 1.05 + weight + 2 * 2**20


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SHARED_FROM", 0)
    deformconv.set_num_threads(3)
    clean, here = threads.scratch, threading.get_ident()

    def scratch(size: int) -> np.ndarray:
        if threading.get_ident() != here:
            raise MemoryError("no scratch for a worker")
        return clean(size)

    call = make(Case("large", (64, 64), (3, 3), padding=1, in_channels=32, out_channels=32), "float32")
    with monkeypatch.context() as broken:
        broken.setattr(threads, "scratch", scratch)
        with pytest.raises(MemoryError, match="no scratch for a worker"):
            for _ in range(50):  # a worker that came too late for one call has its chance in the next
                output(call)
    assert np.isfinite(output(call)).all()


AVX2 = """
import json, sys
import numpy as np
from tests.ops.conv.suite import in_float64, reference_backward
from tests.ops.conv.test_cpu import TAILS, error, gradients, make, output, reference
from deformconv.runtime.vectors import BLOCK
errors = []
for case in TAILS[:1] + TAILS[3:6]:
    call = make(case, "float32")
    errors.append(error(output(call), in_float64(call, reference.deform_conv)))
    for one, two in zip(gradients(call), in_float64(call, reference_backward)):
        if two is not None:
            errors.append(error(one, two))
print(json.dumps([list(BLOCK), errors]))
"""


@pytest.mark.parametrize(
    ("name", "features", "block"),
    [("haswell", "+avx2,+fma", [6, 2, 32]), ("nehalem", "+sse4.2", [4, 2, 16])],
    ids=["AVX2", "SSE"],
)
def test_narrower_hosts(name: str, features: str, block: list[int], tmp_path: Path) -> None:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("these are x86-64 processors")
    environment = os.environ | {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "DEFORMCONV_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    ran = subprocess.run([sys.executable, "-c", AVX2], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found, errors = json.loads(ran.stdout)
    assert found == block
    assert len(errors) == 24
    assert max(errors) <= TOLERANCE["float32"]


def test_reasons() -> None:
    spec = make(TAILS[0], "float32").spec
    assert cpu.reasons_against(spec, "numpy", "cpu", False) == []
    assert "float16" in cpu.reasons_against(make(TAILS[0], "float16").spec, "numpy", "cpu", False)[0]
    assert "cuda:0" in cpu.reasons_against(spec, "torch", "cuda:0", True)[0]
    assert "jax" in cpu.reasons_against(spec, "jax", "cpu", True)[0]
