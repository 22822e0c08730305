"""What tests/compiled.py sees in machine code, on kernels that have it and kernels that have not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tests.compiled import Build, built, launches_for  # noqa: E402

pytestmark = pytest.mark.slow


@triton.jit
def rows(x_ptr, y_ptr, stride, WIDE: tl.constexpr, ATOMIC: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    if WIDE:
        row = row.to(tl.int64)
    at = row[:, None] * stride + tl.arange(0, N)[None, :]
    value = tl.load(x_ptr + at)
    if ATOMIC:
        tl.atomic_add(y_ptr + at, value, sem="relaxed")
    else:
        tl.store(y_ptr + at, value)


@triton.jit
def product(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x, input_precision="ieee"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    yield


def build(card: str, stride: int = 64, wide: bool = True, atomic: bool = False) -> Build:
    with launches_for(card) as asked:
        for _ in range(2):
            rows[(4,)](torch.zeros(128 * stride), torch.zeros(128 * stride), stride, wide, atomic, 64, num_warps=4)
    assert len(asked) == 1, "equal launches are compiled once"
    return built(asked[0])


@pytest.mark.parametrize("card", ["sm_75", "sm_90", "gfx942"])
def test_loads(card: str) -> None:
    threads = 256 if card == "gfx942" else 128
    aligned, shifted = build(card), build(card, stride=67)
    assert aligned.wide_loads_due("x_ptr") == 32 * 64 * 4 // (16 * threads)
    assert aligned.wide_loads_due("y_ptr") == 0
    assert aligned.loads == {16: aligned.wide_loads_due("x_ptr")}
    assert set(shifted.loads) == {4}
    assert aligned.registers > 8 and aligned.stack == 0


@pytest.mark.parametrize("card", ["sm_80", "sm_90", "gfx942"])
def test_atomics(card: str) -> None:
    assert build(card, atomic=True).float_atomics
    assert not build(card).float_atomics


def test_products_of_32_bits() -> None:
    assert build("sm_90", wide=False).narrow_products == {"at = row[:, None] * stride + tl.arange(0, N)[None, :]"}
    assert not build("sm_90").narrow_products


def test_tensor_cores_and_spills() -> None:
    """A product of 64 x 64 numbers by 128 threads, which takes each 32 registers for the sums alone."""
    found = {}
    for dtype, options in ((torch.float16, {}), (torch.float32, {"maxnreg": 32})):
        with launches_for("sm_80") as asked:
            product[(1,)](torch.zeros(64 * 64, dtype=dtype), torch.zeros(64 * 64), 64, num_warps=4, **options)
        found[dtype] = built(asked[0])
    assert found[torch.float16].tensor_core and not found[torch.float16].stack
    assert found[torch.float32].stack and not found[torch.float32].tensor_core
    assert found[torch.float16].shared > 0
