"""An operator that is described, and nothing more, has both front ends, derivatives, transforms and texts: no line under src
knows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.ops.toy import native, numbers
from tests.ops.toy.operator import SCALE

from deformconv import BackendError, ShapeError
from deformconv.numpy import run
from deformconv.ops.operator import Argument, Line

torch = pytest.importorskip("torch")
calls = pytest.importorskip("deformconv.torch.calls")
registry = pytest.importorskip("deformconv.torch.registry")

OP = registry.Registered(SCALE)
by_backend = pytest.mark.parametrize("backend", ["numbers", "portable"])
by_bias = pytest.mark.parametrize("biased", [False, True])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),  # PyTorch's own scripts, used by its forward-mode rules
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # opcheck looks at the .grad of what is no leaf
]


def scale(input: Any, mask: Any, bias: Any = None, power: Any = 1, *, backend: Any = None) -> Any:
    """The public function of a front end: a signature, and where to go."""
    return calls.call(OP, None, backend, (power,), (input, mask, bias))


def tensors(biased: bool = True, requires_grad: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 5), (3, 1, 5)] + [(2,)] * biased
    return [torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for shape in shapes]


def truth(input: Any, mask: Any, bias: Any = None, power: int = 1) -> Any:
    output = input * mask**power
    return output if bias is None else output + bias[:, None]


@by_backend
@by_bias
def test_numpy(backend: str, biased: bool) -> None:
    arrays = [tensor.numpy() for tensor in tensors(biased)]
    operands = dict(zip(SCALE.names, [*arrays, None], strict=False))
    output = run.forward(SCALE, operands, {"power": 2}, backend)
    np.testing.assert_allclose(output, truth(*arrays, power=2))
    if backend == "portable":
        with pytest.raises(BackendError, match="portable: NumPy has no automatic derivative"):
            run.backward(SCALE, output, operands, {"power": 2}, backend, None)
        return
    gradients = run.backward(SCALE, np.ones_like(output), operands, {"power": 2}, backend, ["mask"])
    np.testing.assert_allclose(gradients.mask, (2 * arrays[1] * arrays[0]).sum(1, keepdims=True))
    assert gradients.input is None


@by_backend
@by_bias
def test_derivatives_of_first_and_second_order(backend: str, biased: bool) -> None:
    given = tensors(biased, requires_grad=True)
    assert torch.equal(scale(*given, power=2, backend=backend), truth(*given, power=2))
    assert torch.autograd.gradcheck(lambda *t: scale(*t, power=2, backend=backend), given)
    assert torch.autograd.gradgradcheck(lambda *t: scale(*t, power=2, backend=backend), given)
    grad_output = torch.rand(3, 2, 5, dtype=torch.float64)
    found = calls.backward(OP, backend, (2,), grad_output, tuple([*given, None][:3]), None)
    expected = torch.autograd.grad(truth(*given, power=2), given, grad_output)
    for name, gradient in zip(SCALE.names, expected, strict=False):
        assert torch.allclose(getattr(found, name), gradient)


def test_the_memory_of_tensors_is_the_backend_s() -> None:
    numbers.asked.clear()
    given = tensors(requires_grad=True)
    output = scale(*given)
    assert type(output.grad_fn).__name__ == "ToyScaleFunctionBackward"
    output.sum().backward()
    assert numbers.asked == ["torch", "torch"]


def test_a_graph_names_the_operator() -> None:
    given = tensors(requires_grad=True)
    seen = OP.forward_op(*given, 1, None)  # as whoever looks on calls it
    assert type(seen.grad_fn).__name__ == "ToyScaleFunctionBackward"
    (gradient,) = torch.autograd.grad(seen.sum(), given[:1], create_graph=True)
    assert type(gradient.grad_fn).__name__ == "ToyScaleBackwardBackward"
    names = []
    torch.func.grad(lambda x: (y := scale(x, *given[1:]), names.append(type(y.grad_fn).__name__))[0].sum())(given[0])
    assert len(names) == 1 and "ToyScale" in names[0]


def test_the_oldest_opset_is_the_operator_s(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.Registered(
        dataclasses.replace(SCALE, name="toy_scale_node"), export=registry.Export(lambda spec, *operands: spec, first_opset=99)
    )
    assert op.write_onnx("a spec") == "a spec"
    monkeypatch.setattr(registry.modes, "traced", lambda: True)
    with pytest.raises(BackendError, match=r"dynamo=False\) cannot export .*; expected dynamo=True, with opset_version=99 or"):
        op.write_onnx("a spec")


def test_a_backend_of_native_arrays_gets_the_tensors_in_their_dtype() -> None:
    """No copies of NumPy's, and half precision as it is, since this backend can take it."""
    native.seen.clear()
    given = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors()]
    output = scale(*given, power=2, backend="native")
    output.sum().backward()
    assert len(native.seen) == 2
    for tensor in (*native.seen[0], *native.seen[1]):
        assert type(tensor) is torch.Tensor and tensor.dtype is torch.bfloat16 and not tensor.requires_grad
    assert [tensor.data_ptr() for tensor in native.seen[0]] == [tensor.data_ptr() for tensor in given]
    expected = truth(*given, power=2)
    assert torch.equal(output, expected)
    for tensor, gradient in zip(given, torch.autograd.grad(expected.sum(), given), strict=True):
        assert torch.allclose(tensor.grad, gradient, rtol=0.02)
    assert "bfloat16, torch on cpu" in calls.explain(OP, "native", (2,), tuple(given))
    with pytest.raises(BackendError, match=r"native: it takes PyTorch's tensors, not numpy's arrays"):
        arrays = [tensor.numpy() for tensor in tensors()]
        run.forward(SCALE, dict(zip(SCALE.names, arrays, strict=True)), {"power": 2}, "native")


