"""The CPU kernels: everything a backend must satisfy, and what is special to them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.ops.conv.cases import CASES, Call, Case, make
from tests.ops.conv.suite import ConvSuite, in_float64, reference_backward
from tests.tolerances import TOLERANCE, assert_close, error

import deformconv
from deformconv.ops.conv import cpu, reference
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.runtime import arrays, memory, processors, work

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
    return cpu.forward(call.spec, *call.arrays)


def gradients(call: Call) -> tuple[np.ndarray, ...]:
    c = call
    return cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS)


@pytest.fixture(autouse=True)
def threads_afterwards() -> Iterator[None]:
    chosen = processors._chosen_threads
    yield
    processors._chosen_threads = chosen


class TestCpu(ConvSuite):
    backend = cpu

    @pytest.mark.slow
    @by_tail
    def test_tails(self, case: Case) -> None:
        call = make(case, "float32")
        assert_close(output(call), in_float64(call, reference.forward), "float32")
        expected = in_float64(call, reference_backward)
        for name, actual, right in zip(GRADIENTS, gradients(call), expected, strict=True):
            if right is not None:
                assert_close(actual, right, "float32", name)


@by_tail
def test_results_are_the_same_for_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    call = make(case, "float32")
    results = []
    for number in (1, 2, 3, 8, 2):
        deformconv.set_num_threads(number)
        results.append([output(call), *gradients(call)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


BATCHES = [
    *TAILS,
    Case("narrow offset groups", (9, 12), (3, 3), padding=1, in_channels=64, out_channels=9, offset_groups=8),
    Case("narrow offset groups, a rest", (9, 12), (3, 3), padding=1, in_channels=96, out_channels=9, offset_groups=6),
    Case("several parts and blocks", (30, 31), (3, 3), padding=1, in_channels=130, out_channels=12),
]


@pytest.mark.parametrize("case", BATCHES, ids=lambda case: case.name)
def test_an_image_does_not_depend_on_its_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the sums over a batch on how many images are done at once, for which memory and threads decide."""
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    call = make(dataclasses.replace(case, batch=7), "float32")
    deformconv.set_num_threads(3)
    expected = [output(call), *gradients(call)]
    for size, threads in ((7, 1), (3, 2), (1, 8)):
        deformconv.set_num_threads(threads)
        for first in range(0, 7, size):
            part = slice(first, first + size)
            images = call.but(
                **{
                    name: None if getattr(call, name) is None else getattr(call, name)[part]
                    for name in ("input", "offset", "mask", "grad_output")
                }
            )
            images = images.but(spec=dataclasses.replace(call.spec, batch=len(images.input)))
            found = [output(images), *gradients(images)]
            for name, one, other in zip(("output", *GRADIENTS), expected, found, strict=True):
                if name in ("output", "input", "offset", "mask") and one is not None:
                    np.testing.assert_array_equal(other, one[part], name)
    monkeypatch.setattr(cpu._plans(), "_BATCH_BYTES", 1)
    for threads in (1, 3):
        cpu._backward_plans.cache_clear()
        deformconv.set_num_threads(threads)
        for one, other in zip(expected[1:], gradients(call), strict=True):
            np.testing.assert_array_equal(one, other)
    cpu._backward_plans.cache_clear()


@pytest.mark.slow
def test_float32_at_width_1333_and_depth_4608() -> None:
    """The paper's image width, where adding base and offset in float32 alone costs 5e-5; then the largest layer's sum."""
    wide = Case("wide", (3, 1333), (3, 3), padding=1, in_channels=4, out_channels=4, batch=1)
    deep = Case("deep", (3, 3), (3, 3), padding=1, in_channels=512, out_channels=6, batch=1)
    for case in (wide, deep):
        assert error(output(make(case, "float32")), in_float64(make(case, "float32"), reference.forward)) <= 1e-5


