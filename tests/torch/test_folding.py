"""vmap becomes one call: of a larger batch, of more output channels or of more groups."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tests.ops.conv.cases import Case
from tests.tolerances import TOLERANCE, assert_close
from tests.torch.tensors import call_of
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from deformconv.ops.conv import cpu, portable
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import DeformConv2d, deform_conv2d

pytestmark = [
    # PyTorch's own scripts, used by its forward-mode rules.
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

CASE = Case("2-D", (4, 3), (2, 1), in_channels=4, out_channels=4, padding=1, groups=2, offset_groups=2)
B = 3
MAPPED = [flags for flags in product([False, True], repeat=5) if any(flags)]


def names_of(flags):
    return "+".join(name for name, flag in zip(GRADIENTS, flags, strict=True) if flag)


@pytest.fixture
def counted(monkeypatch, nothing_is_small):
    """How often the kernels run, and that the portable form does not."""
    calls = {"forward": 0, "backward": 0}
    forward, backward = cpu.forward, cpu.backward

    def count(name, function):
        def counting(*arguments, **keywords):
            calls[name] += 1
            return function(*arguments, **keywords)

        return counting

    monkeypatch.setattr(cpu, "forward", count("forward", forward))
    monkeypatch.setattr(cpu, "backward", count("backward", backward))
    monkeypatch.delattr(portable, "forward")
    return calls


def operands_of(flags, case=CASE, at=0):
    """Five tensors, those of the flags B times at an axis, and the function of the five."""
    function, _, keywords, _ = call_of(case)
    several = [list(call_of(case, seed=seed)[1].values()) for seed in range(B)]
    tensors = [torch.stack([one[i] for one in several], at) if flags[i] else several[0][i] for i in range(5)]

    def call(*tensors):
        return function(**dict(zip(GRADIENTS, tensors, strict=True)), **keywords)

    return call, tensors


def one_of(tensors, flags, index, at=0):
    return [t.select(at, index) if flag else t for t, flag in zip(tensors, flags, strict=True)]


@pytest.mark.parametrize("flags", MAPPED, ids=names_of)
def test_vmap_is_one_call(flags, counted):
    call, tensors = operands_of(flags)
    found = vmap(call, in_dims=tuple(0 if flag else None for flag in flags))(*tensors)
    assert counted == {"forward": 1, "backward": 0}
    for index in range(B):
        assert_close(found[index], call(*one_of(tensors, flags, index)), "float64")


@pytest.mark.parametrize("flags", MAPPED, ids=names_of)
def test_gradients_for_each_of_the_mapped(flags, counted):
    """As for the gradients of each image of a batch, which vmap(grad) is for."""
    call, tensors = operands_of(flags)

    def loss(*tensors):
        return call(*tensors).square().sum()

    gradients = grad(loss, argnums=tuple(range(5)))
    found = vmap(gradients, in_dims=tuple(0 if flag else None for flag in flags))(*tensors)
    assert counted == {"forward": 1, "backward": 1}
    for index in range(B):
        for name, ours, expected in zip(GRADIENTS, found, gradients(*one_of(tensors, flags, index)), strict=True):
            assert_close(ours[index], expected, "float64", name)


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_the_gradient_for_one_argument(wanted, counted):
    """jacrev maps over gradients of the output alone."""
    flags = (False,) * 5
    call, tensors = operands_of(flags, CASE.but(batch=1, size=(2, 2), padding=0))
    index = GRADIENTS.index(wanted)

    def of_one(tensor):
        return call(*tensors[:index], tensor, *tensors[index + 1 :])

    found = jacrev(of_one)(tensors[index])
    assert counted == {"forward": 1, "backward": int(wanted != "bias")}
    assert_close(found, torch.autograd.functional.jacobian(of_one, tensors[index]), "float64")


def test_any_axis_and_nested_maps():
    flags = (True, True, False, False, True)
    call, tensors = operands_of(flags, at=1)
    dims = tuple(1 if flag else None for flag in flags)
    found = vmap(call, in_dims=dims, out_dims=2)(*tensors)
    expected = torch.stack([call(*one_of(tensors, flags, i, at=1)) for i in range(B)], 2)
    assert_close(found, expected, "float64")

    weights = torch.stack([tensors[2], 2 * tensors[2]])
    nested = vmap(lambda w: vmap(call, in_dims=dims)(*tensors[:2], w, *tensors[3:]))(weights)
    for index, weight in enumerate(weights):
        assert_close(nested[index], vmap(call, in_dims=dims)(*tensors[:2], weight, *tensors[3:]), "float64")


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    flags = (True, True, True, True, True)
    call, tensors = operands_of(flags, CASE.but(size=(4, 3, 2)[:rank], kernel=(2, 1, 2)[:rank]))
    found = vmap(call)(*tensors)
    for index in range(B):
        assert_close(found[index], call(*one_of(tensors, flags, index)), "float64")


def test_vmap_of_the_registered_operator(counted):
    _, (x, offset, weight, bias, mask) = operands_of((True, True, False, False, True))
    parameters = ([1, 1], [1] * 4, [1, 1], 2, 2, "zeros", None)

    def call(x, offset, mask):
        return torch.ops.deformconv.deform_conv(x, offset, weight, bias, mask, *parameters)

    found = vmap(call)(x, offset, mask)
    assert counted == {"forward": 1, "backward": 0}
    for index in range(B):
        assert_close(found[index], call(x[index], offset[index], mask[index]), "float64")

    def gradients(g, x, offset, mask):
        flags = [True, False, True, True, False]
        return torch.ops.deformconv.deform_conv_backward(g, x, offset, weight, mask, *parameters, flags)

    several = vmap(gradients)(found, x, offset, mask)
    for index in range(B):
        for ours, expected in zip(several, gradients(found[index], x[index], offset[index], mask[index]), strict=True):
            assert_close(ours[index], expected, "float64")


@pytest.mark.usefixtures("float32_products")
def test_half_precision_is_rounded_once():
    flags = (True, False, False, True, False)
    call, tensors = operands_of(flags)
    tensors = [t.bfloat16() for t in tensors]
    found = vmap(call, in_dims=(0, None, None, 0, None))(*tensors)
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    for index in range(B):
        exact = call(*(t.double() for t in one_of(tensors, flags, index)))
        rounding = half_a_unit * exact.abs() + TOLERANCE["float32"] * exact.abs().max()
        assert found[index].dtype == torch.bfloat16
        assert ((found[index] - exact).abs() <= rounding).all()


def small():
    x, weight = torch.rand(1, 1, 4, 3).double(), torch.rand(1, 1, 2, 1).double()
    return x, torch.rand(1, 4, 3, 3).double() * 0.8 + 0.1, weight, torch.rand(1, 2, 3, 3).double()


@pytest.mark.slow
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_second_derivatives_by_all_modes(outer, inner):
    x, offset, weight, mask = small()

    def loss(x, offset, weight, mask):
        return deform_conv2d(x, offset, weight, mask=mask).square().sum()

    names = (0, 1, 2, 3)
    found = outer(inner(loss, argnums=names), argnums=names)(x, offset, weight, mask)
    expected = torch.autograd.functional.hessian(loss, (x, offset, weight, mask))
    for ours, theirs in zip(found, expected, strict=True):
        for mine, wanted in zip(ours, theirs, strict=True):
            assert_close(mine, wanted, "float64")


def test_hessian_and_third_derivatives():
    x, offset, weight, mask = small()

    def loss(offset):
        return deform_conv2d(x, offset, weight, mask=mask).pow(3).sum()

    expected = torch.autograd.functional.hessian(loss, offset)
    assert_close(hessian(loss)(offset), expected, "float64")
    vectorized = torch.autograd.functional.hessian(loss, offset, vectorize=True)
    assert_close(vectorized, expected, "float64")
    third = grad(lambda o: grad(lambda o: grad(loss)(o).square().sum())(o).sum())(offset)
    direction = torch.randn_like(offset)
    step = 1e-6 * direction

    def second(o):
        return grad(lambda o: grad(loss)(o).square().sum())(o).sum()

    slope = (second(offset + step) - second(offset - step)) / 2e-6
    torch.testing.assert_close((third * direction).sum(), slope, rtol=1e-6, atol=1e-6)


def test_vjp_and_jvp_are_adjoint():
    function, arrays, keywords, _ = call_of(CASE)
    tensors = tuple(arrays.values())

    def call(*tensors):
        return function(**dict(zip(GRADIENTS, tensors, strict=True)), **keywords)

    directions = tuple(torch.randn_like(t) for t in tensors)
    y, tangent = jvp(call, tensors, directions)
    _, pull_back = vjp(call, *tensors)
    cotangent = torch.randn_like(y)
    forward = (tangent * cotangent).sum()
    backward = sum((g * d).sum() for g, d in zip(pull_back(cotangent), directions, strict=True))
    assert_close(forward, backward, "float64")
    assert tangent.any()


def test_gradients_of_each_image_for_a_layers_parameters():
    torch.manual_seed(0)
    layer = DeformConv2d(3, 4, 3, padding=1).double()
    torch.nn.init.normal_(layer.offset_conv.weight, std=0.3)
    parameters = dict(layer.named_parameters())
    images = torch.rand(5, 3, 6, 6).double()

    def loss(parameters, image):
        return functional_call(layer, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for (name, _), wanted in zip(parameters.items(), expected, strict=True):
            assert_close(found[name][index].detach(), wanted, "float64", name)


def test_an_ensemble_of_layers():
    """Weights that differ, images that do not: functional_call under vmap."""
    layers = [DeformConv2d(2, 3, 3, padding=1).double() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.rand(2, 2, 5, 5).double()
    found = vmap(lambda p: functional_call(layers[0], p, (x,)))(parameters)
    for ours, layer in zip(found, layers, strict=True):
        assert_close(ours.detach(), layer(x).detach(), "float64")


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian", "jacrev", "per image"])
def test_transforms_within_a_compiled_function(transform):
    """They work or raise, and never return zeros."""
    torch._dynamo.reset()
    x, offset, weight, mask = small()

    def call(offset):
        return deform_conv2d(x, offset, weight, mask=mask)

    def loss(offset):
        return call(offset).square().sum()

    functions = {
        "grad": grad(loss),
        "jvp": lambda o: jvp(call, (o,), (torch.ones_like(o),))[1],
        "vmap": lambda o: vmap(call)(torch.stack([o, 2 * o])),
        "hessian": hessian(loss),
        "jacrev": jacrev(call),
        "per image": lambda o: vmap(grad(loss))(torch.stack([o, 2 * o])),
    }
    function = functions[transform]
    found = torch.compile(lambda o: function(o), backend="aot_eager", fullgraph=True)(offset)
    assert_close(found, function(offset), "float64")
    torch._dynamo.reset()


# For dual numbers Dynamo gives up the graph and compiles the portable form's functions one by one.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual"])
def test_transforms_of_a_compiled_function(transform):
    torch._dynamo.reset()
    x, offset, weight, mask = small()

    def call(offset):
        return deform_conv2d(x, offset, weight, mask=mask)

    compiled = torch.compile(call, backend="aot_eager")

    def dual(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(offset, torch.ones_like(offset)))).tangent

    transforms = {
        "dual": dual,
        "grad": lambda f: grad(lambda o: f(o).sum())(offset),
        "jvp": lambda f: jvp(f, (offset,), (torch.ones_like(offset),))[1],
        "vmap": lambda f: vmap(f)(torch.stack([offset, 2 * offset])),
    }
    assert_close(transforms[transform](compiled), transforms[transform](call), "float64")
    torch._dynamo.reset()


def test_double_backward_of_a_compiled_function_raises():
    """PyTorch's own limit."""
    torch._dynamo.reset()
    x, offset, weight, mask = small()
    offset.requires_grad_()
    compiled = torch.compile(lambda o: deform_conv2d(x, o, weight, mask=mask), backend="aot_eager")
    first = torch.autograd.grad(compiled(offset).square().sum(), offset, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.sum(), offset)
    torch._dynamo.reset()


@pytest.mark.parametrize("create_graph", [False, True])
def test_many_gradients_of_one_output(counted, create_graph):
    """autograd's own vmap: is_grads_batched, and jacobian(vectorize=True)."""
    call, tensors = operands_of((False,) * 5)
    tensors = [t.requires_grad_() for t in tensors]
    y = call(*tensors)
    cotangents = torch.randn(B, *y.shape, dtype=torch.float64)
    options = {"retain_graph": True, "create_graph": create_graph}
    found = torch.autograd.grad(y, tensors, cotangents, is_grads_batched=True, **options)
    assert counted == {"forward": 1, "backward": 1}
    for index in range(B):
        expected = torch.autograd.grad(y, tensors, cotangents[index], retain_graph=True)
        for name, ours, theirs in zip(GRADIENTS, found, expected, strict=True):
            assert_close(ours[index].detach(), theirs, "float64", name)
