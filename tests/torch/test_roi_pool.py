"""Deformable RoI pooling on PyTorch's tensors: gradients, transforms, compilers, precision, errors, and the layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ops.roi_pool.cases import CASES, Case, make, parameters
from tests.ops.roi_pool.suite import by_convention, expected_gradients, expected_output
from tests.runtime.test_threads import run_python
from tests.tolerances import assert_close

import deformconv
from deformconv.torch import DeformRoIPool, deform_roi_pool
from deformconv.torch.roi_pool import DEFORM_ROI_POOL

SMALL = Case("torch", channels=4, boxes=3)
by_backend = pytest.mark.parametrize("backend", ["cpu", "portable"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),  # PyTorch's own scripts, used by its forward-mode rules
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # opcheck looks at the .grad of what is no leaf
]


def tensors(case: Case = SMALL, dtype: str = "float64", requires_grad: bool = False) -> list[Any]:
    call = make(case, dtype)
    given = [None if array is None else torch.from_numpy(array.copy()) for array in call.arrays]
    for number in (0, 2, 3):
        if given[number] is not None:
            given[number].requires_grad_(requires_grad)
    return given


def pool(*operands: Any, case: Case = SMALL, **others: Any) -> Any:
    return deform_roi_pool(*operands, **parameters(case), **others)


@by_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: Case, backend: str) -> None:
    given, grad_output = tensors(case, requires_grad=True), torch.from_numpy(make(case).grad_output)
    output = pool(*given, case=case, backend=backend)
    assert_close(output.detach(), expected_output(case, "float64"), "float64")
    output.backward(grad_output)
    expected = expected_gradients(case, "float64")
    for tensor, gradient in zip(given, expected, strict=True):
        if gradient is not None:
            assert_close(tensor.grad, gradient, "float64")


@by_backend
@by_convention
def test_derivatives_of_first_and_second_order(convention: str, backend: str) -> None:
    case = SMALL.but(convention=convention, channels=2, size=(5, 6), boxes=2, output_size=(2, 2), spread=0.5)
    given = tensors(case, requires_grad=True)
    boxes = given.pop(1)

    def run(input: Any, offset: Any, mask: Any) -> Any:
        return pool(input, boxes, offset, mask, case=case, backend=backend)

    assert torch.autograd.gradcheck(run, given, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(run, given, eps=1e-7, atol=1e-4)


def test_boxes_have_no_gradient() -> None:
    given = tensors(requires_grad=True)
    given[1].requires_grad_()
    pool(*given).sum().backward()
    assert given[1].grad is None and given[0].grad is not None
    found = deformconv.deform_roi_pool_backward(torch.ones(3, 4, 3, 2, dtype=torch.float64), *given, **parameters(SMALL))
    assert found.boxes is None and found.offset.shape == given[2].shape
    _, tangent = torch.func.jvp(
        lambda boxes: pool(given[0].detach(), boxes, None), (given[1].detach(),), (torch.ones(3, 5).double(),)
    )
    assert not tangent.any()
    with pytest.raises(ValueError, match="`wanted` names 'boxes'; expected some of input, offset, mask"):
        deformconv.deform_roi_pool_backward(torch.ones(3, 4, 3, 2).double(), *given, **parameters(SMALL), wanted=["boxes"])


def test_opcheck() -> None:
    values = ([3, 2], 0.5, 2, "aligned", 0.1, [1, 1], [3, 2])
    for case in (SMALL, SMALL.but(deformed=False, masked=False), SMALL.but(masked=False)):
        given = tensors(case, requires_grad=True)
        torch.library.opcheck(DEFORM_ROI_POOL.forward_op, (*given, *values, None))
    given = [tensor.detach() for tensor in tensors()]
    grad_output = torch.rand(3, 4, 3, 2, dtype=torch.float64)
    torch.library.opcheck(DEFORM_ROI_POOL.backward_op, (grad_output, *given, *values, None, [True, False, True, True]))


def test_compile_and_export() -> None:
    given = tensors(requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: pool(*t).sin(), backend="aot_eager", fullgraph=True)
    found, expected = compiled(*given), pool(*given).sin()
    assert torch.equal(found, expected)
    leaves = [given[0], *given[2:]]
    for one, other in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()

    class Net(torch.nn.Module):
        def forward(self, *operands: Any) -> Any:
            return pool(*operands)

    given = [tensor.detach() for tensor in given]
    boxes = torch.export.Dim("boxes", min=2)
    dynamic = {"operands": (None, {0: boxes}, {0: boxes}, {0: boxes})}
    program = torch.export.export(Net(), tuple(given), dynamic_shapes=dynamic)
    more = [given[0], *(torch.cat([tensor, tensor.flip(0)]) for tensor in given[1:])]
    assert torch.equal(program.module()(*more), pool(*more))


@pytest.mark.slow  # a process that imports PyTorch
def test_a_saved_program_is_loaded_by_who_imports_the_room_alone(tmp_path: Path) -> None:
    """The function is loaded when it is called; the operator that programs name is there before, with its derivatives."""

    class Net(torch.nn.Module):
        def forward(self, *operands: Any) -> Any:
            return pool(*operands).sin()

    given = tuple(tensors())
    torch.export.save(torch.export.export(Net(), given), tmp_path / "exported.pt2")
    torch.jit.trace(Net(), given).save(tmp_path / "traced.pt")  # type: ignore[no-untyped-call]
    torch.save((given, pool(*given).sin()), tmp_path / "expected.pt")
    code = f"""
