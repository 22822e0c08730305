"""Deformable aggregation on PyTorch tensors: every derivative, every way that PyTorch calls it, and the error texts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from tests.ops.aggregate.cases import ARGUMENTS, CASES, Case, make
from tests.ops.aggregate.suite import expected_gradients, expected_output
from tests.tolerances import assert_close
from tests.torch.tensors import tensors
from tests.torch.test_layouts import FORMS_OF_MEMORY, LAST
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import deformconv
from deformconv import dispatch
from deformconv.ops.aggregate import cpu
from deformconv.ops.aggregate.operator import DEFORM_AGGREGATE as OPERATOR
from deformconv.torch import deform_aggregate1d, deform_aggregate2d, deform_aggregate3d
from deformconv.torch.aggregate import DEFORM_AGGREGATE

SMALL = Case("torch", (4, 5), (3, 2), padding=1, offset_groups=2)
BY_RANK = {1: SMALL.but(size=(6,), kernel=(3,)), 2: SMALL, 3: SMALL.but(size=(3, 2, 3), kernel=(2, 1, 2), batch=1)}
FUNCTIONS = {1: deform_aggregate1d, 2: deform_aggregate2d, 3: deform_aggregate3d}
by_backend = pytest.mark.parametrize("backend", ["cpu", "portable"])
by_rank = pytest.mark.parametrize("rank", [1, 2, 3])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),  # PyTorch's own scripts, used by its forward-mode rules
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # opcheck looks at the .grad of what is no leaf
]


def given(case: Case = SMALL, dtype: str = "float64", requires_grad: bool = False, **how: Any) -> list[Any]:
    """A case's tensors; None for a mask that it has not."""
    return list(tensors(make(case, dtype, **how), requires_grad, ARGUMENTS).values())


def there(operands: Any) -> list[Any]:
    return [tensor for tensor in operands if tensor is not None]


def window(case: Case) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "offset_groups", "boundary")
    return {"kernel_size": case.kernel, **{name: getattr(case, name) for name in names}}


def aggregate(*operands: Any, case: Case = SMALL, **others: Any) -> Any:
    return FUNCTIONS[len(case.size)](*operands, **window(case), **others)


def gradients(operands: Any, **how: Any) -> list[Any]:
    """Of the sum of the squares."""
    return list(torch.autograd.grad(aggregate(*operands, **how).square().sum(), there(operands)))


@by_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: Case, backend: str) -> None:
    operands, grad_output = given(case, requires_grad=True), torch.from_numpy(make(case).grad_output)
    output = aggregate(*operands, case=case, backend=backend)
    assert_close(output.detach(), expected_output(case, "float64"), "float64")
    output.backward(grad_output)
    expected = expected_gradients(case, "float64")
    for name, tensor in zip(ARGUMENTS, operands, strict=True):
        if tensor is not None:
            assert_close(tensor.grad, getattr(expected, name), "float64", name)


@by_rank
@pytest.mark.parametrize("masked", [True, False])
def test_derivatives_of_first_and_second_order(rank: int, masked: bool) -> None:
    size = {1: (3,), 2: (2, 2), 3: (2, 1, 2)}[rank]
    case = BY_RANK[rank].but(batch=1, channels=2, size=size, kernel=(2, 1, 1)[:rank], padding=0, masked=masked)
    operands = given(case, requires_grad=True, away_from_kinks=True)

    def run(*some: Any) -> Any:
        return aggregate(*some, *[None] * (not masked), case=case)

    assert torch.autograd.gradcheck(run, there(operands))
    assert torch.autograd.gradgradcheck(run, there(operands))


def test_the_root_takes_tensors() -> None:
    operands = given()
    expected = aggregate(*operands)
    assert torch.equal(deformconv.deform_aggregate(*operands, **window(SMALL)), expected)
    grad_output = torch.rand_like(expected)
    found = deformconv.deform_aggregate_backward(grad_output, *operands, **window(SMALL))
    arrays = [tensor.numpy() for tensor in (grad_output, *operands)]
    for ours, theirs in zip(found, deformconv.deform_aggregate_backward(*arrays, **window(SMALL)), strict=True):
        assert np.array_equal(ours.numpy(), theirs)
    one = deformconv.deform_aggregate_backward(grad_output, *operands, **window(SMALL), wanted="mask")
    assert one.input is one.offset is None and torch.equal(one.mask, found.mask)


