"""The compiled kernels: the suite, and what is promised of threads, memory and parts of a call."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.ops.aggregate.cases import ARGUMENTS, Array, Call, Case, call_of, make
from tests.ops.aggregate.suite import AggregateSuite, in_float64, reference_backward, reference_forward
from tests.tolerances import assert_close

import deformconv
from deformconv.ops.aggregate import cpu
from deformconv.ops.aggregate.spec import aggregate_spec
from deformconv.ops.operator import Operand
from deformconv.runtime import memory, work

# Sizes that leave a rest at every place where the work is cut: tiles, vectors, blocks of channels; and usual widths of groups.
CUT = {
    "groups of two vectors": Case("", (19, 23), (3, 3), padding=1, channels=48, offset_groups=3),
    "a wide group": Case("", (9, 11), (3, 2), padding=1, channels=151, batch=1),
    "small groups": Case("", (7, 13), (2, 3), channels=35, offset_groups=7, stride=(1, 2)),
    "a line": Case("", (1033,), (5,), padding=2, channels=6, offset_groups=2, batch=1, masked=False),
    "a volume": Case("", (3, 5, 7), (3, 1, 2), padding=1, channels=20, offset_groups=2, boundary="inside"),
}
by_cut = pytest.mark.parametrize("name", CUT)


class TestCpu(AggregateSuite):
    backend = cpu


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = deformconv.get_num_threads()
    yield deformconv.set_num_threads
    deformconv.set_num_threads(before)


@pytest.fixture(autouse=True)
def all_work_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However small it is."""
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    forget_plans()
    yield
    forget_plans()


def forget_plans() -> None:
    cpu._plan.cache_clear()
    cpu._backward_plan.cache_clear()


def results(call: Call, wanted: tuple[str, ...] = ARGUMENTS) -> list[Array]:
    wanted = tuple(name for name in wanted if getattr(call, name) is not None)
    gradients = cpu.backward(call.spec, call.grad_output, *call.arrays, wanted)
    return [cpu.forward(call.spec, *call.arrays), *(getattr(gradients, name) for name in wanted)]


def assert_same(found: list[Array], expected: list[Array]) -> None:
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)


@by_cut
def test_tails(name: str) -> None:
    call = make(CUT[name], "float32")
    output, *gradients = results(call)
    assert_close(output, in_float64(call, reference_forward), "float32")
    expected = [gradient for gradient in in_float64(call, reference_backward) if gradient is not None]
    for one, two in zip(gradients, expected, strict=True):
        assert_close(one, two, "float32")