def test_masks_keep_their_precision_beside_half() -> None:
    native.seen.clear()
    input, mask, bias = tensors()
    given = [input.bfloat16().requires_grad_(), mask.float().requires_grad_(), bias.bfloat16().requires_grad_()]
    output = scale(*given, power=2, backend="native")
    output.sum().backward()
    assert output.dtype is torch.bfloat16
    for _, mask, *_ in (native.seen[0], native.seen[1][1:]):
        assert mask.dtype is torch.float32
    assert [tensor.grad.dtype for tensor in given] == [tensor.dtype for tensor in given]
    torch.library.opcheck(OP.forward_op, (*(tensor.detach() for tensor in given), 2, "native"))


def test_half_precision_is_rounded_once_on_every_way() -> None:
    x, mask, tangent = (tensor.bfloat16() for tensor in (*tensors(biased=False), torch.rand(3, 2, 5)))
    output, derivative = torch.func.jvp(lambda x: scale(x, mask, power=3), (x,), (tangent,))
    assert output.dtype is derivative.dtype is torch.bfloat16
    assert torch.equal(output, truth(x.float(), mask.float(), power=3).bfloat16())
    assert torch.equal(derivative, truth(tangent.float(), mask.float(), power=3).bfloat16())
    operands = {"input": x.float().half().numpy(), "mask": mask.float().half().numpy(), "bias": None}
    found = run.forward(SCALE, operands, {"power": 3}, "portable")
    exact = truth(*(array.astype("float32") for array in (operands["input"], operands["mask"])), power=3)
    assert found.dtype == "float16" and (found == exact.astype("float16")).all()


def test_what_onnx_has_no_node_for_says_so() -> None:
    with pytest.raises(BackendError, match="toy_scale cannot be exported to ONNX, which has no such node"):
        OP.write_onnx(None)


def test_what_no_backward_pass_sees_is_optional() -> None:
    argument = Argument("bias", gradient=lambda grad: grad)
    with pytest.raises(ValueError, match="`bias` is left out of the backward pass, so it must be optional"):
        dataclasses.replace(SCALE, arguments=(argument,))


@by_bias
def test_opcheck(biased: bool) -> None:
    given = [*tensors(biased, requires_grad=True), None][:3]
    torch.library.opcheck(OP.forward_op, (*given, 2, None))
    grad_output = torch.rand(3, 2, 5, dtype=torch.float64)
    torch.library.opcheck(OP.backward_op, (grad_output, given[0], given[1], 2, None, [True, True, biased]))


