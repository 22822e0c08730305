"""A backward pass whose items are parts of images: what a part covers, and the order in which parts are added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.ops.conv.cases import Call, Case, make
from tests.ops.conv.suite import in_float64, reference_backward
from tests.ops.conv.test_cpu import HALVES, TAILS, gradients, threads_afterwards
from tests.tolerances import assert_close

import deformconv
from deformconv.bench.cases import CASES, named, spec_of
from deformconv.ops.conv import cpu
from deformconv.ops.conv.cpu_kernels import BackwardCut
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.runtime import cache, memory, work
from deformconv.runtime.simd import VECTOR_BYTES
from deformconv.sampling.corners import Table, rows_between

__all__ = ["threads_afterwards"]

# With parts of 16 positions each of these has several, in one block of channels or in many.
PARTED = [
    *(case for case in TAILS if case.name not in ("one position", "many channels")),
    Case("narrow offset groups", (9, 12), (3, 3), padding=1, in_channels=64, out_channels=9, offset_groups=8),
    Case("two blocks", (13, 12), (3, 3), padding=1, in_channels=130, out_channels=12, batch=3),
    Case("inside", (13, 12), (3, 3), padding=1, in_channels=66, out_channels=5, boundary="inside"),
]
by_part = pytest.mark.parametrize("case", PARTED, ids=lambda case: case.name)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of 16 positions, and work that is shared out however little it is."""
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    monkeypatch.setattr(cpu._plans(), "_PART", 16)
    monkeypatch.setattr(cpu._plans(), "_DEPTHWISE_ITEMS", 16)
    cpu._backward_plans.cache_clear()
    yield
    cpu._backward_plans.cache_clear()


def cuts(spec: Any, threads: int) -> list[BackwardCut]:
    return [BackwardCut(*plan.arguments[4].tolist()) for _, _, plan in cpu._backward_plans(spec, threads)]


def poison() -> None:
    """Fill the memory that calls work in with NaN."""
    for piece in memory._kept:
        piece[: piece.size // 8 * 8].view(np.float64)[...] = np.nan


@by_part
def test_the_same_bits_for_any_number_of_threads(case: Case, small_parts: None) -> None:
    call = make(case, "float32")
    assert all(cut.parts > 1 for cut in cuts(call.spec, 1))
    assert not all(cut.whole for cut in cuts(call.spec, 16))
    deformconv.set_num_threads(1)
    expected = gradients(call)
    for name, actual, right in zip(GRADIENTS, expected, in_float64(call, reference_backward), strict=True):
        assert_close(actual, right, "float32", name)
    for threads in (2, 3, 16, 5):
        deformconv.set_num_threads(threads)
        poison()
        for name, one, other in zip(GRADIENTS, expected, gradients(call), strict=True):
            np.testing.assert_array_equal(other, one, name)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("last", [False, True])
def test_half_precision_and_channels_last_are_added_up_in_float32(half: str, last: bool, small_parts: None) -> None:
    call = make(PARTED[-2], "float32")
    rounded = {name: getattr(call, name).astype(np.float16) for name in ("input", "weight", "bias", "grad_output")}
    call = call.but(**{name: array.astype(np.float32) for name, array in rounded.items()})
    if half == "float16":
        call = call.but(spec=dataclasses.replace(call.spec, dtype=half), **rounded)
    if last:
        call = call.but(input=np.moveaxis(np.ascontiguousarray(np.moveaxis(call.input, 1, -1)), -1, 1))
    found = []
    for threads in (1, 16):
        deformconv.set_num_threads(threads)
        poison()
        found.append(gradients(call))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    whole = make(PARTED[-2], "float32").but(**{name: array.astype(np.float32) for name, array in rounded.items()})
    assert_close(found[0].input, in_float64(whole, reference_backward).input, call.spec.dtype)


KINDS = {
    "none": lambda uniform: 0 * uniform,
    "far": lambda uniform: 1e4 * np.sign(uniform),
    "all over the image": lambda uniform: 40 * uniform,
    "down": lambda uniform: 8.5 + uniform / 4,
    "up": lambda uniform: uniform / 4 - 8.5,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 16])
