"""The compiled kernels: the suite, and what is promised of threads, memory and parts of a call."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.ops.attention.cases import ARGUMENTS, Array, Call, Case, make
from tests.ops.attention.suite import BackendSuite, with_queries

import deformconv
from deformconv.ops.attention import cpu
from deformconv.runtime import memory

LARGE = Case("large", batch=2, levels=((20, 30), (10, 15)), heads=3, channels=48, queries=150, points=4)
FEW = LARGE.but(name="few", batch=1, heads=1, channels=70)


class TestCpu(BackendSuite):
    backend = cpu


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = deformconv.get_num_threads()
    yield deformconv.set_num_threads
    deformconv.set_num_threads(before)


def results(call: Call, wanted: tuple[str, ...] = ARGUMENTS) -> list[Array]:
    gradients = cpu.backward(call.spec, call.grad_output, *call.arrays, wanted)
    return [cpu.forward(call.spec, *call.arrays), *(getattr(gradients, name) for name in wanted)]


@pytest.mark.parametrize("case", [LARGE, FEW], ids=lambda case: case.name)
def test_bits_do_not_depend_on_threads(case: Case, threads: Callable[[int], None]) -> None:
    """Nor on the blocks that a head's channels are cut into where there are more threads than heads."""
    found, call = [], make(case, "float32")
    for number in (1, 2, 3, 16):
        threads(number)
        found.append(results(call))
    assert len({cpu._plan(call.spec, number).sums[0] for number in (1, 16)}) == 2
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("reads", [0, 1 << 40])
def test_bits_do_not_depend_on_a_copy(reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(LARGE.but(queries=40), "float32")
    expected = results(call)
    monkeypatch.setattr(cpu, "_READS", reads)
    cpu._plan.cache_clear()
    assert (cpu._plan(call.spec, 1).copy > 0) == (reads == 0)
    found = results(call)
    cpu._plan.cache_clear()
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)


def test_gradients_alone_are_those_beside_others() -> None:
    call = make(LARGE, "float32")
    expected = dict(zip(ARGUMENTS, results(call)[1:], strict=True))
    for wanted in (("value",), ("locations",), ("weights",), ("value", "weights"), ("locations", "weights")):
        for name, gradient in zip(wanted, results(call, wanted)[1:], strict=True):
            np.testing.assert_array_equal(gradient, expected[name])


def test_a_query_and_an_image_give_the_same_bits_beside_any_others() -> None:
    call = make(LARGE, "float32")
    whole = cpu.forward(call.spec, *call.arrays)
    for rows in (slice(3, 4), slice(10, 120)):
        part = with_queries(call, rows)
        np.testing.assert_array_equal(cpu.forward(part.spec, *part.arrays), whole[:, rows])
    alone = cpu.forward(replace(call.spec, batch=1), *(array[1:] for array in call.arrays))
    np.testing.assert_array_equal(alone, whole[1:])


def test_memory_of_any_order() -> None:
    call = make(LARGE, "float32")
    expected = results(call)
    strange = call.but(
        value=np.asfortranarray(call.value),
        locations=call.locations[..., ::-1].copy()[..., ::-1],
        weights=np.repeat(call.weights, 2, axis=-1)[..., ::2],
        grad_output=np.asfortranarray(call.grad_output),
    )
    for array in strange[1:]:
        array.flags.writeable = False
    for one, two in zip(results(strange), expected, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_cache_that_is_required_says_what_to_run(tmp_path: Path) -> None:
    program = (
        "import numpy as np, deformconv\n"
        "value, weights = np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1, 1))\n"
        "deformconv.deform_attention(value, [(1, 1)], np.ones((1, 1, 1, 1, 1, 2)), weights)"
    )
    variables = {**os.environ, "DEFORMCONV_CACHE_DIR": str(tmp_path), "DEFORMCONV_REQUIRE_CACHE": "1"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=variables)
    last = ran.stderr.splitlines()[-1]
    assert "attention.cpu_kernels.forward (float64" in last
    assert "Run `deformconv warmup --dtype float64 --attention`" in last


@pytest.mark.parametrize(("direction", "values"), [("forward", 1), ("backward", 1)])
def test_beside_its_results_a_call_takes_a_copy_of_the_value(direction: str, values: int) -> None:
    """And each thread as much for the value's gradient as a head of an image takes; all else is small beside them."""
    call = make(LARGE.but(heads=8, levels=((60, 80), (30, 40)), queries=2000, channels=32), "float32")
    given = (call.grad_output,) if direction == "backward" else ()
    wanted = (ARGUMENTS,) if direction == "backward" else ()
    getattr(cpu, direction)(call.spec, *given, *call.arrays, *wanted)  # what is kept for the next calls is there
    memory.release()
    tracemalloc.start()
    try:
        found = getattr(cpu, direction)(call.spec, *given, *call.arrays, *wanted)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    of_results = [found] if direction == "forward" else list(found)
    beside = peak - sum(array.nbytes for array in of_results)
    rooms = deformconv.get_num_threads() / (call.spec.batch * call.spec.heads) if direction == "backward" else 0
    assert 0.9 * values < beside / call.value.nbytes < values + rooms + 0.1
