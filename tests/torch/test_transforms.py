"""Whatever wraps tensors or traces calls: the right result or an error, never a wrong one."""

from __future__ import annotations

import pytest
import torch
from tests.tolerances import assert_close
from tests.torch.tensors import call_of
from torch.autograd import forward_ad

from deformconv import BackendError
from deformconv.torch import DeformConv2d, deform_conv2d

# PyTorch's own forward-mode rules are scripted when first used, and scripting is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


@pytest.fixture
def call():
    """deform_conv2d by its offset alone, an offset, and a direction to move it in."""
    function, arrays, keywords, _ = call_of(away_from_kinks=True)
    offset = arrays.pop("offset")
    direction = torch.randn(offset.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return lambda o, **more: function(offset=o, **arrays, **keywords, **more), offset, direction


def directional(call, offset, direction, step=1e-6):
    return (call(offset + step * direction) - call(offset - step * direction)) / (2 * step)


def test_jvp(call):
    function, offset, direction = call
    y, tangent = torch.func.jvp(function, (offset,), (direction,))
    assert_close(y, function(offset), "float64")
    torch.testing.assert_close(tangent, directional(*call), rtol=1e-6, atol=1e-6)


def test_dual_numbers(call):
    function, offset, direction = call
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(offset, direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, directional(*call), rtol=1e-6, atol=1e-6)


def test_func_grad_and_vjp(call):
    function, offset, _ = call
    expected = torch.autograd.grad(function(offset.requires_grad_()).sum(), offset)[0]
    offset = offset.detach()
    assert_close(torch.func.grad(lambda o: function(o).sum())(offset), expected, "float64")
    y, pull_back = torch.func.vjp(function, offset)
    assert_close(pull_back(torch.ones_like(y))[0], expected, "float64")


def test_hessian():
    weight = torch.rand(1, 1, 2, 1, dtype=torch.float64)
    x = torch.rand(1, 1, 4, 3, dtype=torch.float64)
    offset = torch.rand(1, 4, 3, 3, dtype=torch.float64) * 0.8 + 0.1

    def loss(offset):
        return (deform_conv2d(x, offset, weight) ** 2).sum()

    expected = torch.autograd.functional.hessian(loss, offset)
    assert_close(torch.func.hessian(loss)(offset), expected, "float64")
    vectorized = torch.autograd.functional.hessian(loss, offset, vectorize=True)
    assert_close(vectorized, expected, "float64")


def test_vmap():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 2, 3, 6, 6, generator=generator)
    offset = torch.randn(5, 2, 18, 6, 6, generator=generator)
    weight = torch.rand(4, 3, 3, 3, generator=generator)

    def one(x, offset):
        return deform_conv2d(x, offset, weight, padding=1)

    expected = torch.stack([one(a, b) for a, b in zip(x, offset, strict=True)])
    assert_close(torch.func.vmap(one)(x, offset), expected, "float32")


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("how", ["jvp", "dual"])
def test_a_named_kernel_raises_where_it_has_no_derivative(call, how, backend):
    function, offset, direction = call

    def named(o):
        return function(o, backend=backend)

    with pytest.raises(BackendError, match=rf'backend="{backend}" cannot run under forward-mode differentiation.* "portable"'):
        if how == "jvp":
            torch.func.jvp(named, (offset,), (direction,))
        else:
            with forward_ad.dual_level():
                named(forward_ad.make_dual(offset, direction))


def test_a_named_kernel_runs_under_other_transforms(call):
    function, offset, _ = call
    expected = torch.func.grad(lambda o: function(o).sum())(offset)
    assert torch.equal(torch.func.grad(lambda o: function(o, backend="cpu").sum())(offset), expected)
    assert torch.equal(torch.func.vmap(lambda o: function(o, backend="cpu"))(offset[None])[0], function(offset))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = torch.nn.Sequential(DeformConv2d(2, 4, 3, padding=1), torch.nn.ReLU(), DeformConv2d(4, 3, 3))
    for layer in net[::2]:
        torch.nn.init.normal_(layer.offset_conv.weight, std=0.3)
    return net.double()


X = torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_fx_records_one_call(net):
    traced = torch.fx.symbolic_trace(net)
    assert_close(traced(X).detach(), net(X).detach(), "float64")
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert sum(node.target is deform_conv2d for node in calls) == 2


def test_fx_of_a_layer_by_itself():
    """Its forward asks whether it was given offsets, which a tracer must be told: docs/pytorch.md says how."""
    layer = DeformConv2d(3, 4, 3, padding=1)
    x = torch.rand(2, 3, 6, 5)
    traced = torch.fx.symbolic_trace(layer, concrete_args={"offset": None, "mask": None})
    assert torch.equal(traced(x), layer(x))


def test_functional_call(net):
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    assert not torch.func.functional_call(net, zeros, (X,)).any()


def test_dispatch_modes(net):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        y = net(X)
    assert_close(y.detach(), net(X).detach(), "float64")
    assert counter.get_total_flops() > 0


class Named(torch.Tensor):
    """A subclass of no further interest."""


def test_subclasses_stay_what_they_are():
    function, arrays, keywords, _ = call_of()
    expected = function(**arrays, **keywords)
    y = function(**arrays | {"input": arrays["input"].as_subclass(Named)}, **keywords)
    assert type(y) is Named
    assert torch.equal(y.as_subclass(torch.Tensor), expected)


def test_subclasses_that_see_operations_see_one():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    function, arrays, keywords, _ = call_of()
    x = arrays.pop("input")
    both = two_tensor.TwoTensor(x, 2 * x).requires_grad_()
    y = function(both, **arrays, **keywords)
    assert torch.equal(y.a, function(x, **arrays, **keywords))
    assert torch.equal(y.b, function(2 * x, **arrays, **keywords))
    y.sum().backward()
    assert type(both.grad) is two_tensor.TwoTensor


# torch.func.linearize's own.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")
def test_linearize_and_the_older_jvp(call):
    function, offset, direction = call
    expected = torch.func.jvp(function, (offset,), (direction,))[1]
    assert_close(torch.func.linearize(function, offset)[1](direction), expected, "float64")
    assert_close(torch.autograd.functional.jvp(function, offset, direction)[1], expected, "float64")


class Recorder:
    """Takes PyTorch functions for itself, as __torch_function__ allows."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function, args, kwargs


def test_torch_function_is_honoured():
    _, arrays, _, _ = call_of()
    recorder = Recorder()
    function, arguments, keywords = deform_conv2d(
        recorder, arrays["offset"], arrays["weight"], padding=1, groups=1, boundary="inside"
    )
    assert function is deform_conv2d
    assert arguments[0] is recorder
    assert arguments[5] == 1
    assert keywords == {"groups": 1, "offset_groups": None, "boundary": "inside", "backend": None}