def test_compile() -> None:
    given = tensors(requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: scale(*t, power=2).sin(), backend="aot_eager", fullgraph=True)
    found, expected = compiled(*given), scale(*given, power=2).sin()
    assert torch.equal(found, expected)
    for gradient, other in zip(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True
    ):
        assert torch.equal(gradient, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("mapped", [(0, 0, None), (0, None, None), (None, None, 0), (1, 0, 0)])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    given = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, 3 * tensor], dim)
        for tensor, dim in zip(tensors(), mapped, strict=True)
    ]
    found = torch.func.vmap(scale, in_dims=mapped)(*given)
    assert torch.allclose(found, torch.func.vmap(truth, in_dims=mapped)(*given))
    gradient = torch.func.vmap(torch.func.grad(lambda *t: scale(*t).pow(2).sum(), (0, 1, 2)), in_dims=mapped)
    expected = torch.func.vmap(torch.func.grad(lambda *t: truth(*t).pow(2).sum(), (0, 1, 2)), in_dims=mapped)
    for one, other in zip(gradient(*given), expected(*given), strict=True):
        assert torch.allclose(one, other)


def test_mapped_images_are_one_call() -> None:
    numbers.asked.clear()
    torch.func.vmap(scale)(*(torch.stack([tensor] * 4) for tensor in tensors(biased=False)))
    assert numbers.asked == ["torch"]


def test_forward_mode_half_precision_fake_and_autocast() -> None:
    given = tensors()
    _, tangent = torch.func.jvp(lambda x: scale(x, *given[1:]), (given[0],), (torch.ones_like(given[0]),))
    assert torch.allclose(tangent, given[1].expand_as(tangent))
    half = scale(given[0].bfloat16(), given[1].float(), power=3)
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, truth(given[0].bfloat16().float(), given[1].float(), power=3).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scale(given[0].float(), given[1].float()).dtype is torch.bfloat16
    assert scale(*(tensor.to("meta") for tensor in given)).shape == (3, 2, 5)


