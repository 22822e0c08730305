"""Our kernels under torchvision's operator: the same numbers for everybody who calls it, and torchvision's own after."""

from __future__ import annotations

import doctest
import sys

import pytest

torch = pytest.importorskip("torch")

import torchvision  # noqa: E402
from tests.ops.conv.cases import CASES  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402
from tests.torch.tensors import call_of  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.ops import deform_conv2d  # noqa: E402  bound before anything is put under it

from deformconv import dispatch  # noqa: E402
from deformconv.convert import accelerate_torchvision, torchvision_kernels  # noqa: E402
from deformconv.convert import torchvision as convert  # noqa: E402
from deformconv.ops.conv import cpu, gpu, portable  # noqa: E402
from deformconv.torch import native  # noqa: E402
from deformconv.torch.conv.functional import DEFORM_CONV  # noqa: E402

PARITY = [
    case
    for case in CASES
    if len(case.size) == 2 and case.boundary == "zeros" and case.batch and isinstance(case.padding, (int, tuple))
    and not any(isinstance(part, tuple) for part in (case.padding if isinstance(case.padding, tuple) else ()))
]  # fmt: skip


def test_doctests():
    result = doctest.testmod(convert)
    assert result.failed == 0
    assert result.attempted > 5


@pytest.fixture
def counted(monkeypatch):
    """How often our kernels ran, forward and backward."""
    calls = {"forward": 0, "backward": 0}
    for name in calls:
        function = getattr(cpu, name)

        def counting(*arguments, name=name, function=function, **keywords):
            calls[name] += 1
            return function(*arguments, **keywords)

        monkeypatch.setattr(cpu, name, counting)
    return calls


def results(case, dtype="float64"):
    _, arrays, _, grad_output = call_of(case, dtype, requires_grad=True)
    names = ("input", "offset", "weight", "bias")
    y = deform_conv2d(*(arrays[name] for name in names), case.stride, case.padding, case.dilation, arrays["mask"])
    given = [t for t in arrays.values() if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, grad_output)]


@pytest.mark.parametrize("case", PARITY, ids=lambda case: case.name)
def test_forward_and_backward(case, counted):
    expected = results(case)
    assert counted == {"forward": 0, "backward": 0}
    with accelerate_torchvision():
        found = results(case)
    assert counted == {"forward": 1, "backward": 1}
    again = results(case)
    assert counted == {"forward": 1, "backward": 1}
    for ours, theirs, afterwards in zip(found, expected, again, strict=True):
        assert_close(ours, theirs, "float64")
        assert_close(afterwards, theirs, "float64")


def test_several_at_once_and_undo_twice(counted):
    first, second = accelerate_torchvision(), accelerate_torchvision()
    first.undo()
    first.undo()
    results(PARITY[0])
    assert counted["forward"] == 1
    second.undo()
    results(PARITY[0])
    assert counted["forward"] == 1
    with pytest.raises(ZeroDivisionError), accelerate_torchvision():
        raise ZeroDivisionError
    results(PARITY[0])
    assert counted["forward"] == 1


def test_a_second_with_begins_it_again(counted):
    acceleration = accelerate_torchvision()
    for times in (1, 2):
        with acceleration:
            results(PARITY[0])
        assert counted["forward"] == times
        results(PARITY[0])
        assert counted["forward"] == times


class Doubled(torchvision.ops.DeformConv2d):
    """Code of somebody else."""

    def forward(self, input, offset, mask=None):
        return 2 * super().forward(input, offset, mask)


def test_a_model_one_cannot_edit_trains(counted):
    torch.manual_seed(0)
    model = Doubled(3, 4, 3, padding=1)
    x, offset = torch.rand(2, 3, 6, 6), torch.randn(2, 18, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with accelerate_torchvision():
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(x, offset).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert counted == {"forward": 20, "backward": 20}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compile", "export", "trace", "vmap", "autocast"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_works_with_torchvisions_operator_works_on(how, counted):
    x, offset = torch.rand(2, 3, 6, 6), torch.randn(2, 18, 6, 6)
    layer = torchvision.ops.DeformConv2d(3, 4, 3, padding=1)
    expected = layer(x, offset).detach()
    torch._dynamo.reset()
    with accelerate_torchvision():
        if how == "compile":
            found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, offset)
        elif how == "export":
            found = torch.export.export(layer, (x, offset)).module()(x, offset)
        elif how == "trace":
            found = torch.jit.trace(layer, (x, offset))(x, offset)
        elif how == "vmap":
            one = torch.vmap(lambda x, o: deform_conv2d(x, o, layer.weight, layer.bias, padding=1))
            found = one(x[:, None], offset[:, None])[:, 0]
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = layer(x, offset)
    assert counted["forward"] >= 1
    assert_close(found.detach(), expected, "float32")
    torch._dynamo.reset()