@by_cut
def test_bits_do_not_depend_on_threads(name: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how the work is cut for them: who computes all gradients of a group at once, or blocks of its channels."""
    monkeypatch.setattr(cpu, "_ITEM", 1)
    call, found = make(CUT[name], "float32"), []
    for number in (1, 2, 3, 16):
        threads(number)
        found.append(results(call))
    one, many = (cpu._plan(call.spec, number) for number in (1, 16))
    assert one.sums[0] < many.sums[0] or one.forward.items < many.forward.items
    for other in found[1:]:
        assert_same(other, found[0])


@by_cut
def test_gradients_alone_are_those_beside_others(name: str) -> None:
    call = make(CUT[name], "float32")
    expected = dict(zip(ARGUMENTS, results(call)[1:], strict=False))
    for wanted in (("input",), ("offset",), ("mask",), ("input", "mask"), ("offset", "mask")):
        wanted = tuple(name for name in wanted if name in expected)
        assert_same(results(call, wanted)[1:], [expected[name] for name in wanted])


def test_an_image_gives_the_same_bits_in_any_batch() -> None:
    case = CUT["groups of two vectors"].but(batch=5)
    call = make(case, "float32")
    whole = results(call)
    for n in (0, 3):
        one = Call(replace(call.spec, batch=1), *(array[n : n + 1] for array in (*call.arrays, call.grad_output)))
        assert_same(results(one), [array[n : n + 1] for array in whole])


def channels_last(array: Array) -> Array:
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1)


def is_channels_last(array: Array) -> bool:
    return bool(np.moveaxis(array, 1, -1).flags.c_contiguous)


@by_cut
def test_either_order_of_channels_is_kept_and_gives_the_same_bits(name: str) -> None:
    call = make(CUT[name], "float32")
    expected = results(call)
    for order in product((False, True), repeat=3):
        turned = dict(zip((*ARGUMENTS, "grad_output"), (*order, not order[0]), strict=True))
        arrays = {name: getattr(call, name) for name in turned}
        changed = {n: channels_last(a) if turned[n] and a is not None else a for n, a in arrays.items()}
        found = results(call.but(**changed))
        assert_same(found, expected)
        names = ("input", *(name for name in ARGUMENTS if getattr(call, name) is not None))
        for name, result in zip(names, found, strict=True):
            assert is_channels_last(result) if turned[name] else result.flags.c_contiguous


def parted(call: Call, extra: int, last: bool) -> Call:
    """Offset and mask as parts of one array with some channels more, as a layer's projection gives them."""
    assert call.mask is not None
    rest = np.full((call.spec.batch, extra, *call.spec.output_size), np.nan, "float32")
    whole = np.concatenate([call.offset, call.mask, rest], axis=1)
    whole = channels_last(whole) if last else whole
    offsets, masks = call.offset.shape[1], call.mask.shape[1]
    return call.but(offset=whole[:, :offsets], mask=whole[:, offsets : offsets + masks])


@pytest.mark.parametrize("last", [False, True])
def test_parts_of_one_array_are_read_in_place(last: bool) -> None:
    call = make(CUT["groups of two vectors"], "float32")
    parts = parted(call, 5, last)
    for array in (parts.offset, parts.mask):
        assert np.shares_memory(cpu.arrays.flat_axes(array)[0], array)
    assert_same(results(parts), results(call))


def test_memory_of_any_order() -> None:
    call = make(CUT["small groups"], "float32")
    strange = call.but(
        input=np.asfortranarray(call.input),
        offset=call.offset[..., ::-1].copy()[..., ::-1],
        mask=np.repeat(call.mask, 2, axis=-1)[..., ::2],
        grad_output=np.asfortranarray(call.grad_output),
    )
    for array in (*strange.arrays, strange.grad_output):
        array.flags.writeable = False
    assert_same(results(strange), results(call))
    swapped = call.but(offset=call.offset.astype(">f4"), mask=channels_last(call.mask).astype(">f4"))
    assert_same(results(swapped), results(call))


def test_one_image_for_a_batch_without_a_copy() -> None:
    """An expanded array, whose images are 0 numbers apart."""
    call = make(CUT["small groups"].but(batch=3), "float32")
    names = ("offset", "mask")
    expanded = call.but(**{name: np.broadcast_to(getattr(call, name)[:1], getattr(call, name).shape) for name in names})
    plain = call.but(**{name: getattr(expanded, name).copy() for name in names})
    assert_same(results(expanded), results(plain))


def test_images_too_large_for_32_bits_are_left_to_another_backend() -> None:
    def reasons(size: tuple[int, ...], channels: int, **parameters: Any) -> list[str]:
        shapes = (1, channels, *size), (1, len(size), *(1 for _ in size))
        spec = aggregate_spec(*(Operand(shape, "float32") for shape in shapes), kernel_size=1, **parameters)
        return cpu.reasons_against(spec, "numpy", "cpu", False)

    assert reasons((2**14, 2**13), 16, stride=2**15) == []
    (reason,) = reasons((2**14, 2**14), 16, stride=2**15)
    assert reason == "268435456 pixels of 16 channels a group exceed its 32-bit numbers"
    (reason,) = reasons((4,), 1, stride=2**31)
    assert "positions are 32-bit numbers" in reason


def test_nothing_depends_on_what_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither results nor scratch memory are taken for zeros."""
    call = make(CUT["groups of two vectors"], "float32")
    expected = results(call)
    fresh = memory.aligned

    def poisoned(size: int) -> np.ndarray:
        found = fresh(size)
        found[...] = 255  # NaN
        return found

    memory.release()
    monkeypatch.setattr(memory, "aligned", poisoned)
    monkeypatch.setattr(cpu.arrays, "aligned", poisoned)
    assert_same(results(call), expected)
    memory.release()


def test_a_cache_that_is_required_says_what_to_run(tmp_path: Path) -> None:
    program = (
        "import numpy as np, deformconv\n"
        "deformconv.deform_aggregate(np.ones((1, 1, 2, 2)), np.ones((1, 2, 2, 2)), kernel_size=1, backend='cpu')"
    )
    variables = {**os.environ, "DEFORMCONV_CACHE_DIR": str(tmp_path), "DEFORMCONV_REQUIRE_CACHE": "1"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=variables)
    last = ran.stderr.splitlines()[-1]
    assert "aggregate.cpu_kernels.forward (float64, 2-D)" in last
    assert "Run `deformconv warmup --dtype float64 --rank 2 --aggregate`" in last


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_beside_its_results_a_call_takes_a_copy_of_the_input(
    direction: str, last: bool, threads: Callable[[int], None]
) -> None:
    """And each thread as much for the input's gradient as a group of an image takes: no copy of offsets, masks or results."""
    threads(2)
    call = make(Case("", (60, 80), (3, 3), padding=1, channels=32, offset_groups=4, batch=2), "float32")
    if last:
        call = call.but(**{name: channels_last(getattr(call, name)) for name in (*ARGUMENTS, "grad_output")})

    def run() -> Any:
        if direction == "forward":
            return [cpu.forward(call.spec, *call.arrays)]
        return cpu.backward(call.spec, call.grad_output, *call.arrays, ARGUMENTS)

    run()
    memory.release()
    tracemalloc.start()
    try:
        found = run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    beside = peak - sum(array.nbytes for array in found)
    rooms = 2 / (call.spec.batch * call.spec.offset_groups) if direction == "backward" else 0
    assert 0.9 < beside / call.input.nbytes < 1.1 + rooms


def test_a_long_call_of_one_position_and_many_taps() -> None:
    """7 * 7 * 7 taps, more than most kernels have."""
    size = (7, 7, 7)
    call = make(Case("", size, size, channels=3, batch=1), "float32")
    assert prod(call.spec.output_size) == 1
    output, *gradients = results(call)
    assert_close(output, in_float64(call, reference_forward), "float32")
    for one, two in zip(gradients, in_float64(call, reference_backward), strict=True):
        assert_close(one, two, "float32")


def test_an_input_that_is_a_slice() -> None:
    call = make(CUT["small groups"], "float32")
    wide = np.concatenate([call.input, call.input], axis=1)
    for input in (wide[:, :35], channels_last(wide)[:, :35]):
        found = call_of(input, call.offset, call.mask, kernel_size=(2, 3), stride=(1, 2))
        np.testing.assert_array_equal(cpu.forward(found.spec, *found.arrays), cpu.forward(call.spec, *call.arrays))
