"""What a backend of native tensors gets and what becomes of its results: a stand-in for the GPU's kernels, on the CPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.ops.conv.cases import Case
from tests.torch.tensors import call_of

from deformconv import dispatch
from deformconv.ops.conv import gpu
from deformconv.ops.conv.spec import GRADIENTS, Gradients
from deformconv.torch import calls, deform_conv2d, modes

CASE = Case("", (7, 6), (3, 3), padding=1)
halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def kernels(monkeypatch):
    """The GPU's backend takes every call; its results are what is set here, and it keeps what it is given."""
    seen = SimpleNamespace(forward=None, backward=None, output=None, gradients=Gradients())

    def forward(spec, *operands):
        seen.forward = operands
        return seen.output

    def backward(spec, *operands, wanted):
        seen.backward, seen.wanted = operands, wanted
        return seen.gradients

    monkeypatch.setattr(gpu, "reasons_against", lambda *call: [])
    monkeypatch.setattr(gpu, "forward", forward)
    monkeypatch.setattr(gpu, "backward", backward)
    clear()
    yield seen
    clear()


def clear():
    """A plan that was made with the stand-in, or without, is for no other test."""
    calls._plan.cache_clear()
    dispatch._cached_first.cache_clear()


def half_call(half, precise):
    """A call in channels last and half precision, with offsets and masks in the dtype `precise`."""
    function, arrays, keywords, grad_output = call_of(CASE, "float32")
    last = torch.channels_last
    given = {
        "input": arrays["input"].to(half).contiguous(memory_format=last),
        "offset": arrays["offset"].to(precise),
        "weight": arrays["weight"].to(half).contiguous(memory_format=last),
        "bias": arrays["bias"].to(half),
        "mask": arrays["mask"].to(precise),
    }
    return function, given, keywords, grad_output.to(half).contiguous(memory_format=last)


def is_same(found, given):
    """Whether a tensor is another's memory, unconverted, and carries no graph."""
    return (
        found.data_ptr() == given.data_ptr()
        and found.dtype is given.dtype
        and found.stride() == given.stride()
        and not found.requires_grad
    )


@halves
@pytest.mark.parametrize("precise", [torch.float32, None], ids=["float32 offsets", "half offsets"])
def test_nothing_is_copied_or_cast_on_the_way_in_and_out(kernels, half, precise):
    function, given, keywords, grad_output = half_call(half, precise or half)
    tensors = {name: tensor.requires_grad_() for name, tensor in given.items()}
    kernels.output = torch.empty_like(grad_output)
    kernels.gradients = Gradients(**{name: torch.empty_like(tensor.detach()) for name, tensor in tensors.items()})
    output = function(**tensors, **keywords, backend="gpu")
    assert is_same(output.detach(), kernels.output)
    for name, found in zip(("input", "offset", "weight", "bias", "mask"), kernels.forward, strict=True):
        assert is_same(found, tensors[name].detach()), name
    gradients = torch.autograd.grad(output, [tensors[name] for name in GRADIENTS], grad_output)
    assert kernels.wanted == list(GRADIENTS)
    expected = (grad_output, *(tensors[name].detach() for name in ("input", "offset", "weight", "mask")))
    for found, tensor in zip(kernels.backward, expected, strict=True):
        assert is_same(found, tensor)
    for name, found in zip(GRADIENTS, gradients, strict=True):
        assert is_same(found, getattr(kernels.gradients, name)), name


@halves
def test_gradients_are_brought_to_their_tensors_dtype_and_format(kernels, half):
    """A kernel sums the gradients of offsets and masks in float32, also where they are in half precision."""
    function, given, keywords, grad_output = half_call(half, half)
    tensors = {name: tensor.requires_grad_() for name, tensor in given.items()}
    values = {name: torch.rand(tensor.shape) for name, tensor in tensors.items()}
    kernels.output = torch.empty_like(grad_output)
    kernels.gradients = Gradients(**values)
    function(**tensors, **keywords, backend="gpu").backward(grad_output)
    for name, tensor in tensors.items():
        assert tensor.grad.dtype is half
        assert torch.equal(tensor.grad, values[name].to(half)), name
        assert tensor.grad.stride() == tensor.stride(), name


@halves
def test_under_autocast_offsets_stay_float32(kernels, half):
    function, arrays, keywords, grad_output = call_of(CASE, "float32")
    kernels.output = grad_output.to(half)
    with torch.autocast("cpu", half):
        output = function(**arrays, **keywords, backend="gpu")
    assert output.dtype is half
    input, offset, weight, bias, mask = kernels.forward
    assert {tensor.dtype for tensor in (input, weight, bias)} == {half}
    assert is_same(offset, arrays["offset"]) and is_same(mask, arrays["mask"])


def test_a_named_backend_gets_second_derivatives_from_pytorch(kernels):
    """The derivatives of its gradients are the portable form's."""
    function, arrays, keywords, grad_output = call_of(CASE, requires_grad=True)
    tensors = [arrays[name] for name in GRADIENTS]

    def gradients(backend):
        return torch.autograd.grad(function(**arrays, **keywords, backend=backend), tensors, grad_output, create_graph=True)

    expected = gradients("cpu")
    kernels.output = torch.zeros_like(grad_output)
    kernels.gradients = Gradients(*(gradient.detach().clone() for gradient in expected))
    found = gradients("gpu")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in list(arrays.items())[1:]:
        ours, theirs = (
            torch.autograd.grad(each[0].square().sum(), tensor, allow_unused=True, retain_graph=True)[0]
            for each in (found, expected)
        )
        assert (ours is theirs is None) if name == "bias" else torch.allclose(ours, theirs), name


class TestTheCurrentDevice:
    """Kernels are launched on the current GPU, whichever the tensors are on."""

    def test_another_one_is_made_current(self, monkeypatch):
        made = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(made.append(device)))
        for index in (0, 1):
            with modes.on_device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))):
                pass
        assert made == [torch.device("cuda:1")]

    def test_nobody_is_asked_for_a_tensor_on_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was started"))
        with modes.on_device_of(torch.ones(2)):
            pass

    def test_it_is_so_within_the_kernels_of_both_directions(self, kernels, monkeypatch):
        asked, inside = [], []

        @contextmanager
        def on_device_of(tensor):
            asked.append(tensor.data_ptr())
            inside.append(True)
            yield
            inside.pop()

        def forward(spec, *operands):
            assert inside == [True]
            return torch.zeros(spec.output_shape)

        def backward(spec, *operands, wanted):
            assert inside == [True]
            return Gradients(input=torch.zeros(spec.input_shape))

        monkeypatch.setattr(modes, "on_device_of", on_device_of)
        monkeypatch.setattr(gpu, "forward", forward)
        monkeypatch.setattr(gpu, "backward", backward)
        x = torch.rand(1, 2, 5, 5, requires_grad=True)
        deform_conv2d(x, torch.zeros(1, 18, 3, 3), torch.rand(3, 2, 3, 3), backend="gpu").sum().backward()
        assert asked == [x.data_ptr()] * 2 and inside == []
        with torch.no_grad():
            deform_conv2d(x, torch.zeros(1, 18, 3, 3), torch.rand(3, 2, 3, 3), backend="cpu")
        assert len(asked) == 2  # NumPy's memory is on no GPU
