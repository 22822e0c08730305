"""Deformable attention on PyTorch tensors: every derivative, every way that PyTorch calls an operator, and the error texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ops.attention.cases import ARGUMENTS, CASES, Case, make
from tests.ops.attention.suite import expected_gradients, expected_output
from tests.runtime.test_threads import run_python
from tests.tolerances import assert_close

import deformconv
from deformconv import dispatch
from deformconv.ops.attention.operator import DEFORM_ATTENTION as OPERATOR
from deformconv.torch import deform_attention
from deformconv.torch.attention import DEFORM_ATTENTION

SMALL = Case("torch", batch=2, channels=4, queries=5, points=2)
FLAT = [number for pair in SMALL.levels for number in pair]
by_backend = pytest.mark.parametrize("backend", ["cpu", "portable"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),  # PyTorch's own scripts, used by its forward-mode rules
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # opcheck looks at the .grad of what is no leaf
]


def tensors(case: Case = SMALL, dtype: str = "float64", requires_grad: bool = False) -> list[Any]:
    return [torch.from_numpy(array.copy()).requires_grad_(requires_grad) for array in make(case, dtype).arrays]


def attend(value: Any, locations: Any, weights: Any, case: Case = SMALL, **others: Any) -> Any:
    return deform_attention(value, case.levels, locations, weights, **others)


@by_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: Case, backend: str) -> None:
    given, grad_output = tensors(case, requires_grad=True), torch.from_numpy(make(case).grad_output)
    output = attend(*given, case=case, backend=backend)
    assert_close(output.detach(), expected_output(case, "float64"), "float64")
    output.backward(grad_output)
    expected = expected_gradients(case, "float64")
    for name, tensor in zip(ARGUMENTS, given, strict=True):
        assert_close(tensor.grad, getattr(expected, name), "float64", name)


@by_backend
def test_derivatives_of_first_and_second_order(backend: str) -> None:
    case = SMALL.but(batch=1, channels=2, queries=2, levels=((3, 4), (2, 2)))
    given = tensors(case, requires_grad=True)

    def run(*operands: Any) -> Any:
        return attend(*operands, case=case, backend=backend)

    assert torch.autograd.gradcheck(run, given, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(run, given, eps=1e-7, atol=1e-4)


def test_what_needs_no_gradient_gets_none() -> None:
    for needed in ((0,), (1, 2), (2,)):
        given = [tensor.requires_grad_(number in needed) for number, tensor in enumerate(tensors())]
        attend(*given).sum().backward()
        assert [number for number, tensor in enumerate(given) if tensor.grad is not None] == [*needed]
    found = deformconv.deform_attention_backward(
        torch.ones(2, 5, 8).double(), given[0], SMALL.levels, *given[1:], wanted="value"
    )
    assert found.locations is found.weights is None and found.value.shape == given[0].shape
    with pytest.raises(ValueError, match="`wanted` names 'offset'; expected some of value, locations, weights"):
        deformconv.deform_attention_backward(torch.ones(2, 5, 8).double(), given[0], SMALL.levels, *given[1:], wanted="offset")


@pytest.mark.parametrize("kind", ["tuples", "lists", "NumPy", "tensor", "numbers of NumPy"])
def test_levels_of_any_kind(kind: str) -> None:
    given = tensors()
    levels: Any = {
        "tuples": SMALL.levels,
        "lists": [list(pair) for pair in SMALL.levels],
        "NumPy": np.array(SMALL.levels, np.int32),
        "tensor": torch.tensor(SMALL.levels),
        "numbers of NumPy": [(np.int64(height), np.int64(width)) for height, width in SMALL.levels],
    }[kind]
    assert torch.equal(deform_attention(given[0], levels, *given[1:]), attend(*given))
    arrays = [tensor.numpy() for tensor in given]
    found = deformconv.deform_attention(arrays[0], levels, *arrays[1:])
    assert type(found) is np.ndarray and np.array_equal(found, attend(*given).numpy())


def test_opcheck() -> None:
    torch.library.opcheck(DEFORM_ATTENTION.forward_op, (*tensors(requires_grad=True), FLAT, None))
    grad_output = torch.rand(2, 5, 8, dtype=torch.float64)
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(DEFORM_ATTENTION.backward_op, (grad_output, *tensors(), FLAT, None, wanted))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_and_export(backend: str) -> None:
    given = tensors(requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: attend(*t).sin(), backend=backend, fullgraph=True)
    found, expected = compiled(*given), attend(*given).sin()
    assert torch.allclose(found, expected, atol=1e-14)
    for one, other in zip(torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True):
        assert torch.allclose(one, other, atol=1e-14)
    torch._dynamo.reset()

    class Net(torch.nn.Module):
        def forward(self, *operands: Any) -> Any:
            return attend(*operands)

    given = [tensor.detach() for tensor in given]
    queries = torch.export.Dim("queries", min=2)
    program = torch.export.export(Net(), tuple(given), dynamic_shapes={"operands": (None, {1: queries}, {1: queries})})
    more = [given[0], *(torch.cat([tensor, tensor.flip(1)], 1) for tensor in given[1:])]
    assert torch.equal(program.module()(*more), attend(*more))


def test_a_compiled_net_may_take_its_levels_from_shapes() -> None:
    """As a detector does: the levels are the sizes of its maps."""

    def net(maps: list[Any], locations: Any, weights: Any) -> Any:
        value = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1).unflatten(2, (SMALL.heads, -1))
        return deform_attention(value, [one.shape[-2:] for one in maps], locations, weights)

    _, locations, weights = tensors()
    maps = [torch.rand(2, 8, height, width, dtype=torch.float64) for height, width in SMALL.levels]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for flip in (False, True):  # other sizes, which the compiler then takes for variable
        maps = [one.transpose(2, 3).contiguous() if flip else one for one in maps]
        assert torch.equal(compiled(maps, locations, weights), net(maps, locations, weights))
    torch._dynamo.reset()


@pytest.mark.slow  # a process that imports PyTorch
def test_a_saved_program_is_loaded_by_who_imports_the_room_alone(tmp_path: Path) -> None:
    """The function is loaded when it is called; the operator that programs name is there before, with its derivatives."""

    class Net(torch.nn.Module):
        def forward(self, *operands: Any) -> Any:
            return attend(*operands).sin()

    given = tuple(tensors())
    torch.export.save(torch.export.export(Net(), given), tmp_path / "exported.pt2")
    torch.jit.trace(Net(), given).save(tmp_path / "traced.pt")  # type: ignore[no-untyped-call]
    torch.save((given, attend(*given).sin()), tmp_path / "expected.pt")
    code = f"""
