"""Off the CPU the portable form runs within the same Function, part by part: forced here on the CPU, and on meta."""

from __future__ import annotations

import pytest
import torch
from tests.ops.conv.cases import CASES, Case
from tests.tolerances import assert_close
from tests.torch.tensors import call_of

import deformconv
from deformconv.ops.conv import portable
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.ops.taps import portable as taps
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, deform_conv2d


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 300, 1 << 24])
@pytest.mark.parametrize("case", [case for case in CASES if case.batch in (0, 2)], ids=lambda case: case.name)
def test_parts_make_the_whole(case, chunk, monkeypatch):
    """Parts as small as a row of one image, some images, and all at once."""
    function, arrays, keywords, grad_output = call_of(case, requires_grad=True)
    given = [t for t in arrays.values() if t is not None]

    def results(backend):
        y = function(**arrays, **keywords, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, given, grad_output)]

    expected = results("cpu")
    monkeypatch.setattr(taps, "CHUNK", chunk)
    for found, wanted in zip(results("portable"), expected, strict=True):
        assert_close(found, wanted, "float64")


def test_the_parts_cover_the_output_once(monkeypatch):
    for case in CASES:
        spec = portable_spec(case)
        for chunk in (1, 100, 1000, 1 << 24):
            monkeypatch.setattr(taps, "CHUNK", chunk)
            seen = torch.zeros(spec.batch, spec.output_size[0], dtype=torch.int)
            for images, rows, part in portable.parts(spec):
                seen[images, rows] += 1
                assert part.batch == len(range(spec.batch)[images])
                assert part.output_size[0] == len(range(spec.output_size[0])[rows])
                samples = part.batch * part.positions * spec.taps * spec.in_channels
                row = samples // (part.batch * part.output_size[0])
                assert samples <= max(chunk, spec.in_channels * spec.pixels, row)
            assert (seen == 1).all()


def portable_spec(case):
    from tests.ops.conv.cases import make

    return make(case).spec


def test_second_derivatives_in_parts(monkeypatch):
    function, arrays, keywords, _ = call_of(Case("", (5, 4), (2, 2), batch=5, groups=2), requires_grad=True)
    tensors = list(arrays.values())

    def second():
        first = torch.autograd.grad(function(**arrays, **keywords).pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    expected = second()
    monkeypatch.setattr(taps, "CHUNK", 1)
    for found, wanted in zip(second(), expected, strict=True):
        assert_close(found, wanted, "float64")


def test_memory_is_bounded(monkeypatch):
    """The most that is alive at once, forward and backward, does not grow with the batch beyond the results."""
    monkeypatch.setattr(taps, "CHUNK", 1 << 14)

    def peak(batch):
        x, offset = torch.rand(batch, 8, 16, 16), torch.zeros(batch, 18, 16, 16)
        weight = torch.rand(8, 8, 3, 3, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            deform_conv2d(x, offset, weight, padding=1, backend="portable").sum().backward()
        sizes, total, most = [event.nbytes() for event in memory_events(profile)], 0, 0
        for size in sizes:
            total += size
            most = max(most, total)
        return most

    one, eight = peak(1), peak(8)
    output = 8 * 16 * 16 * 4
    assert eight - one < 7 * 4 * output


def memory_events(profile):
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=lambda case: case.name)
def test_the_meta_device(case):
    function, arrays, keywords, _ = call_of(case, requires_grad=True)
    elsewhere = {name: None if t is None else t.detach().to("meta").requires_grad_() for name, t in arrays.items()}
    y = function(**elsewhere, **keywords)
    assert y.is_meta
    assert y.shape == function(**arrays, **keywords).shape
    assert type(y.grad_fn).__name__ == "DeformConvFunctionBackward"
    y.sum().backward()
    for name in GRADIENTS:
        if elsewhere[name] is not None:
            assert elsewhere[name].grad.shape == arrays[name].shape


@pytest.mark.parametrize("layer", [DeformConv1d, DeformConv2d, DeformConv3d])
def test_layers_on_the_meta_device(layer):
    net = layer(4, 6, 3, padding=1, device="meta", dtype=torch.bfloat16)
    x = torch.rand(2, 4, *(7, 6, 5)[: net.rank], device="meta", dtype=torch.bfloat16)
    y = net(x)
    assert y.is_meta
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())
    last = net(x.contiguous(memory_format=torch.channels_last)) if net.rank == 2 else None
    assert last is None or last.is_contiguous(memory_format=torch.channels_last)


def test_compiled_for_another_device(monkeypatch):
    """The registered operators' kernel off the CPU, forced: within it PyTorch differentiates the portable form."""
    torch._dynamo.reset()
    monkeypatch.setattr(taps, "CHUNK", 100)
    function, arrays, keywords, grad_output = call_of(requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    tensors = [arrays[name] for name in GRADIENTS]
    y, expected = (f(**arrays, **keywords, backend="portable") for f in (compiled, function))
    assert_close(y.detach(), expected.detach(), "float64")
    found, wanted = (torch.autograd.grad(result, tensors, grad_output) for result in (y, expected))
    for name, ours, theirs in zip(GRADIENTS, found, wanted, strict=True):
        assert_close(ours, theirs, "float64", name)
    torch._dynamo.reset()


def test_explain_says_how_and_why():
    x, offset = torch.rand(4, 256, 200, 200, device="meta"), torch.rand(4, 18, 200, 200, device="meta")
    lines = deformconv.explain(x, offset, torch.rand(256, 256, 3, 3, device="meta"), padding=1).splitlines()
    how = "  portable: PyTorch's own operations compute the call in 24 parts, one after the other, so that memory stays bounded"
    cpu = "  cpu: its kernels run on the CPU and the arrays are on meta"
    gpu = "  gpu: its kernels run on GPUs of NVIDIA and AMD and the arrays are on meta"
    assert lines[1:5] == ["forward: portable", how, cpu, gpu]
    x, offset = torch.rand(1, 2, 5, 5), torch.rand(1, 18, 5, 5)
    text = deformconv.explain(x, offset, torch.rand(2, 2, 3, 3), padding=1, backend="portable")
    assert "  portable: PyTorch's own operations compute the call at once" in text
