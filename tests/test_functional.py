"""The NumPy front end: what it takes, what it gives, and what it says when it cannot."""

from __future__ import annotations

import doctest
import inspect

import numpy as np
import pytest
from tests.ops.conv.cases import CASES, make
from tests.tolerances import assert_close

import deformconv
from deformconv import BackendError, functional
from deformconv.ops.conv.spec import GRADIENTS

CASE = next(case for case in CASES if case.name == "2-D")


def parameters(case):
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "offset_groups": case.offset_groups,
        "boundary": case.boundary,
    }


def arguments(case, call):
    """The call as keywords, for the public functions."""
    names = ("input", "offset", "weight", "bias", "mask")
    return {name: getattr(call, name) for name in names} | parameters(case)


@pytest.fixture
def keywords():
    return arguments(CASE, make(CASE))


def test_doctests():
    assert doctest.testmod(functional).failed == 0
    assert doctest.testmod(functional).attempted > 10


def test_signatures_are_the_public_ones():
    names = "input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, boundary, backend"
    for function in (deformconv.deform_conv, deformconv.explain):
        assert ", ".join(inspect.signature(function).parameters) == names
    backward = ", ".join(inspect.signature(deformconv.deform_conv_backward).parameters)
    assert backward == f"grad_output, {names}, wanted"
    for name, parameter in inspect.signature(deformconv.deform_conv).parameters.items():
        keyword_only = name in ("groups", "offset_groups", "boundary", "backend")
        assert (parameter.kind is parameter.KEYWORD_ONLY) == keyword_only


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case, dtype):
    call = make(case, dtype)
    keywords = arguments(case, call)
    expected = deformconv.deform_conv(**keywords, backend="reference")
    y = deformconv.deform_conv(**keywords)
    assert type(y) is np.ndarray
    assert y.dtype == dtype
    assert_close(y, expected, dtype)

    gradients = deformconv.deform_conv_backward(call.grad_output, **keywords)
    expected = deformconv.deform_conv_backward(call.grad_output, **keywords, backend="reference")
    assert type(gradients) is deformconv.Gradients
    for name in GRADIENTS:
        argument, found = keywords[name], getattr(gradients, name)
        assert (found is None) == (argument is None), name
        if argument is not None:
            assert found.shape == argument.shape
            assert found.dtype == dtype
            assert_close(found, getattr(expected, name), dtype, name)


def test_positional_arguments_stand_in_torchvisions_order(keywords):
    a = keywords
    y = deformconv.deform_conv(
        a["input"], a["offset"], a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["mask"]
    )
    np.testing.assert_array_equal(y, deformconv.deform_conv(**keywords))


ARRAYS = ("input", "offset", "weight", "bias", "mask")
FORMS = {
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: np.ascontiguousarray(np.flip(a))[(slice(None, None, -1),) * a.ndim],
    "every other element": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "a subclass": lambda a: a.view(np.memmap),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ARRAYS)
