"""The compiled kernels: the suite, and what is promised of threads and memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.ops.roi_pool.cases import CASES, Case, make
from tests.ops.roi_pool.suite import WANTED, BackendSuite

import deformconv
from deformconv.ops.roi_pool import cpu
from deformconv.runtime import memory

LARGE = Case("large", channels=70, size=(30, 40), batch=3, boxes=40, output_size=(7, 7), scale=0.25)


class TestCpu(BackendSuite):
    backend = cpu


@pytest.fixture
def threads() -> object:
    before = deformconv.get_num_threads()
    yield deformconv.set_num_threads
    deformconv.set_num_threads(before)


@pytest.mark.parametrize(
    "case", [LARGE, LARGE.but(channels=98, position_sensitive=True, classes=2), CASES[0]], ids=lambda c: c.name
)
def test_bits_do_not_depend_on_threads(case: Case, threads: object) -> None:
    results = []
    for number in (1, 2, 3, 5):
        threads(number)  # type: ignore[operator]
        call = make(case, "float32")
        gradients = cpu.backward(call.spec, call.grad_output, *call.arrays, WANTED)
        results.append([cpu.forward(call.spec, *call.arrays), gradients.input, gradients.offset, gradients.mask])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_box_gives_the_same_bits_beside_any_others() -> None:
    call = make(LARGE, "float32")
    whole = cpu.forward(call.spec, *call.arrays)
    for rows in (slice(3, 4), slice(10, 30)):
        part = dataclasses.replace(call.spec, boxes=len(call.boxes[rows]))
        alone = cpu.forward(part, call.input, call.boxes[rows], call.offset[rows], call.mask[rows])  # type: ignore[index]
        np.testing.assert_array_equal(alone, whole[rows])


def test_a_cache_that_is_required_says_what_to_run(tmp_path: Path) -> None:
    program = "import numpy as np, deformconv\ndeformconv.deform_roi_pool(np.ones((1, 1, 4, 4)), np.array([[0.0, 0, 0, 3, 3]]))"
    variables = {**os.environ, "DEFORMCONV_CACHE_DIR": str(tmp_path), "DEFORMCONV_REQUIRE_CACHE": "1"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=variables)
    last = ran.stderr.splitlines()[-1]
    assert "roi_pool.cpu_kernels.forward (float64, 2-D)" in last
    assert "Run `deformconv warmup --dtype float64 --rank 2 --rois`" in last


def test_memory_of_any_order() -> None:
    call = make(CASES[0], "float32")
    expected = cpu.forward(call.spec, *call.arrays)
    for array in (call.input, call.boxes, call.offset, call.mask):
        assert array is not None
    strange = [np.asfortranarray(call.input), call.boxes[::-1].copy()[::-1], np.asfortranarray(call.offset), call.mask]
    strange[3] = np.repeat(call.mask, 2, axis=-1)[..., ::2]
    np.testing.assert_array_equal(cpu.forward(call.spec, *strange), expected)


@pytest.mark.parametrize(("direction", "maps"), [("forward", 1), ("backward", 2)])
def test_beside_its_results_a_call_takes_a_map_or_two(direction: str, maps: int) -> None:
    """The input's copy and its gradient's, at a box head's size; all else is small beside them."""
    call = make(Case("box head", channels=256, size=(50, 84), batch=2, boxes=512, output_size=(7, 7), scale=1 / 16), "float32")
    gradient = (call.grad_output,) if direction == "backward" else ()
    wanted = (WANTED,) if direction == "backward" else ()
    getattr(cpu, direction)(call.spec, *gradient, *call.arrays, *wanted)  # what is kept for the next calls is there
    memory.release()
    tracemalloc.start()
    try:
        found = getattr(cpu, direction)(call.spec, *gradient, *call.arrays, *wanted)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    results = [found] if direction == "forward" else [found.input, found.offset, found.mask]
    beside = peak - sum(array.nbytes for array in results)
    assert 0.9 * maps < beside / call.input.nbytes < maps + 0.3
