"""The suite on the GPU kernels, and their calls in half precision: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.conv.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.ops.conv.suite import ConvSuite, in_float64, reference_backward
from tests.tolerances import TOLERANCE, assert_close, error

from deformconv.ops.conv import gpu, reference
from deformconv.ops.conv.spec import GRADIENTS, Gradients

torch = pytest.importorskip("torch")

from tests.half_calls import HalfCall, halved  # noqa: E402

PRECISE = ("offset", "mask")  # which may be float32 beside half precision
HALF = ("float16", "bfloat16")
by_half = pytest.mark.parametrize("half", HALF)
# Offsets and masks in half precision too, or in float32 beside it.
by_mix = pytest.mark.parametrize(
    ("half", "mixed"), [("float16", False), ("bfloat16", True)], ids=["float16", "bfloat16 beside float32"]
)

# Sizes that leave a rest at every place where the work is cut: blocks of positions, of channels, of outputs.
TAILS = [
    Case("primes", (7, 9), (3, 2), stride=(2, 1), padding=(2, 1), batch=3, in_channels=37, out_channels=53),
    Case("one position", (3, 3), (3, 3), batch=5, in_channels=19, out_channels=17),
    Case("many channels", (5, 4), (1, 1), batch=1, in_channels=531, out_channels=3),
    Case("deep groups", (5, 4), (3, 2), padding=1, in_channels=150, out_channels=34, groups=2, offset_groups=3),
    Case("blocks without a rest", (4, 8), (3, 3), padding=1, batch=1, in_channels=128, out_channels=128),
    Case("blocks and a rest", (5, 7), (3, 3), padding=1, batch=2, in_channels=48, out_channels=144, offset_groups=3),
    Case("depthwise", (5, 7), (3, 3), padding=1, in_channels=83, out_channels=83, groups=83),
    Case("depthwise, own offsets", (5, 6), (3, 2), in_channels=5, out_channels=5, groups=5, offset_groups=5),
    Case("depth multiplier", (5, 6), (3, 3), padding=1, in_channels=13, out_channels=39, groups=13),
    Case("long line", (263,), (9,), padding=4, in_channels=5, out_channels=7, batch=1),
    Case("volume", (2, 4, 5), (2, 3, 2), padding=1, in_channels=18, out_channels=11, batch=1),
]
by_tail = pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)


class GpuSuite(ConvSuite):
    """The suite on tensors of `device`. What the kernels do not write is NaN."""

    backend = gpu
    device: ClassVar[str] = "cpu"

    def array(self, array: Array) -> Any:
        return tensor_of(array, self.device)

    def numpy(self, array: Any) -> Array:
        return array.detach().cpu().numpy()

    def output(self, call: Call) -> Array:
        from tests.poison import Poisoned

        with Poisoned():
            return super().output(call)

    def gradients(self, call: Call, wanted: Collection[str] = GRADIENTS) -> Gradients:
        from tests.poison import Poisoned

        with Poisoned():
            return super().gradients(call, wanted)

    @by_tail
    def test_tails(self, case: Case) -> None:
        call = make(case, "float32")
        assert_close(self.output(call), in_float64(call, reference.forward), "float32")
        self.assert_gradients(call, in_float64(call, reference_backward), "float32")


def tensor_of(array: Array, device: str) -> Any:
    """The array as a tensor of the same strides, as far as PyTorch has such: none below zero."""
    usable = array.flags.writeable and min(array.strides, default=0) >= 0
    tensor = torch.from_numpy(array if usable else array.copy())
    if device == "cpu" or tensor.numel() == 0:
        return tensor.to(device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).to(device).as_strided(tensor.shape, tensor.stride())


def half_call(
    case: Case, half: str, mixed: bool, device: str = "cpu", change: Callable[[Call], Call] = lambda call: call
) -> HalfCall:
    """Arguments in half precision; `mixed`: offsets and mask in float32, as positions should be."""
    return halved(change(make(case, "float32")), ARGUMENTS, PRECISE, half, mixed, device)


def half_results(call: HalfCall) -> Iterator[tuple[str, Any, Array]]:
    """The name of each result of the GPU kernels, the result, and what it is in float64."""
    from tests.poison import Poisoned

    t = call.tensors
    with Poisoned():
        output = gpu.forward(call.spec, *(t[name] for name in ARGUMENTS))
    yield "output", output, in_float64(call.exact, reference.forward)
    with Poisoned():
        names = ("grad_output", "input", "offset", "weight", "mask")
        gradients = gpu.backward(call.spec, *(t[name] for name in names), wanted=GRADIENTS)
    for name, expected in in_float64(call.exact, reference_backward)._asdict().items():
        assert (getattr(gradients, name) is None) == (expected is None), name
        if expected is not None:
            yield name, getattr(gradients, name), expected


def assert_near(name: str, result: Any, expected: Array, dtype: str) -> None:
    """As `assert_close`; but a gradient may have two roundings, since the columns' gradient is rounded before it is used."""
    found, finite = result.detach().double().cpu().numpy(), np.isfinite(expected)
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    assert np.array_equal(found[~finite], expected[~finite], equal_nan=True), (
        f"{name}: not NaN or infinite where it is expected"
    )
    wrong, most = error(found[finite], expected[finite]), TOLERANCE[dtype] * (1 if name == "output" else 2)
    assert wrong <= most, f"{name}: error {wrong:.1e} over {most:.0e} for {dtype}"


HALF_CASES = [case for case in CASES if case.batch in (0, 2)]