import sys, torch, deformconv.torch
given, expected = torch.load({str(tmp_path / "expected.pt")!r})
exported = torch.export.load({str(tmp_path / "exported.pt2")!r}).module()
traced = torch.jit.load({str(tmp_path / "traced.pt")!r})
print([torch.equal(program(*given), expected) for program in (exported, traced)])
given[2].requires_grad_()
exported(*given).sum().backward()
print(bool(given[2].grad.abs().sum() > 0), "deformconv.torch.attention.functional" in sys.modules)
"""
    assert run_python(code).splitlines() == ["[True, True]", "True False"]


@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 0, None), (1, None, 2), (None, None, 3)])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    given = [
        tensor if dim is None else torch.stack([tensor, tensor.roll(1, 1), tensor.flip(1)], dim)
        for tensor, dim in zip(tensors(), mapped, strict=True)
    ]
    one_by_one = [
        [tensor if dim is None else tensor.select(dim, b) for tensor, dim in zip(given, mapped, strict=True)] for b in range(3)
    ]
    found = torch.func.vmap(attend, in_dims=mapped)(*given)
    assert torch.allclose(found, torch.stack([attend(*each) for each in one_by_one]))

    def loss(*operands: Any) -> Any:
        return attend(*operands).pow(2).sum()

    gradients = torch.func.grad(loss, (0, 1, 2))
    for number, gradient in enumerate(torch.func.vmap(gradients, in_dims=mapped)(*given)):
        assert torch.allclose(gradient, torch.stack([gradients(*each)[number] for each in one_by_one]))


def test_jacobians_and_second_derivatives_by_transforms() -> None:
    case = SMALL.but(batch=1, channels=2, queries=2, heads=1, levels=((3, 4),))
    value, locations, weights = tensors(case)

    def run(locations: Any) -> Any:
        return attend(value, locations, weights, case=case)

    expected = torch.autograd.functional.jacobian(run, locations)
    assert torch.allclose(torch.func.jacrev(run)(locations), expected)
    assert torch.allclose(torch.func.jacfwd(run)(locations), expected)
    hessian = torch.autograd.functional.hessian(lambda locations: run(locations).pow(2).sum(), locations)
    assert torch.allclose(torch.func.hessian(lambda locations: run(locations).pow(2).sum())(locations), hessian)


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_float32_locations(dtype: torch.dtype, backend: str) -> None:
    """It is computed in float32, and rounded once; each gradient has its argument's dtype."""
    value, locations, weights = tensors(dtype="float32")
    halves = value.to(dtype).requires_grad_(), locations.requires_grad_(), weights.requires_grad_()
    output = attend(*halves, backend=backend)
    assert output.dtype is dtype
    whole = [tensor.detach().float().requires_grad_() for tensor in halves]
    expected = attend(*whole, backend=backend)
    assert torch.equal(output, expected.to(dtype))
    grad_output = torch.rand_like(output)
    ours, theirs = (
        torch.autograd.grad(*each) for each in ((output, halves, grad_output), (expected, whole, grad_output.float()))
    )
    for tensor, one, other in zip(halves, ours, theirs, strict=True):
        assert one.dtype is tensor.dtype and torch.equal(one, other.to(tensor.dtype))
    assert attend(value.to(dtype), locations.to(dtype), weights.to(dtype), backend=backend).dtype is dtype


