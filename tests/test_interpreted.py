"""What the interpreter refuses, or does as a GPU: each row of the table in tests/interpreted.py, on a kernel that needs it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@triton.jit
def copy(x_ptr, y_ptr, size, N: tl.constexpr, WITH_OTHER: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x_ptr + i, mask=i < size, other=0.0) if WITH_OTHER else tl.load(x_ptr + i, mask=i < size)
    tl.store(y_ptr + i, value.to(y_ptr.dtype.element_ty))


@triton.jit
def add_to_itself(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


@triton.jit
def write(y_ptr, step, N: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) * step + tl.arange(0, N), 1.0)


@triton.jit
def hint(y_ptr, first, HINT: tl.constexpr, VALUE: tl.constexpr, N: tl.constexpr):
    i = first + tl.arange(0, N)
    if HINT == 0:
        i = tl.multiple_of(i, VALUE)
    if HINT == 1:
        i = tl.max_contiguous(i * 2, VALUE)
    if HINT == 2:
        i = tl.max_constancy(i // 4, VALUE)
    tl.store(y_ptr + tl.arange(0, N), i.to(tl.float32))


@triton.jit
def multiply(x_ptr, y_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def lost(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.fma(x, x, -(x * x)))


def refused(text):
    return pytest.raises(triton.runtime.errors.InterpreterError, match=text)


def test_what_is_masked_off_is_unknown_without_other():
    x, y = torch.ones(16), torch.zeros(16)
    copy[(1,)](x, y, 5, 16, True)
    assert y.tolist() == [1] * 5 + [0] * 11
    copy[(1,)](x, y, 5, 16, False)
    assert y[:5].tolist() == [1] * 5 and y[5:].isnan().all()


def test_memory_of_others():
    x = torch.ones(32)
    with refused("within none of the launch"):
        copy[(1,)](x[:8], torch.zeros(16), 16, 16, True)
    with refused("within none of the launch"):
        copy[(1,)](x, torch.zeros(16)[:8], 16, 16, True)


def test_programs_that_race():
    y = torch.zeros(64)
    write[(4,)](y, 16, 16)
    assert y.all()
    with pytest.raises(AssertionError, match="write writes a place twice"):
        write[(4,)](y, 15, 16)
    with pytest.raises(AssertionError, match="add_to_itself reads a tensor that it writes"):
        add_to_itself[(1,)](y, y, 16)


@pytest.mark.parametrize(("kind", "value", "first", "holds"), [
    (0, 8, 16, True), (0, 8, 12, False), (1, 1, 0, True), (1, 2, 0, False), (2, 4, 0, True), (2, 8, 0, False),
])  # fmt: skip
def test_hints(kind, value, first, holds):
    y = torch.zeros(16)
    if holds:
        hint[(1,)](y, first, kind, value, 16)
        return
    with refused(("multiple_of", "max_contiguous", "max_constancy")[kind]):
        hint[(1,)](y, first, kind, value, 16)


def test_bfloat16_is_rounded_and_not_computed_in():
    x = torch.randn(4096)
    y = torch.zeros(4096, dtype=torch.bfloat16)
    copy[(1,)](x, y, 4096, 4096, True)
    assert torch.equal(y, x.bfloat16())
    with refused("add of bfloat16"):
        add_to_itself[(1,)](y, y.clone(), 4096)
    with refused("a product of bfloat16"):
        multiply[(1,)](y[:256], torch.zeros(256), "ieee", 16)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 3e9, -3e9])
def test_floats_that_are_no_integers(odd):
    x, y = torch.tensor([2.5] * 15 + [-2.5]), torch.zeros(16, dtype=torch.int32)
    copy[(1,)](x, y, 16, 16, True)
    assert y.tolist() == [2] * 15 + [-2]
    x[3] = odd
    with refused("become int32"):
        copy[(1,)](x, y, 16, 16, True)


def test_tf32_has_its_error():
    x, errors = torch.rand(32, 32) - 0.5, {}
    for precision in ("ieee", "tf32"):
        y = torch.zeros(32, 32)
        multiply[(1,)](x, y, precision, 32)
        errors[precision] = (y - x.double() @ x.double()).abs().max() / y.abs().max()
    assert errors["ieee"] < 1e-6 < 1e-5 < errors["tf32"] < 2e-3


def test_a_product_and_a_sum_in_one_are_rounded_once():
    x = torch.rand(64)
    for dtype, is_exact in ((torch.float32, True), (torch.float64, False)):
        y = torch.full((64,), torch.nan, dtype=dtype)
        lost[(1,)](x.to(dtype), y, 64)
        rest = x.double() ** 2 - (x * x).double() if is_exact else torch.zeros(64)
        assert torch.equal(y.double(), rest.double())


def test_grids_that_no_gpu_takes():
    y = torch.zeros(16)
    for grid in ((1, 2**16), (1, 1, 2**16)):
        with pytest.raises(AssertionError, match="a grid of"):
            write[grid](y, 16, 16)
