"""The GPU kernels in Triton's interpreter: everything a backend must satisfy, without a GPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from tests import mutations
from tests.mutations import Mutation
from tests.ops.attention.cases import ARGUMENTS, CASES, Case, make, spec_of
from tests.ops.attention.gpu_suite import GpuSuite, half_call, half_results
from tests.ops.attention.suite import SMALL, hostile_locations, reference_gradients, reference_output
from tests.ops.conv.gpu_suite import assert_near
from tests.tolerances import assert_close

from deformconv.ops.attention import gpu
from deformconv.sampling import lists

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN that the interpreter computes with
]


class TestGpu(GpuSuite):
    """In float64; what follows has the other dtypes. A sample costs the interpreter some milliseconds."""

    dtypes = ("float64",)
    cases: ClassVar[list[Case]] = [*CASES[:1], CASES[2].but(heads=1), *CASES[3:6], CASES[8].but(heads=1)]

    @pytest.mark.parametrize("names", [("weights",), ()], ids=" and ".join)
    def test_what_is_not_wanted_is_none(self, names: tuple[str, ...]) -> None:
        super().test_what_is_not_wanted_is_none(names)


@pytest.mark.parametrize(
    ("case", "half", "mixed"),
    [(CASES[0], "float16", False), (SMALL.but(heads=1, channels=19, queries=35), "bfloat16", True)],
    ids=str,
)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed)):
        assert_near(name, result, expected, half)


def test_long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many samples near one pixel, which are summed in runs."""
    monkeypatch.setattr(lists, "_RUN", 16)
    call = make(SMALL.but(queries=17), "float64")
    call.locations[:, ::2] = 0.4 + 0.05 * (call.locations[:, ::2] - 0.5)
    tensors = [torch.from_numpy(array) for array in call.arrays]
    found = gpu.backward(call.spec, torch.from_numpy(call.grad_output), *tensors, wanted=["value"])
    assert_close(found.value, reference_gradients(call).value, "float64")
    assert found.locations is found.weights is None


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_from_pytorch(dtype: Any) -> None:
    """With a graph; locations and weights in float32 beside half precision, and so are their gradients."""
    from deformconv.torch import deform_attention

    call = make(SMALL, "float64" if dtype is torch.float64 else "float32")
    value, *others = (torch.from_numpy(array) for array in call.arrays)
    leaves = [tensor.requires_grad_() for tensor in (value.to(dtype), *others)]
    output = deform_attention(leaves[0], SMALL.levels, *leaves[1:], backend="gpu")
    assert output.dtype is dtype
    grad_output = torch.from_numpy(call.grad_output).to(dtype)
    found = torch.autograd.grad(output, leaves, grad_output)
    rounded = {"value": leaves[0].detach(), "grad_output": grad_output}
    expected = reference_gradients(call.but(**{name: tensor.double().numpy() for name, tensor in rounded.items()}))
    for name, leaf, tensor in zip(ARGUMENTS, leaves, found, strict=True):
        assert tensor.dtype is leaf.dtype
        assert_near(name, tensor, getattr(expected, name), str(dtype).removeprefix("torch."))


def reasons(levels: tuple[tuple[int, int], ...], batch: int = 1, queries: int = 1) -> list[str]:
    tokens = sum(height * width for height, width in levels)
    shapes = (batch, tokens, 1, 1), (batch, queries, 1, len(levels), 1, 2), (batch, queries, 1, len(levels), 1)
    arrays = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
    return gpu.reasons_against(spec_of(levels, arrays), "torch", "cpu", True)


def test_what_another_backend_computes() -> None:
    assert reasons(((2, 3),) * 8) == reasons(((40_000, 50_000),)) == []
    assert reasons(((2, 3),) * 9) == ["its kernels take at most 8 levels, and there are 9"]
    assert reasons(((50_000, 50_000),)) == ["1 x 2500000000 pixels of all levels exceed its 32-bit pixel numbers"]
    assert reasons(((2, 3),), batch=50_000, queries=50_000) == ["a batch of 2500000000 queries exceeds its 32-bit numbers"]