def test_autocast_leaves_the_value_as_it_is() -> None:
    value, locations, weights = tensors(dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = locations.bfloat16()
        assert torch.equal(attend(value, rounded, weights), attend(value, rounded.float(), weights))
        assert attend(value.bfloat16(), locations, weights).dtype is torch.bfloat16


def test_meta_tensors() -> None:
    assert attend(*(tensor.to("meta") for tensor in tensors())).shape == (2, 5, 8)


@pytest.mark.parametrize("turn", [(0, 3, 1, 2), (2, 0, 1, 3), (1, 0, 3, 2)])
def test_memory_of_any_order(turn: tuple[int, ...]) -> None:
    """A value may lie in memory as channels-last images do; the output has three axes, and is contiguous."""
    value, locations, weights = tensors(requires_grad=True)
    back = [turn.index(axis) for axis in range(4)]
    strange = value.detach().permute(turn).contiguous().permute(back).requires_grad_()
    turned = locations.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strange.is_contiguous() and not turned.is_contiguous()
    found, expected = attend(strange, turned, weights), attend(value, locations, weights)
    assert torch.equal(found, expected) and found.is_contiguous()
    one, other = torch.autograd.grad(found.sum(), strange)[0], torch.autograd.grad(expected.sum(), value)[0]
    assert torch.equal(one, other)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(attend, backend="aot_eager")(strange, turned, weights), expected)
    torch._dynamo.reset()


def test_who_computes_is_said() -> None:
    spec = make(SMALL, "float32").spec
    text = dispatch.explain(OPERATOR, spec, "torch", "mps:0")
    assert text.splitlines()[0] == (
        "value (2, 47, 2, 4), locations (2, 5, 2, 2, 2, 2), weights (2, 5, 2, 2, 2); float32, torch on mps:0"
    )
    assert "forward: portable\n  portable: PyTorch's own operations compute the call at once\n" in text
    assert "cpu: its kernels run on the CPU and the arrays are on mps:0" in text
    assert "gpu: its kernels run on GPUs of NVIDIA and AMD and the arrays are on mps:0" in text
    text = dispatch.explain(OPERATOR, make(SMALL, "float16").spec, "torch", "cpu")
    assert "; float16 computed in float32, torch on cpu\nforward: cpu\n  cpu: " in text and "\nbackward: cpu\n" in text