def test_double_backward_is_refused_as_by_torchvision():
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    with accelerate_torchvision():
        y = deform_conv2d(x, torch.zeros(1, 2, 4, 4), torch.rand(1, 1, 1, 1))
        first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="double backwards on deform_conv2d not supported"):
            first.sum().backward()


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    text = "accelerate_torchvision needs torchvision, which is not installed: pip install torchvision$"
    with pytest.raises(ModuleNotFoundError, match=text):
        accelerate_torchvision()


class TestOnGpus:
    """The kernels for GPUs, called by PyTorch's dispatcher with tensors of the CPU: there need be no GPU."""

    x, offset, mask = torch.rand(2, 3, 6, 6), torch.randn(2, 18, 6, 6), torch.rand(2, 9, 6, 6)
    weight, bias, grad = torch.rand(4, 3, 3, 3), torch.rand(4), torch.rand(2, 4, 6, 6)
    parameters = (1, 1, 1, 1, 1, 1, 1, 1, True)

    @pytest.fixture(autouse=True)
    def fresh(self):
        dispatch._cached_first.cache_clear()
        yield
        dispatch._cached_first.cache_clear()

    @pytest.fixture
    def kernels(self, monkeypatch):
        """Stand-ins for our GPU kernels, and how often they ran."""
        calls = []

        def forward(spec, *operands):
            calls.append("forward")
            return portable.forward(spec, *operands)

        def backward(spec, grad_output, *operands, wanted):
            calls.append("backward")
            return native.backward(DEFORM_CONV.operator, spec, grad_output, operands, wanted, portable.forward)

        monkeypatch.setattr(gpu, "reasons_against", lambda *call: [])
        monkeypatch.setattr(gpu, "forward", forward)
        monkeypatch.setattr(gpu, "backward", backward)
        return calls

    def forward(self, key, mask=None):
        op = torch.ops.torchvision.deform_conv2d.default
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        given = self.mask if mask is None else mask
        return op.redispatch(keys, self.x, self.weight, self.offset, given, self.bias, *self.parameters)

    def backward(self, key):
        op = torch.ops.torchvision._deform_conv2d_backward.default
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        return op.redispatch(keys, self.grad, self.x, self.weight, self.offset, self.mask, self.bias, *self.parameters)

    @pytest.fixture
    def torchvisions_own(self):
        """For what needs a torchvision for GPUs: what its kernel says to tensors of the CPU."""
        if not torchvision_kernels._is_there("deform_conv2d", "CUDA") or "CUDA" not in torchvision_kernels.dispatch_keys():
            pytest.skip("needs PyTorch 2.9 and a torchvision with kernels for GPUs")
        return pytest.raises(RuntimeError, match="must be a CUDA tensor")

    def test_ours_run(self, kernels):
        if "CUDA" not in torchvision_kernels.dispatch_keys():
            pytest.skip("needs PyTorch 2.9")
        expected = self.forward("CPU"), *self.backward("CPU")
        with accelerate_torchvision():
            found = self.forward("CUDA"), *self.backward("CUDA")
        assert kernels == ["forward", "backward"]
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, "float32")

    def test_torchvisions_own_comes_back(self, kernels, torchvisions_own):
        with accelerate_torchvision():
            self.forward("CUDA")
        with torchvisions_own:
            self.forward("CUDA")

    def test_what_ours_cannot_run_is_torchvisions(self, monkeypatch, torchvisions_own):
        """PyTorch's operations, which take such calls elsewhere, are slower than it."""
        monkeypatch.setattr(gpu, "reasons_against", lambda *call: ["no Triton"])
        monkeypatch.setattr(portable, "forward", lambda *call: pytest.fail("PyTorch's operations ran"))
        with accelerate_torchvision(), torchvisions_own:
            self.forward("CUDA")

    def test_in_both_directions(self, monkeypatch):
        monkeypatch.setattr(gpu, "reasons_against", lambda *call: ["no Triton"])
        monkeypatch.setattr(torchvision_kernels, "_is_there", lambda name, key: True)
        monkeypatch.setattr(torchvision_kernels, "_kernel_of", lambda *which: lambda error, *call: (which, str(error), call))
        arguments = ("keys", self.x, self.weight, self.offset, self.mask, self.bias, *self.parameters)
        ours = torchvision_kernels.kernels("CUDA")
        for name, call in (("deform_conv2d", arguments), ("_deform_conv2d_backward", ("keys", self.grad, *arguments[1:]))):
            which, why, given = ours[name](*call)
            assert which == (name, "CUDA") and all(a is b for a, b in zip(given, call, strict=True))
            assert 'backend="gpu" cannot run this call' in why and "\n  gpu: no Triton\n" in why

    def test_what_ours_refuse_is_torchvisions(self, kernels, torchvisions_own):
        with accelerate_torchvision(), torchvisions_own:
            self.forward("CUDA", self.mask[:, :2])
        assert kernels == []

    def test_beside_a_torchvision_for_cpus_alone(self, monkeypatch):
        monkeypatch.setattr(torchvision_kernels, "_is_there", lambda name, key: key == "CPU")
        monkeypatch.setattr(gpu, "reasons_against", lambda *call: ["no Triton"])
        monkeypatch.setattr(cpu, "reasons_against", lambda *call: ["it is on a GPU"])
        expected = self.forward("CPU")
        ours = torchvision_kernels.kernels("CUDA")
        arguments = (self.x, self.weight, self.offset, self.mask, self.bias, *self.parameters)
        assert_close(ours["deform_conv2d"](None, *arguments), expected, "float32")
        assert len(ours["_deform_conv2d_backward"](None, self.grad, *arguments)) == 5
        with pytest.raises(RuntimeError, match="`mask` has 2 channels"):
            ours["deform_conv2d"](None, *arguments[:3], self.mask[:, :2], *arguments[4:])

    def test_pytorch_that_cannot_hand_on_keeps_its_own(self, monkeypatch):
        monkeypatch.delattr(torch.library, "get_kernel", raising=False)
        assert torchvision_kernels.dispatch_keys() == ("CPU",)


