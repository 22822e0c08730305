"""The operator on JAX's arrays: the front ends' suite, what it takes, and what it says when it cannot."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.frontends.suite import PLAIN, OperatorSuite
from tests.jax.arrays import SMALL, call_of, counts, x64  # noqa: F401
from tests.ops.conv.cases import make

import deformconv
from deformconv.jax import deform_conv, deform_conv1d, deform_conv2d, deform_conv3d, explain, functional

FUNCTIONS = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}
LAYOUTS = {
    "NumPy array": lambda a: np.asarray(a).copy(),
    "NumPy, Fortran order": lambda a: np.asfortranarray(np.asarray(a)),
    "transposed": lambda a: jnp.transpose(jnp.array(jnp.transpose(a))),
    "a slice": lambda a: jnp.concatenate([a, a, a])[a.shape[0] : 2 * a.shape[0]],
    "on a device": lambda a: jax.device_put(a, jax.devices()[0]),
}
MISTAKES = {
    "list": (lambda a: a.tolist(), r"`{name}` is a list; expected a JAX array: pass `jax.numpy.asarray\({name}\)`."),
    "scalar": (lambda a: 1.0, "`{name}` is a float; expected a JAX array"),
    "NumPy scalar": (lambda a: np.float64(1), "`{name}` is a numpy.float64; expected a JAX array"),
    "shape": (lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), "`{name}` is a jax.*ShapeDtypeStruct; expected a JAX array"),
    "masked array": (lambda a: np.ma.masked_array(np.asarray(a)), r"`{name}` is a masked array.*{name}.filled\(0\)"),
    "integers": (lambda a: a.astype(int), "`{name}` is int64; expected floating point"),
    "complex": (lambda a: a + 0j, "`{name}` is complex128; expected floating point"),
    "objects": (lambda a: np.asarray(a).astype(object), "`{name}` is object; expected floating point"),
    "another dtype": (lambda a: a.astype("float32"), "float32.*float64"),
}


class TestOperator(OperatorSuite):
    module = functional
    examples = 15
    kind = type(jnp.zeros(()))
    expected = "a JAX array"
    backends = ("cpu", "portable")
    layouts = LAYOUTS
    mistakes = MISTAKES

    def test_doctests(self):
        jax.config.update("jax_enable_x64", False)  # as whoever tries them has it
        super().test_doctests()

    def array(self, array):
        return jnp.asarray(array)

    def numpy(self, array):
        return np.asarray(array)

    def function(self, rank):
        return FUNCTIONS[rank]

    def backward(self, rank, arrays, grad_output, **parameters):
        given = {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}
        _, pull_back = jax.vjp(lambda given: self.forward(rank, given, **parameters), given)
        return dict.fromkeys(arrays) | pull_back(jnp.asarray(grad_output))[0]

    def convolution(self, call):
        spec, arrays = call.spec, self.arrays(call)
        output = jax.lax.conv_general_dilated(
            arrays["input"], arrays["weight"], spec.stride, spec.padding, rhs_dilation=spec.dilation,
            feature_group_count=spec.groups, precision="highest",
        )  # fmt: skip
        return np.asarray(output + arrays["bias"].reshape(-1, *(1,) * spec.rank))

    def refusals(self, arrays, **parameters):
        yield from super().refusals(arrays, **parameters)
        yield lambda: explain(**arrays, **parameters)
        traced = {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}
        others = {name: array for name, array in arrays.items() if name not in traced}
        yield lambda: jax.jit(lambda traced: deform_conv(**traced, **others, **parameters))(traced)


def small():
    return dict(zip(("input", "offset", "weight"), call_of(SMALL.but(biased=False, masked=False)).arrays, strict=True))


def test_the_roots_function_takes_jaxs_arrays():
    call = call_of(SMALL)
    arrays, keywords = dict(zip(call.names, call.arrays, strict=True)), {"padding": 1}
    expected = call.ours(*call.arrays)

    def root(arrays):
        return deformconv.deform_conv(**arrays, **keywords)

    traced = jax.jit(root)(arrays)
    assert type(root(arrays)) is type(traced) is type(expected)
    np.testing.assert_array_equal(root(arrays), expected)
    np.testing.assert_array_equal(traced, expected)
    some = {name: np.asarray(array) for name, array in arrays.items()} | {"mask": arrays["mask"]}
    np.testing.assert_array_equal(root(some), expected)
    assert counts(jax.grad(lambda arrays: root(arrays).sum()), arrays) == (1, 0, 1)
    assert counts(jax.vmap(root), jax.tree.map(lambda array: jnp.stack([array, array]), arrays)) == (1, 0, 0)
    assert deformconv.explain(**arrays, **keywords) == explain(**arrays, **keywords)


def test_errors_of_the_roots_function_are_those_of_this_one():
    arrays = small() | {"offset": np.zeros((1, 3, 4, 4))}
    for call in (lambda: deformconv.deform_conv(**arrays), lambda: jax.jit(deformconv.deform_conv)(**arrays)):
        with pytest.raises(deformconv.ShapeError, match="`offset` has 3 channels; a 2x1 kernel takes 2 axes x 2 taps = 4"):
            call()
    with pytest.raises(TypeError, match=r"`input` is a list; expected a JAX array: pass `jax.numpy.asarray\(input\)`"):
        deformconv.deform_conv(**small() | {"input": [1.0]})


def test_the_roots_backward_function_names_jaxs():
    arrays = small()
    with pytest.raises(TypeError, match=r"given an array of JAX, which differentiates deform_conv itself: .*jax.vjp.*jax.grad"):
        deformconv.deform_conv_backward(np.zeros((1, 4, 3, 3)), **arrays)


def test_what_acts_as_an_array_is_one():
    class Parameter:
        def __init__(self, array):
            self.array = array

        def __jax_array__(self):
            return self.array

    arrays = small()
    wrapped = arrays | {"weight": Parameter(arrays["weight"])}
    for function in (deform_conv, deformconv.deform_conv):
        np.testing.assert_array_equal(function(**wrapped, padding=1), deform_conv(**arrays, padding=1))


def test_numpys_float64_without_x64():
    """They become float32, as in every function of JAX; beside what is float32 already, too."""
    made = make(PLAIN)
    arrays = {"input": made.input, "offset": made.offset, "weight": made.weight}
    expected = deformconv.deform_conv(**{name: array.astype("float32") for name, array in arrays.items()}, padding=1)
    jax.config.update("jax_enable_x64", False)
    for given in (arrays, arrays | {"input": jnp.asarray(made.input, "float32")}):
        for function in (deform_conv, jax.jit(deform_conv, static_argnames="padding")):
            found = function(**given, padding=1)
            assert found.dtype == "float32"
            np.testing.assert_array_equal(found, expected)
    gradient = jax.grad(lambda weight: deform_conv(made.input, made.offset, weight, padding=1).sum())(jnp.asarray(made.weight))
    assert gradient.dtype == "float32"


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.grad, jax.vmap], ids=["eager", "jit", "grad", "vmap"])
def test_errors_are_the_operators_own_under_every_transformation(wrap):
    arrays = small()

    def call(x):
        return deform_conv(x, arrays["offset"][:, :3], arrays["weight"], padding=1).sum()

    x = arrays["input"]
    with pytest.raises(deformconv.ShapeError, match="`offset` has 3 channels; "):
        wrap(call)(x[None] if wrap is jax.vmap else x)


@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_backends_that_cannot_run_it_say_why(backend):
    reasons = {"gpu": "gpu: it takes PyTorch's tensors, not jax's arrays", "reference": "it takes NumPy arrays, not jax's"}
    arrays = small()
    call = jax.jit(lambda arrays: deform_conv(**arrays, padding=1, backend=backend))
    for run in (lambda: call(arrays), lambda: deform_conv(**arrays, padding=1, backend=backend)):
        with pytest.raises(
            deformconv.BackendError, match=f'backend="{backend}" cannot run this call: (.|\n)*{reasons[backend]}'
        ):
            run()


def test_a_named_backend_computes_the_gradients_too():
    for backend, calls in (("cpu", True), ("portable", False)):
        call = call_of(SMALL, backend=backend)
        lowered = jax.jit(jax.value_and_grad(lambda *a, f=call.ours: f(*a).sum(), (1, 2))).lower(*call.arrays).as_text()
        assert ("deformconv_forward" in lowered, "deformconv_backward" in lowered) == (calls, calls)


def test_numpys_other_order_of_bytes():
    arrays = {name: np.asarray(array) for name, array in small().items()}
    turned = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    np.testing.assert_array_equal(deform_conv(**turned, padding=1), deform_conv(**arrays, padding=1))


def test_parameters_that_are_traced():
    arrays = small()
    with pytest.raises(TypeError, match=r"`stride` is .*Tracer.*; expected integers"):
        jax.jit(lambda stride: deform_conv(**arrays, stride=stride))(1)


def test_without_jit():
    call = call_of(SMALL)
    with jax.disable_jit():
        np.testing.assert_array_equal(call.ours(*call.arrays), jax.jit(call.ours)(*call.arrays))


def test_explain():
    arrays = small()
    text = explain(**arrays, padding=1)
    assert text.startswith("input (1, 4, 4, 3), offset (1, 8, 5, 5), weight (4, 2, 2, 1); float64, jax on cpu\nforward: cpu\n")
    assert "\nbackward: cpu\n" in text and "reference: it takes NumPy arrays, not jax's" in text
    half = explain(**{name: array.astype("bfloat16") for name, array in arrays.items()}, padding=1)
    assert "bfloat16 computed in float32, jax on cpu\nforward: cpu" in half
    traced = []
    jax.jit(lambda arrays: traced.append(explain(**arrays, padding=1)))(arrays)
    assert traced == [text]


def test_four_threads_and_eight_calls_in_a_program():
    call = call_of(SMALL.but(in_channels=4, out_channels=4, padding=((1, 0), (0, 0))), "float32")
    x, *others = call.arrays

    @jax.jit
    def net(x):
        for _ in range(8):
            x = jnp.tanh(call.ours(x, *others))
        return x

    gradient = jax.jit(jax.grad(lambda x: (net(x) ** 2).sum()))
    expected, found = (net(x), gradient(x)), {}

    def work(number):
        found[number] = [(net(x), gradient(x)) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(found) == 4
    for pairs in found.values():
        for pair in pairs:
            for ours, right in zip(pair, expected, strict=True):
                np.testing.assert_array_equal(ours, right)