def test_texts() -> None:
    value, locations, weights = tensors()
    wrong = [
        (
            (value.flatten(2), locations, weights),
            r"`value` has 3 axes, shape \(2, 47, 8\).* pass `value.reshape\(N, L, heads, -1\)`",
        ),
        ((value[:, :-1], locations, weights), r"`value` has 46 tokens, .* `spatial_shapes` has 5\*7 \+ 3\*4 = 47"),
        ((value.transpose(1, 2), locations, weights), r"`value` has 2 tokens.* For \(N, heads, L, d\) pass `value.transpose"),
        ((value[:, :, :0], locations, weights), "expected .* at least one head and one channel"),
        ((value, locations[..., :1], weights), r"`locations` has shape \(.*, 1\); expected \(N, Q, heads, levels, points, 2\)"),
        ((value, torch.cat([locations] * 2, -1), weights), "Boxes are no locations"),
        ((value, locations[:, :, 0, :, 0], weights), r"`locations` has shape .*\. Reference points are no locations"),
        (
            (value, locations, weights.flatten(3)),
            r"`weights` has 4 axes.* pass `weights.reshape\(\*weights.shape\[:3\], levels",
        ),
        (
            (value, locations[:1], weights),
            r"`locations` has 1 image, .* and `value` has 2; expected \(N, Q, heads, levels, points",
        ),
        ((value, locations[:, :, :1], weights), "`locations` has 1 head, .* and `value` has 2"),
        ((value, locations[:, :, :, :1], weights), "`locations` has 1 level, .* and `spatial_shapes` has 2"),
        (
            (value, locations, weights[:, 1:]),
            r"`weights` has 4 queries, .* and `locations` has 5; expected \(N, Q, heads, levels,",
        ),
        ((value, locations, weights[:, :, :, :1]), "`weights` has 1 level, .* and `spatial_shapes` has 2"),
        ((value, locations, weights[..., :1]), "`weights` has 1 point, .* and `locations` has 2"),
    ]
    for operands, text in wrong:
        for call in (lambda operands=operands: attend(*operands), lambda operands=operands: as_arrays(operands)):
            with pytest.raises(deformconv.ShapeError, match=text):
                call()
    with pytest.raises(TypeError, match="`value` is int64; expected floating point"):
        attend(value.long(), locations, weights)
    with pytest.raises(TypeError, match="`weights` is float32 and `value` is float64; expected one dtype"):
        attend(value, locations, weights.float())
    with pytest.raises(TypeError, match="`locations` is None; expected a PyTorch tensor, as `value` and `weights` are"):
        attend(value, None, weights)
    with pytest.raises(ValueError, match="`weights` is on meta and `value` is on cpu"):
        attend(value, locations, weights.to("meta"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampling_locations'; here: locations"):
        attend(value, locations, weights, sampling_locations=locations)
    with pytest.raises(deformconv.ShapeError, match=r"`grad_output` has shape \(2, 5, 4\); expected the output's, \(2, 5, 8\)"):
        deformconv.deform_attention_backward(torch.ones(2, 5, 4).double(), value, SMALL.levels, locations, weights)


def as_arrays(operands: Any) -> Any:
    value, *others = (tensor.numpy() for tensor in operands)
    return deformconv.deform_attention(value, SMALL.levels, *others)


@pytest.mark.parametrize(
    ("levels", "error", "text"),
    [
        ([], deformconv.ShapeError, "`spatial_shapes` is empty; expected a pair"),
        ([(5, 7, 1), (3, 4, 1)], deformconv.ShapeError, r"`spatial_shapes` has 3 numbers for a level, \(5, 7, 1\); expected 2"),
        ([5, 7, 3, 4], TypeError, r"`spatial_shapes` is \[5, 7, 3, 4\]; expected a pair \(height, width\)"),
        ([(5.0, 7.0), (3, 4)], TypeError, r"`spatial_shapes` has \(5.0, 7.0\) for a level; expected two integers"),
        (((5.0, 7), (3, 4)), TypeError, r"`spatial_shapes` has \(5.0, 7\) for a level; expected two integers"),
        (torch.tensor([[5.0, 7.0], [3.0, 4.0]]), TypeError, "expected two integers"),
        ([(0, 7), (3, 4)], deformconv.ShapeError, r"`spatial_shapes` has \(0, 7\) for a level; expected at least one pixel"),
        (7, TypeError, "`spatial_shapes` is 7; expected a pair"),
        (None, TypeError, "`spatial_shapes` is None; expected a pair"),
        ([(7, 5), (3, 5)], deformconv.ShapeError, r"7\*5 \+ 3\*5 = 50; expected the pixels of all levels"),
    ],
)
def test_levels_that_are_wrong(levels: Any, error: type[Exception], text: str) -> None:
    value, locations, weights = tensors()
    for given in ((value, locations, weights), (value.numpy(), locations.numpy(), weights.numpy())):
        with pytest.raises(error, match=text):
            deformconv.deform_attention(given[0], levels, *given[1:])


def test_levels_without_numbers() -> None:
    """A compiler reads them between two graphs; an exporter cannot."""
    value, locations, weights = tensors()
    levels, text = (
        torch.tensor(SMALL.levels),
        "`spatial_shapes` is a tensor without numbers.* pass `\\[\\(height, width\\), ...\\]`",
    )
    with pytest.raises(TypeError, match=text):
        deform_attention(value, levels.to("meta"), locations, weights)

    class Net(torch.nn.Module):
        def forward(self, *operands: Any) -> Any:
            return deform_attention(*operands)

    with pytest.raises(TypeError, match=text):
        torch.export.export(Net(), (value, levels, locations, weights), strict=False)
    torch._dynamo.reset()
    compiled = torch.compile(Net(), backend="aot_eager")
    assert torch.equal(compiled(value, levels, locations, weights), attend(value, locations, weights))
    torch._dynamo.reset()
