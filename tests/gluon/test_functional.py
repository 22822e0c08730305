"""The operator on NDArrays and Symbols: MXNet's own numbers, gradients, and no silent garbage."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.base import MXNetError
from tests.frontends.suite import OperatorSuite
from tests.gluon.arrays import NAMES, mxnet_operator, random_call
from tests.tolerances import assert_close, error

import deformconv
from deformconv.gluon import deform_conv, functional
from deformconv.gluon.arrays import view, write
from deformconv.gluon.functional import DEFORM_CONV
from deformconv.ops.conv import cpu

BOUNDARY = {False: "inside", True: "zeros"}  # MXNet's rule, by whether there is a mask
undecided_type = pytest.mark.filterwarnings("ignore:Cannot decide type|:UserWarning:mxnet.gluon.block")


LAYOUTS = {
    "a slice": lambda a: mx.nd.concat(a, a, a, dim=0)[a.shape[0] : 2 * a.shape[0]],
    "reshaped": lambda a: a.reshape((-1,)).reshape(a.shape),
    "transposed": lambda a: a.transpose().copy().transpose(),
}
MISTAKES = {
    "list": (
        lambda a: a.asnumpy().tolist(),
        r"`{name}` is a list; expected an MXNet NDArray.*: pass `mxnet.nd.array\({name}\)`.",
    ),
    "NumPy array": (lambda a: a.asnumpy(), r"`{name}` is a numpy.ndarray; expected an MXNet NDArray.*: pass `mx"),
    "integers": (lambda a: a.astype("int32"), "`{name}` is int32; expected floating point"),
    "another dtype": (lambda a: a.astype("float32"), "is float32.*is float64|is float64.*is float32"),
}


class TestOperator(OperatorSuite):
    module = functional
    examples = 5
    input = "data"
    kind = mx.nd.NDArray
    expected = "an MXNet NDArray"
    empty_batches = False  # a size of 0 is one that MXNet does not know yet
    layouts = LAYOUTS
    mistakes = MISTAKES

    def array(self, array):
        return mx.nd.array(array, dtype=array.dtype)

    def numpy(self, array):
        return array.asnumpy()

    def function(self, rank):
        return deform_conv

    def backward(self, rank, arrays, grad_output, **parameters):
        given = {name: array for name, array in arrays.items() if array is not None}
        for array in given.values():
            array.attach_grad()
        with mx.autograd.record():
            output = self.forward(rank, arrays, **parameters)
        output.backward(grad_output)
        return {name: None if array is None else array.grad for name, array in arrays.items()}

    def convolution(self, call):
        spec, arrays = call.spec, self.arrays(call)
        return mx.nd.Convolution(
            arrays["input"], arrays["weight"], arrays["bias"], kernel=spec.kernel_size, stride=spec.stride,
            pad=[before for before, _ in spec.padding], dilate=spec.dilation, num_group=spec.groups,
            num_filter=spec.out_channels,
        ).asnumpy()  # fmt: skip


def ours(call, arrays, **keywords):
    groups = {"groups": call.groups, "offset_groups": call.offset_groups}
    return deform_conv(**arrays, **call.window, **groups, **keywords)


@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("seed", range(25))
def test_forward_is_that_of_mxnet(seed, masked):
    call = random_call(seed, masked)
    arrays = call.ndarrays()
    expected = mxnet_operator(call, arrays).asnumpy()
    assert_close(ours(call, arrays, boundary=BOUNDARY[masked]).asnumpy(), expected, "float32")


@pytest.mark.parametrize("seed", range(25))
def test_gradients_of_v1_are_those_of_mxnet(seed):
    call = random_call(seed, masked=False)
    gradients = []
    for operator in (mxnet_operator, lambda call, arrays: ours(call, arrays, boundary="inside")):
        arrays = call.ndarrays(grad_req="write")
        with mx.autograd.record():
            output = operator(call, arrays)
        head = np.random.default_rng(1).standard_normal(output.shape)
        output.backward(mx.nd.array(head))
        gradients.append({name: array.grad.asnumpy() for name, array in arrays.items()})
    theirs, found = gradients
    for name in found:
        assert error(found[name], theirs[name]) < 2e-5, name


@pytest.mark.parametrize(("padding", "size"), [("same", 6), ("valid", 4), (((0, 1), (1, 0)), 5), (1, 6), ([1, 1], 6)], ids=str)
def test_a_symbol_takes_the_forms_of_padding(padding, size):
    symbols = [mx.sym.var("data"), mx.sym.var("offset"), mx.sym.var("weight", shape=(3, 0, 3, 3))]
    symbol = deform_conv(*symbols, padding=padding)
    assert symbol.infer_shape(data=(1, 2, 6, 6), offset=(1, 18, size, size))[1] == [(1, 3, size, size)]


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_each_grad_req_is_honoured(monkeypatch, backend):
    wanted = []
    original = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a, **k: wanted.append(list(k["wanted"])) or original(*a, **k))
    call = random_call(5, masked=True)
    first = call.ndarrays(grad_req="write")
    with mx.autograd.record():
        output = ours(call, first, backend=backend)
    output.backward()
    expected = {name: first[name].grad.asnumpy() for name in NAMES}
    mx.nd.waitall()
    assert wanted == [["input", "offset", "weight", "bias", "mask"]]

    arrays = call.ndarrays()
    for name, request in zip(NAMES, ("add", "null", "write", "add", "null"), strict=True):
        arrays[name].attach_grad(request)
        if arrays[name].grad is not None:
            arrays[name].grad[:] = 7
    with mx.autograd.record():
        output = ours(call, arrays, backend=backend)
    output.backward()
    assert_close(arrays["data"].grad.asnumpy(), 7 + expected["data"], "float32")
    assert_close(arrays["weight"].grad.asnumpy(), expected["weight"], "float32")
    assert_close(arrays["bias"].grad.asnumpy(), 7 + expected["bias"], "float32")
    mx.nd.waitall()
    assert wanted[1:] == [["input", "weight", "bias"]]


def test_a_frozen_call_computes_no_gradient(monkeypatch):
    monkeypatch.setattr(cpu, "backward", lambda *arguments, **keywords: pytest.fail("it was called"))
    call = random_call(5, masked=True)
    arrays = call.ndarrays(grad_req="null")
    x = mx.nd.ones(1)
    x.attach_grad()
    with mx.autograd.record():
        y = x * 3 + ours(call, arrays).sum()
    y.backward()
    assert x.grad.asscalar() == 3


def test_two_uses_of_one_array_add_their_gradients():
    x, weight = mx.nd.random.normal(shape=(1, 2, 6, 6)), mx.nd.random.normal(shape=(2, 2, 3, 3))
    offset = mx.nd.random.normal(shape=(1, 18, 6, 6))
    x.attach_grad()
    with mx.autograd.record():
        y = deform_conv(x, offset, weight, padding=1)
    y.backward()
    once = x.grad.asnumpy()
    with mx.autograd.record():
        y = deform_conv(x, offset, weight, padding=1) + deform_conv(x, offset, weight, padding=1)
    y.backward()
    assert_close(x.grad.asnumpy(), 2 * once, "float32")


def test_second_derivatives_raise():
    call = random_call(5, masked=True)
    arrays = call.ndarrays(grad_req="write")
    with mx.autograd.record():
        output = ours(call, arrays)
        with pytest.raises(MXNetError):
            mx.autograd.grad(output, arrays["data"], create_graph=True)[0].backward()


# Arrays that must be refused, and others that need not be


def thread_arrays(channels=18):
    """The thread's shapes: 10 images of 3x100x100; the offset on record had 27 channels."""
    return mx.nd.ones((10, 3, 100, 100)), mx.nd.zeros((10, channels, 100, 100)), mx.nd.ones((3, 3, 3, 3))