class TestBeyond32Bits:
    """A value of more than 2**31 numbers, of which the last are there: the others are holes in a file."""

    SIZE, CHANNELS, FAR = 2060, 512, 4

    @pytest.fixture
    def call(self, tmp_path: Path) -> tuple[Any, dict[str, Any], Any]:
        """Queries of the last corner of a level, and the same in that corner alone."""
        size, channels, far = self.SIZE, self.CHANNELS, self.FAR
        near = make(Case("far", batch=1, levels=((far, far),), heads=1, channels=channels, queries=3, points=2), "float32")
        shape = (1, size * size, 1, channels)
        assert math.prod(shape) > 2**31
        value = torch.from_file(str(tmp_path / "holes"), shared=True, size=math.prod(shape), dtype=torch.float16).reshape(shape)
        own = torch.from_numpy(near.value).half()
        value.reshape(size, size, channels)[-far:, -far:] = own.reshape(far, far, channels)
        # What float32 makes of the locations, in pixels of the corner, is what the reference gets.
        locations = torch.from_numpy((near.locations * far + (size - far)) / size).float()
        weights, grad_output = torch.from_numpy(near.weights), torch.from_numpy(near.grad_output).half()
        tensors = {"value": value, "locations": locations, "weights": weights, "grad_output": grad_output}
        arrays = [np.broadcast_to(np.float16(0), tuple(tensors[name].shape)) for name in ARGUMENTS]
        exact = near.but(
            value=own.double().numpy(), locations=(locations.double().numpy() * size - (size - far)) / far,
            weights=weights.double().numpy(), grad_output=grad_output.double().numpy(),
        )  # fmt: skip
        return spec_of(((size, size),), arrays), tensors, exact

    def test_forward_and_backward(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The value's gradient, of its last pixels' last channels, which the last program writes."""
        from tests.interpreted import LastProgram

        from deformconv.sampling import triton_lists

        spec, t, exact = call
        last = SimpleNamespace(**vars(triton_lists) | {"collect_levels": LastProgram(triton_lists.collect_levels)})
        monkeypatch.setattr(lists, "_kernels", lambda: last)
        operands = [t[name] for name in ARGUMENTS]
        assert_near("output", gpu.forward(spec, *operands), reference_output(exact), "float16")
        found, expected = gpu.backward(spec, t["grad_output"], *operands, ARGUMENTS), reference_gradients(exact)
        assert_near("weights", found.weights, expected.weights, "float16")
        assert_near("locations", found.locations, expected.locations * self.SIZE / self.FAR, "float16")
        own = found.value.reshape(self.SIZE, self.SIZE, -1)[-1, -self.FAR :, -256:]
        assert_near("value", own, expected.value.reshape(self.FAR, self.FAR, -1)[-1, :, -256:], "float16")

    def test_it_would_be_missed_in_32_bits(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import InterpreterError

        spec, t, _ = call
        monkeypatch.setattr(gpu, "_largest", lambda spec: 1)
        gpu._plan.cache_clear()
        with pytest.raises(InterpreterError, match="within none of the launch"):
            gpu.forward(spec, *(t[name] for name in ARGUMENTS))
        gpu._plan.cache_clear()


LEVELS, LISTS = "deformconv.sampling.triton_levels", "deformconv.sampling.triton_lists"
KERNELS = "deformconv.ops.attention.gpu_kernels"
# A mistake, the module, and what is replaced in its text by what.
MUTATIONS = [
    Mutation("x after y", KERNELS, "tl.load(at + 1, mask=there", "tl.load(at, mask=there"),
    Mutation("another level", KERNELS, "        begin += height * width\n", ""),
    Mutation("corners at integers", KERNELS, "position = safe - 0.5", "position = safe"),
    Mutation("what is rounded is lost", KERNELS, "fraction = position - low + rest", "fraction = position - low"),
    Mutation("an infinite weight is first", KERNELS, "(y_weight * x_weight)[:, None], value, found)",
             "(y_weight * x_weight * tl.load(weight_ptr + at, mask=there, other=0.0).to(ACC))[:, None], value, found)"),
    Mutation("no weight", KERNELS, "(d_x * weight * width + poison)", "(d_x * width + poison)"),
    Mutation("the other size", KERNELS, "(d_y * weight * height + poison)", "(d_y * weight * width + poison)"),
    Mutation("NaN is nothing", KERNELS, "tl.store(d_weight_ptr + at, (found + poison)", "tl.store(d_weight_ptr + at, (found)"),
    Mutation("lists of one head", KERNELS, "(image.to(INDEX) * heads + head) * lists", "(image.to(INDEX) * heads) * lists"),
    Mutation("lists of one level", LEVELS, "first_list = tl.where(is_later, lists, first_list)", "first_list = first_list"),
    Mutation("low and high corners exchanged", LISTS, "- corner // 2 * (X + 1)[:, None] - corner % 2",
             "- (1 - corner // 2) * (X + 1)[:, None] - corner % 2"),
    Mutation("programs overlap", KERNELS, "tl.program_id(0) * BR + tl.arange", "tl.program_id(0) * (BR - 1) + tl.arange"),
]  # fmt: skip


class TestMistakes:
    """A mistake of one place in the kernels' text makes this fail, and so what is tested above."""

    CASE = Case("mistakes", heads=2, channels=33, queries=9, points=2)
    LONG = Case("long", batch=1, levels=((1, 1200),), heads=1, channels=2, queries=40, points=1)

    def check(self) -> None:
        call = make(self.LONG, "float32")
        assert_close(gpu.forward(call.spec, *map(torch.from_numpy, call.arrays)), reference_output(call), "float32")
        call = hostile_locations(make(self.CASE, "float32"))
        call.weights[0, 2, 0, 0, 0], call.locations[0, 2, 0, 0, 0] = np.inf, (0.5, 0.5)
        tensors = [torch.from_numpy(array) for array in call.arrays]
        assert_close(gpu.forward(call.spec, *tensors), reference_output(call), "float32")
        call.weights[0, 2, 0, 0, 0] = 0.5
        found = gpu.backward(call.spec, torch.from_numpy(call.grad_output), *tensors, wanted=ARGUMENTS)
        expected = reference_gradients(call)
        for name in ARGUMENTS:
            assert_close(getattr(found, name), getattr(expected, name), "float32", name)

    def test_there_is_none(self) -> None:
        self.check()

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
    def test_it_is_noticed(self, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import InterpreterError

        mutations.load(mutation, (LEVELS, LISTS, KERNELS), tmp_path, monkeypatch)
        monkeypatch.setattr(gpu, "_kernels", lambda: sys.modules[KERNELS])
        monkeypatch.setattr(lists, "_kernels", lambda: sys.modules[LISTS])
        with pytest.raises((AssertionError, InterpreterError)):
            self.check()
