"""The suite on the GPU kernels, and their calls in half precision: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.conv.gpu_suite import tensor_of
from tests.ops.roi_pool.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.ops.roi_pool.suite import (
    CONVENTIONS,
    SMALL,
    WANTED,
    BackendSuite,
    by_convention,
    reference_gradients,
    reference_output,
)
from tests.tolerances import assert_close

from deformconv.ops.roi_pool import gpu
from deformconv.ops.roi_pool.spec import Gradients

torch = pytest.importorskip("torch")

from tests.half_calls import HalfCall, halved  # noqa: E402

PRECISE = ("boxes", "offset", "mask")  # which may be float32 beside half precision

# Sizes that leave a rest at every place where the work is cut: blocks of bins, of channels, of pixels; more parts than bins.
TAILS = [
    Case("primes", channels=37, size=(11, 13), batch=3, boxes=7, output_size=(5, 7), sampling=3),
    Case("one bin", channels=17, boxes=5, output_size=(1, 1)),
    Case("one of everything", channels=1, size=(1, 1), batch=1, boxes=1, output_size=(1, 1), sampling=1, scale=0.25),
    Case("a line of pixels", channels=3, size=(1, 9), boxes=3),
    Case("more parts than bins", output_size=(2, 3), part_size=(4, 3)),
    Case("parts that leave a rest", output_size=(5, 7), part_size=(3, 2), convention="rounded"),
    Case("many channels", channels=531, boxes=2, output_size=(2, 2)),
    Case("blocks without a rest", channels=128, boxes=4, output_size=(4, 4)),
    Case("classes and groups", channels=2 * 6 * 9, output_size=(2, 3), position_sensitive=True, classes=9),
]
by_tail = pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)


class GpuSuite(BackendSuite):
    """The suite on tensors of `device`. What the kernels do not write is NaN."""

    backend = gpu
    device: ClassVar[str] = "cpu"
    cases: ClassVar[list[Case]] = [case for case in CASES if case.sampling]

    # Where boxes decide on their samples, another backend computes.
    test_a_bin_without_samples_is_zero_whatever_its_offset = None  # type: ignore[assignment]

    @pytest.mark.parametrize(("convention", "sampling"), [(convention, 2) for convention in CONVENTIONS])
    def test_hostile_boxes(self, convention: str, sampling: int, dtype: str) -> None:
        super().test_hostile_boxes(convention, sampling, dtype)

    def tensors(self, call: Call) -> list[Any]:
        return [None if array is None else tensor_of(array, self.device) for array in call.arrays]

    def output(self, call: Call) -> Array:
        from tests.poison import Poisoned

        with Poisoned():
            found: Array = gpu.forward(call.spec, *self.tensors(call)).cpu().numpy()
        return found

    def gradients(self, call: Call, wanted: Any = WANTED) -> Gradients:
        from tests.poison import Poisoned

        with Poisoned():
            grad_output = tensor_of(call.grad_output, self.device)
            found = gpu.backward(call.spec, grad_output, *self.tensors(call), wanted=wanted)
        return Gradients(*(None if tensor is None else tensor.cpu().numpy() for tensor in found))

    @by_tail
    def test_tails(self, case: Case) -> None:
        call = make(case, "float32")
        assert_close(self.output(call), reference_output(call), "float32")
        self.assert_gradients(self.gradients(call), reference_gradients(call), "float32")

    @by_convention
    def test_boxes_of_no_image_are_nan(self, convention: str, dtype: str) -> None:
        """Nobody looks at values on a GPU. They read nothing, and reach no pixel."""
        call = make(SMALL.but(convention=convention, boxes=7), dtype)
        call.boxes[:6, 0] = -1, 2, 0.5, np.nan, 1e30, -np.inf
        call.boxes[6, 0] = 1
        right = call._replace(
            spec=replace(call.spec, boxes=1), boxes=call.boxes[6:], offset=call.offset[6:], mask=call.mask[6:],  # type: ignore[index]
            grad_output=call.grad_output[6:],
        )  # fmt: skip
        found, expected = self.output(call), reference_output(right)
        assert np.isnan(found[:6]).all()
        assert_close(found[6:], expected, dtype)
        gradients = self.gradients(call)
        assert np.isnan(gradients.offset[:6]).all() and np.isnan(gradients.mask[:6]).all()
        own = gradients._replace(offset=gradients.offset[6:], mask=gradients.mask[6:])
        self.assert_gradients(own, reference_gradients(right), dtype)

    def test_a_mask_that_is_no_number_reaches_its_own_bin_alone(self, dtype: str) -> None:
        """And where no sample of it counts, not even the gradients."""
        call = make(SMALL, dtype)
        call.mask[0, 0, 1, 1], call.mask[1, 0, 0, 0] = np.nan, np.inf  # type: ignore[index]
        call.offset[1, :, 0, 0] = 1e6  # type: ignore[index]
        assert_close(self.output(call), reference_output(call), dtype)
        found, expected = self.gradients(call), reference_gradients(call)
        self.assert_gradients(found, expected, dtype)
        assert (found.offset[1, :, 0, 0] == 0).all() and np.isnan(found.offset).any()

    def test_a_box_gives_the_same_bits_beside_any_others(self) -> None:
        call = make(self.cases[0].but(boxes=9), "float32")
        whole = self.output(call)
        for boxes in (slice(3, 4), slice(2, 9)):
            part = replace(call.spec, boxes=len(call.boxes[boxes]))
            own = call.but(spec=part, boxes=call.boxes[boxes], offset=call.offset[boxes], mask=call.mask[boxes])  # type: ignore[index]
            assert np.array_equal(self.output(own), whole[boxes])

    def test_pieces_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of boxes, whose lists are too long for one."""
        call = make(self.cases[0].but(boxes=5), "float32")
        expected = reference_gradients(call)
        for boxes in (1, 2):
            monkeypatch.setattr(gpu, "_PIECE", boxes * call.spec.bins * 4)
            self.assert_gradients(self.gradients(call), expected, "float32")

    @pytest.mark.parametrize("case", [SMALL, TAILS[-1]], ids=lambda case: case.name)
    def test_channels_last(self, case: Case) -> None:
        call = make(case, "float32")
        x, *others = self.tensors(call)
        grad_output = tensor_of(call.grad_output, self.device)
        output = gpu.forward(call.spec, x, *others)
        gradient = gpu.backward(call.spec, grad_output, x, *others, wanted=["input"]).input
        assert output.is_contiguous() and gradient.is_contiguous()
        last, form = x.contiguous(memory_format=torch.channels_last), torch.channels_last
        ours = gpu.forward(call.spec, last, *others)
        assert ours.is_contiguous(memory_format=form) and torch.equal(ours, output)
        found = gpu.backward(call.spec, grad_output.contiguous(memory_format=form), last, *others, wanted=["input"]).input
        assert torch.equal(found, gradient)
        assert found.is_contiguous(memory_format=form) or case.position_sensitive  # whose channels change places


def half_call(
    case: Case, half: str, mixed: bool, device: str = "cpu", change: Callable[[Call], Call] = lambda call: call
) -> HalfCall:
    """Arguments in half precision; `mixed`: boxes, offsets and mask in float32, as positions should be."""
    return halved(change(make(case, "float32")), ARGUMENTS, PRECISE, half, mixed, device)


def half_results(call: HalfCall) -> Iterator[tuple[str, Any, Array]]:
    """The name of each result of the GPU kernels, the result, and what it is in float64."""
    from tests.poison import Poisoned

    operands = [call.tensors[name] for name in ARGUMENTS]
    with Poisoned():
        output = gpu.forward(call.spec, *operands)
        gradients = gpu.backward(call.spec, call.tensors["grad_output"], *operands, wanted=WANTED)
    yield "output", output, reference_output(call.exact)
    for name, expected in reference_gradients(call.exact)._asdict().items():
        found = getattr(gradients, name)
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert found.dtype == call.tensors[name].dtype, name
            yield name, found, expected


HALF_CASES = [case for case in CASES if case.sampling and case.convention != "unaligned"]