def test_what_needs_no_gradient_gets_none() -> None:
    for needed in ((0,), (1, 2), (2,)):
        operands = [tensor.requires_grad_(number in needed) for number, tensor in enumerate(given())]
        aggregate(*operands).sum().backward()
        assert [number for number, tensor in enumerate(operands) if tensor.grad is not None] == [*needed]


def test_opcheck() -> None:
    for case in (SMALL, BY_RANK[3].but(masked=False)):
        spec = make(case).spec
        parameters = (*map(list, OPERATOR.pack(spec)[:4]), *OPERATOR.pack(spec)[4:])
        torch.library.opcheck(DEFORM_AGGREGATE.forward_op, (*given(case, requires_grad=True), *parameters, None))
        grad_output = torch.rand(spec.output_shape, dtype=torch.float64)
        for wanted in ([True, True, case.masked], [False, True, False]):
            torch.library.opcheck(DEFORM_AGGREGATE.backward_op, (grad_output, *given(case), *parameters, None, wanted))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend: str, last: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: aggregate(*t).sin(), backend=backend, fullgraph=True)
    operands = [t.contiguous(memory_format=LAST[2]) if last else t for t in given()]
    operands = [t.requires_grad_() for t in operands]
    found, expected = compiled(*operands), aggregate(*operands).sin()
    assert torch.allclose(found, expected, atol=1e-14) and found.stride() == expected.stride()
    pairs = (torch.autograd.grad(y.sum(), operands) for y in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert torch.allclose(one, other, atol=1e-14) and one.stride() == other.stride()
    torch._dynamo.reset()


class Net(torch.nn.Module):
    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.case = BY_RANK[rank]

    def forward(self, *operands: Any) -> Any:
        return aggregate(*operands, case=self.case).sin()


@by_rank
def test_export_of_any_size(rank: int) -> None:
    operands, any_size = tuple(given(BY_RANK[rank].but(batch=2))), torch.export.Dim.DYNAMIC
    sizes = {axis: any_size for axis in range(rank + 2) if axis != 1}
    program = torch.export.export(Net(rank), operands, dynamic_shapes={"operands": (sizes,) * 3})
    larger = given(BY_RANK[rank].but(batch=3, size=(8, 7, 6)[:rank]))
    assert torch.equal(program.module()(*larger), Net(rank)(*larger))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_and_symbols() -> None:
    operands, larger = tuple(given()), given(SMALL.but(batch=3, size=(7, 6)))
    for traced in (torch.jit.trace(Net(), operands), make_fx(Net(), tracing_mode="symbolic")(*operands)):  # type: ignore[no-untyped-call]
        assert torch.equal(traced(*larger), Net()(*larger))
    recorded = torch.fx.symbolic_trace(torch.nn.Sequential(Recorded()))
    assert torch.equal(recorded(operands[0]), Recorded()(operands[0]))
    assert any(node.target is deform_aggregate2d for node in recorded.graph.nodes)


class Recorded(torch.nn.Module):
    """Whose offsets it has itself, for a tracer that hands stand-ins."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", given()[1])

    def forward(self, x: Any) -> Any:
        return aggregate(x, self.offset, case=SMALL)


MAPPED = [flags for flags in product([False, True], repeat=3) if any(flags)]


@pytest.mark.parametrize("flags", MAPPED, ids=lambda flags: "".join("-+"[flag] for flag in flags))
def test_vmap_is_one_call(flags: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a larger batch, whatever is mapped; so are the gradients of each."""
    several = [given(seed=seed) for seed in range(3)]
    operands = [torch.stack([one[i] for one in several], i) if flag else several[0][i] for i, flag in enumerate(flags)]
    dims = tuple(i if flag else None for i, flag in enumerate(flags))
    one_by_one = [[t.select(i, b) if flags[i] else t for i, t in enumerate(operands)] for b in range(3)]

    def loss(*some: Any) -> Any:
        return aggregate(*some).square().sum()

    each = torch.func.grad(loss, (0, 1, 2))
    outputs, expected = [aggregate(*some) for some in one_by_one], [each(*some) for some in one_by_one]
    calls: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: calls.append(name) or function(*arguments, **keywords)

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, counting(name, getattr(cpu, name)))
    assert torch.equal(torch.func.vmap(aggregate, in_dims=dims)(*operands), torch.stack(outputs))
    assert calls == ["forward"]
    for number, gradient in enumerate(torch.func.vmap(each, in_dims=dims)(*operands)):
        assert_close(gradient, torch.stack([gradients[number] for gradients in expected]), "float64")
    assert calls == ["forward", "forward", "backward"]


