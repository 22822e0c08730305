"""Half precision: read and written, computed in float32, rounded once; beside float32 offsets, autocast, a GradScaler."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.ops.conv.cases import CASES
from tests.tolerances import TOLERANCE, assert_close, error
from tests.torch.tensors import PLAIN, call_of
from torch import nn

import deformconv
from deformconv import BackendError
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, deform_conv2d

# As on every processor but those that multiply bfloat16: the last bits are others there.
pytestmark = pytest.mark.usefixtures("float32_products")

HALF = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("half", HALF, ids=str)
COARSE = ("input", "weight", "bias")


def half_call(half, mixed, case=PLAIN):
    """A call in half precision, the same numbers in float32, and a gradient of the output."""
    function, arrays, keywords, grad_output = call_of(case, "float32", requires_grad=True)
    coarse = {
        name: None if t is None else t.detach().to(half if not mixed or name in COARSE else t.dtype).requires_grad_()
        for name, t in arrays.items()
    }
    whole = {name: None if t is None else t.detach().float().requires_grad_() for name, t in coarse.items()}
    return function, coarse, whole, keywords, grad_output.to(half)


@pytest.mark.parametrize("mixed", [False, True], ids=["half", "mixed"])
@pytest.mark.parametrize("case", [case for case in CASES if case.batch == 2], ids=lambda case: case.name)
@halves
def test_results_are_those_of_float32_rounded_once(case, half, mixed):
    function, coarse, whole, keywords, grad_output = half_call(half, mixed, case)
    y, expected = function(**coarse, **keywords), function(**whole, **keywords)
    assert y.dtype == half
    assert torch.equal(y, expected.to(half))
    y.backward(grad_output)
    expected.backward(grad_output.float())
    for name in GRADIENTS:
        if coarse[name] is not None:
            assert coarse[name].grad.dtype == coarse[name].dtype
            assert torch.equal(coarse[name].grad, whole[name].grad.to(coarse[name].dtype)), name


@halves
def test_it_is_near_float64(half):
    function, coarse, _, keywords, _ = half_call(half, mixed=True)
    exact = function(**{name: t.detach().double() for name, t in coarse.items()}, **keywords)
    assert_close(function(**coarse, **keywords).detach().double(), exact, str(half).removeprefix("torch."))


@halves
def test_explain_says_so(half):
    _, coarse, _, keywords, _ = half_call(half, mixed=True)
    lines = deformconv.explain(**coarse, **keywords).splitlines()
    name = str(half).removeprefix("torch.")
    assert lines[0].endswith(f"; {name}, torch on cpu")
    assert lines[1] == "forward: cpu"
    assert lines.count(f"  cpu: it reads and writes {name}, and computes in float32") == 2


@halves
def test_it_is_converted_by_no_pass_over_memory(half, monkeypatch):
    """Neither of the arguments nor of the results, but for offsets and masks in half precision."""
    function, coarse, _, keywords, grad_output = half_call(half, mixed=True)
    monkeypatch.setattr(torch.Tensor, "to", lambda *_: pytest.fail("converted"))
    monkeypatch.setattr(torch.Tensor, "float", lambda *_: pytest.fail("converted"))
    monkeypatch.setattr("deformconv.runtime.arrays.narrowed", lambda *_: pytest.fail("converted"))
    function(**coarse, **keywords).backward(grad_output)
    assert all(coarse[name].grad.dtype == coarse[name].dtype for name in GRADIENTS)


@halves
@pytest.mark.parametrize("form", ["channels last", "sliced", "without a bias", "v1", "read-only"])
def test_the_memory_of_arguments_does_not_matter(half, form):
    function, coarse, _, keywords, grad_output = half_call(half, mixed=True)
    arrays = {name: t.detach() for name, t in coarse.items()}
    if form in ("without a bias", "v1"):
        arrays["bias" if form == "without a bias" else "mask"] = None
    changes = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
        "sliced": lambda t: torch.stack([t, t], dim=-1)[..., 0],
        "read-only": lambda t: t.expand(1, *t.shape)[0],
    }
    changed = {name: t if t is None or form not in changes else changes[form](t) for name, t in arrays.items()}
    changed = {name: None if t is None else t.requires_grad_() for name, t in changed.items()}
    whole = {name: None if t is None else t.detach().float().requires_grad_() for name, t in arrays.items()}
    y, expected = function(**changed, **keywords), function(**whole, **keywords)
    assert torch.equal(y, expected.to(half))
    y.backward(grad_output)
    expected.backward(grad_output.float())
    for name in GRADIENTS:
        if arrays[name] is not None:
            assert torch.equal(changed[name].grad, whole[name].grad.to(changed[name].dtype)), name


@halves
def test_odd_numbers(half):
    """Subnormal numbers, infinities, NaN and zeros of both signs are what they are in float32, rounded."""
    tiny, largest = torch.finfo(half).smallest_normal / 4, torch.finfo(half).max
    numbers = [tiny, -tiny, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), largest, -largest, 1.0]
    x = torch.tensor(numbers).to(half).reshape(1, 1, 1, -1)
    for factor in (1.0, -0.5, 3.0, 0.0):
        weight, offset = torch.full((1, 1, 1, 1), factor).to(half), torch.zeros(1, 2, 1, len(numbers))
        y = deform_conv2d(x, offset, weight)
        expected = deform_conv2d(x.float(), offset, weight.float()).to(half)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))
        assert torch.equal(y.nan_to_num(0.0).signbit(), expected.nan_to_num(0.0).signbit())


@halves
@pytest.mark.parametrize("padding", [0, 1])
def test_zero_offsets_give_the_plain_convolution(half, padding):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 19, 12, 13).to(half), torch.randn(21, 19, 3, 3).to(half), torch.randn(21).to(half)
    rows, columns = 10 + 2 * padding, 11 + 2 * padding
    offset, mask = torch.zeros(2, 18, rows, columns), torch.ones(2, 9, rows, columns)
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    y = deform_conv2d(x, offset, weight, bias, padding=padding, mask=mask)
    # One rounding of the result, and what sums in float32 lose, relative to the largest.
    bound = torch.finfo(half).eps / 2 * exact.abs() + TOLERANCE["float32"] * exact.abs().max()
    assert ((y.double() - exact).abs() <= bound).all()
    plain = nn.functional.conv2d(x, weight, bias, padding=padding).double()
    assert error(y.double(), exact) <= max(error(plain, exact), torch.finfo(half).eps / 2)


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@halves
def test_by_every_backend(half, backend):
    function, coarse, whole, keywords, grad_output = half_call(half, mixed=True)
    y = function(**coarse, **keywords, backend=backend)
    y.backward(grad_output)
    expected = function(**whole, **keywords)
    expected.backward(grad_output.float())
    name = str(half).removeprefix("torch.")
    assert_close(y.detach().float(), expected.detach(), name)
    for argument in GRADIENTS:
        assert_close(coarse[argument].grad.float(), whole[argument].grad, name, argument)


@halves
def test_the_gain_of_float32_offsets(half):
    """bfloat16 knows an offset of 20 to 0.125 pixels, and puts 20.06 at 20: on a slope that is seen."""
    x = torch.arange(32.0).expand(1, 1, 8, 32)[..., :24]
    weight, offset = torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 8, 24)
    offset[:, 1] = -16.06
    exact = deform_conv2d(x, offset, weight)[..., 18:]
    fine = deform_conv2d(x.to(half), offset, weight.to(half))[..., 18:]
    coarse = deform_conv2d(x.to(half), offset.to(half), weight.to(half))[..., 18:]
    assert (fine - exact).abs().max() <= exact.max() * torch.finfo(half).eps / 2
    assert (coarse - exact).abs().max() <= 0.0625
    assert (half is torch.bfloat16) == ((coarse - exact).abs().min() > 0.03)


@halves
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("weight", torch.float32), ("bias", torch.float32), ("offset", torch.float64), ("mask", torch.float64)],
)
def test_other_mixes_raise(half, name, dtype):
    function, coarse, _, keywords, _ = half_call(half, mixed=True)
    other, given = str(dtype).removeprefix("torch."), str(half).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"`{name}` is {other} and `input` is {given}; expected one dtype"):
        function(**coarse | {name: coarse[name].detach().to(dtype)}, **keywords)


def test_two_kinds_of_half_raise():
    function, coarse, _, keywords, _ = half_call(torch.float16, mixed=False)
    with pytest.raises(TypeError, match="`offset` is bfloat16 and `input` is float16; expected one dtype"):
        function(**coarse | {"offset": coarse["offset"].detach().bfloat16()}, **keywords)


def test_half_offsets_beside_float32_raise():
    function, arrays, keywords, _ = call_of(dtype="float32")
    with pytest.raises(TypeError, match="`offset` is bfloat16 and `input` is float32; expected one dtype"):
        function(**arrays | {"offset": arrays["offset"].bfloat16()}, **keywords)


def test_the_reference_stays_out():
    function, coarse, _, keywords, _ = half_call(torch.float16, mixed=False)
    with pytest.raises(BackendError, match="it takes NumPy arrays"):
        function(**coarse, **keywords, backend="reference")


@halves
def test_second_derivatives(half):
    function, coarse, whole, keywords, _ = half_call(half, mixed=True)

    def second(arrays):
        y = function(**arrays, **keywords).float()
        first = torch.autograd.grad(y.square().sum(), [arrays[name] for name in GRADIENTS], create_graph=True)
        return torch.autograd.grad(sum(g.float().sum() for g in first), arrays["weight"])[0]

    found, expected = second(coarse), second(whole)
    assert found.dtype == half
    assert error(found.float(), expected) < 10 * TOLERANCE[str(half).removeprefix("torch.")]


class TestAutocast:
    @halves
    def test_the_function_does_as_a_convolution(self, half):
        """Input, weight and bias in half precision; offsets and masks in float32."""
        function, arrays, keywords, _ = call_of(dtype="float32", requires_grad=True)
        with torch.autocast("cpu", dtype=half):
            y = function(**arrays, **keywords)
            assert y.dtype == nn.functional.conv2d(arrays["input"], arrays["weight"]).dtype == half
            z = function(**arrays | {"offset": arrays["offset"].to(half)}, **keywords)
        assert z.dtype == half
        cast = {name: t.detach().to(half) if name in COARSE else t.detach() for name, t in arrays.items()}
        assert torch.equal(y, function(**cast, **keywords))
        y.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in arrays.values())

    def test_float64_is_left_alone(self):
        function, arrays, keywords, _ = call_of()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(**arrays, **keywords)
        assert torch.equal(y, function(**arrays, **keywords))

    def test_of_another_device_does_nothing(self):
        function, arrays, keywords, _ = call_of(dtype="float32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, where there is no such device
            with torch.autocast("cuda", dtype=torch.float16):
                y = function(**arrays, **keywords)
        assert y.dtype == torch.float32

    @halves
    @pytest.mark.parametrize("backend", ["cpu", "portable"])
    def test_derivatives_within_it(self, half, backend):
        """Autocast does not reach the operations that the portable form is made of."""
        function, arrays, keywords, _ = call_of(dtype="float64", requires_grad=True)

        def second():
            y = function(**arrays, **keywords, backend=backend)
            first = torch.autograd.grad(y.square().sum(), arrays["weight"], create_graph=True)[0]
            return y, first, torch.autograd.grad(first.sum(), arrays["offset"])[0]

        expected = second()
        with torch.autocast("cpu", dtype=half):
            found = second()
        if backend == "cpu":
            assert all(map(torch.equal, found[:2], expected[:2]))  # the last is PyTorch's derivative of a derivative
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.dtype == torch.float64
            assert_close(ours.detach(), wanted.detach(), "float64")

    @pytest.mark.parametrize("layer", [DeformConv1d, DeformConv2d, DeformConv3d])
    @halves
    def test_layers_predict_in_float32(self, layer, half):
        torch.manual_seed(0)
        net = layer(4, 6, 3, padding=1)
        nn.init.normal_(net.offset_conv.weight, std=0.3)
        x = torch.rand(2, 4, *(7, 6, 5)[: net.rank])
        offset, mask = net.offsets_and_mask(x)
        expected = net(x)
        seen = []
        net.offset_conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with torch.autocast("cpu", dtype=half):
            for image in (x, x.to(half)):
                y = net(image)
                assert y.dtype == half
                assert_close(y.float().detach(), expected.detach(), "bfloat16")
            found = net.offsets_and_mask(x)
        assert set(seen) == {torch.float32}
        for ours, wanted in zip(found, (offset, mask), strict=True):
            assert_close(ours.detach(), wanted.detach(), "float32")
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())

    def test_compiled(self):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = DeformConv2d(4, 6, 3, padding=1)
        nn.init.normal_(net.offset_conv.weight, std=0.3)
        x = torch.rand(2, 4, 7, 6)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = compiled(x), net(x)
        assert found.dtype == torch.bfloat16
        assert_close(found.detach().float(), expected.detach().float(), "bfloat16")
        torch._dynamo.reset()


@halves
def test_layers_in_half_precision_predict_in_float32(half):
    torch.manual_seed(0)
    net = DeformConv2d(4, 6, 3, padding=1)
    nn.init.normal_(net.offset_conv.weight, std=0.3)
    net.to(half)
    x = torch.rand(2, 4, 7, 6).to(half)
    offset, mask = net.offsets_and_mask(x)
    assert offset.dtype == mask.dtype == torch.float32
    y = net(x)
    assert y.dtype == half
    y.float().square().mean().backward()
    assert all(p.grad.dtype == half for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_a_grad_scaler_trains_and_skips_what_overflows():
    torch.manual_seed(0)
    net = nn.Sequential(DeformConv2d(3, 8, 3, padding=1), nn.ReLU(), DeformConv2d(8, 1, 3, padding=1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    x = torch.rand(4, 3, 8, 8)
    target = x.mean(1, keepdim=True)
    losses, scales = [], []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(net(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] == 2.0**39  # the first gradients overflowed and were left out
    assert losses[0] == pytest.approx(losses[1])
    assert losses[-1] < losses[0] / 3