def test_any_memory_gives_the_same_result(keywords, name, form):
    call = make(CASE)
    expected = deformconv.deform_conv(**keywords)
    gradients = deformconv.deform_conv_backward(call.grad_output, **keywords)
    odd = FORMS[form](keywords[name])
    before = odd.tobytes()
    keywords[name] = odd
    np.testing.assert_array_equal(deformconv.deform_conv(**keywords), expected)
    for found, wanted in zip(deformconv.deform_conv_backward(call.grad_output, **keywords), gradients, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert odd.tobytes() == before


@pytest.mark.parametrize("form", FORMS)
def test_any_memory_of_grad_output(keywords, form):
    call = make(CASE)
    gradients = deformconv.deform_conv_backward(call.grad_output, **keywords)
    odd = FORMS[form](call.grad_output)
    for found, wanted in zip(deformconv.deform_conv_backward(odd, **keywords), gradients, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_expanded_grad_output(keywords):
    expanded = np.broadcast_to(np.float64(2), (2, 6, 7, 8))
    gradients = deformconv.deform_conv_backward(expanded, **keywords)
    expected = deformconv.deform_conv_backward(expanded.copy(), **keywords)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


BAD = {
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


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_array_or_of_another_dtype(keywords, name, bad):
    spoil, text = BAD[bad]
    keywords[name] = spoil(keywords[name])
    for function in (deformconv.deform_conv, deformconv.explain):
        with pytest.raises(TypeError, match=text.format(name=name)):
            function(**keywords)
    with pytest.raises(TypeError, match=text.format(name=name)):
        deformconv.deform_conv_backward(make(CASE).grad_output, **keywords)


def test_what_is_no_grad_output(keywords):
    grad_output = make(CASE).grad_output
    with pytest.raises(TypeError, match="`grad_output` is a list; expected a NumPy array"):
        deformconv.deform_conv_backward(grad_output.tolist(), **keywords)
    with pytest.raises(TypeError, match="`grad_output` is float32; expected the dtype of `input`, float64"):
        deformconv.deform_conv_backward(grad_output.astype("float32"), **keywords)
    with pytest.raises(deformconv.ShapeError, match="`grad_output` has shape"):
        deformconv.deform_conv_backward(grad_output[:1], **keywords)


@pytest.mark.parametrize("name", ["input", "offset", "weight"])
def test_none_is_no_array(keywords, name):
    keywords[name] = None
    with pytest.raises(TypeError, match=f"`{name}` is None; expected a NumPy array or a PyTorch tensor"):
        deformconv.deform_conv(**keywords)


def test_float16_runs_forward_and_says_why_not_backward(keywords):
    call = make(CASE, "float16")
    half = arguments(CASE, call)
    y = deformconv.deform_conv(**half)
    assert y.dtype == np.float16
    assert_close(y, deformconv.deform_conv(**half, backend="reference"), "float16")
    with pytest.raises(BackendError, match=r"float16.*\n.*\n?.*NumPy has no automatic derivative"):
        deformconv.deform_conv_backward(call.grad_output, **half)


def test_backends_by_name(keywords):
    expected = deformconv.deform_conv(**keywords)
    for backend in ("cpu", "portable", "reference"):
        assert_close(deformconv.deform_conv(**keywords, backend=backend), expected, "float64", backend)
    with pytest.raises(ValueError, match="`backend` is 'fast'; expected"):
        deformconv.deform_conv(**keywords, backend="fast")


@pytest.mark.parametrize("wanted", [("input",), ("offset", "mask"), ["weight"], {"bias"}, (), "mask", None])
def test_only_what_is_wanted(keywords, monkeypatch, wanted):
    from deformconv.ops.conv import cpu

    call, asked, real = make(CASE), [], cpu.backward

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
    grad_output = make(CASE).grad_output
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


def test_arguments_are_not_changed(keywords):
    call = make(CASE)
    before = {name: keywords[name].copy() for name in ARRAYS}
    y = deformconv.deform_conv(**keywords)
    deformconv.deform_conv_backward(call.grad_output, **keywords)
    for name in ARRAYS:
        np.testing.assert_array_equal(keywords[name], before[name])
        assert not np.shares_memory(y, keywords[name])


class TestTensors:
    """PyTorch tensors go to the torch room, and do not mix with arrays."""

    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    def tensors(self, keywords):
        return {k: self.torch.from_numpy(v) if k in ARRAYS else v for k, v in keywords.items()}

    def test_tensors_give_tensors(self, keywords):
        call = make(CASE)
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
        call, tensors = make(CASE), self.tensors(keywords)
        grad_output = self.torch.from_numpy(call.grad_output)
        gradients = deformconv.deform_conv_backward(grad_output, **tensors, backend="portable")
        expected = deformconv.deform_conv_backward(call.grad_output, **keywords)
        for found, wanted in zip(gradients, expected, strict=True):
            assert_close(found, wanted, "float64")

    @pytest.mark.parametrize("name", ARRAYS)
    def test_a_mix_is_an_error(self, keywords, name):
        mixed = self.tensors(keywords) | {name: keywords[name]}
        text = rf"`{name}` is a numpy.ndarray; expected a PyTorch tensor, as .* are. Pass `torch.from_numpy\("
        with pytest.raises(TypeError, match=text):
            deformconv.deform_conv(**mixed)
        mixed = keywords | {name: self.tensors(keywords)[name]}
        with pytest.raises(TypeError, match=r"is a numpy.ndarray; expected a PyTorch tensor, as "):
            deformconv.deform_conv(**mixed)

    def test_a_grad_output_of_the_other_kind(self, keywords):
        call = make(CASE)
        text = "is a numpy.ndarray; expected a PyTorch tensor"
        with pytest.raises(TypeError, match=text):
            deformconv.deform_conv_backward(call.grad_output, **self.tensors(keywords))
        with pytest.raises(TypeError, match=text):
            deformconv.deform_conv_backward(self.torch.from_numpy(call.grad_output), **keywords)
