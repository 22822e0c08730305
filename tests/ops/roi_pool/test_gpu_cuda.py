"""On a GPU: everything a backend must satisfy, in every dtype; the same bits each time, graphs, PyTorch's compiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.ops.conv.gpu_suite import assert_near, by_half, by_mix
from tests.ops.roi_pool.cases import Case, make, parameters
from tests.ops.roi_pool.gpu_suite import HALF_CASES, TAILS, GpuSuite, half_call, half_results
from tests.ops.roi_pool.suite import WANTED, hostile_offsets
from tests.tolerances import assert_close

import deformconv
from deformconv.ops.roi_pool import gpu

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.cuda

# A detector's boxes, many of them one over the other.
BOX_HEAD = Case("box head", channels=256, size=(50, 84), boxes=256, output_size=(7, 7), scale=1 / 16)


class TestGpu(GpuSuite):
    device = "cuda"


@by_mix
@pytest.mark.parametrize("case", [*HALF_CASES, *TAILS], ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed, "cuda")):
        assert_near(name, result, expected, half)


@by_half
def test_odd_numbers_beside_half_precision(half: str) -> None:
    case = Case("odd", channels=32, boxes=5, output_size=(3, 3), convention="rounded")
    for name, result, expected in half_results(half_call(case, half, True, "cuda", hostile_offsets)):
        assert_near(name, result, expected, half)


def on_gpu(case: Case, dtype: Any) -> tuple[Any, list[Any], Any]:
    """A call's spec, its tensors on the GPU, and the output's gradient."""
    call = make(case, "float64" if dtype is torch.float64 else "float32")
    x, *others = (torch.from_numpy(array).cuda() for array in call.arrays)
    spec = replace(call.spec, dtype=str(dtype).removeprefix("torch."))
    return spec, [x.to(dtype), *others], torch.from_numpy(call.grad_output).cuda().to(dtype)


def results(spec: Any, tensors: list[Any], grad_output: Any) -> list[Any]:
    gradients = gpu.backward(spec, grad_output, *tensors, wanted=WANTED)
    return [gpu.forward(spec, *tensors), gradients.input, gradients.offset, gradients.mask]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_in_20_runs_while_another_stream_is_busy(dtype: Any) -> None:
    call = on_gpu(BOX_HEAD, dtype)
    expected = results(*call)
    other, product = torch.cuda.Stream(), torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            product @ product
        assert all(map(torch.equal, results(*call), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward_are_recorded(dtype: Any) -> None:
    """In a graph, which waits for nothing, and which sees other boxes later."""
    spec, tensors, grad_output = on_gpu(BOX_HEAD, dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(spec, tensors, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(spec, tensors, grad_output)
    for shift in (0.0, 7.3):
        tensors[1][:, 1:] += shift
        graph.replay()
        assert all(map(torch.equal, found, results(spec, tensors, grad_output)))


def test_boxes_that_all_lie_at_one_pixel() -> None:
    """As those that a padded batch is filled with: thousands of samples of one pixel."""
    spec, tensors, grad_output = on_gpu(BOX_HEAD.but(channels=32), torch.float32)
    tensors[1].zero_()
    tensors[2].zero_()
    found = gpu.backward(spec, grad_output, *tensors, wanted=WANTED).input
    wide = [tensor.double() for tensor in tensors]
    expected = gpu.backward(replace(spec, dtype="float64"), grad_output.double(), *wide, wanted=WANTED).input
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sampling", [0, 2])
def test_the_public_function(sampling: int) -> None:
    """It runs these kernels, and PyTorch's operations where boxes decide; both agree with the definition on the CPU."""
    case = Case("public", channels=6, sampling=sampling, boxes=5)
    call = make(case)
    own = [torch.from_numpy(array.copy()).cuda() for array in call.arrays]
    leaves = [own[number].requires_grad_() for number in (0, 2, 3)]
    output = deformconv.deform_roi_pool(*own, **parameters(case), backend="gpu" if sampling else None)
    expected = deformconv.deform_roi_pool(*call.arrays, **parameters(case))
    assert_close(output.detach().cpu(), expected, "float64")
    found = torch.autograd.grad(output, leaves, torch.from_numpy(call.grad_output).cuda())
    wanted = deformconv.deform_roi_pool_backward(call.grad_output, *call.arrays, **parameters(case))
    for ours, theirs in zip(found, (wanted.input, wanted.offset, wanted.mask), strict=True):
        assert_close(ours.cpu(), theirs, "float64")


def test_compiled_by_pytorch() -> None:
    case = Case("compiled", channels=8, boxes=5)
    _, tensors, grad_output = on_gpu(case, torch.float32)
    x = tensors[0].requires_grad_()

    def call(x: Any) -> Any:
        return deformconv.deform_roi_pool(x, *tensors[1:], **parameters(case)).sin()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    for found, expected in zip(
        torch.autograd.grad(compiled(x), x, grad_output), torch.autograd.grad(call(x), x, grad_output), strict=True
    ):
        assert_close(found.cpu(), expected.cpu(), "float32")
