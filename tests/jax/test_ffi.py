"""XLA's calls of Python: the structs as XLA sends them, errors, memory that is nobody's copy."""

from __future__ import annotations

import ctypes
import re
import threading
from ctypes import c_int64
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.arrays import call_of
from tests.ops.conv.cases import Case

import deformconv
from deformconv import BackendError
from deformconv.jax import ffi, kernels
from deformconv.ops.conv import cpu
from deformconv.runtime import arrays, work

PLAIN = Case("plain", (7, 8), (3, 3), padding=1, in_channels=8, out_channels=8)
F32 = 11  # XLA's number for the type
NAMES = ("input", "offset", "weight", "bias", "mask")


@pytest.fixture
def call():
    return call_of(PLAIN, "float32")


@pytest.fixture
def threads_afterwards():
    before = deformconv.get_num_threads()
    yield
    deformconv.set_num_threads(before)


def last_field_end(struct, name):
    field = getattr(struct, name)
    return field.offset + field.size


def test_structs_are_as_long_as_what_xla_sends():
    """Every struct that is read: its own size, and where the fields within it lie."""
    seen = {}

    def raw(address):
        frame = ffi.Frame.from_address(address)
        if frame.extension:
            extension = ffi.Extension.from_address(frame.extension)
            metadata = ffi.Metadata.from_address(extension.metadata)
            seen["extension"], seen["metadata"] = extension.struct_size, metadata.struct_size
            seen["type"] = extension.type
            return 0 if ffi._answered(frame) else 1
        api = ffi.Api.from_address(frame.api)
        buffers = [(frame.arg_items, frame.args), (frame.ret_items, frame.rets)]
        found = [ffi.Buffer.from_address(a) for items, size in buffers for a in (c_int64 * size).from_address(items)]
        seen["frame"], seen["api"], seen["version"] = frame.struct_size, api.struct_size, api.version.struct_size
        seen["args"], seen["rets"], seen["attrs"] = frame.args_size, frame.rets_size, frame.attrs_size
        seen["counts"], seen["stage"] = (frame.args, frame.rets, frame.attrs), frame.stage
        seen["buffers"] = [buffer.struct_size for buffer in found]
        seen["dtypes"] = [buffer.dtype for buffer in found]
        seen["shapes"] = [tuple((c_int64 * buffer.rank).from_address(buffer.dims)) for buffer in found]
        seen["major"], seen["minor"] = api.version.major, api.version.minor
        span = ffi.Span.from_address(c_int64.from_address(frame.attr_items).value)
        seen["text"] = ctypes.string_at(span.data, span.size)
        return 0

    handler = ctypes.CFUNCTYPE(c_int64, c_int64)(raw)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))
    jax.ffi.register_ffi_target("deformconv_sizes", jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value), "cpu")
    out = jax.ShapeDtypeStruct((5, 2), jnp.float32)
    jax.jit(lambda x, y: jax.ffi.ffi_call("deformconv_sizes", [out])(x, y, call="text"))(
        jnp.ones((3, 4), jnp.float32), jnp.ones(6, jnp.float32)
    )[0].block_until_ready()

    assert seen["frame"] == ctypes.sizeof(ffi.Frame) == 168
    assert seen["args"] == seen["rets"] == 40 == ffi.Frame.rets_size.offset - ffi.Frame.args_size.offset
    assert seen["attrs"] == 48 == ctypes.sizeof(ffi.Frame) - ffi.Frame.attrs_size.offset
    assert seen["counts"] == (2, 1, 1)
    assert seen["stage"] == 3  # to execute
    assert seen["buffers"] == [ctypes.sizeof(ffi.Buffer)] * 3
    assert seen["dtypes"] == [F32] * 3
    assert seen["shapes"] == [(3, 4), (6,), (5, 2)]
    assert seen["text"] == b"text"
    # A newer XLA's may be longer: it adds fields at the end.
    assert seen["api"] >= ctypes.sizeof(ffi.Api)
    assert seen["version"] == ctypes.sizeof(ffi.Version)
    assert seen["extension"] == ctypes.sizeof(ffi.Extension)
    assert seen["type"] == ffi._METADATA
    assert seen["metadata"] >= last_field_end(ffi.Metadata, "traits")
    assert seen["major"] == ffi.MAJOR
    assert seen["minor"] >= 1


