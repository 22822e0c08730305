"""What every front end must satisfy: `OperatorSuite` for `deform_conv` on its arrays, `LayerSuite` for its layers.

A front end's test file inherits them and says how its arrays are made, how its calls are written, and what it cannot do:

    class TestOperator(OperatorSuite):
        dtypes = ("float32",)

        def function(self, rank):
            return deform_conv

Numbers are compared with the reference's in float64, which `tests/ops/conv` proves.
"""

from __future__ import annotations

import doctest
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.conv.cases import ARGUMENTS, CASES, Array, Call, Case, call_of, make, output_size
from tests.ops.conv.suite import (
    expected_gradients,
    expected_output,
    in_float64,
    plain_convolution,
    reference_backward,
)
from tests.tolerances import TOLERANCE, assert_close, error

import deformconv
from deformconv.ops.conv import reference
from deformconv.ops.conv.spec import GRADIENTS

FOUR_TO_EIGHT: dict[str, Any] = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}
PLAIN = next(case for case in CASES if case.name == "2-D")
WINDOW, OTHERS = ("stride", "padding", "dilation"), ("groups", "offset_groups", "boundary")
SIGNATURE = ("input", "offset", "weight", "bias", *WINDOW, "mask", *OTHERS, "backend")
PARAMETERS = (*WINDOW, *OTHERS)


def parameters(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in PARAMETERS}


class Suite:
    """What both suites share: which dtypes and ranks there are, and how a test is tried with all of them."""

    module: ClassVar[ModuleType]
    examples: ClassVar[int] = 11  # lines that its docstrings have for a doctest, or more
    input: ClassVar[str] = "input"  # what the front end calls the first argument
    dtypes: ClassVar[tuple[str, ...]] = ("float64", "float32")
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def values(self) -> dict[str, Any]:
        """The values of arguments that no test lists itself."""
        return {"dtype": self.dtypes, "rank": self.ranks}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        values = self.values()
        said = [re.findall(r"\w+", str(mark.args[0])) for mark in metafunc.definition.iter_markers("parametrize")]
        for name in [name for name in values if name in metafunc.fixturenames and name not in chain(*said)]:
            metafunc.parametrize(name, values[name], ids=lambda value: getattr(value, "name", value))

    def array(self, array: Array) -> Any:
        """A NumPy array as the front end takes it, in memory of its own."""
        return array.copy()

    def numpy(self, array: Any) -> Array:
        """One of its arrays, a result above all, as a NumPy array."""
        return array

    def test_doctests(self) -> None:
        result = doctest.testmod(self.module)
        assert result.failed == 0 and result.attempted >= self.examples


