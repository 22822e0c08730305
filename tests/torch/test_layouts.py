"""Memory formats, strides and inputs without a batch."""

from __future__ import annotations

import pytest
import torch
from tests.ops.conv.cases import Case
from tests.tolerances import assert_close
from tests.torch.tensors import FUNCTIONS, call_of
from torch import nn

from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, deform_conv2d

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FORMS = {
    2: Case("2-D", (6, 5), (3, 3), padding=1, groups=2, offset_groups=2),
    3: Case("3-D", (4, 3, 5), (2, 2, 2), padding=1),
}
by_rank = pytest.mark.parametrize("rank", [2, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "portable"])
@by_rank
def test_channels_last_in_channels_last_out(rank, backend, dtype):
    form = LAST[rank]
    function, arrays, keywords, grad_output = call_of(FORMS[rank])
    arrays = {name: t.to(dtype) for name, t in arrays.items()}
    grad_output = grad_output.to(dtype)
    plain = {name: t.clone().requires_grad_() for name, t in arrays.items()}
    last = dict(plain) | {
        name: arrays[name].contiguous(memory_format=form).requires_grad_() for name in ("input", "offset", "weight", "mask")
    }
    y = function(**last, **keywords, backend=backend)
    expected = function(**plain, **keywords, backend=backend)
    assert y.is_contiguous(memory_format=form)
    assert expected.is_contiguous()
    assert_close(y.detach().double(), expected.detach().double(), str(dtype).removeprefix("torch."))
    found = torch.autograd.grad(y, list(last.values()), grad_output.contiguous(memory_format=form))
    wanted = torch.autograd.grad(expected, list(plain.values()), grad_output)
    for name, ours, theirs in zip(last, found, wanted, strict=True):
        assert_close(ours.double(), theirs.double(), str(dtype).removeprefix("torch."), name)
        assert theirs.is_contiguous()
        if name in ("input", "weight"):
            assert ours.is_contiguous(memory_format=form)


@by_rank
def test_only_the_inputs_format_counts(rank):
    function, arrays, keywords, _ = call_of(FORMS[rank])
    weight = arrays["weight"].contiguous(memory_format=LAST[rank])
    assert function(**arrays | {"weight": weight}, **keywords).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 4, 1, 1), (1, 1, 1, 1)], ids=str)
def test_shapes_whose_format_is_ambiguous_follow_convolution(shape):
    weight = torch.rand(4, shape[1], 1, 1)
    offset = torch.zeros(shape[0], 2, *shape[2:])
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(shape).contiguous(memory_format=form)
        ours, theirs = deform_conv2d(x, offset, weight), nn.functional.conv2d(x, weight)
        assert ours.shape == theirs.shape
        assert ours.is_contiguous(memory_format=form) or not theirs.is_contiguous(memory_format=form)


@by_rank
def test_a_net_in_channels_last(rank):
    torch.manual_seed(0)
    layer = (DeformConv2d, DeformConv3d)[rank - 2]
    net = nn.Sequential(layer(3, 8, 3, padding=1), nn.ReLU(), layer(8, 4, 3, padding=1))
    for part in net[::2]:
        nn.init.normal_(part.offset_conv.weight, std=0.3)
    x = torch.rand(2, 3, *(6, 5, 7)[:rank])
    expected = net(x)
    net.to(memory_format=LAST[rank])
    y = net(x.contiguous(memory_format=LAST[rank]))
    assert y.is_contiguous(memory_format=LAST[rank])
    assert_close(y.detach(), expected.detach(), "float32")
    y.sum().backward()
    assert all(p.grad.is_contiguous(memory_format=LAST[rank]) for p in net.parameters() if p.ndim == rank + 2)


def test_compiled_strides_are_the_eager_ones():
    torch._dynamo.reset()
    compiled = torch.compile(deform_conv2d, backend="aot_eager", fullgraph=True)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(2, 4, 6, 5).contiguous(memory_format=form)
        arguments = x, torch.randn(2, 18, 6, 5), torch.rand(3, 4, 3, 3), None, 1, 1
        assert compiled(*arguments).stride() == deform_conv2d(*arguments).stride()
    torch._dynamo.reset()


def expanded(t):
    return t[:1].expand(t.shape)


FORMS_OF_MEMORY = {
    "expanded batch": expanded,
    "one number": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape) if t.numel() else t,
    "permuted": lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    "every other": lambda t: t.repeat_interleave(2, 0)[::2],
    "part of a larger one": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("form", FORMS_OF_MEMORY)
@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_strides_do_not_matter(name, backend, form):
    function, arrays, keywords, grad_output = call_of(FORMS[2])
    odd = FORMS_OF_MEMORY[form](arrays[name])
    results = []
    for tensor in (odd, odd.clone(memory_format=torch.contiguous_format)):
        given = {k: (tensor if k == name else t).detach().requires_grad_() for k, t in arrays.items()}
        y = function(**given, **keywords, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, list(given.values()), grad_output)])
    for ours, expected in zip(*results, strict=True):
        if backend == "cpu":
            assert torch.equal(ours, expected)
        else:  # PyTorch's product may sum in another order
            assert_close(ours, expected, "float64")


