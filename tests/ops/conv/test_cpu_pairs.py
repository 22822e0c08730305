"""Products of pairs of bfloat16, as processors with AVX512-BF16 make them: here of plain operations, by the same kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.ops.conv.cases import CASES, Call, Case, make
from tests.ops.conv.suite import in_float64, reference_backward
from tests.ops.conv.test_cpu import (
    TAILS,
    _peak,
    assert_rounded,
    gradients,
    halved,
    output,
    threads_afterwards,
)
from tests.ops.conv.test_cpu_layer import Layer
from tests.tolerances import TOLERANCE

import deformconv
from deformconv.ops.conv import cpu, reference
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.runtime import arrays, work

__all__ = ["threads_afterwards"]

BITS = np.dtype(np.uint16)
UNIT = 2.0**-8  # half a unit in the last place of 1
pytestmark = pytest.mark.usefixtures("products_of_pairs")

# `TAILS` and `BATCHES` with channels and outputs of a weight group in pairs, which leave rests elsewhere.
EVEN = [
    Case("primes, doubled", (19, 29), (5, 3), stride=(2, 1), padding=(2, 1), batch=3, in_channels=38, out_channels=58),
    Case("one position", (3, 3), (3, 3), batch=5, in_channels=22, out_channels=18),
    Case("many channels", (5, 4), (1, 1), batch=1, in_channels=1030, out_channels=6),
    Case("deep groups", (6, 5), (3, 3), padding=1, in_channels=156, out_channels=36, groups=2, offset_groups=3),
    Case("many small groups", (7, 9), (3, 3), padding=1, in_channels=96, out_channels=96, groups=24, offset_groups=4),
    Case("large kernel", (12, 11), (7, 7), padding=3, in_channels=10, out_channels=20),
    Case("long line", (1033,), (9,), padding=4, in_channels=6, out_channels=8, batch=1),
    Case("volume", (3, 5, 7), (3, 3, 2), padding=1, in_channels=10, out_channels=14, batch=1),
    Case("narrow offset groups", (9, 12), (3, 3), padding=1, in_channels=64, out_channels=10, offset_groups=8),
    Case("several parts and blocks", (30, 31), (3, 3), padding=1, in_channels=130, out_channels=12),
]
ONE_WAY = [
    Case("forward only", (7, 9), (3, 3), padding=1, in_channels=12, out_channels=15),
    Case("backward only", (7, 9), (3, 3), padding=1, in_channels=15, out_channels=12),
]


def by(cases: list[Case]) -> Any:
    """Parametrises by cases; those that are not 2-D have kernels of their own to be compiled."""
    marks = [[] if len(case.size) == 2 else [pytest.mark.slow] for case in cases]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=mark, id=case.name) for case, mark in zip(cases, marks, strict=True)]
    )


by_even = by(EVEN)


def call_of(case: Case) -> tuple[Call, Call]:
    return halved(make(case, "float32"), "bfloat16")


def absolute(call: Call) -> Call:
    """The call of the same places with nothing negative, so that nothing cancels out."""
    names = ("input", "weight", "bias", "mask", "grad_output")
    return call.but(**{name: np.abs(getattr(call, name)) for name in names if getattr(call, name) is not None})


@by([*EVEN, *ONE_WAY, *CASES])
def test_the_bound(case: Case) -> None:
    """Samples are rounded once, and so are results; between them sums lose what float32's lose."""
    call, whole = call_of(case)
    found = dict(zip(("output", *GRADIENTS), (output(call), *gradients(call)), strict=True))
    expected = dict(zip(found, (in_float64(whole, reference.forward), *in_float64(whole, reference_backward)), strict=True))
    largest = absolute(whole)
    of_samples = {
        "output": in_float64(largest, reference.forward),
        "weight": in_float64(largest, reference_backward).weight,
    }
    forwards, backwards = cpu._in_pairs(call.spec)
    for name, exact in expected.items():
        if exact is None or not exact.size:
            continue
        bound = TOLERANCE["float32"] * np.abs(exact).max()
        bound = bound + (UNIT * np.abs(exact) if found[name].dtype == BITS else 0)
        if name in of_samples and (forwards if name == "output" else backwards):
            bound = bound + (1 + UNIT) * UNIT * of_samples[name]
        assert (np.abs(arrays.widened(found[name]).astype(np.float64) - exact) <= bound).all(), name


