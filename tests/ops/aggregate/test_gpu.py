"""The GPU kernels in Triton's interpreter: everything a backend must satisfy, without a GPU.

How a window's taps are placed and sampled is tried beside the convolution, which has it from the same functions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tests import mutations
from tests.mutations import Mutation
from tests.ops.aggregate.cases import CASES, Case, make
from tests.ops.aggregate.gpu_suite import TAILS, GpuSuite, half_call, half_results
from tests.ops.aggregate.suite import SMALL, in_float64, odd, reference_backward
from tests.ops.conv.gpu_suite import assert_near
from tests.tolerances import assert_close

from deformconv.ops import gpu as on_gpu
from deformconv.ops.aggregate import gpu
from deformconv.ops.aggregate.spec import GRADIENTS, AggregateSpec, aggregate_spec
from deformconv.ops.operator import Operand
from deformconv.sampling import lists

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN that the interpreter computes with
]

INTERPRETED = ("1-D, all at once", "2-D, inside, strided", "2-D, batch of 0", "3-D, inside")


class TestGpu(GpuSuite):
    """In float64, in which identities are tried; what follows has the other dtypes.

    A test takes the interpreter a second. What a window's taps and the lists of samples do is tried with the convolution, which
    has the same functions; on a GPU all of the suite is.
    """

    dtypes = ("float64",)
    tables: ClassVar[dict[str, list[Any]]] = {
        "case": [case for case in CASES if case.name.startswith(INTERPRETED)],
        "tail": [TAILS[1].but(kernel=(1, 1), padding=0), TAILS[2].but(size=(3, 4), kernel=(2, 2))],
    }

    @pytest.mark.parametrize("wanted", [("offset",), ("input", "mask"), ()], ids=" and ".join)
    def test_only_what_is_wanted_is_computed(self, wanted: tuple[str, ...]) -> None:
        super().test_only_what_is_wanted_is_computed(wanted)

    @pytest.mark.parametrize("last", [("input", "mask")], ids=" and ".join)
    def test_channels_last(self, last: tuple[str, ...]) -> None:
        super().test_channels_last(last)

    test_arguments_are_left_alone = None  # type: ignore[assignment]
    test_positions = test_rank_embeds_in_the_next = test_integer_offsets_shift_the_image = None  # type: ignore[assignment]
    test_a_pixel_of_weight_0_is_read = test_nothing_but_odd_offsets = test_output_is_linear = None  # type: ignore[assignment]
    test_gradients_of_nothing_but_odd_offsets = test_far_positions_are_outside = None  # type: ignore[assignment]
    test_far_positions_have_no_gradient = test_output_of_any_configuration = None  # type: ignore[assignment]
    test_gradients_of_any_configuration = test_zero_offsets_give_the_sums_of_windows = None  # type: ignore[assignment]
    test_layout_in_memory_does_not_matter = test_a_call_repeats_its_output = None  # type: ignore[assignment]
    test_mask_of_ones_is_none = test_nan_reaches_the_outputs_that_read_it = None  # type: ignore[assignment]
    test_nan_reaches_the_gradients_that_used_it = test_odd_numbers_everywhere_match_the_reference = None  # type: ignore[assignment]
    test_an_image_does_not_depend_on_its_batch = test_a_channel_does_not_depend_on_others = None  # type: ignore[assignment]
    test_layout_in_memory_does_not_matter_to_gradients = test_a_call_repeats_its_gradients = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("case", "half", "mixed"),
    [(CASES[1], "float16", False), (SMALL.but(boundary="inside"), "bfloat16", True)],
    ids=str,
)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed)):
        assert_near(name, result, expected, half)


def test_long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many samples near one pixel, which are summed in runs."""
    monkeypatch.setattr(lists, "_RUN", 8)
    call = make(Case("near", (3, 4), (2, 3), padding=1, channels=6, offset_groups=2))
    axes = np.indices(call.spec.output_size).reshape(2, -1)
    offset = call.offset.reshape(2, -1, 2, axes.shape[1])
    offset[..., ::2] = (1 - axes)[:, ::2] + offset[..., ::2] / 8
    t = [torch.from_numpy(array) for array in (call.grad_output, call.input, call.offset, call.mask)]
    found = gpu.backward(call.spec, *t, wanted=["input"])
    assert_close(found.input, in_float64(call, reference_backward).input, "float64")
    assert found.offset is found.mask is None


