"""A product of float32 by TF32 units: the numbers in Triton's interpreter and on a GPU, and what is compiled for cards."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deformconv.runtime import product  # noqa: E402

# M, G, K, N: whole blocks, rests of rows and of columns, and sums that programs share out, equally and not.
SHAPES = [(64, 1, 64, 64), (67, 1, 96, 70), (5, 3, 64, 65), (130, 2, 32, 128), (33, 1, 1056, 64), (20, 2, 2080, 65)]
LAYER = (6272, 1, 576, 64)  # of 64 channels on two maps of 56 x 56
FACTORS = LAYER[2:]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def factors(shape: tuple[int, ...], device: str, rows_apart: int = 0) -> tuple[Any, Any, Any, Any]:
    """Left, right, bias, and room for the result, all NaN; rows of `left` and of the result lie apart."""
    M, G, K, N = shape
    generator = torch.Generator().manual_seed(0)
    left, right, bias = (torch.randn(size, generator=generator) for size in ((M, G, K + rows_apart), (G, N, K), (G * N,)))
    room = torch.full((M, G, N + rows_apart), torch.nan)
    left, room = (tensor.to(device)[..., : tensor.shape[2] - rows_apart] for tensor in (left, room))
    return left, right.to(device), bias.to(device), room


def exact(left: Any, right: Any, bias: Any) -> Any:
    found = torch.einsum("mgk,gnk->mgn", left.double(), right.double())
    return found if bias is None else found + bias.double().reshape(right.shape[0], -1)


def check(shape: tuple[int, ...], device: str) -> None:
    for rows_apart in (0, 3):
        left, right, bias, to = factors(shape, device, rows_apart)
        for given in (bias, None):
            product.multiply(left, right, given, to)
            expected = exact(left, right, given)
            # Of float32's own products of as many numbers; TF32's error is 300 times as large.
            assert (to - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.interpreter
@by_shape
def test_it_is_right(shape: tuple[int, ...]) -> None:
    check(shape, "cpu")


@pytest.mark.cuda
class TestOnAGpu:
    @by_shape
    def test_it_is_as_exact_as_float32(self, shape: tuple[int, ...]) -> None:
        check(shape, "cuda")

    @pytest.mark.parametrize("shape", [LAYER, (392, 1, 4608, 512)], ids=["whole sums", "shared sums"])
    def test_a_pipeline_changes_no_bit(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """How many turns of the loop are in flight at once: loads made early see what they are to see."""
        left, right, bias, to = factors(shape, "cuda")
        found = []
        for stages in (1, 2, 3, 4):
            monkeypatch.setattr(product, "_STAGES", stages)
            to.fill_(torch.nan)
            product.multiply(left, right, bias, to)
            found.append(to.clone())
        assert all(torch.equal(one, found[0]) for one in found)

    def test_sums_of_many(self) -> None:
        left, right, _, to = factors((300, 1, 4608, 80), "cuda")
        left, right = left.abs(), right.abs()
        product.multiply(left, right, None, to)
        expected = exact(left, right, None)
        assert ((to - expected).abs() / expected).max() <= 1e-5

    def test_odd_numbers(self) -> None:
        """An infinity or NaN stays what it is, though it cannot be split into a number of TF32 and a rest."""
        left, right, _, to = factors((64, 1, 64, 64), "cuda")
        left[3, 0, 5], left[7, 0, 1], right[0, 9, 2] = torch.inf, torch.nan, -torch.inf
        left[:, 0, 2] = left[:, 0, 2].abs() + 0.5
        left[11, 0, 2] = 1.0  # of which no rest is left
        product.multiply(left, right, None, to)
        expected = exact(left, right, None).float()
        odd = ~expected.isfinite()
        assert torch.equal(odd, ~to.isfinite())
        assert torch.equal(to[odd].nan_to_num(), expected[odd].nan_to_num())
        assert (to - expected)[~odd].abs().max() <= 1e-6 * expected[~odd].abs().max()

    def test_large_and_small_numbers(self) -> None:
        for scale in (1e18, 1e-15):
            left, right, _, to = factors((64, 1, 64, 64), "cuda")
            product.multiply(left * scale, right * scale, None, to)
            expected = exact(left * scale, right * scale, None)
            assert (to - expected).abs().max() <= 1e-6 * expected.abs().max()


class TestWhereItPays:
    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(product, "_is_fast", lambda device: device == "cuda:0")

    def test_float32_of_blocks(self) -> None:
        assert product.pays("float32", "cuda:0", *FACTORS)
        assert not product.pays("float32", "cuda:1", *FACTORS)
        assert not product.pays("float32", "cuda:0", 27, 64)
        assert not product.pays("float32", "cuda:0", 576, 3)
        for dtype in ("bfloat16", "float16", "float64"):
            assert not product.pays(dtype, "cuda:0", *FACTORS)

    def test_programs_share_out_long_sums_of_few_tiles(self) -> None:
        """With more rows, groups or columns there are enough for all of a card, and short sums are not worth it."""
        assert product._parts((392, 1, 4608, 512)) == 4
        for more in ((6272, 1, 4608, 512), (392, 32, 4608, 64), (392, 1, 4608, 4608), (392, 1, 512, 512)):
            assert product._parts(more) == 1

    def test_not_where_tf32_is_allowed(self) -> None:
        """It is asked at each call, by the newer setting too, after which PyTorch does not let the older one be read."""
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        try:
            for allowed in (True, False):
                matmul.allow_tf32 = allowed
                assert product.pays("float32", "cuda:0", *FACTORS) is not allowed
            if hasattr(matmul, "fp32_precision"):
                setting = matmul.fp32_precision
                matmul.fp32_precision = "tf32"
                assert not product.pays("float32", "cuda:0", *FACTORS)
                matmul.fp32_precision = setting
        finally:
            matmul.allow_tf32 = before


def build_of(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, folder: Any) -> Any:
    """What a product is compiled to for an H100."""
    from tests.compiled import built, launches_for

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    with launches_for("sm_90") as asked:
        left, right, bias, to = factors(shape, "cpu")
        product.multiply(left, right, bias, to)
    (build,) = map(built, asked)
    return build


@pytest.mark.slow
def test_matrices_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where elements are counted in 64 bits no product of 32 bits becomes a part of an address."""
    monkeypatch.setattr(product, "_WIDE", 0)
    build = build_of(SHAPES[0], monkeypatch, tmp_path)
    assert str(build.launch.constant("INDEX")) == "int64"
    assert build.stack == 0
    assert not build.narrow_products


def test_a_product_of_many_sizes_is_compiled_twice_at_most() -> None:
    from tests.compiled import launches_for

    with launches_for("sm_90") as asked:
        for rows in range(7, 7 + 20 * 37, 37):
            left, right, bias, to = factors((rows, 1, 1152, 256), "cpu")
            product.multiply(left, right, bias, to)
    assert 1 <= len(set(asked)) <= 2


@pytest.mark.slow
def test_it_is_made_by_tensor_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    build = build_of((64, 1, 64, 64), monkeypatch, tmp_path)
    assert build.launch.constant("BK") == 32
    # Three products for one: a tile's 32 numbers of depth are 4 of TF32's instructions.
    assert build.count("HGMMA") == 3 * 4 and build.count("FFMA") == 0
    assert build.stack == 0 and build.registers <= 255 and build.shared <= 99 << 10
    assert not build.float_atomics
