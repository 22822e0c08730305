"""The GPU kernels in Triton's interpreter: everything a backend must satisfy, without a GPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import mutations
from tests.mutations import Mutation
from tests.ops.conv.gpu_suite import assert_near, by_mix
from tests.ops.roi_pool.cases import Call, Case, make, parameters, spec_of
from tests.ops.roi_pool.gpu_suite import HALF_CASES, GpuSuite, half_call, half_results
from tests.ops.roi_pool.suite import WANTED, hostile_offsets, reference_gradients, reference_output
from tests.tolerances import assert_close

from deformconv.ops.roi_pool import gpu
from deformconv.ops.roi_pool.spec import RoiSpec
from deformconv.sampling import lists

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN that the interpreter computes with
]


class TestGpu(GpuSuite):
    """In float64; what follows has the other dtypes."""

    dtypes = ("float64",)


@by_mix
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed)):
        assert_near(name, result, expected, half)


def test_numbers_that_float32_does_not_have() -> None:
    """Triton takes Python's numbers for float32: a scale, a factor and corners of many digits, negative and 0."""
    for gamma in (1 / 3, -1e-3, 0.0):
        call = make(Case("digits", channels=2, size=(40, 50), scale=1 / 7, gamma=gamma, spread=3.0))
        tensors = [torch.from_numpy(array) for array in call.arrays]
        assert_close(gpu.forward(call.spec, *tensors), reference_output(call), "float64")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_from_pytorch(dtype: Any) -> None:
    """With a graph; boxes, offsets and masks in float32 beside half precision, and so are their gradients."""
    from deformconv.torch import deform_roi_pool

    case = Case("from PyTorch", channels=4, boxes=3)
    call = make(case, "float64" if dtype is torch.float64 else "float32")
    x, boxes, offset, mask = (torch.from_numpy(array) for array in call.arrays)
    leaves = [tensor.requires_grad_() for tensor in (x.to(dtype), offset, mask)]
    given = leaves[0], boxes, *leaves[1:]
    output = deform_roi_pool(*given, **parameters(case), backend="gpu")
    assert output.dtype is dtype
    found = torch.autograd.grad(output, leaves, torch.from_numpy(call.grad_output).to(dtype))
    assert [tensor.dtype for tensor in found] == [leaf.dtype for leaf in leaves]
    rounded = {"input": leaves[0].detach(), "grad_output": torch.from_numpy(call.grad_output).to(dtype)}
    expected = reference_gradients(call.but(**{name: tensor.double().numpy() for name, tensor in rounded.items()}))
    for name, tensor in zip(WANTED, found, strict=True):
        assert_near(name, tensor, getattr(expected, name), str(dtype).removeprefix("torch."))


def test_where_boxes_decide_another_backend_computes() -> None:
    call = make(Case("", sampling=0))
    reasons = gpu.reasons_against(call.spec, "torch", "cpu", False)
    assert reasons == ["with sampling_ratio=0 boxes decide how many samples there are, and to ask them is to wait for the GPU"]
    assert gpu.reasons_against(make(Case("")).spec, "torch", "cpu", True) == []


def test_a_map_beyond_32_bits() -> None:
    arrays = [np.broadcast_to(np.float32(0), shape) for shape in ((1, 1, 46_340, 46_340), (1, 5))]
    reasons = gpu.reasons_against(spec_of(Case("", deformed=False, masked=False), [*arrays, None, None]), "torch", "cpu", False)
    assert reasons == ["a map of 2147395600 pixels exceeds its 32-bit pixel numbers"]


