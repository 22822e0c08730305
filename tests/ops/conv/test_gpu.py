"""The GPU kernels in Triton's interpreter: everything a backend must satisfy, without a GPU."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.ops.conv.cases import Call, Case, call_of, output_size
from tests.ops.conv.gpu_suite import HALF_CASES, GpuSuite, assert_near, by_mix, half_call, half_results
from tests.ops.conv.suite import by_boundary, odd, reference_backward

from deformconv.ops.conv import gpu, reference
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Operand, conv_spec

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
    return problem.but(batch=1, size=tuple(min(length, 8 - i) for i, length in enumerate(problem.size)))


@by_mix
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    """bfloat16 is rounded and multiplied as tests/interpreted.py has it, since Triton's own interpreter is wrong there."""
    for name, result, expected in half_results(half_call(case, half, mixed)):
        assert_near(name, result, expected, half)


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
        monkeypatch.setattr(gpu, "_kernels", lambda: only_last("collect"))
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
        monkeypatch.setattr(gpu, "_kernels", lambda: only_last("convolve_depthwise"))
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


class Recorded:
    """The kernels, of which a launch is noted and none runs."""

    def __init__(self) -> None:
        self.grids: dict[str, list[tuple[int, ...]]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        def launched(grid: tuple[int, ...]) -> Callable[..., None]:
            self.grids[name].append(grid)
            return lambda *arguments, **options: None

        return _Launches(launched)


class _Launches:
    def __init__(self, launched: Callable[..., Any]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launched(grid)


@pytest.mark.parametrize("stride", [1, 1000], ids=["many positions", "few positions"])
def test_a_large_image_has_no_grid_that_no_gpu_takes(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of nine million pixels: beside the first, a grid's axes have at most 65,535 programs."""
    from tests.interpreted import GRID

    case = Case("", (3000, 3000), (1, 1), stride=stride, batch=1, in_channels=2, out_channels=3, masked=False)
    out = output_size(case)
    x, weight, bias = torch.zeros(1, 2, 3000, 3000).half(), torch.zeros(3, 2, 1, 1).half(), torch.zeros(3).half()
    offset, grad_output = torch.zeros(1, 2, *out).half(), torch.zeros(1, 3, *out).half()
    operands = [Operand(tuple(t.shape), "float16") for t in (x, offset, weight, bias)]
    spec, recorded = conv_spec(*operands, stride=stride), Recorded()
    monkeypatch.setattr(gpu, "_kernels", lambda: recorded)
    gpu.forward(spec, x, offset, weight, bias, None)
    gpu.backward(spec, grad_output, x, offset, weight, None, GRADIENTS)
    assert {"sample", "sample_backward", "collect", "transpose"} <= set(recorded.grids)
    for name, grids in recorded.grids.items():
        for grid in grids:
            assert all(size <= most for size, most in zip(grid, GRID, strict=False)), f"{name}: {grid}"


def only_last(name: str) -> Any:
    """The kernels; of one of them the last program runs alone."""
    from tests.interpreted import LastProgram

    from deformconv.ops.conv import gpu_kernels

    return SimpleNamespace(**vars(gpu_kernels) | {name: LastProgram(getattr(gpu_kernels, name))})


def interpreter_error() -> type[Exception]:
    from triton.runtime.errors import InterpreterError

    return InterpreterError


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class Mutation(NamedTuple):
    """A mistake in the text of the kernels."""

    what: str
    module: str
    old: str
    new: str


RULE, KERNELS = "deformconv.sampling.triton", "deformconv.ops.conv.gpu_kernels"
# A mistake, the module, and what is replaced in its text by what.
MUTATIONS = [
    Mutation("two taps swapped", KERNELS, "+ tap % WINDOW[0][2] * WINDOW[3][2]", "+ (tap ^ 1) % WINDOW[0][2] * WINDOW[3][2]"),
    Mutation("no mask", KERNELS, "* P + position, mask=there, other=0.0)", "* P + position, mask=there, other=0.0) * 0 + 1"),
    Mutation("no rule for NaN", RULE, 'tl.where(offset != offset, float("nan"), 0.0)', "tl.where(offset != offset, 0.0, 0.0)"),
    Mutation("far offsets are converted", RULE, "near = tl.abs(offset) < 1073741824.0", "near = offset == offset"),
    Mutation(
        "no `other`", KERNELS, "(inside & counts)[:, None] & is_channel[None, :], other=0.0", "(inside & counts)[:, None]"
    ),
    Mutation("pixels before the map", RULE, "(pixel >= 0) & (pixel < size)", "pixel < size"),
    Mutation("pixels after the map", RULE, "(pixel >= 0) & (pixel < size)", "pixel >= 0"),
    Mutation("the low corner's weight twice", RULE, "weight = fraction", "weight = 1.0 - fraction"),
    Mutation("another axis's derivative", KERNELS, "(z_weight * x_weight if CORNER & 2", "(z_weight * x_weight if CORNER & 1"),
    Mutation("one offset group's planes", KERNELS, "(image * G + group) * K + tap) * RANK", "(image * G) * K + tap) * RANK"),
    Mutation("low and high corners exchanged", KERNELS, "tl.where(at < middle, 1, 0)", "tl.where(at < middle, 0, 1)"),
    Mutation("a list too few", KERNELS, "end = tl.load(start_ptr + number + 2", "end = tl.load(start_ptr + number + 1"),
    Mutation("programs overlap", KERNELS, "own_row = tl.program_id(0) * BR", "own_row = tl.program_id(0) * (BR - 1)"),
    Mutation(
        "an untrue hint", KERNELS, "tl.multiple_of(group * size + own, SPAN)", "tl.multiple_of(group * size + own, 2 * SPAN)"
    ),
]


class TestMistakes:
    """A mistake of one place in the kernels' text makes this fail, and so what is tested above."""

    CASES = (
        Case("dense", (4, 5), (2, 3), padding=2, in_channels=36, out_channels=32, groups=2, offset_groups=3),
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

    def check(self) -> None:
        for case in self.CASES:
            for name, result, expected in half_results(half_call(case, "bfloat16", mixed=True, change=odd)):
                assert_near(name, result, expected, "bfloat16")

    def test_there_is_none(self) -> None:
        self.check()

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
    def test_it_is_noticed(self, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (RULE, KERNELS):
            text = inspect.getsource(importlib.import_module(name))
            if name == mutation.module:
                assert mutation.old in text, "the text has changed: find the place again"
                text = text.replace(mutation.old, mutation.new)
            file = tmp_path / f"{name}.py"
            file.write_text(text)
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
        monkeypatch.setattr(gpu, "_kernels", lambda: sys.modules[KERNELS])
        with pytest.raises((AssertionError, interpreter_error())):
            self.check()