SENTENCE = (
    "`offset` has 27 channels; a 3x3 kernel takes 2 axes x 9 taps = 18 per offset group. "
    "27 = 18 offsets + 9 masks: for v2 pass the last 9 as `mask`."
)


def thread_block():
    data, offset, weight = mx.sym.var("data"), mx.sym.var("offset"), mx.sym.var("weight", shape=(3, 3, 3, 3))
    return gluon.SymbolBlock(deform_conv(data, offset, weight, padding=1), [data, offset])


@undecided_type
def test_the_threads_symbol_block_works():
    block = thread_block()
    block.initialize(mx.init.One())
    data, offset, weight = thread_arrays()
    data.attach_grad()
    with mx.autograd.record():
        output = block(data, offset)
    output.backward()
    plain = mx.nd.Convolution(data, weight, kernel=(3, 3), pad=(1, 1), num_filter=3, no_bias=True)
    assert_close(output.asnumpy(), plain.asnumpy(), "float32")
    assert data.grad[0, 0, 0, 0].asscalar() == 12 and data.grad[0, 0, 1, 1].asscalar() == 27


@undecided_type
def test_in_a_symbol_block_the_27_channels_raise_and_the_sentence_is_on_stderr(capfd):
    block = thread_block()
    block.initialize()
    with pytest.raises((MXNetError, ValueError)) as raised:  # Gluon raises ValueError while shapes are deferred
        block(*thread_arrays(27)[:2])
    assert "MXNetError" in f"{type(raised.value).__name__} {raised.value}"
    assert f"deformconv.errors.ShapeError: {SENTENCE}" in capfd.readouterr().err