@pytest.fixture
def deterministic() -> Any:
    """Set PyTorch's deterministic mode, as torch.use_deterministic_algorithms does, until the test ends."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


NATIVE_FIRST = registry.Registered(
    dataclasses.replace(SCALE, name="toy_scale_native_first", backends=(Line("native"), Line("numbers"), Line("portable")))
)


def scale_native_first(*operands: Any) -> Any:
    return calls.call(NATIVE_FIRST, None, None, (2,), operands)


def test_a_backend_that_is_not_deterministic_is_passed_over_where_pytorch_is_told_to_be(deterministic: Any) -> None:
    given = tensors(requires_grad=True)
    native.seen.clear()
    before = scale_native_first(*given)  # by `native`, which a backward pass in the mode must not run either
    assert len(native.seen) == 1
    deterministic(True)
    numbers.asked.clear()
    before.sum().backward()
    scale_native_first(*given).sum().backward()
    torch.func.vmap(scale_native_first)(*(torch.stack([tensor.detach()] * 4) for tensor in given))
    calls.backward(NATIVE_FIRST, None, (2,), torch.ones(3, 2, 5, dtype=torch.float64), tuple(given), None)
    assert len(native.seen) == 1 and numbers.asked == ["torch"] * 8
    assert calls.explain(NATIVE_FIRST, None, (2,), tuple(given)).splitlines()[1:4] == [
        "forward: numbers",
        "  numbers: it multiplies 2 times",
        "  native: its results differ in their last bits each time, and torch.use_deterministic_algorithms(True) is set",
    ]
    deterministic(False)
    scale_native_first(*given)
    assert len(native.seen) == 2


def test_a_backend_that_is_not_deterministic_raises_when_it_is_named(deterministic: Any) -> None:
    given = tensors(requires_grad=True)
    before = scale(*given, backend="native")
    deterministic(True)
    text = r"native: its results differ in their last bits each time, and torch.use_deterministic_algorithms\(True\) is set"
    assert "forward: no backend can run it" in calls.explain(OP, "native", (1,), tuple(given))
    with pytest.raises(BackendError, match=f'backend="native" cannot run this call(.|\n)*{text}'):
        scale(*given, backend="native")
    with pytest.raises(BackendError, match=text):
        before.sum().backward()
    with pytest.raises(BackendError, match=text):
        OP.forward_op(*given, 1, "native")


def test_a_backend_that_is_not_deterministic_warns_where_a_warning_is_asked_for(deterministic: Any) -> None:
    given = tensors(requires_grad=True)
    deterministic(True, warn_only=True)
    native.seen.clear()
    text = (
        "toy_scale runs on the backend 'native', whose results differ in their last bits each time, though "
        r"torch.use_deterministic_algorithms\(True, warn_only=True\) is set"
    )
    with pytest.warns(UserWarning, match=text):
        output = scale(*given, backend="native")
    with pytest.warns(UserWarning, match=text):
        output.sum().backward()
    assert len(native.seen) == 2
    scale_native_first(*given)  # another can run it: nothing to warn of
    assert len(native.seen) == 2
    setting = "torch.use_deterministic_algorithms(True, warn_only=True)"
    assert calls.explain(OP, "native", (1,), tuple(given)).splitlines()[1:3] == [
        "forward: native",
        f"  native: its results differ in their last bits each time, and {setting} is set",
    ]


def test_texts_for_numpy_name_what_the_operator_has() -> None:
    operands = {"input": np.ma.masked_array(np.ones((1, 1, 2))), "mask": np.ones((1, 1, 2)), "bias": None}
    with pytest.raises(TypeError) as caught:
        run.forward(SCALE, operands, {"power": 1}, None)
    assert str(caught.value) == (
        "`input` is a masked array, whose own mask would be ignored; expected a plain array: pass `input.filled(0)`."
    )
    array = type("NDArray", (), {"__module__": "mxnet.ndarray.ndarray"})()
    with pytest.raises(TypeError, match=r"For MXNet's arrays and symbols there is `deformconv.gluon.toy_scale`\.$"):
        run.forward(SCALE, operands | {"input": array}, {"power": 1}, None)


def test_texts() -> None:
    given = tensors()
    assert calls.explain(OP, None, (2,), tuple(given)).splitlines() == [
        "input (3, 2, 5), mask (3, 1, 5); float64, torch on cpu",
        "forward: numbers",
        "  numbers: it multiplies 2 times",
        "  portable: can run it, but numbers comes first",
        '  native: can run it, but only when asked for by backend="native"',
        "backward: numbers",
        "  numbers: it multiplies 2 times",
        "  portable: can run it, but numbers comes first",
        '  native: can run it, but only when asked for by backend="native"',
    ]
    half = [tensor.half() for tensor in given]
    assert "; float16 computed in float32, torch on cpu" in calls.explain(OP, None, (2,), tuple(half))
    with pytest.raises(BackendError, match=r'="numbers" cannot run this call: input .*\n  numbers: it counts to 3, not to 4'):
        scale(*given, power=4, backend="numbers")
    with pytest.raises(ValueError, match='; expected "numbers", "portable", "native", or None'):
        scale(*given, backend="cpu")
    with pytest.raises(ShapeError, match=r"`mask` has shape \(3, 2, 5\); expected \(N, 1, L\)"):
        scale(given[0], given[0])
    with pytest.raises(TypeError, match=r"`mask` is a numpy.ndarray; expected a PyTorch tensor, as `input` and `bias` are"):
        scale(given[0], given[1].numpy(), given[2])
    with pytest.raises(TypeError, match="`mask` is None; expected a PyTorch tensor"):
        scale(given[0], None)
    with pytest.raises(ValueError, match="`wanted` names 'offset'; expected some of input, mask, bias"):
        run.backward(SCALE, given[0].numpy(), {"input": given[0].numpy(), "mask": given[1].numpy(), "bias": None}, {"power": 1},
                     None, ["offset"])  # fmt: skip