class TestTorchvisionsExpectations:
    """What torchvision's own tests ask of its operator."""

    def arguments(self, batch=10, dtype=torch.float64):
        torch.manual_seed(0)
        x = torch.rand(batch, 6, 5, 4, dtype=dtype)
        offset = torch.randn(batch, 3 * 2 * 3 * 2, 5, 5, dtype=dtype)
        mask = torch.randn(batch, 3 * 3 * 2, 5, 5, dtype=dtype)
        layer = torchvision.ops.DeformConv2d(6, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2)
        layer = layer.to(dtype)
        size = nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, 2).shape[2:]
        return layer, x, offset[..., : size[0], : size[1]].contiguous(), mask[..., : size[0], : size[1]].contiguous()

    @pytest.mark.parametrize("contiguous", [True, False])
    @pytest.mark.parametrize("batch", [0, 1, 33])
    def test_forward_and_contiguity(self, batch, contiguous):
        layer, x, offset, mask = self.arguments(batch)
        if not contiguous:
            x, offset, mask = (t.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2) for t in (x, offset, mask))
        for arguments in ((x, offset), (x, offset, mask)):
            with accelerate_torchvision():
                found = layer(*arguments)
            assert_close(found.detach(), layer(*arguments).detach(), "float64")

    @pytest.mark.parametrize("masked", [False, True])
    def test_backward_by_finite_differences(self, masked):
        layer, x, offset, mask = self.arguments(batch=2)
        offset = offset.floor() + 0.1 + 0.8 * torch.rand_like(offset)
        tensors = [t.requires_grad_() for t in (x, offset, layer.weight, layer.bias, mask)]

        def call(x, offset, weight, bias, mask):
            window = layer.stride, layer.padding, layer.dilation
            return deform_conv2d(x, offset, weight, bias, *window, mask=mask if masked else None)

        with accelerate_torchvision():
            assert torch.autograd.gradcheck(call, tensors, nondet_tol=0, fast_mode=True)

    def test_wrong_sizes(self):
        layer, x, offset, mask = self.arguments()
        with accelerate_torchvision():
            with pytest.raises(RuntimeError, match="the shape of the offset"):
                layer(x, torch.rand_like(offset[:, :2]))
            # PyTorch before 2.9 does not hand on to torchvision's own kernel, and the text is ours.
            theirs = hasattr(torch.library, "get_kernel")
            with pytest.raises(RuntimeError, match=r"mask.shape\[1\] is not valid" if theirs else "`mask` has 2 channels"):
                layer(x, offset, torch.rand_like(mask[:, :2]))

    def test_other_dtypes_go_to_ours(self, counted):
        layer, x, offset, _ = self.arguments(dtype=torch.float32)
        with accelerate_torchvision():
            found = layer.bfloat16()(x.bfloat16(), offset.bfloat16())
        assert found.dtype == torch.bfloat16
        assert counted["forward"] == 1

    def test_a_nan_does_not_crash(self):
        layer, x, offset, _ = self.arguments()
        offset[0, :2, 0, 0] = torch.nan
        with accelerate_torchvision():
            y = layer(x, offset)
        assert y[0, :, 0, 0].isnan().any()
        assert not y[1:].isnan().any()