def test_the_header_of_the_installed_jaxlib_has_the_version_that_is_read():
    assert ffi.reason_against() is None
    assert Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").is_file()


@pytest.fixture
def header(monkeypatch, tmp_path):
    """Writes what the installed jaxlib's header says, as if it were another one's."""

    def write(text):
        file = tmp_path / "xla/ffi/api/c_api.h"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
        ffi.reason_against.cache_clear()

    yield write
    ffi.reason_against.cache_clear()


def test_another_version_of_xla_s_interface_is_refused(header, call):
    header("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n")
    text = (
        r"jaxlib [\d.]+ calls compiled functions by version 1 of XLA's interface, and deformconv knows 0: "
        r'install another version of JAX or of deformconv, or pass backend="portable", which is slower\.'
    )
    with pytest.raises(BackendError, match=text):
        jax.jit(call.ours)(*call.arrays)
    portable = jax.jit(call_of(PLAIN, "float32", backend="portable").ours)(*call.arrays)
    ffi.reason_against.cache_clear()
    header_free = jax.jit(call.alone)(*call.arrays)
    np.testing.assert_allclose(portable, header_free, atol=1e-5)


@pytest.mark.parametrize("text", ["", "#define XLA_FFI_API_MAJOR 0", "#define SOMETHING 1"])
def test_a_header_that_does_not_say_otherwise_is_no_reason(header, text):
    header(text)
    assert ffi.reason_against() is None


def test_no_header_is_no_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert ffi.reason_against.__wrapped__() is None


# Errors


@pytest.mark.parametrize("how", [jax.jit, lambda function: function], ids=["jitted", "eager"])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("a kernel's own text: é"), "INTERNAL: RuntimeError: a kernel's own text: é"),
        (ValueError("of a value"), "INVALID_ARGUMENT: ValueError: of a value"),
        (MemoryError("none left"), "RESOURCE_EXHAUSTED: MemoryError: none left"),
    ],
)
def test_an_exception_in_a_kernel_arrives_with_its_text_and_the_next_call_works(monkeypatch, call, how, error, text):
    def failing(*arguments, **keywords):
        raise error

    function = how(call.ours)
    expected = np.asarray(function(*call.arrays))
    with monkeypatch.context() as broken:
        broken.setattr(cpu, "_forward_plan", failing)
        with pytest.raises(Exception, match=re.escape(text)) as caught:
            jax.block_until_ready(function(*call.arrays))
    assert isinstance(caught.value, (RuntimeError, ValueError))
    np.testing.assert_array_equal(function(*call.arrays), expected)


def test_an_exception_in_a_backward_pass_arrives(monkeypatch, call):
    gradient = jax.jit(jax.grad(lambda *arrays: call.ours(*arrays).sum()))
    expected = np.asarray(gradient(*call.arrays))

    def failing(*arguments):
        raise RuntimeError("in a backward pass")

    with monkeypatch.context() as broken:
        broken.setattr(cpu, "_collect", failing)
        with pytest.raises(Exception, match="RuntimeError: in a backward pass"):
            jax.block_until_ready(gradient(*call.arrays))
    np.testing.assert_array_equal(gradient(*call.arrays), expected)


def test_a_program_of_another_version_is_told_so(call):
    text = kernels._Call(deformconv.jax.functional.operator.DEFORM_CONV, call.spec, ("output",), False).text()
    other = text.replace("(1, ", "(2, ", 1)
    out = jax.ShapeDtypeStruct(call.spec.output_shape, jnp.float32)
    with pytest.raises(
        Exception, match=r"another version of deformconv .* \(form 2 of a call, expected 1\): compile, or export"
    ):
        jax.block_until_ready(jax.jit(lambda *a: jax.ffi.ffi_call(kernels.FORWARD, [out])(*a, call=other))(*call.arrays))