@pytest.mark.parametrize("half", ["bfloat16"])
def test_added_up(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input's gradient by atomics, in float32, which a card is to be there for, as none is here."""

    def no_lists(*of: Any) -> None:
        raise AssertionError("samples are not sorted")

    monkeypatch.setattr(on_gpu, "adds", lambda channels, device: True)
    monkeypatch.setattr(lists, "entries", no_lists)
    for name, result, expected in half_results(half_call(SMALL, half, True, change=odd)):
        assert_near(name, result, expected, half)
    call = half_call(SMALL, half, True)
    t = [call.tensors[name] for name in ("grad_output", "input", "offset", "mask")]
    found = gpu.backward(call.spec, *t, wanted=["input"]).input
    assert_near("input", found, in_float64(call.exact, reference_backward).input, half)
    assert found.dtype == t[1].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_from_pytorch(dtype: Any) -> None:
    """With a graph; offsets and masks in float32 beside half precision, and so are their gradients."""
    from deformconv.torch import deform_aggregate2d

    call = make(SMALL, "float64" if dtype is torch.float64 else "float32")
    x, *others = (torch.from_numpy(array) for array in call.arrays)
    leaves = [tensor.requires_grad_() for tensor in (x.to(dtype), *others)]
    output = deform_aggregate2d(*leaves, kernel_size=SMALL.kernel, padding=1, offset_groups=3, backend="gpu")
    assert output.dtype is dtype
    grad_output = torch.from_numpy(call.grad_output).to(dtype)
    found = torch.autograd.grad(output, leaves, grad_output)
    rounded = {"input": leaves[0].detach(), "grad_output": grad_output}
    expected = reference_backward(call.but(**{name: tensor.double().numpy() for name, tensor in rounded.items()}))
    for name, leaf, tensor in zip(GRADIENTS, leaves, found, strict=True):
        assert tensor.dtype is leaf.dtype
        assert_near(name, tensor, getattr(expected, name), str(dtype).removeprefix("torch."))


def test_what_another_backend_computes() -> None:
    def reasons(size: tuple[int, int]) -> list[str]:
        shapes = (1, 1, *size), (1, 2, *size)
        spec = aggregate_spec(*(Operand(shape, "float32") for shape in shapes), kernel_size=1)
        return gpu.reasons_against(spec, "torch", "cpu", False)

    assert reasons((46_000, 46_000)) == []
    assert len(reasons((46_341, 46_341))) == 3


class TestBeyond32Bits:
    """A map of more than 2**31 numbers, of which the last are there: the others are holes in a file."""

    SIZE, CHANNELS, FAR = 2060, 512, 2

    @pytest.fixture
    def call(self, tmp_path: Path) -> tuple[AggregateSpec, list[Any], Any, Any]:
        """As many positions as the last corner of an image has pixels, which offsets move there; and that corner alone."""
        size, channels, far = self.SIZE, self.CHANNELS, self.FAR
        near = make(Case("far", (far, far), (1, 1), batch=1, channels=channels), "float32")
        shape = (1, size, size, channels)
        x = torch.from_file(str(tmp_path / "holes"), shared=True, size=int(np.prod(shape)), dtype=torch.float16).reshape(shape)
        own = torch.from_numpy(near.input).half()
        x[:, -far:, -far:] = own.movedim(1, -1)
        step = size // far
        moved = (size - far + np.arange(far) * (1 - step)).astype(np.float32)
        offset = np.stack([np.broadcast_to(moved[:, None], (far, far)), np.broadcast_to(moved, (far, far))])[None]
        shift = np.float32([0.25, -0.5]).reshape(1, 2, 1, 1)
        tensors = [x.movedim(-1, 1), torch.from_numpy(offset + shift), torch.from_numpy(near.mask)]
        spec = aggregate_spec(*(Operand(tuple(t.shape), "float16") for t in tensors), kernel_size=1, stride=step)
        grad_output = torch.from_numpy(near.grad_output).half()
        exact = near.but(
            input=own.double().numpy(), offset=np.broadcast_to(shift, near.offset.shape).astype(np.float64),
            mask=near.mask.astype(np.float64), grad_output=grad_output.double().numpy(),
        )  # fmt: skip
        return spec, tensors, grad_output, exact

    def test_forward_and_backward(self, call: Any) -> None:
        from deformconv.ops.aggregate import reference

        spec, tensors, grad_output, exact = call
        assert_near("output", gpu.forward(spec, *tensors), reference.forward(exact.spec, *exact.arrays), "float16")
        found, expected = gpu.backward(spec, grad_output, *tensors, wanted=("offset", "mask")), reference_backward(exact)
        assert_near("offset", found.offset, expected.offset, "float16")
        assert_near("mask", found.mask, expected.mask, "float16")

    def test_it_would_be_missed_in_32_bits(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import InterpreterError

        spec, tensors, *_ = call
        monkeypatch.setattr(gpu, "_largest", lambda spec: 1)
        gpu._plan.cache_clear()
        with pytest.raises(InterpreterError, match="within none of the launch"):
            gpu.forward(spec, *tensors)
        gpu._plan.cache_clear()


LISTS, TAPS, KERNELS = (
    "deformconv.sampling.triton_lists", "deformconv.ops.taps.gpu_kernels", "deformconv.ops.aggregate.gpu_kernels"
)  # fmt: skip
# A mistake, the module, and what is replaced in its text by what.
MUTATIONS = [
    Mutation("channels last are read as first", TAPS, "    if LAST:\n", "    if LAST and False:\n"),
    Mutation("the wrong format", TAPS, "G * K, LAST[1])\n        tl.store", "G * K, LAST[0])\n        tl.store"),
    Mutation("another image", TAPS, "(image * P + position) * channels + channel", "position * channels + channel"),
    Mutation("no mask", TAPS, "((d_x + poison) * mask)", "(d_x + poison)"),
    Mutation("a tap is left out", KERNELS, "tl.program_id(1) * taps + taps, K)", "tl.program_id(1) * taps + taps, K - 1)"),
    Mutation("samples of one group", KERNELS, "(image * G + group) * K + tap) * P", "(image * G + group * 0) * K + tap) * P"),
    Mutation("lists of one group", KERNELS, "(image * G + group) * lists", "(image * G) * lists"),
    Mutation("another group's gradient", KERNELS, "channels_of(group, 0, GC", "channels_of(0, 0, GC"),
]


class TestMistakes:
    """A mistake of one place in the kernels' text makes this fail, and so what is tested above."""

    CASE = Case("mistakes", (3, 4), (2, 2), padding=1, channels=2 * 19, offset_groups=2)

    def check(self) -> None:
        call = half_call(self.CASE, "bfloat16", mixed=True, change=odd)
        call.tensors["mask"] = call.tensors["mask"].contiguous(memory_format=torch.channels_last)
        for name, result, expected in half_results(call):
            assert_near(name, result, expected, "bfloat16")

    def test_there_is_none(self) -> None:
        self.check()

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
    def test_it_is_noticed(self, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import InterpreterError

        mutations.load(mutation, (LISTS, TAPS, KERNELS), tmp_path, monkeypatch)
        monkeypatch.setattr(gpu, "_kernels", lambda: sys.modules[KERNELS])
        monkeypatch.setattr(lists, "_kernels", lambda: sys.modules[LISTS])
        with pytest.raises((AssertionError, InterpreterError)):
            self.check()
