"""Derivatives of the functions: right, only where they are asked for, and from any thread."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import product

import pytest
import torch
from tests.ops.conv.cases import Case
from tests.tolerances import assert_close
from tests.torch.tensors import call_of
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import deformconv
from deformconv.ops.conv import cpu
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import native

SMALL = {
    1: Case("1-D", (5,), (3,), in_channels=2, out_channels=2, padding=1, offset_groups=2),
    2: Case("2-D", (3, 3), (2, 1), in_channels=2, out_channels=2, stride=(2, 1), padding=1, groups=2),
    3: Case("3-D", (2, 3, 2), (1, 2, 2), batch=1, in_channels=2, out_channels=1),
}


def function_of(case, **how):
    """The call as a function of its tensors, and these."""
    function, arrays, keywords, grad_output = call_of(case, requires_grad=True, **how)
    names = [name for name in GRADIENTS if arrays[name] is not None]

    def call(*tensors):
        return function(**arrays | dict(zip(names, tensors, strict=True)), **keywords)

    return call, [arrays[name] for name in names], grad_output


@pytest.mark.parametrize("boundary", ["zeros", "inside"])
@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradcheck(rank, masked, boundary):
    case = SMALL[rank].but(masked=masked, boundary=boundary)
    call, tensors, _ = function_of(case, away_from_kinks=True)
    assert gradcheck(call, tensors)


# PyTorch's own scripts, used by its forward-mode rules.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("boundary", ["zeros", "inside"])
@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_forward_mode(rank, masked, boundary):
    """And forward mode over gradients."""
    call, tensors, _ = function_of(SMALL[rank].but(masked=masked, boundary=boundary), away_from_kinks=True)
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, tensors, check_backward_ad=False, fast_mode=True, **forward)
    assert gradgradcheck(call, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradcheck_of_batched_gradients(rank):
    call, tensors, _ = function_of(SMALL[rank], away_from_kinks=True)
    assert gradcheck(call, tensors, check_batched_grad=True)


@pytest.mark.parametrize("boundary", ["zeros", "inside"])
@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_can_be_differentiated(rank, masked, boundary):
    case = SMALL[rank].but(masked=masked, boundary=boundary, biased=False)
    call, tensors, _ = function_of(case, away_from_kinks=True)
    assert gradgradcheck(call, tensors)


def test_a_graph_of_gradients_does_not_change_them():
    call, tensors, grad_output = function_of(SMALL[2])
    plain = torch.autograd.grad(call(*tensors), tensors, grad_output)
    with_graph = torch.autograd.grad(call(*tensors), tensors, grad_output, create_graph=True)
    assert all(map(torch.equal, with_graph, plain))


SUBSETS = [
    tuple(name for name, needed in zip(GRADIENTS, bits, strict=True) if needed) for bits in product([False, True], repeat=5)
]


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda needed: "+".join(needed) or "none")
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    asked, real = [], cpu.backward

    def spy(spec, grad_output, input, offset, weight, mask, wanted, library):
        asked.append(tuple(wanted))
        return real(spec, grad_output, input, offset, weight, mask, wanted, library)

    call, tensors, grad_output = function_of(SMALL[2])
    whole = torch.autograd.grad(call(*tensors), tensors, grad_output)
    monkeypatch.setattr(cpu, "backward", spy)
    for name, tensor in zip(GRADIENTS, tensors, strict=True):
        tensor.requires_grad_(name in needed)
    y = call(*tensors)
    assert y.requires_grad == bool(needed)
    if needed:
        y.backward(grad_output)
        assert asked == [needed]
    for name, tensor, expected in zip(GRADIENTS, tensors, whole, strict=True):
        assert (tensor.grad is not None) == (name in needed)
        if name in needed:
            assert_close(tensor.grad, expected, "float64", name)


@pytest.mark.parametrize(
    "grad_output",
    [
        lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
        lambda g: g.repeat_interleave(2, -1)[..., ::2],
        lambda g: g.contiguous(memory_format=torch.channels_last),
        lambda g: torch.complex(g, -g).conj().imag,
    ],
    ids=["transposed", "every other element", "channels last", "negative bit"],
)
def test_any_memory_of_grad_output(grad_output):
    call, tensors, plain = function_of(SMALL[2])
    expected = torch.autograd.grad(call(*tensors), tensors, plain)
    odd = grad_output(plain)
    assert torch.equal(odd, plain)
    for found, wanted in zip(torch.autograd.grad(call(*tensors), tensors, odd), expected, strict=True):
        assert_close(found, wanted, "float64")


def test_expanded_grad_output():
    """The gradient of a sum is one number seen everywhere, with strides of 0."""
    call, tensors, plain = function_of(SMALL[2])
    expected = torch.autograd.grad(call(*tensors), tensors, torch.ones_like(plain))
    for found, wanted in zip(torch.autograd.grad(call(*tensors).sum(), tensors), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask"])
def test_changing_a_saved_tensor_is_noticed(name):
    call, tensors, _ = function_of(SMALL[2])
    copies = [tensor.clone() for tensor in tensors]
    y = call(*copies)
    with torch.no_grad():
        copies[GRADIENTS.index(name)].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_retain_graph():
    call, tensors, grad_output = function_of(SMALL[2])
    y = call(*tensors)
    first = torch.autograd.grad(y, tensors, grad_output, retain_graph=True)
    second = torch.autograd.grad(y, tensors, grad_output)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, tensors, grad_output)


def test_nothing_but_the_inputs_is_saved():
    call, tensors, _ = function_of(SMALL[2])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(*tensors)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in tensors}
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None


def test_views_and_shared_inputs():
    """One tensor as two arguments, through views: their gradients add up."""
    base = torch.rand(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 2, 1, 1, dtype=torch.float64)

    def call(base):
        return deformconv.deform_conv(base[:, :2] * 2, base[:, 2:] + 0.25, weight)

    assert gradcheck(call, [base])
    same = torch.rand(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: deformconv.deform_conv(t, t, weight), [same])


def test_checkpointing():
    call, tensors, grad_output = function_of(SMALL[2])
    expected = torch.autograd.grad(call(*tensors), tensors, grad_output)
    for reentrant in (False, True):
        for tensor in tensors:
            tensor.grad = None
        checkpoint(call, *tensors, use_reentrant=reentrant).backward(grad_output)
        assert all(torch.equal(t.grad, wanted) for t, wanted in zip(tensors, expected, strict=True))


def test_anomaly_mode():
    call, tensors, grad_output = function_of(SMALL[2])
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        call(*tensors).backward(grad_output)
    assert tensors[0].grad is not None


def test_one_backward_over_graphs_of_several_threads():
    """Forward in eight threads, one backward for all."""
    call, tensors, grad_output = function_of(SMALL[2])
    expected = torch.autograd.grad(call(*tensors), tensors, grad_output)
    outputs: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: outputs.__setitem__(n, call(*tensors))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.stack([outputs[n] for n in range(8)]).sum(0).backward(grad_output)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert_close(tensor.grad, 8 * wanted, "float64")


def test_an_error_in_backward_reaches_the_caller(monkeypatch):
    def broken(*arguments, **keywords):
        raise MemoryError("no room for d_input")

    call, tensors, _ = function_of(SMALL[2])
    y = call(*tensors)
    monkeypatch.setattr(cpu, "backward", broken)
    with pytest.raises(MemoryError, match="no room for d_input"):
        y.sum().backward()


def test_the_public_gradients_are_differentiable_where_a_tensor_requires_it():
    _, tensors, grad_output = function_of(SMALL[1])

    def second(offset):
        arguments = [tensors[0], offset, *tensors[2:4], 1, 1, 1, tensors[4]]
        gradients = deformconv.deform_conv_backward(grad_output, *arguments, offset_groups=2)
        return gradients.weight

    offset = (tensors[1].detach().floor() + 0.3).requires_grad_()
    assert gradcheck(second, [offset])
    with torch.no_grad():
        assert not second(offset).requires_grad


def test_empty_batches():
    case = SMALL[2].but(batch=0)
    call, tensors, grad_output = function_of(case)
    y = call(*tensors)
    y.backward(grad_output)
    assert y.shape[0] == 0
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_derivatives_of_gradients_cost_nothing_until_they_are_computed(monkeypatch):
    """A graph of gradients is computed by the kernels as well; their derivative is the portable form's."""
    calls, real = [], native.backward
    monkeypatch.setattr(native, "backward", lambda *a: calls.append(1) or real(*a))
    call, tensors, grad_output = function_of(SMALL[2])
    torch.autograd.grad(call(*tensors), tensors, grad_output)
    gradients = torch.autograd.grad(call(*tensors), tensors, grad_output, create_graph=True)
    assert not calls
    torch.autograd.grad(sum(g.sum() for g in gradients[:3]), tensors[0])
    assert calls