def test_float32_gradient_of_the_weight_over_many_positions() -> None:
    """A sum of 160,000 products, all of one sign."""
    case = Case("large image", (400, 400), (1, 2), padding=((0, 0), (1, 0)), batch=1, in_channels=3, out_channels=2)
    call = make(case, "float32")
    call = call.but(input=np.abs(call.input), grad_output=np.abs(call.grad_output), mask=np.abs(call.mask))
    exact = make(case, "float64").but(**{n: getattr(call, n).astype("f8") for n in ("input", "grad_output", "mask", "offset")})
    c = exact
    expected = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, ["weight"]).weight
    assert error(gradients(call)[2], expected) <= 1e-5


MEMORY = {
    "primes": (TAILS[0], {}),
    "many small groups": (TAILS[4], {}),
    "depthwise, own offsets": (TAILS[6], {}),
    "large kernel": (TAILS[8], {}),
    "512 offset groups": (
        Case("", (9, 9), (7, 7), padding=3, in_channels=512, out_channels=512, groups=512, offset_groups=512, batch=1),
        {},
    ),
    "weight with channels last": (
        Case("", (9, 9), (3, 3), padding=1, in_channels=256, out_channels=512, batch=1),
        {"weight": lambda weight: np.moveaxis(np.moveaxis(weight, 1, -1).copy(), -1, 1)},
    ),
    "offset and mask sliced from one array": (
        Case("", (90, 90), (3, 3), padding=1, in_channels=4, out_channels=4, batch=6),
        {"offset": lambda offset: _sliced(offset), "mask": lambda mask: _sliced(mask)},
    ),
}


def _sliced(array: np.ndarray) -> np.ndarray:
    wide = np.concatenate([array, array[:, :3]], axis=1)
    return wide[:, : array.shape[1]]