def test_parts_that_read_nothing_and_parts_that_read_everything(kind: str, threads: int, small_parts: None) -> None:
    call = make(PARTED[-2].but(size=(26, 12)), "float32")
    uniform = np.random.default_rng(1).uniform(-1, 1, call.offset.shape)
    call = call.but(offset=KINDS[kind](uniform).astype(np.float32))
    deformconv.set_num_threads(threads)
    for _ in range(2):
        poison()
        found = gradients(call)
    for name, actual, right in zip(GRADIENTS, found, in_float64(call, reference_backward), strict=True):
        if kind != "none" or name != "offset":  # it has a kink at whole numbers
            assert_close(actual, right, "float32", name)
    assert (kind == "far") == (not found.input.any())


@pytest.mark.parametrize("wanted", [("input",), ("offset", "mask"), ("weight",), ("input", "weight")])
def test_some_of_the_gradients(wanted: tuple[str, ...], small_parts: None) -> None:
    c: Call = make(PARTED[-2], "float32")
    deformconv.set_num_threads(16)
    everything = gradients(c)
    poison()
    found = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, wanted)
    for name in GRADIENTS:
        if name in wanted:
            np.testing.assert_array_equal(getattr(found, name), getattr(everything, name))
        else:
            assert getattr(found, name) is None


def test_parts_depend_on_an_image_alone() -> None:
    for case in CASES:
        parts = {
            (cut.parts, cut.part_size, cut.tile)
            for batch in (1, 2, 9)
            for threads in (1, 16)
            for cut in cuts(spec_of(case._replace(batch=batch)), threads)
        }
        assert len(parts) == 1, case.name


# An image has parts for eight threads, a depthwise convolution's for four; fewer if they would have less than 768 positions
# (the first two) or the weight is large (two images of 256 channels have no more than one).
ITEMS = [
    ("c64-56", 1, 4), ("c128-28", 1, 4), ("c256-56", 1, 8), ("depthwise", 1, 4),
    ("c64-56", 2, 8), ("c128-28", 2, 8), ("c256-56", 2, 8), ("depthwise", 2, 8),
    ("resnet-c3-v2", 1, 8), ("resnet-c3-v2", 2, 16), ("resnet-c4-v2", 1, 8), ("resnet-c4-v2", 2, 8), ("edvr", 1, 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "images", "items"), ITEMS)
def test_threads_have_work(name: str, images: int, items: int) -> None:
    spec = spec_of(named(name)._replace(batch=images))
    assert sum(plan.share.items for _, _, plan in cpu._backward_plans(spec, 16)) == items


@cache.kernel
def bounds(size, rows, weights, tile, count, pixels, found):
    found[0], found[1] = rows_between(size, Table(rows, weights, tile), count, pixels)


@pytest.mark.parametrize("count", [1, VECTOR_BYTES // 4 - 1, VECTOR_BYTES // 4, 3 * VECTOR_BYTES // 4 + 2])
@pytest.mark.parametrize("outside", [0.0, 0.5, 1.0])
def test_rows_that_samples_read(count: int, outside: float) -> None:
    random, pixels, tile = np.random.default_rng(count), 90, 64
    rows = random.integers(20, 70, (4, tile)).astype(np.int32)
    rows[random.random(rows.shape) < outside] = pixels
    rows[:, count:] = -1000  # of no sample
    found = np.empty(2, np.int64)
    bounds(
        (9, 10),
        np.concatenate([rows.reshape(-1), np.zeros(2 * tile, np.int32)]),
        np.zeros(1, np.float32),
        tile,
        count,
        pixels,
        found,
    )
    read = rows[:, :count][rows[:, :count] < pixels]
    assert found.tolist() == ([read.min(), read.max() + 1] if read.size else [pixels, 0])