@by([*EVEN, *ONE_WAY])
def test_samples_that_are_pixels_are_not_rounded(case: Case) -> None:
    """Then all is as in float32, but for the order of sums: they are rounded to the same number, or to its neighbour."""
    call, whole = call_of(case.but(masked=False))
    call, whole = (one.but(offset=np.round(one.offset)) for one in (call, whole))
    for found, exact in (
        (output(call), in_float64(whole, reference.forward)),
        (gradients(call)[2], in_float64(whole, reference_backward).weight),
    ):
        error = np.abs(arrays.widened(found).astype(np.float64) - exact)
        assert (error <= UNIT * np.abs(exact) + TOLERANCE["float32"] * np.abs(exact).max()).all()


@by([*TAILS, *ONE_WAY])
def test_an_odd_number_is_multiplied_in_float32(case: Case) -> None:
    call, whole = call_of(case)
    forwards, backwards = cpu._in_pairs(call.spec)
    group = call.spec.in_channels // call.spec.groups, call.spec.out_channels // call.spec.groups
    assert (forwards, backwards) == ((False, False) if group == (1, 1) else tuple(number % 2 == 0 for number in group))
    if not forwards:
        assert_rounded(output(call), output(whole), BITS)
    if not backwards:
        for name, found, one in zip(GRADIENTS, gradients(call), gradients(whole), strict=True):
            if one is not None:
                assert_rounded(found, one, np.dtype(np.float32) if name in ("offset", "mask") else BITS, name)