class TestWithoutABatch:
    """As nn.ConvNd: (C, *S) in, (C, *O) out."""

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_functions(self, rank, masked):
        case = Case("", (6, 5, 4)[:rank], (3, 2, 2)[:rank], batch=1, masked=masked, padding=1)
        _, arrays, keywords, grad_output = call_of(case, requires_grad=True)
        expected = FUNCTIONS[rank](**arrays, **keywords)
        names = ("input", "offset", "mask")
        one = {name: t[0] if t is not None and name in names else t for name, t in arrays.items()}
        y = FUNCTIONS[rank](**one, **keywords)
        assert torch.equal(y, expected[0])
        given = [t for t in arrays.values() if t is not None]
        found = torch.autograd.grad(y, given, grad_output[0])
        for ours, theirs in zip(found, torch.autograd.grad(expected, given, grad_output), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        "how", [{}, {"padding": 1}, {"padding": ((0, 1), (2, 1))}, {"padding": 1, "padding_mode": "reflect"}]
    )
    @pytest.mark.parametrize("modulated", [False, True])
    def test_layers(self, how, modulated):
        torch.manual_seed(0)
        layer = DeformConv2d(4, 3, 3, modulated=modulated, offset_groups=2, **how)
        nn.init.normal_(layer.offset_conv.weight, std=0.3)
        x = torch.rand(4, 7, 6)
        y = layer(x)
        assert y.shape == layer(x[None])[0].shape
        assert_close(y.detach(), layer(x[None])[0].detach(), "float32")
        assert_close(layer(x, *layer.offsets_and_mask(x)).detach(), y.detach(), "float32")

    @pytest.mark.parametrize("layer", [DeformConv1d, DeformConv3d])
    def test_layers_of_other_ranks(self, layer):
        net = layer(4, 3, 3, padding=1)
        x = torch.rand(4, *(7, 6, 5)[: net.rank])
        assert_close(net(x).detach(), net(x[None])[0].detach(), "float32")

    def test_transforms(self):
        layer = DeformConv2d(4, 3, 3, padding=1).double()
        images = torch.rand(5, 4, 7, 6).double()
        assert_close(torch.func.vmap(layer)(images).detach(), layer(images).detach(), "float64")
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(images[0]), layer(images[0]))
        exported = torch.export.export(layer, (images[0],)).module()
        assert torch.equal(exported(images[1]), layer(images[1]))

    def test_the_public_gradients(self):
        import deformconv

        x, offset, weight = torch.rand(3, 5, 5), torch.rand(2, 5, 5), torch.rand(4, 3, 1, 1)
        y = deformconv.deform_conv(x, offset, weight)
        found = deformconv.deform_conv_backward(y, x, offset, weight)
        batched = deformconv.deform_conv_backward(y[None], x[None], offset[None], weight)
        assert torch.equal(found.input, batched.input[0])
        assert torch.equal(found.offset, batched.offset[0])
        assert torch.equal(found.weight, batched.weight)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(parametrization):
    torch.manual_seed(0)
    layer = DeformConv2d(4, 3, 3, padding=1)
    nn.init.normal_(layer.offset_conv.weight, std=0.3)
    getattr(nn.utils.parametrizations, parametrization)(layer)
    layer.eval()  # spectral_norm changes with every access in training
    x = torch.rand(2, 4, 6, 5)
    y = layer(x)
    offset, mask = layer.offsets_and_mask(x)
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=mask)
    assert_close(y.detach(), expected.detach(), "float32")
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert_close(layer(x).detach(), y.detach(), "float32")


@pytest.mark.parametrize("last", [False, True])
def test_whatever_strides_a_kernel_returns(last, monkeypatch):
    """A kernel may return views of the other memory format; what leaves has the input's."""
    from deformconv.ops.conv import cpu
    from deformconv.ops.conv.spec import Gradients

    def turned(array):
        if array is None or array.ndim < 4:
            return array
        return array.copy() if last else array.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)

    forward, backward = cpu.forward, cpu.backward
    function, arrays, keywords, grad_output = call_of(FORMS[2])
    form = torch.channels_last if last else torch.contiguous_format
    tensors = {
        name: (t.contiguous(memory_format=form) if name in ("input", "weight") else t).requires_grad_()
        for name, t in arrays.items()
    }

    def results():
        y = function(**tensors, **keywords)
        return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), grad_output)]

    expected = results()
    monkeypatch.setattr(cpu, "forward", lambda *a, **k: turned(forward(*a, **k)))
    monkeypatch.setattr(cpu, "backward", lambda *a, **k: Gradients(*map(turned, backward(*a, **k))))
    for found, wanted in zip(results(), expected, strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()