def test_transforms() -> None:
    case = SMALL.but(batch=1, channels=2, size=(2, 2), kernel=(2, 1))
    x, offset, mask = given(case, away_from_kinks=True)

    def run(offset: Any) -> Any:
        return aggregate(x, offset, mask, case=case)

    expected = torch.autograd.functional.jacobian(run, offset)
    assert torch.allclose(torch.func.jacrev(run)(offset), expected)
    assert torch.allclose(torch.func.jacfwd(run)(offset), expected)
    direction = torch.rand_like(offset)
    along = (expected * direction).sum(tuple(range(-offset.ndim, 0)))
    assert torch.allclose(torch.func.jvp(run, (offset,), (direction,))[1], along)
    with forward_ad.dual_level():
        assert torch.allclose(forward_ad.unpack_dual(run(forward_ad.make_dual(offset, direction))).tangent, along)
        with pytest.raises(deformconv.BackendError, match='backend="cpu" cannot run under forward-mode differentiation'):
            aggregate(x, forward_ad.make_dual(offset, direction), mask, case=case, backend="cpu")
    hessian = torch.autograd.functional.hessian(lambda offset: run(offset).square().sum(), offset)
    assert torch.allclose(torch.func.hessian(lambda offset: run(offset).square().sum())(offset), hessian)
    whole = torch.autograd.functional.jacobian(run, offset, vectorize=True)
    assert torch.allclose(whole, expected)


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_float32_offsets(dtype: torch.dtype, backend: str) -> None:
    """It is computed in float32, and rounded once; each gradient has its argument's dtype."""
    operands = [t.requires_grad_() for t in (given(dtype="float32")[0].to(dtype), *given(dtype="float32")[1:])]
    whole = [tensor.detach().float().requires_grad_() for tensor in operands]
    output, expected = aggregate(*operands, backend=backend), aggregate(*whole, backend=backend)
    assert output.dtype is dtype and torch.equal(output, expected.to(dtype))
    grad_output = torch.rand_like(output)
    ours = torch.autograd.grad(output, operands, grad_output)
    theirs = torch.autograd.grad(expected, whole, grad_output.float())
    for tensor, one, other in zip(operands, ours, theirs, strict=True):
        assert one.dtype is tensor.dtype and torch.equal(one, other.to(tensor.dtype))
    assert aggregate(*(tensor.to(dtype) for tensor in operands), backend=backend).dtype is dtype


def test_autocast_does_what_it_does_with_a_convolution() -> None:
    """The input becomes half precision, and the output with it; offsets and masks stay float32, or become it."""
    x, offset, mask = given(dtype="float32", requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = aggregate(x, offset, mask)
        rounded = aggregate(x, offset.bfloat16(), mask.bfloat16())
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, aggregate(x.bfloat16(), offset, mask))
    assert torch.equal(rounded, aggregate(x.bfloat16(), offset.bfloat16().float(), mask.bfloat16().float()))
    found.float().sum().backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in (x, offset, mask))