class OperatorSuite(Suite):
    """`deform_conv` on a framework's arrays, forward and backward."""

    kind: ClassVar[type]  # of its arrays
    expected: ClassVar[str]  # what an error says it expected: "a PyTorch tensor"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "portable", "reference")
    empty_batches: ClassVar[bool] = True
    # What an argument must not be, and the error; its name stands for {name}.
    mistakes: ClassVar[dict[str, tuple[Callable[[Any], Any], str]]]
    # Memory in which an array may lie.
    layouts: ClassVar[dict[str, Callable[[Any], Any]]]

    def values(self) -> dict[str, Any]:
        cases = [case for case in CASES if len(case.size) in self.ranks and (case.batch or self.empty_batches)]
        return super().values() | {"case": cases, "mistake": self.mistakes, "layout": self.layouts}

    def function(self, rank: int) -> Callable[..., Any]:
        """The public function."""
        raise NotImplementedError

    def backward(self, rank: int, arrays: dict[str, Any], grad_output: Any, **parameters: Any) -> dict[str, Any]:
        """The gradients by the arguments' names, None for an argument that is None."""
        raise NotImplementedError

    def convolution(self, call: Call) -> Array:
        """The framework's own convolution, if it has one."""
        return plain_convolution(call)

    def forward(self, rank: int, arrays: dict[str, Any], **parameters: Any) -> Any:
        return self.function(rank)(**self.named(arrays), **parameters)

    def refusals(self, arrays: dict[str, Any], **parameters: Any) -> Iterator[Callable[[], Any]]:
        """Calls that a mistake in the arrays must make fail."""
        yield lambda: self.forward(2, arrays, **parameters)

    def named(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arrays under the names that the front end gives them."""
        return {self.called(name): array for name, array in arrays.items()}

    def called(self, name: str) -> str:
        return self.input if name == "input" else name

    def arrays(self, call: Call) -> dict[str, Any]:
        arrays = {name: getattr(call, name) for name in ARGUMENTS}
        return {name: None if array is None else self.array(array) for name, array in arrays.items()}

    def results(self, case: Case, dtype: str, **more: Any) -> list[Array]:
        """The output and the gradients of the arguments that there are."""
        call = make(case, dtype)
        arguments, rank = parameters(case) | more, len(case.size)
        output = self.forward(rank, self.arrays(call), **arguments)
        gradients = self.backward(rank, self.arrays(call), self.array(call.grad_output), **arguments)
        return [self.numpy(array) for array in (output, *gradients.values()) if array is not None]

    def check(self, result: Any, dtype: str) -> Array:
        """A result of the right kind, as a NumPy array."""
        assert type(result) is self.kind
        array = self.numpy(result)
        assert array.dtype == dtype
        return array

    def test_the_signature_is_the_public_one(self, rank: int) -> None:
        names = [
            self.input,
            *[
                "offset",
                "weight",
                "bias",
                "stride",
                "padding",
                "dilation",
                "mask",
                "groups",
                "offset_groups",
                "boundary",
                "backend",
            ],
        ]
        defaults = [inspect.Parameter.empty] * 3 + [None, 1, 0, 1, None, None, None, "zeros", None]
        found = list(inspect.signature(self.function(rank)).parameters.values())
        assert [(p.name, p.default) for p in found[:12]] == list(zip(names, defaults, strict=True))
        assert all((p.kind is p.KEYWORD_ONLY) == (8 <= place < len(found) - 1) for place, p in enumerate(found))
        assert found[-1].kind is inspect.Parameter.VAR_KEYWORD  # for the error that names another library's word

    def test_another_librarys_word(self, rank: int) -> None:
        function = self.function(rank)
        text = f"{function.__name__}() got an unexpected keyword argument 'num_deformable_group'; here: offset_groups."
        with pytest.raises(TypeError) as raised:
            function(None, None, None, num_deformable_group=2)
        assert str(raised.value) == text

    # Numbers.

    def test_agrees_with_the_reference(self, case: Case, dtype: str) -> None:
        call, rank = make(case, dtype), len(case.size)
        output = self.forward(rank, self.arrays(call), **parameters(case))
        assert_close(self.check(output, dtype), expected_output(case, dtype), dtype)
        gradients = self.backward(rank, self.arrays(call), self.array(call.grad_output), **parameters(case))
        for name, expected in expected_gradients(case, dtype)._asdict().items():
            found = gradients[name]
            assert (found is None) == (expected is None), name
            if found is not None:
                assert_close(self.check(found, dtype), expected, dtype, name)

    def test_zero_offsets_give_the_plain_convolution(self, rank: int) -> None:
        case = Case("", (6, 5, 7)[:rank], (3, 2, 3)[:rank], stride=2, padding=1, groups=2, masked=False)
        call = make(case)
        call = call.but(offset=np.zeros_like(call.offset))
        output = self.forward(rank, self.arrays(call), **parameters(case))
        assert_close(self.numpy(output), self.convolution(call), "float64")

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
    def test_odd_offsets_touch_one_output_position(self, bad: float) -> None:
        """Forward and backward, and the process survives."""
        case = Case("", (6, 6), (3, 3), batch=1, in_channels=2, out_channels=3, padding=1, masked=False, biased=False)
        call = make(case)
        offset = np.zeros_like(call.offset)
        offset[0, 8:10, 2, 3] = bad  # of the centre
        call = call.but(offset=offset, grad_output=np.ones_like(call.grad_output))
        output = self.numpy(self.forward(2, self.arrays(call), **parameters(case)))
        touched = np.zeros((6, 6), bool)
        touched[2, 3] = np.isnan(bad)
        assert np.array_equal(np.isnan(output[0]), np.broadcast_to(touched, (3, 6, 6)))
        assert_close(output, in_float64(call, reference.forward), "float64")
        gradients = self.backward(2, self.arrays(call), self.array(call.grad_output), **parameters(case))
        found = {name: self.numpy(array) for name, array in gradients.items() if array is not None}
        assert np.isfinite(found["input"]).all()
        assert np.array_equal(np.isnan(found["offset"][0, 8]), touched)
        assert not np.isnan(np.delete(found["offset"][0], [8, 9], axis=0)).any()
        for name, expected in in_float64(call, reference_backward)._asdict().items():
            if name in found:
                assert_close(found[name], expected, "float64", name)

    def test_backends_by_name(self) -> None:
        arrays = self.arrays(make(PLAIN))
        expected = self.numpy(self.forward(2, arrays, **parameters(PLAIN)))
        for backend in self.backends:
            output = self.forward(2, arrays, **parameters(PLAIN), backend=backend)
            assert_close(self.check(output, "float64"), expected, "float64", backend)

    def test_half_precision(self) -> None:
        call = make(PLAIN, "float16")
        output = self.forward(2, self.arrays(call), **parameters(PLAIN))
        assert_close(self.check(output, "float16"), expected_output(PLAIN, "float16"), "float16")
        grad_output = self.array(call.grad_output)
        gradients = self.backward(2, self.arrays(call), grad_output, **parameters(PLAIN))
        for name, expected in expected_gradients(PLAIN, "float16")._asdict().items():
            assert_close(self.check(gradients[name], "float16"), expected, "float16", name)

    # Arguments.

    def test_positional_arguments_stand_in_torchvisions_order(self) -> None:
        case = PLAIN.but(stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        a, p = self.arrays(make(case)), parameters(case)
        window = (p.pop("stride"), p.pop("padding"), p.pop("dilation"))
        output = self.function(2)(a["input"], a["offset"], a["weight"], a["bias"], *window, a["mask"], **p)
        assert_close(self.numpy(output), expected_output(case, "float64"), "float64")

    @pytest.mark.parametrize(
        ("padding", "pairs"),
        [("same", ((1, 1), (1, 2))), ("valid", ((0, 0), (0, 0))), (2, ((2, 2), (2, 2))), ([0, 1], ((0, 0), (1, 1))),
         (((0, 2), (1, 0)), ((0, 2), (1, 0)))],
    )  # fmt: skip
    def test_forms_of_padding(self, padding: Any, pairs: Any) -> None:
        case = Case("", (5, 6), (3, 4), padding=pairs)
        output = self.forward(2, self.arrays(make(case)), **parameters(case) | {"padding": padding})
        assert_close(self.numpy(output), expected_output(case, "float64"), "float64")

    def test_groups_are_verified_when_they_are_given(self) -> None:
        arrays = self.arrays(make(PLAIN))
        for name in ("groups", "offset_groups"):
            with pytest.raises(deformconv.ShapeError, match=f"{name}=2"):
                self.forward(2, arrays, **parameters(PLAIN) | {name: 2})

    def test_the_boundary_reaches_the_operator(self) -> None:
        arrays = self.arrays(make(PLAIN))
        zeros, inside = (
            self.numpy(self.forward(2, arrays, **parameters(PLAIN) | {"boundary": boundary}))
            for boundary in ("zeros", "inside")
        )
        assert_close(inside, expected_output(PLAIN.but(boundary="inside"), "float64"), "float64")
        assert np.abs(inside - zeros).max() > TOLERANCE["float64"]

    @pytest.mark.parametrize("name", [*ARGUMENTS, "grad_output"])
    def test_memory_does_not_matter(self, layout: str, name: str) -> None:
        """Not to the bit, and what lies in it is not changed."""
        call, arguments = make(PLAIN), parameters(PLAIN)
        output, *gradients = self.results(PLAIN, "float64")
        arrays = self.arrays(call) | {"grad_output": self.array(call.grad_output)}
        arrays[name] = self.layouts[layout](arrays[name])
        np.testing.assert_array_equal(self.numpy(arrays[name]), getattr(call, name))
        grad_output = arrays.pop("grad_output")
        np.testing.assert_array_equal(self.numpy(self.forward(2, arrays, **arguments)), output)
        found = self.backward(2, arrays, grad_output, **arguments)
        for argument, expected in zip(GRADIENTS, gradients, strict=True):
            np.testing.assert_array_equal(self.numpy(found[argument]), expected, argument)
        kept = arrays | {"grad_output": grad_output}
        np.testing.assert_array_equal(self.numpy(kept[name]), getattr(call, name))

    def test_arguments_are_left_alone(self) -> None:
        call = make(PLAIN)
        arrays, grad_output = self.arrays(call), self.array(call.grad_output)
        output = self.numpy(self.forward(2, arrays, **parameters(PLAIN)))
        self.backward(2, arrays, grad_output, **parameters(PLAIN))
        for name, array in {**arrays, "grad_output": grad_output}.items():
            np.testing.assert_array_equal(self.numpy(array), getattr(call, name))
            assert not np.shares_memory(output, self.numpy(array))

    # Threads.

    def test_results_are_the_same_for_any_number_of_threads(self) -> None:
        case = Case("", (40, 41), (3, 3), in_channels=16, out_channels=32, padding=1)
        chosen, results = deformconv.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                deformconv.set_num_threads(number)
                results.append(self.results(case, "float32"))
        finally:
            deformconv.set_num_threads(chosen)
        for other in results[1:]:
            for found, expected in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(found, expected)

    def test_eight_threads_at_once_give_what_one_gives(self) -> None:
        cases = [case for case in CASES if case.batch == 2][:8]
        expected = [self.results(case, "float32") for case in cases]
        found: dict[int, list[Array]] = {}
        barrier = threading.Barrier(8)

        def work(number: int) -> None:
            barrier.wait()
            for _ in range(5):
                found[number] = self.results(cases[number], "float32")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(8):
            for ours, serial in zip(found[number], expected[number], strict=True):
                np.testing.assert_array_equal(ours, serial)

    # Mistakes. The texts about shapes are tested with the operator; that a front end hands them on is tested here.

    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_what_is_no_array_of_the_dtype(self, name: str, mistake: str) -> None:
        spoil, text = self.mistakes[mistake]
        arrays = self.arrays(make(PLAIN))
        arrays[name] = spoil(arrays[name])
        for call in self.refusals(arrays, **parameters(PLAIN)):
            with pytest.raises(TypeError, match=text.replace("{name}", self.called(name))):
                call()

    @pytest.mark.parametrize("name", ["input", "offset", "weight"])
    def test_none_is_no_array(self, name: str) -> None:
        arrays = self.arrays(make(PLAIN)) | {name: None}
        with pytest.raises(TypeError, match=f"`{self.called(name)}` is None; expected {self.expected}"):
            self.forward(2, arrays, **parameters(PLAIN))

    def test_packed_offsets_are_told_from_masks(self) -> None:
        arrays = self.arrays(make(PLAIN.but(masked=False)))
        arrays["offset"] = self.array(np.zeros((2, 27, 7, 8)))
        with pytest.raises(deformconv.ShapeError) as raised:
            self.forward(2, arrays, padding=1)
        assert str(raised.value) == (
            "`offset` has 27 channels; a 3x3 kernel takes 2 axes x 9 taps = 18 per offset group. "
            "27 = 18 offsets + 9 masks: for v2 pass the last 9 as `mask`."
        )

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"boundary": "border"}, "`boundary` is 'border'; expected 'zeros' or 'inside'."),
            ({"backend": "fast"}, "`backend` is 'fast'; expected"),
            ({"stride": 0}, "`stride` is 0; expected at least 1"),
            ({"padding": (1, 1, 1, 1)}, "`padding` has 4 entries"),
            ({"dilation": (1, 0)}, "`dilation` is (1, 0); expected at least 1"),
        ],
        ids=str,
    )
    def test_parameters_that_are_refused(self, arguments: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=re.escape(text)):
            self.forward(2, self.arrays(make(PLAIN)), **parameters(PLAIN) | arguments)

    def test_an_input_of_another_rank_is_named_as_the_front_end_names_it(self) -> None:
        arrays = self.arrays(make(PLAIN))
        arrays["input"] = self.array(np.zeros((2, 4, 7, 8, 9)))
        with pytest.raises(deformconv.ShapeError, match=f"^`{self.input}` has 5 axes, shape "):
            self.forward(2, arrays, **parameters(PLAIN))


# A layer's arguments, and the error: its type, the argument that it names and its text, in which arguments have our names.
Refusal = tuple[dict[str, Any], type[Exception], str, str]
REFUSED: list[Refusal] = [
    ({"kernel_size": (3, 3, 3)}, deformconv.ShapeError, "kernel_size", "has 3 entries"),
    ({"kernel_size": 0}, deformconv.ShapeError, "kernel_size", "is 0; expected at least 1"),
    ({"kernel_size": 2.5}, TypeError, "kernel_size", "is 2.5"),
    ({"stride": 0}, deformconv.ShapeError, "stride", "is 0; expected at least 1"),
    ({"dilation": 0}, deformconv.ShapeError, "dilation", "is 0; expected at least 1"),
    ({"padding": -1}, deformconv.ShapeError, "padding", "is -1; expected at least 0"),
    ({"groups": 3}, deformconv.ShapeError, "groups", "is 3; expected a divisor of"),
    ({"offset_groups": 3}, deformconv.ShapeError, "offset_groups", "is 3; expected a divisor of in_channels = 4"),
    ({"groups": 0}, deformconv.ShapeError, "groups", "is 0; expected at least 1"),
    ({"out_channels": 0}, deformconv.ShapeError, "out_channels", "is 0; expected at least 1"),
    ({"boundary": "clamp"}, ValueError, "boundary", "is 'clamp'; expected"),
]
# An input's shape and dtype, and the error of a layer of four channels and eight, 3x3.
Misfit = tuple[tuple[int, ...], str, type[Exception], str]
MISFITS: list[Misfit] = [
    (
        (2, 5, 9, 9),
        "float64",
        deformconv.ShapeError,
        r"`{input}` has 5 channels, shape \(2, 5, 9, 9\); this layer has in_channels=4\.",
    ),
    ((9, 9), "float64", deformconv.ShapeError, r"`{input}` has 2 axes, shape \(9, 9\); .* takes 4"),
    ((2, 9, 9, 4), "float64", deformconv.ShapeError, "`{input}` looks channels-last"),
    ((1, 4, 2, 9), "float64", deformconv.ShapeError, "`weight` has a kernel of size 3x3; along height it spans"),
    ((2, 4, 9, 9), "float32", TypeError, "`weight` is float64 and `{input}` is float32; expected one dtype"),
    ((2, 4, 9, 9), "uint8", TypeError, "`{input}` is uint8; expected floating point"),
]


# The arguments of layers that are the operator on what they predict.
LAYERS: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"padding": 1, "stride": 2, "dilation": 2},
    {"offset_groups": 2, "bias": False},
    {"padding": 1, "groups": 2, "offset_groups": 2},
]


class LayerSuite(Suite):
    """Layers that predict their own offsets and masks, made from arguments under our names."""

    layers: ClassVar[list[dict[str, Any]]] = LAYERS

    words: ClassVar[dict[str, str]] = {}  # the front end's names, where they are others
    refusals: ClassVar[list[Refusal]] = REFUSED
    misfits: ClassVar[list[Misfit]] = MISFITS

    def values(self) -> dict[str, Any]:
        return super().values() | {"arguments": self.layers, "refusal": self.refusals, "misfit": self.misfits}

    def layer(self, rank: int, *, modulated: bool, **arguments: Any) -> Any:
        """A layer of float64 with its first weights."""
        raise NotImplementedError

    def weights(self, layer: Any) -> dict[str, Any]:
        """Its weight, bias, offset_weight and offset_bias as NumPy arrays; None for one that it lacks."""
        raise NotImplementedError

    def set_predictor(self, layer: Any, weight: Array, bias: Array) -> None:
        raise NotImplementedError

    def call(self, layer: Any, input: Any) -> Any:
        return layer(input)

    def predict(self, layer: Any, input: Any) -> tuple[Any, Any]:
        return layer.offsets_and_mask(input)

    def outputs(self, layer: Any, input: Array) -> tuple[Array, Array, Array | None]:
        """Its output, offsets and mask as NumPy arrays."""
        offset, mask = self.predict(layer, self.array(input))
        output = self.call(layer, self.array(input))
        return self.numpy(output), self.numpy(offset), None if mask is None else self.numpy(mask)

    def random_predictor(self, layer: Any) -> None:
        random = np.random.default_rng(1)
        shape = self.weights(layer)["offset_weight"].shape
        self.set_predictor(layer, 0.3 * random.normal(size=shape), random.normal(size=shape[0]))

    def renamed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {self.words.get(name, name): value for name, value in arguments.items()}

    def image(self, rank: int, channels: int = 4) -> Array:
        return np.random.default_rng(0).normal(size=(2, channels, *(7, 6, 8)[:rank]))

    @pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
    def test_a_layer_is_the_operator_on_what_it_predicts(self, arguments: dict[str, Any], modulated: bool, rank: int) -> None:
        """Its predictor is a convolution over the same window, whose channels are first the offsets', then the masks'."""
        layer = self.layer(rank, modulated=modulated, **FOUR_TO_EIGHT | arguments)
        x = self.image(rank)
        window = self.window(arguments, x.shape[2:])
        size = output_size(Case("", x.shape[2:], (3,) * rank, **window))
        for fresh in (True, False):
            if not fresh:
                self.random_predictor(layer)
            output, offset, mask = self.outputs(layer, x)
            w = self.weights(layer)
            taps = 3**rank * arguments.get("offset_groups", 1)
            assert w["offset_weight"].shape[0] == taps * (rank + modulated)
            zeros = np.zeros((2, rank * 3**rank, *size))
            raw = plain_convolution(call_of(x, zeros, w["offset_weight"], w["offset_bias"], **window))
            assert_close(offset, raw[:, : taps * rank], "float64", "offset")
            assert (mask is None) == (not modulated)
            if mask is not None:
                assert_close(mask, 2 / (1 + np.exp(-raw[:, taps * rank :])), "float64", "mask")
            if fresh:
                assert not offset.any() and (mask is None or (mask == 1).all())
                assert_close(output, plain_convolution(call_of(x, zeros, w["weight"], w["bias"], **window)), "float64")
            boundary = self.own_boundary(modulated)
            expected = deformconv.deform_conv(x, offset, w["weight"], w["bias"], mask=mask, **window, boundary=boundary)
            assert_close(output, expected, "float64")

    def window(self, arguments: dict[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
        """What a layer's arguments mean for the operator, on an input of these sizes."""
        return {name: arguments[name] for name in WINDOW if name in arguments}

    def own_boundary(self, modulated: bool) -> str:
        """The rule of a layer that is told none."""
        return "zeros"

    @pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
    def test_the_boundary_can_be_chosen(self, modulated: bool) -> None:
        x = self.image(2)
        for boundary in ("zeros", "inside"):
            layer = self.layer(2, modulated=modulated, **FOUR_TO_EIGHT, padding=1, boundary=boundary)
            self.random_predictor(layer)
            output, offset, mask = self.outputs(layer, x)
            w = self.weights(layer)
            expected = {
                rule: deformconv.deform_conv(x, offset, w["weight"], w["bias"], padding=1, mask=mask, boundary=rule)
                for rule in ("zeros", "inside")
            }
            assert_close(output, expected.pop(boundary), "float64")
            assert error(output, expected.popitem()[1]) > 1e-3

    def test_the_order_of_the_predictors_channels(self, rank: int) -> None:
        layer, taps = self.layer(rank, modulated=True, **FOUR_TO_EIGHT, padding=1, offset_groups=2), 3**rank
        weight = self.weights(layer)["offset_weight"]
        assert weight.shape[0] == 2 * taps * (rank + 1)
        self.set_predictor(layer, np.zeros_like(weight), np.arange(2.0 * taps * (rank + 1)))
        _, offset, mask = self.outputs(layer, self.image(rank))
        assert np.array_equal(offset.reshape(*offset.shape[:2], -1)[0, :, 0], np.arange(2.0 * taps * rank))
        last = np.arange(2.0 * taps * rank, 2.0 * taps * (rank + 1))
        assert mask is not None
        assert_close(mask.reshape(*mask.shape[:2], -1)[0, :, 0], 2 / (1 + np.exp(-last)), "float64")

    @pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
    def test_arguments_that_are_refused(self, refusal: Refusal, modulated: bool) -> None:
        arguments, raises, name, text = refusal
        with pytest.raises(raises) as raised:
            self.layer(2, modulated=modulated, **FOUR_TO_EIGHT | arguments)
        for ours, theirs in self.words.items():
            text = re.sub(rf"\b{ours}\b", theirs, text)
        assert str(raised.value).startswith(f"`{self.words.get(name, name)}` {text}")

    @pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
    def test_an_input_that_does_not_fit(self, misfit: Misfit, modulated: bool) -> None:
        """In the operator's words, not in those of the framework's convolution."""
        shape, dtype, raises, text = misfit
        layer = self.layer(2, modulated=modulated, **FOUR_TO_EIGHT)
        self.call(layer, self.array(self.image(2)))
        x = self.unturned(np.zeros(shape, dtype))
        for call in (self.call, self.predict):
            with pytest.raises(raises, match=text.replace("{input}", self.input)):
                call(layer, x)

    def unturned(self, array: Array) -> Any:
        """An array whose axes are the framework's already."""
        return self.array(array)