@pytest.mark.parametrize("name", MEMORY)
def test_forward_makes_no_column_buffer(name: str) -> None:
    """A call takes its output, a copy of the input, one of the weight, and 2 MB a thread."""
    case, layouts = MEMORY[name]
    call = make(case, "float32")
    call = call.but(**{argument: layout(getattr(call, argument)) for argument, layout in layouts.items()})
    result, peak = _peak(lambda: output(call))
    # Copies are padded: each image of the input's by a row of zeros, the weight's to whole vectors of outputs.
    outputs = case.out_channels // case.groups
    weight = call.weight.nbytes * (1 if outputs == 1 else -(-outputs // 16) * 16 / outputs)
    rows = 4 * case.in_channels * case.batch
    assert peak <= result.nbytes + call.input.nbytes + rows + weight + 2 * 2**20


def _peak(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a compiled call returns, and the most bytes that it held, on one thread that has kept nothing from before."""
    run()
    memory.release()
    deformconv.set_num_threads(1)
    tracemalloc.start()
    try:
        return run(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_backward_grows_with_the_batch_by_what_must_exist(batch: int) -> None:
    """Beside the gradients: copies of a few images and their output's gradient, sums for the weight, 2 MB a thread."""
    case = Case("", (60, 60), (3, 3), padding=1, in_channels=128, out_channels=128, batch=batch)
    call = make(case, "float32")
    found, peak = _peak(lambda: gradients(call))
    results = sum(gradient.nbytes for gradient in found)
    # Two blocks of channels each sum offsets and masks; one block of an image has a gradient of the input, in two parts.
    images = min(batch, 24 * 2**20 // (call.input[0].nbytes + call.grad_output[0].nbytes))
    own = images * (call.input[0].nbytes + call.grad_output[0].nbytes + 2 * (call.offset[0].nbytes + call.mask[0].nbytes))
    rows = 4 * (case.in_channels * images + case.out_channels * 16)
    replicas = 14  # of the weight's gradient at the most, and the packed weight
    assert peak <= results + own + call.input[0].nbytes + rows + (1 + replicas) * call.weight.nbytes + 2 * 2**20
    columns = 9 * call.input.nbytes
    assert peak - results <= columns


def test_slices_of_one_array_are_read_in_place() -> None:
    call = make(Case("", (6, 7), (3, 3), padding=1, batch=3, offset_groups=2), "float32")
    sliced = call.but(offset=_sliced(call.offset), mask=_sliced(call.mask))
    np.testing.assert_array_equal(output(sliced), output(call))
    for one, two in zip(gradients(sliced), gradients(call), strict=True):
        np.testing.assert_array_equal(one, two)


MEMORY_OF_RESULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "channels first": lambda array: np.full_like(array, np.nan, order="C"),
    "channels last": lambda array: np.moveaxis(np.full_like(np.moveaxis(array, 1, -1), np.nan, order="C"), -1, 1),
}


@pytest.mark.parametrize("name", MEMORY_OF_RESULTS)
@pytest.mark.parametrize("case", [*CASES, TAILS[0], TAILS[3], TAILS[5]], ids=lambda case: case.name)
def test_results_are_written_into_the_caller_s_memory(case: Case, name: str) -> None:
    call, empty = make(case, "float32"), MEMORY_OF_RESULTS[name]
    expected = output(call)
    out = empty(expected)
    assert cpu.forward(call.spec, *call.arrays, out=out) is out
    np.testing.assert_array_equal(out, expected)
    c, right = call, gradients(call)
    given = {n: np.full_like(g, np.nan) for n, g in zip(GRADIENTS, right, strict=True) if g is not None}
    given["input"] = empty(right[0])
    found = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS, out=given)
    for n, gradient, one in zip(GRADIENTS, found, right, strict=True):
        assert gradient is given.get(n), n
        if one is not None:
            np.testing.assert_array_equal(gradient, one, n)


def test_memory_for_some_of_the_gradients() -> None:
    call = make(CASES[4], "float32")
    c, right, out = call, gradients(call), {"weight": np.empty_like(call.weight)}
    found = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, ("weight", "mask"), out=out)
    assert found.weight is out["weight"]
    assert found.input is None
    np.testing.assert_array_equal(found.weight, right[2])
    np.testing.assert_array_equal(found.mask, right[4])


def test_memory_that_is_a_slice_of_a_batch() -> None:
    call = make(CASES[4], "float32")
    expected = output(call)
    out = np.zeros((4, *expected.shape[1:]), np.float32)
    cpu.forward(call.spec, *call.arrays, out=out[1:3])
    np.testing.assert_array_equal(out[1:3], expected)
    assert not out[0].any()
    assert not out[3].any()


def test_memory_that_results_do_not_fit_is_refused() -> None:
    call = make(CASES[4], "float32")
    shape = call.spec.output_shape
    read_only = np.empty(shape, np.float32)
    read_only.flags.writeable = False
    for out, text in {
        "another shape": (
            np.empty(shape[1:], np.float32),
            "`out` has shape (6, 7, 8), float32; expected the result's, (2, 6, 7",
        ),
        "another dtype": (np.empty(shape, np.float64), "float64; expected the result's, (2, 6, 7, 8), float32."),
        "strides": (np.empty((*shape, 2), np.float32)[..., 0], "does not lie side by side in writable memory"),
        "read-only": (read_only, "does not lie side by side in writable memory"),
    }.values():
        with pytest.raises(ValueError, match=re.escape(text)):
            cpu.forward(call.spec, *call.arrays, out=out)
    c, last = call, MEMORY_OF_RESULTS["channels last"](call.weight)
    with pytest.raises(ValueError, match="expected an array in C order, as"):
        cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS, out={"weight": last})


