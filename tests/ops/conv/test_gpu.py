"""The GPU kernels in Triton's interpreter: everything a backend must satisfy, without a GPU."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests import mutations
from tests.mutations import Mutation
from tests.ops.conv.cases import ARGUMENTS, Call, Case, call_of, make, output_size
from tests.ops.conv.gpu_suite import HALF_CASES, GpuSuite, assert_near, half_call, half_results
from tests.ops.conv.suite import in_float64, odd, reference_backward
from tests.ops.rules import by_boundary
from tests.tolerances import assert_close

from deformconv.ops import gpu as on_gpu
from deformconv.ops.conv import gpu, reference
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Operand, conv_spec
from deformconv.ops.gpu import Card
from deformconv.runtime import product
from deformconv.sampling import lists

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN that the interpreter computes with
]


class TestGpu(GpuSuite):
    """In float64, in which identities are tried; what follows has the other dtypes.

    The interpreter takes some 50 microseconds for each operation of a program, however many numbers that is of, and the input's
    gradient has a program for each pixel: so some tests have fewer pixels here, or fewer values.
    """

    dtypes = ("float64",)

    def test_output_of_a_real_problem(self, problem: Case) -> None:
        super().test_output_of_a_real_problem(shrunk(problem))

    def test_gradients_of_a_real_problem(self, problem: Case) -> None:
        super().test_gradients_of_a_real_problem(shrunk(problem))

    @by_boundary
    @pytest.mark.parametrize("far", [np.inf, -1e30, 2.0**40, 1e4])
    def test_far_positions_have_no_gradient(self, far: float, dtype: str, boundary: str) -> None:
        super().test_far_positions_have_no_gradient(far, dtype, boundary)

    @by_boundary
    @pytest.mark.parametrize("value", [np.nan, -np.inf, 2.0**31])
    def test_gradients_of_nothing_but_odd_offsets(self, value: float, rank: int, boundary: str) -> None:
        super().test_gradients_of_nothing_but_odd_offsets(value, rank, boundary)


def shrunk(problem: Case) -> Case:
    most = {1: (16,), 2: (6, 5), 3: (3, 3, 2)}[len(problem.size)]
    return problem.but(batch=1, size=tuple(map(min, problem.size, most)))


# One form of each case, in turn: each of them costs half a second.
@pytest.mark.parametrize(
    ("case", "half", "mixed"),
    [
        pytest.param(case, *(("float16", False), ("bfloat16", True))[number % 2], id=case.name)
        for number, case in enumerate(HALF_CASES)
    ],
)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    """bfloat16 is rounded and multiplied as tests/interpreted.py has it, since Triton's own interpreter is wrong there."""
    for name, result, expected in half_results(half_call(case, half, mixed)):
        assert_near(name, result, expected, half)