@by_backend
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_in_channels_last_out(dtype: torch.dtype, rank: int, backend: str) -> None:
    """The output has the input's memory format, and each gradient its argument's."""
    case = BY_RANK[rank]
    plain = [tensor.to(dtype).requires_grad_() for tensor in given(case, "float32")]
    grad_output = torch.rand_like(aggregate(*plain, case=case))
    expected = aggregate(*plain, case=case, backend=backend)
    wanted = torch.autograd.grad(expected, plain, grad_output)
    for flags in product([False, True], repeat=3):
        forms = [LAST[rank] if flag else torch.contiguous_format for flag in flags]
        operands = [t.detach().contiguous(memory_format=form).requires_grad_() for t, form in zip(plain, forms, strict=True)]
        output = aggregate(*operands, case=case, backend=backend)
        assert output.is_contiguous(memory_format=forms[0])
        name = str(dtype).removeprefix("torch.")
        assert_close(output.detach().double(), expected.detach().double(), name)
        for got, right, form in zip(torch.autograd.grad(output, operands, grad_output), wanted, forms, strict=True):
            assert got.is_contiguous(memory_format=form)
            assert_close(got.double(), right.double(), name)


@pytest.mark.parametrize("form", FORMS_OF_MEMORY)
def test_strides_do_not_matter(form: str) -> None:
    for number in range(3):
        results = []
        odd = FORMS_OF_MEMORY[form](given()[number])
        for tensor in (odd, odd.clone(memory_format=torch.contiguous_format)):
            operands = given(requires_grad=True)
            operands[number] = tensor.detach().requires_grad_()
            results.append([aggregate(*operands).detach(), *gradients(operands)])
        for ours, expected in zip(*results, strict=True):
            assert_close(ours, expected, "float64")


@by_rank
def test_one_image_without_a_batch(rank: int) -> None:
    case = BY_RANK[rank].but(batch=1)
    operands = given(case)
    single = [tensor[0].requires_grad_() for tensor in operands]
    output = aggregate(*single, case=case)
    assert torch.equal(output, aggregate(*operands, case=case)[0])
    batched = gradients([tensor.requires_grad_() for tensor in operands], case=case)
    for one, whole in zip(gradients(single, case=case), batched, strict=True):
        assert torch.equal(one, whole[0])
    assert torch.equal(torch.func.vmap(lambda *t: aggregate(*t, case=case))(*operands), output[None].detach())