def test_positions_beyond_32_bits_are_left_to_another_backend() -> None:
    from deformconv.ops.conv.spec import Operand, conv_spec

    arrays = Operand((1, 1, 4), "float32"), Operand((1, 1, 3), "float32"), Operand((1, 1, 1), "float32")
    reason = cpu.reasons_against(conv_spec(*arrays, stride=2**31, padding=2**31), "numpy", "cpu", False)
    assert len(reason) == 1
    assert "positions are 32-bit numbers" in reason[0]
    x, offset, weight = np.ones((1, 1, 4)), np.zeros((1, 1, 3)), np.ones((1, 1, 1))
    y = deformconv.deform_conv(x, offset, weight, stride=2**31, padding=2**31)
    np.testing.assert_array_equal(y, [[[0, 1, 0]]])


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    deformconv.set_num_threads(3)
    kernels, here = cpu._kernels(), threading.get_ident()
    forward = kernels.forward

    def failing(*arguments: Any) -> None:
        if threading.get_ident() != here:
            raise MemoryError("none for a worker")
        forward(*arguments)

    call = make(Case("large", (64, 64), (3, 3), padding=1, in_channels=32, out_channels=32), "float32")
    with monkeypatch.context() as broken:
        broken.setattr(kernels, "forward", failing)
        with pytest.raises(MemoryError, match="none for a worker"):
            for _ in range(50):  # a worker that came too late for one call has its chance in the next
                output(call)
    assert np.isfinite(output(call)).all()


HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}  # as NumPy holds them


def by_half(test: Callable[..., None]) -> Any:
    """In both kinds of half precision, with products in float32 on every processor."""
    return pytest.mark.usefixtures("float32_products")(pytest.mark.parametrize("half", HALVES)(test))


def halved(call: Call, half: str, places: bool = False) -> tuple[Call, Call]:
    """The call in half precision, offsets and masks too if `places`, and the same numbers in float32."""
    names = ("input", "weight", "bias", "grad_output", *(("offset", "mask") if places else ()))
    given = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    short = {name: arrays.narrowed(array, HALVES[half]) for name, array in given.items()}
    whole = call.but(**{name: arrays.widened(array) for name, array in short.items()})
    return dataclasses.replace(call, spec=dataclasses.replace(call.spec, dtype=half), **short), whole


def assert_rounded(found: np.ndarray, whole: np.ndarray, dtype: np.dtype, name: str = "output") -> None:
    assert found.dtype == dtype, name
    np.testing.assert_array_equal(found, arrays.narrowed(whole, dtype), name)


@by_half
@pytest.mark.parametrize("case", [*TAILS[:1], *TAILS[3:7]], ids=lambda case: case.name)
def test_half_precision_is_float32_rounded_once(case: Case, half: str) -> None:
    """One rounding of the arguments, which is the caller's, float32 between, and one of the results."""
    call, whole = halved(make(case, "float32"), half)
    dtype, places = HALVES[half], np.dtype(np.float32)
    assert_rounded(output(call), output(whole), dtype)
    for name, found, one in zip(GRADIENTS, gradients(call), gradients(whole), strict=True):
        if one is not None:
            assert_rounded(found, one, places if name in ("offset", "mask") else dtype, name)


@by_half
def test_half_precision_is_within_its_bound(half: str) -> None:
    """Of the exact result of the same numbers: half a unit in the last place of each, and what sums in float32 lose."""
    call, whole = halved(make(TAILS[0], "float32"), half)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[half]
    expected = [in_float64(whole, reference.forward), *in_float64(whole, reference_backward)]
    for name, found, exact in zip(("output", *GRADIENTS), [output(call), *gradients(call)], expected, strict=True):
        bound = TOLERANCE["float32"] * np.abs(exact).max()
        bound = bound + (unit * np.abs(exact) if found.dtype == HALVES[half] else 0)
        assert (np.abs(arrays.widened(found).astype(np.float64) - exact) <= bound).all(), name


@by_half
def test_offsets_and_masks_in_half_precision_have_such_gradients(half: str) -> None:
    call, whole = halved(make(TAILS[0], "float32"), half, places=True)
    assert_rounded(output(call), output(whole), HALVES[half])
    right = gradients(whole)
    for name, found, one in zip(GRADIENTS, gradients(call), right, strict=True):
        if one is not None:
            assert_rounded(found, one, HALVES[half], name)
    out = {name: np.zeros_like(getattr(call, name)) for name in GRADIENTS if getattr(call, name) is not None}
    c = call
    found = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS, out=out)
    for name, one in zip(GRADIENTS, right, strict=True):
        if name in out:
            assert getattr(found, name) is out[name]
            assert_rounded(out[name], one, HALVES[half], name)
    v1 = dataclasses.replace(call, spec=dataclasses.replace(call.spec, masked=False), mask=None)
    offset = cpu.backward(v1.spec, v1.grad_output, v1.input, v1.offset, v1.weight, None, ("offset",)).offset
    assert offset.dtype == HALVES[half]