class TestAddedUp:
    """The input's gradient by atomics, which a card is to be there for, as none is here."""

    @pytest.fixture(autouse=True)
    def added(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_lists(*of: Any) -> None:
            raise AssertionError("samples are not sorted")

        monkeypatch.setattr(gpu, "_adds", lambda spec, device: True)
        monkeypatch.setattr(lists, "entries", no_lists)

    @pytest.mark.parametrize("boundary", ["zeros", "inside"])
    @pytest.mark.parametrize(
        "case",
        [
            Case("line", (9,), (3,), padding=1, in_channels=5, out_channels=4, masked=False),
            Case("groups", (5, 6), (3, 2), stride=(2, 1), padding=1, in_channels=12, out_channels=6, groups=2, offset_groups=3),
            Case("depthwise", (4, 5), (3, 3), padding=1, in_channels=6, out_channels=6, groups=6, offset_groups=2),
            Case("volume", (2, 3, 3), (2, 2, 2), padding=1, batch=1, in_channels=4, out_channels=2, offset_groups=2),
        ],
        ids=lambda case: case.name,
    )
    def test_gradients(self, case: Case, boundary: str) -> None:
        call = make(case.but(boundary=boundary), "float64")
        expected = in_float64(call, reference_backward)
        arrays = (call.grad_output, call.input, call.offset, call.weight, call.mask)
        tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
        for wanted in (("input", "offset", "weight"), ("input",), ("input", "weight")):
            found = gpu.backward(call.spec, *tensors, wanted=wanted)
            for name in wanted:
                assert_close(getattr(found, name).numpy(), getattr(expected, name), "float64")

    @pytest.mark.parametrize("half", ["float16", "bfloat16"])
    def test_halves_are_added_in_float32(self, half: str) -> None:
        case = Case("", (4, 5), (3, 3), padding=1, in_channels=8, out_channels=4, offset_groups=2)
        for name, result, expected in half_results(half_call(case, half, True)):
            assert_near(name, result, expected, half)

    def test_a_position_that_is_no_number(self) -> None:
        """It gives nothing to the input's gradient, whose other numbers are what they would be without it."""
        call = make(Case("", (4, 5), (3, 3), padding=1, in_channels=2, out_channels=3), "float64")
        offset = call.offset.copy()
        offset[0, 3, 1, 2], offset[1, 5, 0, 0] = np.nan, np.inf
        call = call.but(offset=offset)
        t = {name: torch.from_numpy(getattr(call, name)) for name in ("grad_output", "input", "offset", "weight", "mask")}
        found = gpu.backward(call.spec, *t.values(), wanted=["input"]).input
        assert_close(found.numpy(), in_float64(call, reference_backward).input, "float64")


class TestWhereItIsAddedUp:
    @pytest.fixture(autouse=True)
    def card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cards = {"cuda:0": Card("H100", "sm_90", (9, 0), 80 << 30), "cuda:1": Card("A100", "sm_80", (8, 0), 80 << 30)}
        monkeypatch.setattr(on_gpu, "card", cards.get)

    def test_few_channels_of_an_offset_group(self) -> None:
        few, many = (make(Case("", (3, 4), (1, 1), in_channels=64, offset_groups=groups), "float32").spec for groups in (8, 1))
        assert gpu._adds(few, "cuda:0")
        assert "added up in another order each time" in " ".join(gpu.how(few, "torch", "cuda:0", True))
        assert not gpu._adds(many, "cuda:0")
        assert "order" not in " ".join(gpu.how(many, "torch", "cuda:0", True))
        assert not gpu._adds(few, "cuda:1")  # where it was not measured
        assert not gpu._adds(few, "cpu")

    def test_not_where_pytorch_is_deterministic(self) -> None:
        spec = make(Case("", (3, 4), (1, 1), in_channels=64, offset_groups=8), "float32").spec
        for warn_only in (False, True):
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            try:
                assert not gpu._adds(spec, "cuda:0")
            finally:
                torch.use_deterministic_algorithms(False)
        assert gpu._adds(spec, "cuda:0")


class TestLongLists:
    """Of many samples near one pixel, which are summed in runs."""

    @pytest.mark.parametrize("run", [4])
    @pytest.mark.parametrize(
        "case",
        [
            Case("line", (40,), (3,), padding=1, in_channels=5, out_channels=4, offset_groups=1),
            Case("plane", (5, 6), (3, 3), padding=1, in_channels=12, out_channels=8, offset_groups=2, boundary="inside"),
            Case("volume", (2, 3, 3), (2, 2, 2), padding=1, batch=1, in_channels=4, out_channels=2),
        ],
        ids=lambda case: case.name,
    )
    def test_some_are_whole_runs(self, case: Case, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lists, "_RUN", run)
        call = make(case, "float64")
        # Half of all samples are moved to the neighbourhood of one pixel.
        axes = np.indices(call.spec.output_size)
        offset = call.offset.reshape(call.spec.batch, call.spec.offset_groups, call.spec.taps, call.spec.rank, -1).copy()
        middle = np.array(call.spec.input_size)[:, None] // 2 - axes.reshape(call.spec.rank, -1)
        offset[..., ::2] = middle[:, ::2] + offset[..., ::2] / 8
        call = call.but(offset=offset.reshape(call.offset.shape))
        t = {name: torch.from_numpy(getattr(call, name)) for name in ("grad_output", "input", "offset", "weight", "mask")}
        found = gpu.backward(call.spec, *t.values(), wanted=["input"]).input
        assert_close(found.numpy(), in_float64(call, reference_backward).input, "float64")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_products_of_ours(groups: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a card multiplies float32 by TF32, as none does here: in place of PyTorch's, forward and backward."""
    multiply, made = product.multiply, []

    def counted(left: Any, *others: Any) -> None:
        made.append(left.shape)
        multiply(left, *others)

    monkeypatch.setattr(product, "pays", lambda dtype, device, depth, across: dtype == "float32")
    monkeypatch.setattr(product, "multiply", counted)
    case = Case("", (3, 4), (2, 2), padding=1, batch=1, in_channels=64, out_channels=32 * groups, groups=groups, biased=biased)
    call = make(case, "float32")
    t = {name: None if array is None else torch.from_numpy(array) for name in ARGUMENTS for array in [getattr(call, name)]}
    assert_close(gpu.forward(call.spec, *t.values()).numpy(), in_float64(call, reference.forward), "float32")
    names = ("input", "offset", "weight", "mask")
    found = gpu.backward(call.spec, torch.from_numpy(call.grad_output), *(t[name] for name in names), wanted=names)
    expected = in_float64(call, reference_backward)
    for name in names:
        assert_close(getattr(found, name).numpy(), getattr(expected, name), "float32", name)
    assert len(made) == 2


class TestBeyond32Bits:
    """Tensors of more than 2**31 numbers, of which the last are there: the others are holes in a file, or untouched memory."""

    SIZE, CHANNELS, FAR = 2060, 512, 4

    @pytest.fixture
    def holes(self, tmp_path: Path) -> Callable[..., Any]:
        def tensor(shape: tuple[int, ...], dtype: Any) -> Any:
            assert math.prod(shape) > 2**31
            return torch.from_file(str(tmp_path / "holes"), shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

        return tensor

    def call(self, holes: Callable[..., Any], dtype: Any) -> tuple[ConvSpec, dict[str, Any], Call]:
        """As many positions as the last corner of an image has pixels, which offsets move there; and that corner alone."""
        size, channels, far = self.SIZE, self.CHANNELS, self.FAR
        random = np.random.default_rng(0)
        x = holes((1, size, size, channels), dtype).movedim(-1, 1)
        x[..., -far:, -far:] = torch.from_numpy(random.normal(size=(channels, far, far)))
        step = size // far
        offset = np.empty((1, 2, far, far))
        offset[:, 0] = (size - far + np.arange(far) * (1 - step) + 0.25)[:, None]
        offset[:, 1] = size - far + np.arange(far) * (1 - step) - 0.5
        weight, grad_output = random.normal(size=(16, channels, 1, 1)), random.normal(size=(1, 16, far, far))
        tensors = {"input": x, "offset": torch.from_numpy(offset).float()}
        tensors |= {"weight": torch.from_numpy(weight).to(dtype), "grad_output": torch.from_numpy(grad_output).to(dtype)}
        operands = [Operand(tuple(tensors[name].shape), name_of(dtype)) for name in ("input", "offset", "weight")]
        near = np.empty_like(offset)
        near[:, 0], near[:, 1] = 0.25, -0.5
        corner, weight, grad_output = (
            t.double().numpy() for t in (x[..., -far:, -far:], tensors["weight"], tensors["grad_output"])
        )
        return conv_spec(*operands, stride=step), tensors, call_of(corner, near, weight).but(grad_output=grad_output)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_an_image(self, holes: Callable[..., Any], dtype: Any) -> None:
        """In both sizes of numbers."""
        spec, t, corner = self.call(holes, dtype)
        output = gpu.forward(spec, t["input"], t["offset"], t["weight"], None, None)
        assert_near("output", output, reference.forward(corner.spec, *corner.arrays), name_of(dtype))
        operands = (t["grad_output"], t["input"], t["offset"], t["weight"], None)
        found, expected = gpu.backward(spec, *operands, ("offset", "weight")), reference_backward(corner)
        assert_near("offset", found.offset, expected.offset, name_of(dtype))
        assert_near("weight", found.weight, expected.weight, name_of(dtype))

    def test_the_gradient_of_an_image(self, holes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Of its last pixels' last channels, which the last program writes."""
        spec, t, corner = self.call(holes, torch.float16)
        from deformconv.sampling import triton_lists

        monkeypatch.setattr(lists, "_kernels", lambda: only_last(triton_lists, "collect"))
        operands = (t["grad_output"], t["input"], t["offset"], t["weight"], None)
        found = gpu.backward(spec, *operands, ("input",)).input[:, -16:, -1:, -self.FAR :]
        assert_near("input", found, reference_backward(corner).input[:, -16:, -1:], "float16")

    def test_offsets(self, holes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Of an image with one channel, which is small: the others of the last program's positions are beside it."""
        size, far = 32_800, 4
        random = np.random.default_rng(0)
        x, mask = random.normal(size=(1, 1, far, far)), None
        near = random.uniform(-1, 1, (1, 2, 1, far)).astype(np.float16)
        offset = holes((1, 2, size, size), torch.float16)
        offset[..., -1:, -far:] = torch.from_numpy(near)
        spec = conv_spec(
            Operand(x.shape, "float16"), Operand(tuple(offset.shape), "float16"), Operand((1, 1, 1, 1), "float16"),
            padding=((size - far, 0), (size - far, 0)),
        )  # fmt: skip
        from deformconv.ops.conv import gpu_kernels

        monkeypatch.setattr(gpu, "_kernels", lambda: only_last(gpu_kernels, "convolve_depthwise"))
        half = torch.from_numpy(x).half()
        output = gpu.forward(spec, half, offset, torch.ones(1, 1, 1, 1).half(), None, mask)[..., -1:, -far:]
        whole = np.zeros((1, 2, far, far))
        whole[..., -1:, :] = near
        expected = call_of(half.double().numpy(), whole, np.ones((1, 1, 1, 1)))
        assert_near("output", output, reference.forward(expected.spec, *expected.arrays)[..., -1:, :], "float16")

    def test_they_would_be_missed_in_32_bits(self, holes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        spec, t, _ = self.call(holes, torch.float16)
        monkeypatch.setattr(gpu, "_largest", lambda spec: 1)
        gpu._plan.cache_clear()
        with pytest.raises(interpreter_error(), match="within none of the launch"):
            gpu.forward(spec, t["input"], t["offset"], t["weight"], None, None)
        gpu._plan.cache_clear()


@pytest.mark.parametrize("stride", [1, 1000], ids=["many positions", "few positions"])
def test_a_large_image_has_no_grid_that_no_gpu_takes(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of nine million pixels: beside the first, a grid's axes have at most 65,535 programs."""
    from tests.interpreted import GRID
    from triton.runtime.interpreter import GridExecutor

    grids: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: grids[self.fn.__name__].append(self.grid))
    case = Case("", (3000, 3000), (1, 1), stride=stride, batch=1, in_channels=2, out_channels=3, masked=False)
    positions = output_size(case)
    x, weight, bias = torch.zeros(1, 2, 3000, 3000).half(), torch.zeros(3, 2, 1, 1).half(), torch.zeros(3).half()
    offset, grad_output = torch.zeros(1, 2, *positions).half(), torch.zeros(1, 3, *positions).half()
    spec = conv_spec(*(Operand(tuple(t.shape), "float16") for t in (x, offset, weight, bias)), stride=stride)
    gpu.forward(spec, x, offset, weight, bias, None)
    gpu.backward(spec, grad_output, x, offset, weight, None, GRADIENTS)
    assert {"sample", "sample_backward", "arrange", "collect"} <= set(grids)
    for name, found in grids.items():
        for grid in found:
            assert all(size <= most for size, most in zip(grid, GRID, strict=False)), f"{name}: {grid}"


def only_last(kernels: Any, name: str) -> Any:
    """The kernels; of one of them the last program runs alone."""
    from tests.interpreted import LastProgram

    return SimpleNamespace(**vars(kernels) | {name: LastProgram(getattr(kernels, name))})


def interpreter_error() -> type[Exception]:
    from triton.runtime.errors import InterpreterError

    return InterpreterError


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


RULE, LISTS = "deformconv.sampling.triton", "deformconv.sampling.triton_lists"
TAPS, KERNELS = "deformconv.ops.taps.gpu_kernels", "deformconv.ops.conv.gpu_kernels"
# A mistake, the module, and what is replaced in its text by what.
MUTATIONS = [
    Mutation("two taps swapped", TAPS, "+ tap % WINDOW[0][2] * WINDOW[3][2]", "+ (tap ^ 1) % WINDOW[0][2] * WINDOW[3][2]"),
    Mutation("no mask", TAPS, "tl.load(mask_ptr + at, mask=there, other=0.0)", "(tl.load(mask_ptr + at, mask=there) * 0 + 1)"),
    Mutation("no rule for NaN", RULE, 'tl.where(offset != offset, float("nan"), 0.0)', "tl.where(offset != offset, 0.0, 0.0)"),
    Mutation("far offsets are converted", RULE, "near = tl.abs(offset) < 1073741824.0", "near = offset == offset"),
    Mutation("no `other`", TAPS, "(inside & counts)[:, None] & is_channel[None, :], other=0.0", "(inside & counts)[:, None]"),
    Mutation("pixels before the map", RULE, "(pixel >= 0) & (pixel < size)", "pixel < size"),
    Mutation("pixels after the map", RULE, "(pixel >= 0) & (pixel < size)", "pixel >= 0"),
    Mutation("the low corner's weight twice", RULE, "weight = fraction", "weight = 1.0 - fraction"),
    Mutation("another axis's derivative", TAPS, "(z_weight * x_weight if CORNER & 2", "(z_weight * x_weight if CORNER & 1"),
    Mutation("one offset group's planes", TAPS, "position, (group * K + tap) * RANK, P", "position, tap * RANK + group * 0, P"),
    Mutation("low and high corners exchanged", LISTS, "pixel % X + 1 - corner % 2", "pixel % X + corner % 2"),
    Mutation("a list too few", LISTS, "end = tl.load(start_ptr + number + 1", "end = tl.load(start_ptr + number"),
    Mutation("runs are summed again", LISTS, "count = end - first - runs * RUN", "count = end - first"),
    Mutation("programs overlap", TAPS, "own_row = block * BR", "own_row = block * (BR - 1)"),
    Mutation(
        "an untrue hint", LISTS, "tl.multiple_of(group * size + own, SPAN)", "tl.multiple_of(group * size + own, 2 * SPAN)"
    ),
]


class TestMistakes:
    """A mistake of one place in the kernels' text makes this fail, and so what is tested above."""

    CASES = (
        Case("dense", (3, 4), (2, 3), padding=1, in_channels=18, out_channels=8, groups=2, offset_groups=3),
        Case(
            "one group",
            (4, 5),
            (2, 2),
            padding=1,
            batch=3,
            in_channels=32,
            out_channels=16,
            offset_groups=2,
            boundary="inside",
        ),
    )

    @pytest.fixture(autouse=True)
    def short_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So short that lists of a few samples have some."""
        monkeypatch.setattr(lists, "_RUN", 4)

    def check(self) -> None:
        for case in self.CASES:
            for name, result, expected in half_results(half_call(case, "bfloat16", mixed=True, change=odd)):
                assert_near(name, result, expected, "bfloat16")

    def test_there_is_none(self) -> None:
        self.check()

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
    def test_it_is_noticed(self, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mutations.load(mutation, (RULE, LISTS, TAPS, KERNELS), tmp_path, monkeypatch)
        monkeypatch.setattr(gpu, "_kernels", lambda: sys.modules[KERNELS])
        monkeypatch.setattr(lists, "_kernels", lambda: sys.modules[LISTS])
        with pytest.raises((AssertionError, interpreter_error())):
            self.check()