def test_a_program_cannot_have_a_module_imported(call, tmp_path, monkeypatch):
    """Saved programs travel: what one names is looked up among the operators that are known, and no module is loaded."""
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "operator.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = kernels._Call(deformconv.jax.functional.operator.DEFORM_CONV, call.spec, ("output",), False).text()
    other = text.replace("'deformconv.ops.conv'", "'stranger'", 1)
    out = jax.ShapeDtypeStruct(call.spec.output_shape, jnp.float32)
    with pytest.raises(Exception, match="calls the operator 'deform_conv' of 'stranger', which JAX does not know in this"):
        jax.block_until_ready(jax.jit(lambda *a: jax.ffi.ffi_call(kernels.FORWARD, [out])(*a, call=other))(*call.arrays))


# Memory


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 1, 4, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_of_no_numbers_needs_no_address(shape, channels_last):
    if len(shape) > 1 or not channels_last:
        assert ffi.memory(shape, "float32", channels_last)(0).shape == shape


def test_memory_is_not_copied_wherever_it_lies():
    numbers = np.arange(2 * 3 * 4 * 5 + 1, dtype=np.float32)
    for first in (0, 1):  # neither a cache line's beginning nor a vector's
        address = numbers[first:].ctypes.data
        array = ffi.memory((2, 3, 4, 5), "float32")(address)
        np.testing.assert_array_equal(array, numbers[first : first + 120].reshape(2, 3, 4, 5))
        assert array.ctypes.data == address
        last = ffi.memory((2, 3, 4, 5), "float32", True)(address)
        np.testing.assert_array_equal(last, np.moveaxis(numbers[first : first + 120].reshape(2, 4, 5, 3), -1, 1))
        last[1, 2, 3, 4] = -1
        assert numbers[first + 119] == -1
        numbers[first + 119] = first + 119


def test_kernels_read_and_write_memory_that_no_vector_is_aligned_to(call):
    """A caller may bring its own, whose arrays begin anywhere."""
    given = [np.asarray(array) for array in call.arrays]
    kept = [np.zeros(array.nbytes + 8, np.uint8) for array in [*given, np.empty(call.spec.output_shape, np.float32)]]
    addresses = [memory.ctypes.data + 4 for memory in kept]
    for array, memory in zip(given, kept, strict=False):
        memory[4 : 4 + array.nbytes] = array.reshape(-1).view(np.uint8)
    text = kernels._Call(deformconv.jax.functional.operator.DEFORM_CONV, call.spec, ("output",), False).text().encode()
    kernels._forward(text, addresses[:-1], addresses[-1:])
    found = kept[-1][4 : 4 + 4 * np.prod(call.spec.output_shape)].view(np.float32).reshape(call.spec.output_shape)
    expected = deformconv.deform_conv(**dict(zip(call.names, given, strict=True)), padding=1)
    np.testing.assert_array_equal(found, expected)


def test_results_are_computed_in_xla_s_memory(monkeypatch, call):
    """No array is made for a result, and none copied."""
    step = jax.jit(jax.value_and_grad(lambda *arrays: call.ours(*arrays).sum(), argnums=range(len(call.arrays))))
    expected = jax.block_until_ready(step(*call.arrays))

    def made(*arguments):
        raise AssertionError(f"memory for a result of shape {arguments[0]}")

    monkeypatch.setattr(arrays, "aligned_empty", made)
    found = jax.block_until_ready(step(*call.arrays))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("masked", [True, False])