def test_meta_and_fake_tensors() -> None:
    assert aggregate(*(tensor.to("meta") for tensor in given())).shape == aggregate(*given()).shape
    for form in (torch.contiguous_format, torch.channels_last):
        operands = [tensor.contiguous(memory_format=form).requires_grad_() for tensor in given()]
        expected = [aggregate(*operands), *gradients(operands)]
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in operands]
            found = [aggregate(*fakes), *gradients(fakes)]
        for fake, real in zip(found, expected, strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_operations_are_counted_as_a_depthwise_convolutions() -> None:
    """In forward; gradients of the input, and of offset and mask together, are as many each."""
    x, weight = torch.rand(2, 4, 6, 6, requires_grad=True), torch.rand(4, 1, 3, 3)
    offset, mask = torch.zeros(2, 36, 6, 6), torch.rand(2, 18, 6, 6, requires_grad=True)

    def counted(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    once = counted(lambda: torch.conv2d(x, weight, padding=1, groups=4))
    assert once == counted(lambda: deform_aggregate2d(x, offset, mask, padding=1)) > 0
    assert 3 * once == counted(lambda: deform_aggregate2d(x, offset, mask, padding=1).sum().backward())
    assert 2 * once == counted(lambda: deform_aggregate2d(x, offset, mask.detach(), padding=1).sum().backward())


def test_explain() -> None:
    text = dispatch.explain(OPERATOR, make(SMALL, "float16").spec, "torch", "cpu")
    assert text.splitlines()[0].startswith("input (2, 4, 4, 5), offset (2, 24, 4, 6), mask (2, 12, 4, 6); float16 computed in")
    assert "\nforward: cpu\n" in text and "\nbackward: cpu\n" in text
    text = dispatch.explain(OPERATOR, make(SMALL, "float32").spec, "torch", "meta")
    assert "forward: portable" in text and "cpu: its kernels run on the CPU and the arrays are on meta" in text


def spoiled(**changes: Any) -> Any:
    """A call of the plainest kind, two groups of 3x3 taps over 6x5 pixels, with something wrong."""
    x, offset, mask = torch.rand(2, 4, 6, 5), torch.rand(2, 36, 6, 5), torch.rand(2, 18, 6, 5)
    call = {"input": x, "offset": offset, "mask": mask, "padding": 1}
    return deform_aggregate2d(
        **call | {name: change(call[name]) if callable(change) else change for name, change in changes.items()}
    )


LAST_AXIS = {name: lambda tensor: tensor.movedim(1, -1) for name in ARGUMENTS}
TEXTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        LAST_AXIS,
        deformconv.ShapeError,
        "`offset` has 6 channels; .*`offset` and `input` look channels-last: move their last axis",
    ),
    ({"offset": LAST_AXIS["offset"]}, deformconv.ShapeError, "`offset` has 6 channels; .* `offset` looks channels-last"),
    ({"input": LAST_AXIS["input"]}, deformconv.ShapeError, "expected the output's, 5x4: .* `input` looks channels-last"),
    ({"mask": LAST_AXIS["mask"]}, deformconv.ShapeError, "`mask` has 6 channels; .* `mask` looks channels-last"),
    ({"padding": 0}, deformconv.ShapeError, "6x5 is the input's size, which stride 1x1 and padding .* do not keep: predict"),
    ({"stride": 2}, deformconv.ShapeError, r"`offset` has spatial size 6x5; expected the output's, 3x3: along height .* = 3\."),
    ({"offset_groups": 3}, deformconv.ShapeError, "`offset_groups` is 3; expected a divisor of C = 4"),
    ({"offset_groups": 4}, deformconv.ShapeError, "so offset_groups=4 takes 72. 36 channels fit offset_groups=2"),
    ({"input": lambda x: x[:, :3]}, deformconv.ShapeError, "these are 2 offset groups; expected a divisor of C = 3"),
    ({"input": lambda x: x[:, :0]}, deformconv.ShapeError, "no channels; expected at least 1"),
    ({"offset": torch.rand(2, 54, 6, 5), "mask": None}, deformconv.ShapeError, "54 = 36 offsets . 18 masks: .* as `mask`"),
    ({"kernel_size": 5, "padding": 2}, deformconv.ShapeError, "a 5x5 kernel takes 2 axes x 25 taps = 50 per"),
    ({"kernel_size": (3, 3, 3)}, deformconv.ShapeError, "`kernel_size` has 3 entries"),
    ({"kernel_size": 0}, deformconv.ShapeError, "`kernel_size` is 0; expected at least 1"),
    ({"kernel_size": 9, "padding": 0}, deformconv.ShapeError, "`kernel_size` is 9x9; along height it spans"),
    ({"kernel_size": 3.0}, TypeError, "`kernel_size` is 3.0, .*; expected integers"),
    ({"kernel_size": None}, TypeError, "`kernel_size` is None, .*; expected integers"),
    ({"padding": (1, 1, 1, 1)}, deformconv.ShapeError, "`padding` has 4 entries, .* write pairs"),
    ({"padding": "same", "stride": 2}, deformconv.ShapeError, "`padding` is 'same' with stride 2x2; expected stride 1x1"),
    ({"mask": lambda mask: mask[:, :9]}, deformconv.ShapeError, "`mask` has 9 channels; .* `mask` and `offset` disagree"),
    ({"mask": lambda mask: mask[:1]}, deformconv.ShapeError, "`mask` has a batch of 1; expected the batch of `input`, 2"),
    ({"mask": lambda mask: mask[:, :, 1:]}, deformconv.ShapeError, "`mask` has spatial size 5x5; expected the output's, 6x5"),
    ({"offset": lambda o: o.unflatten(1, (2, 18))}, deformconv.ShapeError, "`offset` has 5 axes.*; a 2-D call takes 4"),
    ({"input": lambda x: x[0]}, deformconv.ShapeError, "one image; expected a batch axis in both, or in neither"),
    ({"input": lambda x: x[0, 0]}, deformconv.ShapeError, "`input` has 2 axes.*; deform_aggregate2d takes 4"),
    ({"input": lambda x: x.long()}, TypeError, "`input` is int64; expected floating point"),
    ({"offset": lambda o: o.double()}, TypeError, "`offset` is float64 and `input` is float32; expected one dtype"),
    ({"offset": lambda o: o.half()}, TypeError, "`offset` is float16 and `input` is float32; expected one dtype"),
    ({"offset": None}, TypeError, "`offset` is None; expected a PyTorch tensor"),
    ({"offset": lambda o: o.numpy()}, TypeError, "`offset` is a numpy.ndarray; .* Pass `torch.from_numpy"),
    ({"mask": 3}, TypeError, "`mask` is a int; expected a PyTorch tensor, as `input` and `offset` are"),
    ({"mask": lambda mask: mask.to("meta")}, ValueError, "`mask` is on meta and `input` is on cpu"),
    ({"input": lambda x: x.to_sparse()}, TypeError, "`input` has the layout torch.sparse_coo; expected a dense tensor"),
    ({"boundary": "border"}, ValueError, "`boundary` is 'border'; expected 'zeros' or 'inside'"),
    ({"backend": "cuda"}, ValueError, "`backend` is 'cuda'; expected \"cpu\""),
    (
        {"weight": torch.rand(4, 1, 3, 3)},
        TypeError,
        "argument 'weight'; nothing is multiplied by a weight here: deform_conv does",
    ),
    ({"groups": 2}, TypeError, "unexpected keyword argument 'groups'; here: offset_groups"),
    ({"group": 2}, TypeError, "unexpected keyword argument 'group'; here: offset_groups"),
    ({"pad": 1}, TypeError, "unexpected keyword argument 'pad'; here: padding"),
    ({"offset_scale": 2.0}, TypeError, "argument 'offset_scale'; fold it into `offset`, as deformconv.vision.DCNv3 does"),
    ({"remove_center": True}, TypeError, "argument 'remove_center'; pass `mask` with 0 at the centre"),
    ({"im2col_step": 256}, TypeError, "argument 'im2col_step'; leave it out, a batch may have any size"),
]