@by_half
@pytest.mark.parametrize("name", MEMORY_OF_RESULTS)
def test_half_precision_with_channels_first_and_last(half: str, name: str) -> None:
    call, _ = halved(make(TAILS[0], "float32"), half)
    right = [output(call), *gradients(call)]
    last = {n: np.moveaxis(np.moveaxis(getattr(call, n), 1, -1).copy(), -1, 1) for n in ("input", "weight", "grad_output")}
    other = call.but(**last) if name == "channels last" else call
    for found, one in zip([output(other), *gradients(other)], right, strict=True):
        np.testing.assert_array_equal(found, one)
    out = np.zeros_like(right[0])
    assert cpu.forward(call.spec, *call.arrays, out=out) is out
    np.testing.assert_array_equal(out, right[0])


@by_half
def test_half_precision_is_the_same_for_any_number_of_threads(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    call, _ = halved(make(TAILS[0], "float32"), half)
    results = []
    for number in (1, 3):
        deformconv.set_num_threads(number)
        results.append([output(call), *gradients(call)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


@by_half
def test_half_precision_without_pixels_or_images(half: str) -> None:
    for case in (Case("", (0, 5), (3, 3), padding=2, batch=0), Case("", (6, 5), (3, 3), batch=0)):
        call, whole = halved(make(case, "float32"), half)
        assert_rounded(output(call), output(whole), HALVES[half])
        for name, found, one in zip(GRADIENTS, gradients(call), gradients(whole), strict=True):
            assert_rounded(found, one, np.dtype(np.float32) if name in ("offset", "mask") else HALVES[half], name)


@by_half
def test_half_precision_takes_no_copy_but_those_that_there_are(half: str) -> None:
    call, _ = halved(make(Case("", (60, 60), (3, 3), padding=1, in_channels=64, out_channels=64), "float32"), half)
    result, peak = _peak(lambda: output(call))
    rows = 4 * call.input.shape[1] * len(call.input)
    assert peak <= result.nbytes + 2 * call.input.nbytes + rows + 2 * call.weight.nbytes + 2 * 2**20


AVX2 = """
import json, sys
import numpy as np
from tests.ops.conv.suite import in_float64, reference_backward
from tests.ops.conv.test_cpu import HALVES, TAILS, assert_rounded, error, gradients, halved, make, output, reference
from tests.ops.conv.test_cpu_pairs import EVEN, test_the_bound
from tests.pair_products import products_in
from deformconv.runtime.matmul import BLOCK
from deformconv.runtime.simd import VECTOR_BYTES
errors = []
for case in TAILS[:1] + TAILS[3:6]:
    call = make(case, "float32")
    errors.append(error(output(call), in_float64(call, reference.forward)))
    for one, two in zip(gradients(call), in_float64(call, reference_backward)):
        if two is not None:
            errors.append(error(one, two))
call, whole = halved(make(TAILS[0], "float32"), "float16")  # these processors do not convert it
assert_rounded(output(call), output(whole), HALVES["float16"])
with products_in("uint32"):
    test_the_bound(EVEN[0])
print(json.dumps([[*BLOCK, VECTOR_BYTES], errors]))
"""


@pytest.mark.slow
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
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(Path(deformconv.__file__).parents[1])]),
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
    assert cpu.reasons_against(make(TAILS[0], "float16").spec, "numpy", "cpu", False) == []
    assert "cuda:0" in cpu.reasons_against(spec, "torch", "cuda:0", True)[0]
    assert cpu.reasons_against(spec, "jax", "cpu", True) == []
    assert "cupy" in cpu.reasons_against(spec, "cupy", "cpu", True)[0]
