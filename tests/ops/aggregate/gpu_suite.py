"""The suite on the GPU kernels, and their calls in half precision: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.aggregate.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.ops.aggregate.suite import SMALL, AggregateSuite, in_float64, reference_backward, reference_forward
from tests.ops.conv.gpu_suite import tensor_of
from tests.tolerances import assert_close

from deformconv.ops.aggregate import gpu
from deformconv.ops.aggregate.spec import GRADIENTS, Gradients

torch = pytest.importorskip("torch")

from tests.half_calls import HalfCall, halved  # noqa: E402

PRECISE = ("offset", "mask")  # which may be float32 beside half precision

# Sizes that leave a rest at every place where the work is cut: blocks of positions, of channels; many taps for few programs.
TAILS = [
    Case("primes", (7, 9), (3, 2), stride=(2, 1), padding=(2, 1), batch=3, channels=37),
    Case("blocks without a rest", (4, 8), (3, 3), padding=1, batch=1, channels=128),
    Case("groups and a rest", (5, 7), (3, 3), padding=1, channels=3 * 19, offset_groups=3),
    Case("volume", (2, 4, 5), (2, 3, 2), padding=1, channels=18, batch=1, offset_groups=2),
]


class GpuSuite(AggregateSuite):
    """The suite on tensors of `device`. What the kernels do not write is NaN."""

    backend = gpu
    tables: ClassVar[dict[str, list[Any]]] = {"case": CASES, "tail": TAILS}
    device: ClassVar[str] = "cpu"

    def array(self, array: Array) -> Any:
        return tensor_of(array, self.device)

    def numpy(self, array: Any) -> Array:
        found: Array = array.detach().cpu().numpy()
        return found

    def output(self, call: Call) -> Array:
        from tests.poison import Poisoned

        with Poisoned():
            return super().output(call)

    def gradients(self, call: Call, wanted: Collection[str] = GRADIENTS) -> Gradients:
        from tests.poison import Poisoned

        with Poisoned():
            return super().gradients(call, wanted)

    def test_tails(self, tail: Case) -> None:
        call = make(tail, "float32")
        assert_close(self.output(call), in_float64(call, reference_forward), "float32")
        self.assert_gradients(call, in_float64(call, reference_backward), "float32")

    def test_pieces_give_the_same_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of images, whose lists are too long for one."""
        call = make(SMALL, "float32")
        expected = self.gradients(call)
        monkeypatch.setattr(gpu, "_PIECE", gpu._samples(call.spec))
        for one, other in zip(self.gradients(call), expected, strict=True):
            assert np.array_equal(one, other)

    @pytest.mark.parametrize("last", [("offset",), ("mask",), ARGUMENTS], ids=" and ".join)
    def test_channels_last(self, last: tuple[str, ...]) -> None:
        """Each argument by itself; its gradient lies as it does, and the output as the input."""
        call = make(SMALL, "float32")
        form = torch.channels_last
        given = {name: self.array(getattr(call, name)) for name in ARGUMENTS}
        given = {name: t.contiguous(memory_format=form) if name in last else t for name, t in given.items()}
        output = gpu.forward(call.spec, *given.values())
        assert np.array_equal(self.numpy(output), self.output(call))
        assert output.is_contiguous(memory_format=form if "input" in last else torch.contiguous_format)
        found = gpu.backward(call.spec, self.array(call.grad_output), *given.values(), wanted=GRADIENTS)
        for name, gradient, expected in zip(ARGUMENTS, found, self.gradients(call), strict=True):
            assert np.array_equal(self.numpy(gradient), expected), name
            assert gradient.is_contiguous(memory_format=form if name in last else torch.contiguous_format), name


def half_call(
    case: Case, half: str, mixed: bool, device: str = "cpu", change: Callable[[Call], Call] = lambda call: call
) -> HalfCall:
    """Arguments in half precision; `mixed`: offsets and masks in float32, as positions should be."""
    return halved(change(make(case, "float32")), ARGUMENTS, PRECISE, half, mixed, device)


def half_results(call: HalfCall) -> Iterator[tuple[str, Any, Array]]:
    """The name of each result of the GPU kernels, the result, and what it is in float64."""
    from tests.poison import Poisoned

    operands = [call.tensors[name] for name in ARGUMENTS]
    with Poisoned():
        output = gpu.forward(call.spec, *operands)
        gradients = gpu.backward(call.spec, call.tensors["grad_output"], *operands, wanted=GRADIENTS)
    yield "output", output, in_float64(call.exact, reference_forward)
    for name, expected in in_float64(call.exact, reference_backward)._asdict().items():
        found = getattr(gradients, name)
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert found.dtype == call.tensors[name].dtype, name
            yield name, found, expected


HALF_CASES = [case for case in CASES if case.batch in (0, 2)]
