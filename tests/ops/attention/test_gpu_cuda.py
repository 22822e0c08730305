"""On a GPU: everything a backend must satisfy, in every dtype; the same bits each time, graphs, PyTorch's compiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.ops.attention.cases import ARGUMENTS, Case, make
from tests.ops.attention.gpu_suite import DETR, HALF_CASES, GpuSuite, half_call, half_results
from tests.ops.attention.suite import reference_gradients, reference_output
from tests.ops.conv.gpu_suite import assert_near, by_mix
from tests.tolerances import assert_close

from deformconv.ops.attention import gpu
from deformconv.torch import deform_attention

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.cuda

ENCODER = Case("encoder", levels=((50, 84), (25, 42), (13, 21), (7, 11)), heads=8, channels=32, queries=5586, points=4)
DECODER = ENCODER.but(name="decoder", queries=300)


class TestGpu(GpuSuite):
    device = "cuda"


@by_mix
@pytest.mark.parametrize("case", [*HALF_CASES, DETR], ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed, "cuda")):
        assert_near(name, result, expected, half)


def on_gpu(case: Case, dtype: Any) -> tuple[Any, list[Any], Any]:
    """A call's spec, its tensors on the GPU, and the output's gradient."""
    call = make(case, "float64" if dtype is torch.float64 else "float32")
    value, *others = (torch.from_numpy(array).cuda() for array in call.arrays)
    spec = replace(call.spec, dtype=str(dtype).removeprefix("torch."))
    return spec, [value.to(dtype), *others], torch.from_numpy(call.grad_output).cuda().to(dtype)


def results(spec: Any, tensors: list[Any], grad_output: Any) -> list[Any]:
    return [gpu.forward(spec, *tensors), *gpu.backward(spec, grad_output, *tensors, wanted=ARGUMENTS)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_in_20_runs_while_another_stream_is_busy(dtype: Any) -> None:
    call = on_gpu(ENCODER, dtype)
    expected = results(*call)
    other, product = torch.cuda.Stream(), torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            product @ product
        assert all(map(torch.equal, results(*call), expected))


@pytest.mark.parametrize("case", [ENCODER, DECODER], ids=lambda case: case.name)
def test_a_large_call_agrees_with_array_operations(case: Case) -> None:
    """In float64, which share nothing with the kernels; all in float32, and locations on no integer."""
    spec, tensors, grad_output = on_gpu(case, torch.float32)
    found = results(spec, tensors, grad_output)
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    output = deform_attention(leaves[0], case.levels, *leaves[1:], backend="portable")
    expected = [output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())]
    for name, ours, theirs in zip(("output", *ARGUMENTS), found, expected, strict=True):
        assert_close(ours.cpu(), theirs.cpu(), "float32", name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward_are_recorded(dtype: Any) -> None:
    """In a graph, which waits for nothing, and which sees other locations later."""
    spec, tensors, grad_output = on_gpu(DECODER, dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(spec, tensors, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(spec, tensors, grad_output)
    for shift in (0.0, 0.13):
        tensors[1] += shift
        graph.replay()
        assert all(map(torch.equal, found, results(spec, tensors, grad_output)))


def test_locations_that_are_all_one_pixel() -> None:
    """As those of queries that a padded batch is filled with: many thousand samples of one pixel."""
    spec, tensors, grad_output = on_gpu(ENCODER, torch.float32)
    tensors[1].fill_(0.3)
    found = gpu.backward(spec, grad_output, *tensors, wanted=ARGUMENTS).value
    wide = [tensor.double() for tensor in tensors]
    expected = gpu.backward(replace(spec, dtype="float64"), grad_output.double(), *wide, wanted=ARGUMENTS).value
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_public_function() -> None:
    case = DETR
    call = make(case)
    leaves = [torch.from_numpy(array.copy()).cuda().requires_grad_() for array in call.arrays]
    output = deform_attention(leaves[0], case.levels, *leaves[1:], backend="gpu")
    assert_close(output.detach().cpu(), reference_output(call), "float64")
    found = torch.autograd.grad(output, leaves, torch.from_numpy(call.grad_output).cuda())
    expected = reference_gradients(call)
    for name, gradient in zip(ARGUMENTS, found, strict=True):
        assert_close(gradient.cpu(), getattr(expected, name), "float64", name)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own scripts, which its compiler imports
def test_compiled_by_pytorch() -> None:
    _, tensors, grad_output = on_gpu(DETR, torch.float32)
    value = tensors[0].requires_grad_()

    def call(value: Any) -> Any:
        return deform_attention(value, DETR.levels, *tensors[1:]).sin()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    (found,), (expected,) = (torch.autograd.grad(run(value), value, grad_output) for run in (compiled, call))
    assert_close(found.cpu(), expected.cpu(), "float32")