class TestBeyond32Bits:
    """A map of more than 2**31 numbers, of which the last are there: the others are holes in a file."""

    SIZE, CHANNELS, FAR = 2060, 512, 4

    @pytest.fixture
    def call(self, tmp_path: Path) -> tuple[RoiSpec, dict[str, Any], Call]:
        """A box in the last corner of an image, and the same in that corner alone."""
        size, channels, far = self.SIZE, self.CHANNELS, self.FAR
        case = Case("far", channels=channels, size=(far, far), batch=1, boxes=1, output_size=(2, 2), scale=1.0, spread=0.5)
        near = make(case, "float32").but(boxes=np.array([(0, 1.75, 1.5, 3.75, 3.5)], "float32"))
        shape = (1, size, size, channels)
        assert math.prod(shape) > 2**31
        holes = torch.from_file(str(tmp_path / "holes"), shared=True, size=math.prod(shape), dtype=torch.float16)
        x = holes.reshape(shape).movedim(-1, 1)
        x[..., -far:, -far:] = torch.from_numpy(near.input)
        near = near.but(input=near.input.astype("float16").astype("float32"))
        tensors = {name: torch.from_numpy(getattr(near, name).copy()) for name in ("boxes", "offset", "mask")}
        tensors["boxes"][:, 1:] += size - far
        grad_output = near.grad_output.astype("float16")
        tensors |= {"input": x, "grad_output": torch.from_numpy(grad_output)}
        operand = np.broadcast_to(np.float16(0), (1, channels, size, size))
        halves = [getattr(near, name).astype("float16") for name in ("boxes", "offset", "mask")]
        return spec_of(case, [operand, *halves]), tensors, near.but(grad_output=grad_output.astype("float32"))

    def test_forward_and_backward(self, call: Any) -> None:
        spec, t, near = call
        operands = [t[name] for name in ("input", "boxes", "offset", "mask")]
        assert_near("output", gpu.forward(spec, *operands), reference_output(near), "float16")
        found, expected = gpu.backward(spec, t["grad_output"], *operands, wanted=("offset", "mask")), reference_gradients(near)
        assert_near("offset", found.offset, expected.offset, "float16")
        assert_near("mask", found.mask, expected.mask, "float16")

    def test_it_would_be_missed_in_32_bits(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import InterpreterError

        spec, t, _ = call
        monkeypatch.setattr(gpu, "_largest", lambda spec: 1)
        gpu._plan.cache_clear()
        with pytest.raises(InterpreterError, match="within none of the launch"):
            gpu.forward(spec, *(t[name] for name in ("input", "boxes", "offset", "mask")))
        gpu._plan.cache_clear()


LISTS, KERNELS = "deformconv.sampling.triton_lists", "deformconv.ops.roi_pool.gpu_kernels"
# A mistake, the module, and what is replaced in its text by what.
MUTATIONS = [
    Mutation("x after y", KERNELS, "tl.load(at + PARTS, mask", "tl.load(at, mask"),
    Mutation("another box's part", KERNELS, "(box * G + group) * (2 * PARTS)", "box * (2 * PARTS)"),
    Mutation("rounded to even", KERNELS, "tl.floor(tl.abs(number) + 0.5)", "tl.floor(tl.abs(number) + 0.49)"),
    Mutation("the margin of other conventions", KERNELS, '0.5 if CONVENTION == "rounded" else 1.0', "1.0"),
    Mutation("no gradient is stopped", KERNELS, "tl.where(y_moves, y_slope * found_y, 0.0)", "found_y"),
    Mutation("boxes of no image", KERNELS, "known & y_finite & x_finite", "y_finite & x_finite"),
    Mutation("one group of channels", KERNELS, "* pixels * C + part_of_input * CO", "* pixels * C + 0 * part_of_input"),
    Mutation("lists of one group", KERNELS, "(image * groups + group) * lists", "(image * groups) * lists"),
    Mutation("what does not count divides", KERNELS, "tl.where(counted > 0.0, counted, 1.0)", "4.0 + 0.0 * counted"),
    Mutation("samples of one row", KERNELS, "sample // SAMPLES, Y", "sample % SAMPLES, Y"),
    Mutation("low and high corners exchanged", LISTS, "pixel % X + 1 - corner % 2", "pixel % X + corner % 2"),
    Mutation("programs overlap", KERNELS, ".to(INDEX) * BR + tl.arange(0, BR)", ".to(INDEX) * (BR - 1) + tl.arange(0, BR)"),
    Mutation(
        "no `other`", KERNELS, "value = tl.load(x_ptr + at, mask=counts[:, None] & is_channel[None, :], other=0.0)",
        "value = tl.load(x_ptr + at, mask=counts[:, None] & is_channel[None, :])",
    ),
]  # fmt: skip


class TestMistakes:
    """A mistake of one place in the kernels' text makes this fail, and so what is tested above."""

    CASE = Case(
        "mistakes", channels=24 * 12, output_size=(3, 4), position_sensitive=True, classes=2, part_size=(2, 3), boxes=12,
        convention="rounded", scale=0.5, size=(6, 7), spread=3.0,
    )  # fmt: skip

    def check(self) -> None:
        call = hostile_offsets(make(self.CASE, "float32"))
        call.boxes[3, 0] = 7  # an image that is not there
        call.boxes[4, 1] += 0.5 - call.boxes[4, 1] % 1
        call.boxes[5:, 1:] = np.rint(call.boxes[5:, 1:])
        tensors = [torch.from_numpy(array) for array in call.arrays]
        found = gpu.forward(call.spec, *tensors)
        gradients = gpu.backward(call.spec, torch.from_numpy(call.grad_output), *tensors, wanted=WANTED)
        assert found[3].isnan().all() and gradients.offset[3].isnan().all() and gradients.mask[3].isnan().all()
        call.boxes[3, 1] = np.nan  # which means the same
        call.boxes[3, 0] = 0
        assert_close(found, reference_output(call), "float32")
        expected = reference_gradients(call)
        for name in WANTED:
            assert_close(getattr(gradients, name), getattr(expected, name), "float32", name)

    def test_there_is_none(self) -> None:
        self.check()

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
    def test_it_is_noticed(self, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import InterpreterError

        mutations.load(mutation, (LISTS, KERNELS), tmp_path, monkeypatch)
        monkeypatch.setattr(gpu, "_kernels", lambda: sys.modules[KERNELS])
        monkeypatch.setattr(lists, "_kernels", lambda: sys.modules[LISTS])
        with pytest.raises((AssertionError, InterpreterError)):
            self.check()