import sys, torch, deformconv.torch
given, expected = torch.load({str(tmp_path / "expected.pt")!r})
exported = torch.export.load({str(tmp_path / "exported.pt2")!r}).module()
traced = torch.jit.load({str(tmp_path / "traced.pt")!r})
compiled = torch.compile(exported, backend="aot_eager")
print([torch.equal(program(*given), expected) for program in (exported, traced, compiled)])
given[2].requires_grad_()
exported(*given).sum().backward()
print(bool(given[2].grad.abs().sum() > 0), "deformconv.torch.roi_pool.functional" in sys.modules)
"""
    assert run_python(code).splitlines() == ["[True, True, True]", "True False"]


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (None, 0, None, None), (0, None, None, 1), (None, None, 2, None)])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    given = [
        tensor if dim is None else torch.stack([tensor, tensor.roll(1, -1) if n != 1 else tensor, tensor], dim)
        for n, (tensor, dim) in enumerate(zip(tensors(), mapped, strict=True))
    ]
    one_by_one = [
        [tensor if dim is None else tensor.select(dim, b) for tensor, dim in zip(given, mapped, strict=True)] for b in range(3)
    ]
    found = torch.func.vmap(pool, in_dims=mapped)(*given)
    assert torch.allclose(found, torch.stack([pool(*each) for each in one_by_one]))

    def loss(input: Any, boxes: Any, offset: Any, mask: Any) -> Any:
        return pool(input, boxes, offset, mask).pow(2).sum()

    gradients = torch.func.grad(loss, (0, 2, 3))
    for number, gradient in enumerate(torch.func.vmap(gradients, in_dims=mapped)(*given)):
        assert torch.allclose(gradient, torch.stack([gradients(*each)[number] for each in one_by_one]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_float32_boxes(dtype: torch.dtype) -> None:
    input, boxes, offset, mask = tensors(dtype="float32")
    output = pool(input.to(dtype), boxes, offset, mask)
    assert output.dtype is dtype
    assert torch.equal(output, pool(input.to(dtype).float(), boxes, offset, mask).to(dtype))


def test_autocast_leaves_the_input_as_it_is() -> None:
    input, boxes, offset, mask = tensors(dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool(input, boxes, offset.bfloat16(), mask), pool(input, boxes, offset.bfloat16().float(), mask))
        assert pool(input.bfloat16(), boxes, offset, mask).dtype is torch.bfloat16


def test_a_list_of_boxes_is_one_tensor() -> None:
    input, boxes, offset, mask = tensors(SMALL.but(boxes=3))
    rows = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    order = torch.argsort(boxes[:, 0], stable=True)
    assert torch.equal(pool(input, rows, offset, mask), pool(input, boxes[order], offset, mask))
    assert pool(input, [rows[0][:0], rows[1][:0]]).shape == (0, 4, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_list_in_half_precision_counts_its_images(dtype: torch.dtype) -> None:
    """bfloat16 knows no 257, float16 no 2049."""
    input = torch.arange(2051.0)[:, None, None, None].expand(-1, 1, 2, 2) % 64
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=dtype)] * 2051
    found = deform_roi_pool(input.to(dtype), boxes, output_size=1)
    assert torch.equal(found.flatten(), input[:, 0, 0, 0].to(dtype))
    halves = [np.zeros((1, 4), np.float16)] * 2049
    with pytest.raises(TypeError, match="`boxes` is a list of 2049 in float16, which counts images to 2048"):
        deformconv.deform_roi_pool(np.zeros((2049, 1, 2, 2), np.float16), halves)


def test_parameters_of_other_types() -> None:
    input, boxes, *_ = tensors(SMALL.but(channels=6))
    expected = deform_roi_pool(input, boxes, None, None, (3, 2), 0.5, position_sensitive=True)
    given = torch.Size((3, 2)), np.float32(0.5), np.int64(2)
    assert torch.equal(deform_roi_pool(input, boxes, None, None, *given, position_sensitive=np.True_), expected)  # type: ignore
    assert torch.equal(deform_roi_pool(input, boxes, sampling_ratio=-1), deform_roi_pool(input, boxes, sampling_ratio=0))


def test_vmap_of_a_box_of_no_image_reads_no_other_call_s() -> None:
    input, boxes, *_ = tensors()
    boxes = torch.stack([boxes, boxes])
    boxes[0, 1, 0] = 2
    with pytest.raises(ValueError, match="row 1, column 0; expected the number of the box's image"):
        torch.func.vmap(pool)(torch.stack([input, input]), boxes)
    found = torch.func.vmap(lambda *each: pool(*each, backend="portable"))(
        torch.stack([input, input]).to("meta"), boxes.to("meta")
    )
    assert found.shape == (2, 3, 4, 3, 2)


def test_meta_and_fake_tensors() -> None:
    assert pool(*(tensor.to("meta") for tensor in tensors()), case=SMALL.but(sampling=0)).shape == (3, 4, 3, 2)
    assert pool(*(tensor.to("meta") for tensor in tensors())).shape == (3, 4, 3, 2)


def test_a_box_of_no_image_raises() -> None:
    for image, text in ((7.0, "7"), (-1.0, "-1"), (0.5, "0.5"), (float("nan"), "nan")):
        for backend in ("cpu", "portable"):
            given = tensors()
            given[1][1, 0] = image
            with pytest.raises(
                ValueError, match=f"`boxes` has {text} in row 1, column 0; expected .* 0 to 1, as `input` has a"
            ):
                pool(*given, backend=backend)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_box_of_no_image_raises_backwards_and_in_numpy(kind: str) -> None:
    """A kernel would read another memory for it, and the values may have changed since the forward pass."""
    given: Any = tensors()
    given[1][1, 0] = 7
    grad_output: Any = torch.ones(3, 4, 3, 2, dtype=torch.float64)
    if kind == "numpy":
        given, grad_output = [tensor.numpy() for tensor in given], grad_output.numpy()
    text = "`boxes` has 7 in row 1, column 0; expected the number of the box's image"
    with pytest.raises(ValueError, match=text):
        deformconv.deform_roi_pool(*given, **parameters(SMALL))
    with pytest.raises(ValueError, match=text):
        deformconv.deform_roi_pool_backward(grad_output, *given, **parameters(SMALL))


def test_texts() -> None:
    input, boxes, offset, mask = tensors()
    with pytest.raises(deformconv.ShapeError, match=r"`boxes` has shape \(3, 4\); expected \(R, 5\)"):
        pool(input, boxes[:, 1:], offset, mask)
    with pytest.raises(deformconv.ShapeError, match=r"`offset` has 3 channels; expected 2, x before y.* pass the last one as"):
        pool(input, boxes, torch.cat([offset, mask], 1))
    with pytest.raises(deformconv.ShapeError, match="`boxes` is an empty list"):
        pool(input, [])
    with pytest.raises(TypeError, match=r"`boxes\[0\]` is a list; expected a PyTorch tensor \(r, 4\) for each image"):
        pool(input, [[0, 0, 1, 1]])
    with pytest.raises(TypeError, match=r"`boxes\[1\]` is a numpy.ndarray; expected a PyTorch tensor"):
        pool(input, [boxes[:, 1:], boxes[:, 1:].numpy()])
    with pytest.raises(
        deformconv.ShapeError, match=r"`boxes` is a list of 1; expected .* each of the 2 images of `input`, with r"
    ):
        pool(input, [boxes[:, 1:]])
    with pytest.raises(deformconv.ShapeError, match=r"`boxes` has shape \(2, 3, 4\); .* pass `list\(boxes\)`"):
        pool(input, boxes[:, 1:].expand(2, 3, 4))
    with pytest.raises(TypeError, match=r"`offset` is 7; expected .* roi_align is the fifth one here: pass output_size=7,"):
        deform_roi_pool(input, boxes, 7, 1 / 16, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`offset` is \(3, 2\); .* pass output_size=\(3, 2\),"):
        deformconv.deform_roi_pool(input.numpy(), boxes.numpy(), (3, 2))
    with pytest.raises(deformconv.ShapeError, match=r"`boxes` is a list of 3; expected .* each of the 2 images"):
        deformconv.deform_roi_pool(input.numpy(), [boxes[:, 1:].numpy()] * 3)
    with pytest.raises(deformconv.ShapeError, match=r"`offset` has 2 axes, .* pass `offset.reshape\(-1, 2, 3, 2\)`"):
        pool(input, boxes, offset.flatten(1))
    with pytest.raises(deformconv.ShapeError, match=r"`mask` has 2 axes, .* pass `mask.reshape\(-1, 1, 3, 2\)`"):
        pool(input, boxes, offset, mask.flatten(1))
    with pytest.raises(deformconv.ShapeError, match=r"`offset` has 1 channel; .* One number for each bin is a mask"):
        pool(input, boxes, mask, offset)
    with pytest.raises(deformconv.ShapeError, match=r"`sampling_ratio` is \(2, 2\); expected one integer, for both axes"):
        deform_roi_pool(input, boxes, sampling_ratio=(2, 2))  # type: ignore[arg-type]
    with pytest.raises(deformconv.ShapeError, match=r"`boxes\[1\]` has shape \(4,\)"):
        pool(input, [boxes[:, 1:], boxes[0, 1:]])
    with pytest.raises(TypeError, match="`position_sensitive` is 7; expected True"):
        deform_roi_pool(input, boxes, position_sensitive=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'trans_std'; here: gamma"):
        deform_roi_pool(input, boxes, trans_std=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'aligned'; here: convention"):
        deform_roi_pool(input, boxes, aligned=True)  # type: ignore[call-arg]


class TestLayer:
    def layer(self, **others: Any) -> DeformRoIPool:
        return DeformRoIPool(4, (3, 2), 0.5, hidden=16, **others).double()

    @pytest.mark.parametrize("trunk", ["shared", "separate"])
    @pytest.mark.parametrize("modulated", [True, False])
    def test_a_fresh_layer_is_plain_pooling(self, trunk: str, modulated: bool) -> None:
        input, boxes, *_ = tensors()
        layer = self.layer(trunk=trunk, modulated=modulated)
        assert torch.allclose(layer(input, boxes), deform_roi_pool(input, boxes, None, None, (3, 2), 0.5), atol=1e-14)
        assert torch.equal(copy.deepcopy(layer)(input, boxes), layer(input, boxes))

    def test_the_predictor_learns(self) -> None:
        input, boxes, *_ = tensors()
        layer = self.layer()
        layer(input, boxes).pow(2).sum().backward()
        last = layer.offset_mask_fc[-1]
        assert last.weight.grad.abs().sum() > 0
        with torch.no_grad():
            last.bias += 0.5
        offset, mask = layer.predict(input, boxes)
        assert offset.shape == (3, 2, 3, 2) and mask is not None and mask.shape == (3, 1, 3, 2)
        assert torch.equal(layer(input, boxes), layer(input, boxes, offset, mask))

    def test_keys_are_those_of_the_field(self) -> None:
        assert [*self.layer().state_dict()] == [f"offset_mask_fc.{n}.{p}" for n in (0, 2, 4) for p in ("weight", "bias")]
        separate = [*self.layer(trunk="separate").state_dict()]
        assert separate == [
            *(f"offset_fc.{n}.{p}" for n in (0, 2, 4) for p in ("weight", "bias")),
            *(f"mask_fc.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")),
        ]
        assert "mask_fc.0.weight" not in self.layer(trunk="separate", modulated=False).state_dict()

    def test_loops_that_initialise_nets_leave_the_last_layer_alone(self) -> None:
        layer = self.layer()
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) or "Linear" in type(module).__name__:
                torch.nn.init.xavier_uniform_(module.weight)
        assert not layer.offset_mask_fc[-1].weight.any()

    def test_repr_and_errors(self) -> None:
        layer = self.layer(trunk="separate", modulated=False)
        assert "DeformRoIPool(\n  4, output_size=(3, 2), spatial_scale=0.5, sampling_ratio=2, convention='aligned'" in repr(
            layer
        )
        with pytest.raises(ValueError, match="`trunk` is 'both'; expected 'shared' or 'separate'"):
            self.layer(trunk="both")
        with pytest.raises(deformconv.ShapeError, match=r"`input` has 5 channels, .* has channels=4: build it with channels=5"):
            layer(torch.rand(1, 5, 4, 4), [torch.zeros(1, 4)])

    def test_a_constructor_s_errors(self) -> None:
        for wrong, kind, text in (
            ({"convention": "algined"}, ValueError, r"`convention` is 'algined'; expected one of 'aligned' \(mmcv"),
            ({"spatial_scale": None}, TypeError, "`spatial_scale` is None; expected a number"),
            ({"spatial_scale": 0}, ValueError, "`spatial_scale` is 0.0; expected a positive number"),
            ({"sampling_ratio": None}, TypeError, "`sampling_ratio` is None"),
            ({"sampling_ratio": 0, "convention": "rounded"}, ValueError, "`sampling_ratio` is 0, which lets a box decide"),
            ({"gamma": "a"}, TypeError, "`gamma` is 'a'; expected a number"),
            ({"mask_scale": None}, ValueError, "`mask_scale` is None; expected a number above 0"),
        ):
            with pytest.raises(kind, match=text):
                DeformRoIPool(4, hidden=2, **wrong)  # type: ignore[arg-type]

    def test_an_input_of_another_kind(self) -> None:
        input, boxes, *_ = tensors()
        with pytest.raises(TypeError, match="`input` is float32 and this layer's parameters are float64; expected one dtype"):
            self.layer()(input.float(), boxes.float())
        with pytest.raises(TypeError, match="`input` is a dict; expected a PyTorch tensor"):
            self.layer()({"0": input}, boxes)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert self.layer().float()(input.bfloat16(), boxes.float()).dtype is torch.bfloat16

    def test_a_net_with_it_is_traced_by_fx(self) -> None:
        input, boxes, *_ = tensors()

        class Net(torch.nn.Module):
            def __init__(self, pool: DeformRoIPool) -> None:
                super().__init__()
                self.conv, self.pool = torch.nn.Conv2d(4, 4, 1).double(), pool

            def forward(self, input: Any, boxes: Any) -> Any:
                return self.pool(self.conv(input), boxes)

        net = Net(self.layer())
        assert torch.equal(torch.fx.symbolic_trace(net)(input, boxes), net(input, boxes))

    def test_scripts_are_refused_and_traces_are_not(self) -> None:
        input, boxes, *_ = tensors()
        layer = self.layer()
        with pytest.raises(
            NotImplementedError, match=r"torch\.jit\.script cannot compile a DeformRoIPool; expected torch\.jit\.trace"
        ):
            torch.jit.script(torch.nn.ModuleList([layer]))
        traced = torch.jit.trace(layer, (input, boxes))
        assert torch.equal(traced(input.flip(0), boxes[:2]), layer(input.flip(0), boxes[:2]))

    def test_copies_and_memory_formats(self) -> None:
        input, boxes, *_ = tensors()
        layer = self.layer()
        assert torch.equal(pickle.loads(pickle.dumps(layer))(input, boxes), layer(input, boxes))
        given = input.to(memory_format=torch.channels_last).requires_grad_()
        layer(given, boxes).sum().backward()
        assert given.grad is not None and given.grad.is_contiguous(memory_format=torch.channels_last)
        plain = input.clone().requires_grad_()
        layer(plain, boxes).sum().backward()
        assert torch.equal(given.grad, plain.grad)
        strange = boxes.t().contiguous().t(), input.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(layer(strange[1], strange[0]), layer(input, boxes))

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiled(self, backend: str) -> None:
        input, boxes, *_ = tensors()
        layer = self.layer()
        with torch.no_grad():
            layer.offset_mask_fc[-1].bias.normal_()
        expected = torch.autograd.grad(layer(input, boxes).pow(2).sum(), [*layer.parameters()])
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for rows in (boxes, [boxes[:2, 1:], boxes[2:, 1:]]):
            assert torch.allclose(compiled(input, rows), layer(input, rows), atol=1e-12)
        found = torch.autograd.grad(compiled(input, boxes).pow(2).sum(), [*layer.parameters()])
        assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, expected, strict=True))
        wrong = boxes.clone()
        wrong[0, 0] = 9
        with pytest.raises(ValueError, match="`boxes` has 9 in row 0, column 0"):
            compiled(input, wrong)
        torch._dynamo.reset()


def test_jacobians_and_second_derivatives_by_transforms() -> None:
    case = SMALL.but(channels=2, size=(5, 6), boxes=2, output_size=(2, 2), spread=0.5)
    input, boxes, offset, mask = tensors(case)

    def run(offset: Any) -> Any:
        return pool(input, boxes, offset, mask, case=case)

    expected = torch.autograd.functional.jacobian(run, offset)
    assert torch.allclose(torch.func.jacrev(run)(offset), expected)
    assert torch.allclose(torch.func.jacfwd(run)(offset), expected)
    hessian = torch.autograd.functional.hessian(lambda offset: run(offset).pow(2).sum(), offset)
    assert torch.allclose(torch.func.hessian(lambda offset: run(offset).pow(2).sum())(offset), hessian)
