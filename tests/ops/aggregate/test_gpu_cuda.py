"""On a GPU: everything a backend must satisfy, in every dtype; the same bits each time, graphs, PyTorch's compiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.ops.aggregate.cases import ARGUMENTS, Case, make, parameters
from tests.ops.aggregate.gpu_suite import HALF_CASES, TAILS, GpuSuite, half_call, half_results
from tests.ops.aggregate.suite import in_float64, odd, reference_backward, reference_forward
from tests.ops.conv.gpu_suite import assert_near, by_half, by_mix
from tests.tolerances import assert_close

from deformconv.ops.aggregate import gpu
from deformconv.torch import deform_aggregate2d

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.cuda

STAGE = Case("a stage", (56, 56), (3, 3), padding=1, batch=4, channels=128, offset_groups=8)


@pytest.mark.usefixtures("in_order")
class TestGpu(GpuSuite):
    device = "cuda"


@by_mix
@pytest.mark.parametrize("case", [*HALF_CASES, *TAILS], ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed, "cuda")):
        assert_near(name, result, expected, half)


@by_half
def test_odd_numbers_beside_half_precision(half: str) -> None:
    case = Case("odd", (5, 6), (3, 3), padding=1, channels=32, offset_groups=2, boundary="inside")
    for name, result, expected in half_results(half_call(case, half, True, "cuda", odd)):
        assert_near(name, result, expected, half)


def on_gpu(case: Case, dtype: Any) -> tuple[Any, list[Any], Any]:
    """A call's spec, its tensors on the GPU with their channels last, and the output's gradient."""
    call = make(case, "float64" if dtype is torch.float64 else "float32")
    form = torch.channels_last
    x, *others = (torch.from_numpy(array).cuda().contiguous(memory_format=form) for array in call.arrays)
    spec = replace(call.spec, dtype=str(dtype).removeprefix("torch."))
    return spec, [x.to(dtype), *others], torch.from_numpy(call.grad_output).cuda().to(dtype).contiguous(memory_format=form)


def results(spec: Any, tensors: list[Any], grad_output: Any) -> list[Any]:
    return [gpu.forward(spec, *tensors), *gpu.backward(spec, grad_output, *tensors, wanted=ARGUMENTS)]


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_in_20_runs_while_another_stream_is_busy(dtype: Any) -> None:
    call = on_gpu(STAGE, dtype)
    expected = results(*call)
    other, product = torch.cuda.Stream(), torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            product @ product
        assert all(map(torch.equal, results(*call), expected))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_large_call_agrees_with_array_operations(groups: int) -> None:
    """In float64, which share nothing with the kernels; offsets are away from integers. Of 8 groups all is added by atomics."""
    case = STAGE.but(offset_groups=groups)
    spec, tensors, grad_output = on_gpu(case, torch.float32)
    tensors[1] = tensors[1].floor() + 0.1 + 0.8 * (tensors[1] - tensors[1].floor())
    found = results(spec, tensors, grad_output)
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    output = deform_aggregate2d(*leaves, **parameters(case), backend="portable")
    expected = [output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())]
    for name, ours, theirs in zip(("output", *ARGUMENTS), found, expected, strict=True):
        assert_close(ours.cpu(), theirs.cpu(), "float32", name)


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward_are_recorded(dtype: Any) -> None:
    """In a graph, which waits for nothing, and which sees other offsets later."""
    spec, tensors, grad_output = on_gpu(STAGE, dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(spec, tensors, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(spec, tensors, grad_output)
    for shift in (0.0, 0.7):
        tensors[1] += shift
        graph.replay()
        assert all(map(torch.equal, found, results(spec, tensors, grad_output)))


def test_the_public_function() -> None:
    case = TAILS[2]
    call = make(case)
    leaves = [torch.from_numpy(array.copy()).cuda().requires_grad_() for array in call.arrays]
    output = deform_aggregate2d(*leaves, **parameters(case), backend="gpu")
    assert_close(output.detach().cpu(), in_float64(call, reference_forward), "float64")
    found = torch.autograd.grad(output, leaves, torch.from_numpy(call.grad_output).cuda())
    expected = in_float64(call, reference_backward)
    for name, gradient in zip(ARGUMENTS, found, strict=True):
        assert_close(gradient.cpu(), getattr(expected, name), "float64", name)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own scripts, which its compiler imports
def test_compiled_by_pytorch() -> None:
    case = TAILS[2]
    _, tensors, grad_output = on_gpu(case, torch.float32)
    x = tensors[0].requires_grad_()

    def call(x: Any) -> Any:
        return deform_aggregate2d(x, *tensors[1:], **parameters(case)).sin()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    (found,), (expected,) = (torch.autograd.grad(run(x), x, grad_output) for run in (compiled, call))
    assert_close(found.cpu(), expected.cpu(), "float32")