def test_a_call_between_axes_that_are_moved_copies_no_large_array(masked):
    """Channels last at both ends, as in Flax and Keras: XLA turns nothing, nor in the backward pass."""
    N, C, S, K = 2, 16, 24, 9
    shapes = {"x": (N, S, S, C), "offset": (N, 2 * K, S, S), "weight": (C, C, 3, 3), "mask": (N, K, S, S)}
    x, offset, weight, mask = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values())

    def layer(x, offset, weight, mask):
        from deformconv.jax import calls
        from deformconv.jax.functional import DEFORM_CONV

        operands = dict.fromkeys(NAMES) | {"input": jnp.moveaxis(x, -1, 1), "offset": offset, "weight": weight}
        operands |= {"mask": mask} if masked else {}
        parameters = {"stride": 1, "padding": 1, "dilation": 1, "groups": None, "offset_groups": None, "boundary": "zeros"}
        return jnp.moveaxis(calls.call(DEFORM_CONV, operands, parameters, None, 2, channels_last=True), 1, -1)

    large = N * S * S * C

    def moved(function):
        text = jax.jit(function).lower(x, offset, weight, mask).compile().as_text()
        assert "custom-call" in text
        found = re.findall(r"= f32\[([\d,]+)\]\S* (transpose|copy|copy-start)\(", text)
        return [(shape, kind) for shape, kind in found if np.prod([int(size) for size in shape.split(",")]) >= large]

    assert not moved(layer)
    assert not moved(lambda *given: jax.grad(lambda *a: (layer(*a) ** 2).sum(), argnums=(0, 1, 2))(*given))


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_memory_that_is_given_away_is_not_written_while_it_is_read():
    """An output of the input's shape: XLA may put it where a donated input was only once that has been read."""
    case = PLAIN.but(masked=False, biased=False)
    call = call_of(case, "float32")
    expected = np.asarray(jax.jit(call.ours)(*call.arrays))
    gradient = jax.jit(lambda *a: jax.vjp(call.ours, *a)[1](a[0]))
    expected_gradients = [np.asarray(g) for g in gradient(*call.arrays)]
    for donated in ((0,), (0, 1, 2)):
        for function, right in ((call.ours, [expected]), (lambda *a: jax.vjp(call.ours, *a)[1](a[0]), expected_gradients)):
            given = [jnp.array(array, copy=True) for array in call.arrays]
            found = jax.jit(function, donate_argnums=donated)(*given)
            for one, two in zip(jax.tree.leaves(found), right, strict=True):
                np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_no_images_is_computed(batch):
    call = call_of(PLAIN, "float32")
    given = [a[:batch] if a.ndim > 1 and n != "weight" else a for n, a in zip(call.names, call.arrays, strict=True)]
    output, gradients = jax.jit(lambda *a: (call.ours(*a), jax.grad(lambda *b: call.ours(*b).sum(), argnums=range(5))(*a)))(
        *given
    )
    assert output.shape == (batch, 8, 7, 8)
    for gradient, array in zip(gradients, given, strict=True):
        assert gradient.shape == array.shape
        assert batch or not np.asarray(gradient).any()


# Threads


def test_bits_are_the_same_for_any_number_of_threads(monkeypatch, threads_afterwards):
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    call = call_of(PLAIN.but(size=(19, 23), in_channels=24, out_channels=20), "float32")
    step = jax.jit(lambda *a: (call.ours(*a), jax.grad(lambda *b: (call.ours(*b) ** 2).sum(), argnums=range(5))(*a)))
    results = []
    for number in (1, 2, 3, 8):
        deformconv.set_num_threads(number)
        results.append([np.asarray(leaf) for leaf in jax.tree.leaves(step(*call.arrays))])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_calls_from_several_threads_at_once(call):
    function, errors, found = jax.jit(call.ours), [], []
    expected = np.asarray(function(*call.arrays))

    def work_on():
        try:
            for _ in range(25):
                found.append(np.asarray(function(*call.arrays)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(found) == 100
    for output in found:
        np.testing.assert_array_equal(output, expected)


def test_many_calls_in_one_program(call):
    """XLA may run those that do not depend on each other at once."""
    spread = jax.jit(lambda *a: [call.ours(a[0] + shift, *a[1:]) for shift in range(8)])
    for shift, output in enumerate(spread(*call.arrays)):
        expected = deformconv.deform_conv(
            **(
                dict(zip(call.names, map(np.asarray, call.arrays), strict=True)) | {"input": np.asarray(call.arrays[0] + shift)}
            ),
            padding=1,
        )
        np.testing.assert_array_equal(output, expected)


def test_an_operator_s_text_says_all_that_a_call_needs(call):
    operator = deformconv.jax.functional.operator.DEFORM_CONV
    found = kernels._read(kernels._Call(operator, call.spec, ("input", "mask"), True).text().encode())
    assert found == kernels._Call(operator, call.spec, ("input", "mask"), True)