def test_mistakes_are_told_in_gluons_words():
    x, offset, weight = mx.nd.ones((1, 3, 8, 8)), mx.nd.zeros((1, 18, 8, 8)), mx.nd.ones((4, 3, 3, 3))
    for arguments, message in [
        ((x[0], offset, weight), "`data` has 3 axes, shape (3, 8, 8); a weight with 4 axes takes 4: (N, C_in, height, width). "
         "For one image without a batch axis pass `data[None]`."),
        ((mx.nd.ones((1, 8, 8, 3)), offset, weight), "`data` looks channels-last: move its last axis to place 1, "
         "`numpy.moveaxis(data, -1, 1)`."),
        ((x, offset, mx.nd.ones((4, 2, 3, 3))), "expected a divisor of C_in = 3, the channels of `data` (1, 3, 8, 8)."),
        ((x, offset[:, :, 1:-1, 1:-1], weight, mx.nd.ones(5)), "`bias` has shape (5,); expected (4,)"),
        ((x, offset, weight), "`offset` has spatial size 8x8; expected the output's, 6x6"),
    ]:  # fmt: skip
        with pytest.raises(deformconv.ShapeError) as raised:
            deform_conv(*arguments)
        assert message in str(raised.value)
    with pytest.raises(deformconv.ShapeError, match="`mask` has 8 channels; expected 9 taps x 1 offset group = 9"):
        deform_conv(x, offset, weight, padding=1, mask=mx.nd.ones((1, 8, 8, 8)))
    with pytest.raises(ValueError, match="`boundary` is 'border'; expected 'zeros' or 'inside'"):
        deform_conv(x, offset, weight, padding=1, boundary="border")
    with pytest.raises(ValueError, match="`backend` is 'cuda'; expected \"cpu\""):
        deform_conv(x, offset, weight, padding=1, backend="cuda")


def test_other_things_than_arrays():
    x, offset, weight = mx.nd.ones((1, 3, 8, 8)), mx.nd.zeros((1, 18, 8, 8)), mx.nd.ones((4, 3, 3, 3))
    with pytest.raises(TypeError, match=r"`weight` is a numpy.ndarray; expected an MXNet NDArray, as `data` is: pass `mx"):
        deform_conv(x, offset, np.ones((4, 3, 3, 3)))
    with pytest.raises(TypeError, match=r"`offset` is a mxnet.ndarray.ndarray.NDArray; expected an MXNet Symbol, as `data` is"):
        deform_conv(mx.sym.var("data"), offset, weight)
    with pytest.raises(TypeError, match=r"`weight` is a mxnet.symbol.symbol.Symbol; expected an MXNet NDArray, as `data` is"):
        deform_conv(x, offset, mx.sym.var("weight"))
    with pytest.raises(TypeError, match=r"`data` is stored as row_sparse; expected a dense array: `data.tostype\('default'\)`"):
        deform_conv(x.tostype("row_sparse"), offset, weight)