@by_even
def test_the_same_bits_for_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    call, _ = call_of(case)
    results = []
    for number in (1, 2, 3, 8):
        deformconv.set_num_threads(number)
        results.append([output(call), *gradients(call)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@by_even
def test_an_image_does_not_depend_on_its_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor sums over a batch on how many images are done at once."""
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    call, _ = call_of(dataclasses.replace(case, batch=5))
    deformconv.set_num_threads(3)
    expected = [output(call), *gradients(call)]
    for first, end in ((0, 3), (3, 5), (2, 3)):
        part = {name: getattr(call, name) for name in ("input", "offset", "mask", "grad_output")}
        images = call.but(**{name: None if array is None else array[first:end] for name, array in part.items()})
        images = images.but(spec=dataclasses.replace(call.spec, batch=end - first))
        for name, one, other in zip(("output", *GRADIENTS), expected, [output(images), *gradients(images)], strict=True):
            if name in ("output", "input", "offset", "mask") and one is not None:
                np.testing.assert_array_equal(other, one[first:end], name)
    monkeypatch.setattr(cpu._plans(), "_BATCH_BYTES", 1)
    cpu._backward_plans.cache_clear()
    for one, other in zip(expected[1:], gradients(call), strict=True):
        np.testing.assert_array_equal(one, other)


@by_even
def test_channels_may_lie_last(case: Case) -> None:
    call, _ = call_of(case)
    last = {n: np.moveaxis(np.moveaxis(getattr(call, n), 1, -1).copy(), -1, 1) for n in ("input", "weight", "grad_output")}
    other = call.but(**last)
    for found, one in zip([output(other), *gradients(other)], [output(call), *gradients(call)], strict=True):
        np.testing.assert_array_equal(found, one)


@by_even
def test_a_weight_that_is_packed_already(case: Case) -> None:
    call, _ = call_of(case)
    packed = cpu.pack(call.spec, call.weight)
    assert packed.dtype == cpu._plans().words()
    input, offset, _, bias, mask = call.arrays
    np.testing.assert_array_equal(cpu.forward(call.spec, input, offset, None, bias, mask, packed=packed), output(call))


@by_even
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(case: Case, number: float) -> None:
    """They are at the places where float32 has them."""
    call, whole = call_of(case.but(batch=min(case.batch, 2)))
    for name in ("input", "weight", "offset", "mask", "grad_output"):
        array = getattr(whole, name)
        if array is None:
            continue
        odd = array.copy()
        odd.reshape(-1)[odd.size // 2] = number
        short = odd if name in ("offset", "mask") else arrays.narrowed(odd, BITS)
        found = [output(call.but(**{name: short})), *gradients(call.but(**{name: short}))]
        with np.errstate(all="ignore"):
            expected = [output(whole.but(**{name: odd})), *gradients(whole.but(**{name: odd}))]
        for what, one, other in zip(("output", *GRADIENTS), found, expected, strict=True):
            if other is not None:
                one = arrays.widened(one)
                np.testing.assert_array_equal(np.isnan(one), np.isnan(other), f"{what} of {name}")
                infinite = np.isinf(other)
                np.testing.assert_array_equal(one[infinite], other[infinite], f"{what} of {name}")
                assert np.array_equal(np.isinf(one), infinite)


def test_it_is_said() -> None:
    pairs = "it reads and writes bfloat16, rounds samples to it, and adds up their products in float32"
    floats = "it reads and writes bfloat16, and computes in float32"
    for case, *said in (
        (EVEN[0], pairs, pairs),
        (TAILS[0], floats, floats),
        (ONE_WAY[0], pairs, floats),
        (ONE_WAY[1], floats, pairs),
    ):
        call, whole = call_of(case)
        assert [cpu.how(call.spec, "numpy", "cpu", backward)[1] for backward in (False, True)] == said, case.name
        assert len(cpu.how(whole.spec, "numpy", "cpu", False)) == 1
    half, _ = halved(make(EVEN[0], "float32"), "float16")
    assert cpu.how(half.spec, "numpy", "cpu", True)[1:] == ["it reads and writes float16, and computes in float32"]


def test_no_pixels_or_images() -> None:
    even = {"in_channels": 4, "out_channels": 6}
    for case in (Case("", (0, 5), (3, 3), padding=2, batch=0, **even), Case("", (6, 5), (3, 3), batch=0, **even)):
        call, whole = call_of(case)
        assert_rounded(output(call), output(whole), BITS)
        for name, found, one in zip(GRADIENTS, gradients(call), gradients(whole), strict=True):
            assert_rounded(found, one, np.dtype(np.float32) if name in ("offset", "mask") else BITS, name)


@pytest.mark.parametrize("wanted", [["input"], ["weight"], ["offset", "mask"], ["bias"], ["weight", "bias"]])
def test_some_gradients(wanted: list[str]) -> None:
    c, _ = call_of(EVEN[0])
    everything = dict(zip(GRADIENTS, gradients(c), strict=True))
    found = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, wanted)._asdict()
    for name in GRADIENTS:
        if name in wanted:
            np.testing.assert_array_equal(found[name], everything[name], name)
        else:
            assert found[name] is None


def test_memory() -> None:
    """No copy of a sample that is not a tile's."""
    call, _ = call_of(Case("", (60, 60), (3, 3), padding=1, in_channels=64, out_channels=64))
    result, peak = _peak(lambda: output(call))
    rows = 4 * call.input.shape[1] * len(call.input)
    assert peak <= result.nbytes + 2 * call.input.nbytes + rows + call.weight.nbytes + 2 * 2**20


@by_even
def test_a_layer_s_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it predicts is float32, and no rounding more than that of samples is between that and the output."""
    layer = Layer(case, "float32")
    short, whole = halved(layer.call, "bfloat16")
    layer.weight = arrays.widened(arrays.narrowed(layer.weight, BITS))
    layer.bias = arrays.widened(arrays.narrowed(layer.bias, BITS))
    layer.call = whole
    exact = layer.expected()
    activation, weights = (2.0, None), [arrays.narrowed(array, BITS) for array in (layer.weight, layer.bias)]
    found = cpu.forward_layer(short.spec, short.input, short.weight, short.bias, *weights, activation)
    close = TOLERANCE["bfloat16"] * np.abs(exact).max()
    assert (np.abs(arrays.widened(found).astype(np.float64) - exact) <= close).all()
    panels = cpu.pack(short.spec, short.weight), cpu.pack_predictor(short.spec, len(layer.weight), weights[0])
    again = cpu.forward_layer(short.spec, short.input, short.weight, short.bias, *weights, activation, packed=panels)
    np.testing.assert_array_equal(again, found)
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    for number in (1, 3):
        deformconv.set_num_threads(number)
        again = cpu.forward_layer(short.spec, short.input, short.weight, short.bias, *weights, activation)
        np.testing.assert_array_equal(again, found)


@pytest.mark.slow
def test_warmup_compiles_all_that_calls_take() -> None:
    cpu.warmup(("bfloat16",), (2,))
    kernels = cpu._kernels().forward, cpu._kernels().backward, cpu._kernels().collect, cpu._layer_kernel()
    before = [len(kernel.signatures) for kernel in kernels]
    for case in (EVEN[0], TAILS[0], TAILS[5], *ONE_WAY):
        call, _ = call_of(case)
        output(call), gradients(call)
        weights = np.zeros((3 * call.spec.taps, call.spec.in_channels, *call.spec.kernel_size), np.uint16)
        cpu.forward_layer(call.spec, call.input, call.weight, call.bias, weights, None, (1.0, None))
    assert [len(kernel.signatures) for kernel in kernels] == before
