"""The NumPy front end: what it takes, what it gives, and what it says when it cannot."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from tests.frontends.suite import PLAIN, OperatorSuite, parameters
from tests.ops.conv.cases import ARGUMENTS, make
from tests.tolerances import assert_close

import deformconv
from deformconv import functional
from deformconv.ops.conv.spec import GRADIENTS

LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: np.ascontiguousarray(np.flip(a))[(slice(None, None, -1),) * a.ndim],
    "every other element": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "a subclass": lambda a: a.view(np.memmap),
}
MISTAKES = {
    "list": (lambda a: a.tolist(), r"`{name}` is a list; .* Pass `numpy.asarray\({name}, dtype="),
    "scalar": (lambda a: 1.0, "`{name}` is a float; expected a NumPy array or a PyTorch tensor"),
    "NumPy scalar": (lambda a: np.float64(1), "`{name}` is a numpy.float64; expected a NumPy array"),
    "text": (lambda a: "x", "`{name}` is a str; expected a NumPy array or a PyTorch tensor"),
    "other library": (lambda a: memoryview(a), "`{name}` is a memoryview; expected a NumPy array"),
    "masked array": (lambda a: np.ma.masked_array(a), r"`{name}` is a masked array.*{name}.filled\(0\)"),
    "integers": (lambda a: a.astype(int), "`{name}` is int64; expected floating point"),
    "booleans": (lambda a: a > 0, "`{name}` is bool; expected floating point"),
    "objects": (lambda a: a.astype(object), "`{name}` is object; expected floating point"),
    "complex": (lambda a: a + 0j, "`{name}` is complex128; expected floating point"),
    "another dtype": (lambda a: a.astype("float32"), "float32.*float64"),
}


class TestOperator(OperatorSuite):
    module = functional
    kind = np.ndarray
    expected = "a NumPy array or a PyTorch tensor"
    layouts = LAYOUTS
    mistakes = MISTAKES

    def function(self, rank):
        return deformconv.deform_conv

    def backward(self, rank, arrays, grad_output, **parameters):
        gradients = deformconv.deform_conv_backward(grad_output, **arrays, **parameters)
        assert type(gradients) is deformconv.Gradients
        return gradients._asdict()

    def refusals(self, arrays, **parameters):
        yield from super().refusals(arrays, **parameters)
        yield lambda: deformconv.explain(**arrays, **parameters)
        yield lambda: deformconv.deform_conv_backward(make(PLAIN).grad_output, **arrays, **parameters)


def arguments(case, call):
    """The call as keywords, for the public functions."""
    return {name: getattr(call, name) for name in ARGUMENTS} | parameters(case)


@pytest.fixture
def keywords():
    return arguments(PLAIN, make(PLAIN))


def test_signatures_are_the_public_ones():
    names = "input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, boundary, backend"
    unknown = ", unknown"  # for the error that names another library's word
    for function in (deformconv.deform_conv, deformconv.explain):
        assert ", ".join(inspect.signature(function).parameters) == names + unknown
    backward = ", ".join(inspect.signature(deformconv.deform_conv_backward).parameters)
    assert backward == f"grad_output, {names}, wanted{unknown}"


def test_expanded_grad_output(keywords):
    expanded = np.broadcast_to(np.float64(2), (2, 6, 7, 8))
    gradients = deformconv.deform_conv_backward(expanded, **keywords)
    expected = deformconv.deform_conv_backward(expanded.copy(), **keywords)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_is_no_grad_output(keywords):
    grad_output = make(PLAIN).grad_output
    with pytest.raises(TypeError, match="`grad_output` is a list; expected a NumPy array"):
        deformconv.deform_conv_backward(grad_output.tolist(), **keywords)
    with pytest.raises(TypeError, match="`grad_output` is float32; expected the dtype of `input`, float64"):
        deformconv.deform_conv_backward(grad_output.astype("float32"), **keywords)
    with pytest.raises(deformconv.ShapeError, match="`grad_output` has shape"):
        deformconv.deform_conv_backward(grad_output[:1], **keywords)


@pytest.mark.parametrize("wanted", [("input",), ("offset", "mask"), ["weight"], {"bias"}, (), "mask", None])
def test_only_what_is_wanted(keywords, monkeypatch, wanted):
    from deformconv.ops.conv import cpu

    call, asked, real = make(PLAIN), [], cpu.backward

    def spy(spec, grad_output, input, offset, weight, mask, wanted):
        asked.append(set(wanted))
        return real(spec, grad_output, input, offset, weight, mask, wanted)

    whole = deformconv.deform_conv_backward(call.grad_output, **keywords)
    monkeypatch.setattr(cpu, "backward", spy)
    gradients = deformconv.deform_conv_backward(call.grad_output, **keywords, wanted=wanted)
    names = set(GRADIENTS) if wanted is None else {wanted} if isinstance(wanted, str) else set(wanted)
    assert asked == [names]
    for name in GRADIENTS:
        found = getattr(gradients, name)
        assert (found is not None) == (name in names)
        if found is not None:
            np.testing.assert_allclose(found, getattr(whole, name), rtol=1e-12)


def test_wanting_what_is_not_there(keywords):
    grad_output = make(PLAIN).grad_output
    with pytest.raises(ValueError, match="`wanted` names 'kernel'; expected some of input, offset"):
        deformconv.deform_conv_backward(grad_output, **keywords, wanted=["kernel"])
    keywords["mask"] = None
    with pytest.raises(ValueError, match="`wanted` names 'mask', but no `mask` was passed"):
        deformconv.deform_conv_backward(grad_output, **keywords, wanted=["mask"])
    assert deformconv.deform_conv_backward(grad_output, **keywords).mask is None


def test_explain_names_what_runs(keywords):
    lines = deformconv.explain(**keywords).splitlines()
    assert lines[0].endswith("; float64, numpy on cpu")
    assert lines[1] == "forward: cpu"
    assert "backward: cpu" in lines
    assert deformconv.explain(**keywords, backend="reference").splitlines()[1] == "forward: reference"


class TestTensors:
    """PyTorch tensors go to the torch room, and do not mix with arrays."""

    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    def tensors(self, keywords):
        return {k: self.torch.from_numpy(v) if k in ARGUMENTS else v for k, v in keywords.items()}

    def test_tensors_give_tensors(self, keywords):
        call = make(PLAIN)
        tensors = self.tensors(keywords)
        y = deformconv.deform_conv(**tensors)
        assert type(y) is self.torch.Tensor
        np.testing.assert_array_equal(y.numpy(), deformconv.deform_conv(**keywords))
        gradients = deformconv.deform_conv_backward(self.torch.from_numpy(call.grad_output), **tensors)
        expected = deformconv.deform_conv_backward(call.grad_output, **keywords)
        for found, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_array_equal(found.numpy(), wanted)
        assert "float64, torch on cpu" in deformconv.explain(**tensors)

    def test_tensors_keep_their_gradient(self, keywords):
        tensors = self.tensors(keywords)
        tensors["offset"].requires_grad_()
        deformconv.deform_conv(**tensors).sum().backward()
        assert tensors["offset"].grad is not None

    def test_the_portable_gradients_of_tensors(self, keywords):
        call, tensors = make(PLAIN), self.tensors(keywords)
        grad_output = self.torch.from_numpy(call.grad_output)
        gradients = deformconv.deform_conv_backward(grad_output, **tensors, backend="portable")
        expected = deformconv.deform_conv_backward(call.grad_output, **keywords)
        for found, wanted in zip(gradients, expected, strict=True):
            assert_close(found, wanted, "float64")

    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_a_mix_is_an_error(self, keywords, name):
        mixed = self.tensors(keywords) | {name: keywords[name]}
        text = rf"`{name}` is a numpy.ndarray; expected a PyTorch tensor, as .* are. Pass `torch.from_numpy\("
        with pytest.raises(TypeError, match=text):
            deformconv.deform_conv(**mixed)
        mixed = keywords | {name: self.tensors(keywords)[name]}
        with pytest.raises(TypeError, match=r"is a numpy.ndarray; expected a PyTorch tensor, as "):
            deformconv.deform_conv(**mixed)

    def test_a_grad_output_of_the_other_kind(self, keywords):
        call = make(PLAIN)
        text = "is a numpy.ndarray; expected a PyTorch tensor"
        with pytest.raises(TypeError, match=text):
            deformconv.deform_conv_backward(call.grad_output, **self.tensors(keywords))
        with pytest.raises(TypeError, match=text):
            deformconv.deform_conv_backward(self.torch.from_numpy(call.grad_output), **keywords)