def test_the_roots_function_names_this_one():
    x, offset, weight = mx.nd.ones((1, 3, 8, 8)), mx.nd.zeros((1, 18, 8, 8)), mx.nd.ones((4, 3, 3, 3))
    with pytest.raises(TypeError, match=r"For MXNet's arrays and symbols there is `deformconv\.gluon\.deform_conv`") as raised:
        deformconv.deform_conv(x, offset, weight)
    assert str(raised.value).startswith("`input` is a mxnet.ndarray.ndarray.NDArray; expected a NumPy array or")


class Elsewhere(mx.nd.NDArray):
    """An array that says it is on a GPU, where MXNet for the CPU can have none."""

    __slots__ = ()
    context = mx.gpu(0)


def test_contexts(capfd):
    x, offset, weight = mx.nd.ones((1, 3, 8, 8)), mx.nd.zeros((1, 18, 8, 8)), mx.nd.ones((4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"`offset` is on cpu\(1\) and `data` is on cpu; expected one device for all"):
        deform_conv(x, offset.as_in_context(mx.cpu(1)), weight, padding=1)
    moved = [array.as_in_context(mx.cpu(1)) for array in (x, offset, weight)]
    for array in moved:
        array.attach_grad()
    with mx.autograd.record():
        y = deform_conv(*moved, padding=1)
    y.backward()
    assert y.context == mx.cpu(1) and moved[0].grad.context == mx.cpu(1)
    assert y[0, 0, 1, 1].asscalar() == 27
    elsewhere = x.copy()
    elsewhere.__class__ = Elsewhere
    message = (
        "`data` is on gpu(0); deformconv computes MXNet's arrays on the CPU: pass `data.as_in_context(mxnet.cpu())`, or run "
        "the net in the context mxnet.cpu()."
    )
    with pytest.raises(deformconv.BackendError) as raised:
        deform_conv(elsewhere, offset, weight, padding=1)
    assert str(raised.value) == message
    symbol = deform_conv(mx.sym.var("data"), mx.sym.var("offset"), mx.sym.var("weight"), padding=1)
    attributes = {name: text for name, text in symbol.get_children()[0].list_attr().items() if name != "op_type"}
    with pytest.raises(deformconv.BackendError):
        DEFORM_CONV.prop(**attributes).create_operator(mx.gpu(0), [x.shape, offset.shape, weight.shape], [0, 0, 0])
    assert capfd.readouterr().err == f"deformconv.errors.BackendError: {message}\n"


def test_arrays_of_other_processes_memory():
    x, offset, weight = mx.nd.ones((1, 3, 8, 8)), mx.nd.zeros((1, 18, 8, 8)), mx.nd.ones((4, 3, 3, 3))
    shared = x.as_in_context(mx.Context("cpu_shared", 0))  # a DataLoader's worker hands its batches over in it
    assert deform_conv(shared, offset, weight, padding=1)[0, 0, 1, 1].asscalar() == 27


def test_slices_and_reshaped_arrays_are_read_where_they_lie():
    rng = np.random.default_rng(0)
    x, offset = rng.standard_normal((4, 3, 6, 6)), rng.standard_normal((4, 18, 6, 6))
    weight = rng.standard_normal((2, 3, 3, 3))
    nd = [mx.nd.array(array, dtype="float64") for array in (x, offset, weight.reshape(6, 3, 3))]
    found = deform_conv(nd[0][1:3], nd[1][1:3], nd[2].reshape((2, 3, 3, 3)), padding=1)
    assert_close(found.asnumpy(), deformconv.deform_conv(x[1:3], offset[1:3], weight, padding=1), "float64")
    assert deform_conv(nd[0].transpose((0, 1, 3, 2)), nd[1], nd[2].reshape((2, 3, 3, 3)), padding=1).shape == (4, 2, 6, 6)


def test_a_view_is_the_arrays_memory():
    array = mx.nd.array([[1, 2], [3, 4]])
    seen = view(array)
    assert seen.base is not None and seen.tolist() == [[1, 2], [3, 4]]
    write(array, "write", np.full((2, 2), 5, np.float32))
    write(array, "add", np.ones((2, 2), np.float32))
    assert array.asnumpy().tolist() == [[6, 6], [6, 6]] == seen.tolist()
    del array
    assert seen.tolist() == [[6, 6], [6, 6]]


def test_numpy_like_arrays():
    x, offset, weight = mx.np.ones((1, 3, 8, 8)), mx.np.zeros((1, 18, 8, 8)), mx.np.ones((4, 3, 3, 3))
    x.attach_grad()
    with mx.autograd.record():
        y = deform_conv(x, offset, weight, padding=1)
    y.backward()
    assert type(y) is mx.np.ndarray and type(x.grad) is mx.np.ndarray
    assert y[0, 0, 1, 1] == 27 and x.grad[0, 0, 1, 1] == 36
    symbols = [mx.sym.var(name).as_np_ndarray() for name in ("data", "offset", "weight")]
    assert type(deform_conv(*symbols)) is type(symbols[0])


# Symbols


def symbolic(call, boundary):
    symbols = {name: mx.sym.var(name) for name in call.arrays}
    groups = {"groups": call.groups, "offset_groups": call.offset_groups}
    return deform_conv(**symbols, **call.window, **groups, boundary=boundary, name="deformed")


@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
def test_an_executor_runs_it_as_mxnets(masked):
    call = random_call(11, masked)
    theirs = mxnet_operator(call, {name: mx.sym.var(name) for name in call.arrays}, mx.sym)
    mine = symbolic(call, BOUNDARY[masked])
    assert mine.list_arguments() == list(call.arrays) and mine.name == "deformed"
    outputs, gradients = [], []
    for symbol in (theirs, mx.sym.load_json(mine.tojson())):
        executor = symbol.simple_bind(mx.cpu(), **{name: array.shape for name, array in call.arrays.items()})
        outputs.append(executor.forward(is_train=True, **call.ndarrays())[0].asnumpy())
        if symbol is not theirs or not masked:  # MXNet's v2 has no backward pass on the CPU
            executor.backward(mx.nd.ones(outputs[-1].shape))
            gradients.append({name: array.asnumpy() for name, array in executor.grad_dict.items()})
    assert_close(outputs[1], outputs[0], "float32")
    if not masked:
        for name, gradient in gradients[0].items():
            assert error(gradients[1][name], gradient) < 2e-5, name


@pytest.mark.parametrize("request_", ["write", "add", "null"])
def test_an_executors_grad_req(request_):
    call = random_call(12, masked=True)
    arrays = call.ndarrays("float64")
    gradients = {name: mx.nd.ones_like(array) for name, array in arrays.items()}
    requests = dict.fromkeys(arrays, "null") | {"offset": request_}
    executor = symbolic(call, "zeros").bind(mx.cpu(), arrays, gradients, requests)
    output = executor.forward(is_train=True)[0]
    executor.backward(mx.nd.ones_like(output))
    plain = call.numpy("float64")
    plain["input"] = plain.pop("data")
    expected = deformconv.deform_conv_backward(np.ones(output.shape), **plain, **call.window).offset
    expected = {"write": expected, "add": 1 + expected, "null": np.ones_like(expected)}[request_]
    assert_close(gradients["offset"].asnumpy(), expected, "float64")
    assert (gradients["data"].asnumpy() == 1).all()


def test_shapes_follow_from_the_weights_kernel():
    data, offset = mx.sym.var("data"), mx.sym.var("offset")
    weight, bias = mx.sym.var("weight", shape=(8, 0, 3, 3)), mx.sym.var("bias")
    symbol = deform_conv(data, offset, weight, bias, padding=1, groups=2)
    shapes, outputs, _ = symbol.infer_shape(data=(2, 6, 7, 9), offset=(2, 18, 7, 9))
    assert shapes == [(2, 6, 7, 9), (2, 18, 7, 9), (8, 3, 3, 3), (8,)] and outputs == [(2, 8, 7, 9)]
    assert symbol.infer_shape_partial()[0] == [(), (), (8, 0, 3, 3), (8,)]
    partial = symbol.infer_shape_partial(data=(0, 6, 0, 0))
    assert partial[0][2] == (8, 3, 3, 3) and partial[1] == [(0, 0, 0, 0)]
    assert symbol.infer_type(data="float64")[1] == [np.float64]


def test_an_attribute_scope_does_no_harm():
    with mx.AttrScope(ctx_group="stage1", __note__="x"):
        symbol = symbolic(random_call(12, masked=True), "zeros")
    assert symbol.attr("ctx_group") == "stage1" or symbol.attr("__ctx_group__") == "stage1"
    shapes = {name: array.shape for name, array in random_call(12, masked=True).arrays.items()}
    assert symbol.infer_shape(**shapes)[1]


def test_a_symbols_parameters_are_checked_where_it_is_written():
    symbols = [mx.sym.var(name) for name in ("data", "offset", "weight")]
    for keywords, message in [
        ({"boundary": "border"}, "`boundary` is 'border'; expected 'zeros' or 'inside'."),
        ({"backend": "cuda"}, "`backend` is 'cuda'"),
        ({"stride": 0}, "`stride` is 0; expected at least 1"),
        ({"dilation": (1, 0)}, r"`dilation` is \(1, 0\); expected at least 1"),
        ({"padding": (1, 1, 1, 1)}, "`padding` has 4 entries"),
        ({"padding": "full"}, "`padding` is 'full'"),
        ({"groups": 0}, "`groups` is 0; expected at least 1."),
    ]:
        with pytest.raises(ValueError, match=message):
            deform_conv(*symbols, **keywords)
    with pytest.raises(TypeError, match="expected integers"):
        deform_conv(*symbols, stride=1.5)


def test_a_foreign_symbol_of_this_name_raises():
    """An exception while MXNet makes a custom operator would end the process: it must come later."""
    code = """
import warnings; warnings.simplefilter("ignore")
import mxnet as mx, deformconv.gluon
for attributes in ({}, {"stride": "1"}):
    try:
        mx.sym.Custom(mx.sym.var("a"), mx.sym.var("b"), mx.sym.var("c"), op_type="deformconv", **attributes)
    except mx.base.MXNetError:
        print("raised")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.count("raised\n") == 2, done
    assert "the operator 'deformconv' has the attributes none; expected a symbol that" in done.stderr
    assert "the operator 'deformconv' has the attributes stride; expected" in done.stderr


def test_mixed_dtypes_in_a_graph_raise_with_the_sentence_on_stderr(capfd):
    call = random_call(12, masked=False)
    arrays = call.ndarrays()
    arrays["weight"] = arrays["weight"].astype("float64")
    with pytest.raises(MXNetError):
        symbolic(call, "zeros").bind(mx.cpu(), arrays).forward()[0].asnumpy()
    assert "TypeError: `weight` is float64 and `data` is float32; expected one dtype" in capfd.readouterr().err


# MXNet's engine


class _Doubled(mx.operator.CustomOp):
    """Another operator in Python, which copies its array out and in."""

    def forward(self, is_train, req, in_data, out_data, aux):
        self.assign(out_data[0], req[0], mx.nd.array(2 * in_data[0].asnumpy()))

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        self.assign(in_grad[0], req[0], mx.nd.array(2 * out_grad[0].asnumpy()))


@mx.operator.register("tests_doubled")
class _DoubledProp(mx.operator.CustomOpProp):
    def create_operator(self, ctx, in_shapes, in_dtypes):
        return _Doubled()


def test_it_runs_between_other_operators_in_python():
    call = random_call(13, masked=True)
    arrays = call.ndarrays(grad_req="write")
    for _ in range(20):
        with mx.autograd.record():
            doubled = arrays | {"data": mx.nd.Custom(arrays["data"], op_type="tests_doubled")}
            output = mx.nd.Custom(ours(call, doubled), op_type="tests_doubled")
        output.backward()
    once = ours(call, arrays | {"bias": mx.nd.zeros_like(arrays["bias"])})
    assert_close(output.asnumpy(), 4 * once.asnumpy() + 2 * arrays["bias"].asnumpy().reshape(1, -1, 1, 1), "float32")


def test_large_calls_from_several_threads_at_once():
    """Each hands work to this library's threads from one of MXNet's own, while others hold and release the GIL."""
    x, weight = mx.nd.random.normal(shape=(2, 32, 40, 40)), mx.nd.random.normal(shape=(32, 32, 3, 3))
    offset = mx.nd.random.normal(shape=(2, 18, 40, 40))
    expected = deform_conv(x, offset, weight, padding=1).asnumpy()
    results: list[bool] = []

    def work():
        for _ in range(5):
            data, kernel = x.copy(), weight.copy()
            data.attach_grad()
            with mx.autograd.record():
                y = deform_conv(data, offset, kernel, padding=1)
            y.backward()
            results.append(bool((y.asnumpy() == expected).all()) and bool(np.isfinite(data.grad.asnumpy()).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == [True] * 20


@pytest.mark.parametrize("environment", [{"MXNET_ENGINE_TYPE": "NaiveEngine"}, {"MXNET_CUSTOM_OP_NUM_THREADS": "1"}])
def test_other_engines(environment):
    code = """
import warnings; warnings.simplefilter("ignore")
import mxnet as mx
from deformconv.gluon import ModulatedDeformableConvolution
net = mx.gluon.nn.HybridSequential()
net.add(ModulatedDeformableConvolution(4, 3, padding=1), ModulatedDeformableConvolution(4, 3, padding=1))
net.initialize()
for hybridized in (False, True):
    net.hybridize(hybridized)
    with mx.autograd.record():
        y = net(mx.nd.ones((1, 2, 8, 8)))
    y.backward()
    mx.nd.waitall()
print(net[0].offset_weight.grad().shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.stdout == "(27, 2, 3, 3)\n", done


def test_a_program_may_end_before_its_gradients_are_computed():
    """MXNet stops its threads for operators in Python at exit, and aborts if it needs another one afterwards."""
    code = """
import warnings; warnings.simplefilter("ignore")
import time
import mxnet as mx
from deformconv.gluon import deform_conv
from deformconv.ops.conv import cpu
backward = cpu.backward
def slow(*arguments, **keywords):
    time.sleep(0.1)
    print("computed", flush=True)
    return backward(*arguments, **keywords)
cpu.backward = slow
x, offset, weight = mx.nd.ones((1, 2, 6, 6)), mx.nd.zeros((1, 18, 6, 6)), mx.nd.ones((2, 2, 3, 3))
x.attach_grad()
with mx.autograd.record():
    y = x
    for _ in range(3):
        y = deform_conv(y, offset, weight, padding=1)
y.backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout) == (0, "computed\n" * 3), done


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_a_call_leaves_no_memory_behind():
    """Views and callbacks let go of the arrays: after a while the process does not grow."""
    x, offset, weight = mx.nd.ones((1, 8, 128, 128)), mx.nd.zeros((1, 18, 128, 128)), mx.nd.ones((8, 8, 3, 3))
    x.attach_grad()

    def pages_after(times):
        for _ in range(times):
            with mx.autograd.record():
                y = deform_conv(x, offset, weight, padding=1)
            y.backward()
            mx.nd.waitall()
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = pages_after(100)
    grown = (pages_after(200) - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 200 * 4 * x.size / 2  # half of what 200 kept outputs would take