@pytest.mark.parametrize(("changes", "error", "text"), TEXTS, ids=lambda value: value if isinstance(value, str) else "")
def test_texts(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        spoiled(**changes)


def test_texts_of_other_functions() -> None:
    x, offset, mask = given(dtype="float32")
    with pytest.raises(
        deformconv.ShapeError, match=r"deform_aggregate1d takes 3: .* 4 axes are 2-D data, for deform_aggregate2d"
    ):
        deform_aggregate1d(x, offset, mask)
    for function in (deform_aggregate1d, deform_aggregate3d):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'pads'; here: padding"
        ):
            function(x, offset, mask, pads=1)
    how = window(SMALL)
    with pytest.raises(
        deformconv.ShapeError, match=r"`grad_output` has shape \(2, 4, 4, 5\); expected the output's, \(2, 4, 4, 6"
    ):
        deformconv.deform_aggregate_backward(x, x, offset, mask, **how)
    grad_output = aggregate(x, offset, mask)
    with pytest.raises(TypeError, match="`grad_output` is float64; expected the dtype of `input`, float32"):
        deformconv.deform_aggregate_backward(grad_output.double(), x, offset, mask, **how)
    with pytest.raises(ValueError, match="`wanted` names 'weight'; expected some of input, offset, mask"):
        deformconv.deform_aggregate_backward(grad_output, x, offset, mask, **how, wanted="weight")
    with pytest.raises(ValueError, match="`wanted` names 'mask', but no `mask` was passed"):
        deformconv.deform_aggregate_backward(grad_output, x, offset, None, **how, wanted="mask")
    with pytest.raises(TypeError, match=r"`input` is a numpy.ndarray; expected a PyTorch tensor, .* Pass `torch.from_numpy"):
        deformconv.deform_aggregate(x.numpy(), offset, **how)
