"""What every backend of deformable convolution must satisfy.

A backend's test file inherits `ConvSuite` (`ForwardSuite`, if it has no gradients), names the backend and what it cannot do:

    class TestGpu(ConvSuite):
        backend = gpu
        dtypes = ("float32",)
        deterministic = False

`ForwardRules` and `GradientRules` are the parts without the reference, which would always agree with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.conv.cases import ARGUMENTS, CASES, PROBLEMS, Array, Call, Case, call_of, make, output_size
from tests.ops.rules import FAR, INFINITE, LAYOUTS, ODD, POSITIONS, SIZES, Rules, by_boundary, strewn
from tests.tolerances import assert_close

from deformconv.ops.conv import reference
from deformconv.ops.conv.spec import GRADIENTS, Gradients

SMALL = Case("small", (4, 5), (2, 3), padding=1, groups=2, offset_groups=2)


@cache
def expected_output(case: Case, dtype: str) -> Array:
    return in_float64(make(case, dtype), reference.forward)


@cache
def expected_gradients(case: Case, dtype: str) -> Gradients:
    return in_float64(make(case, dtype), reference_backward)


def in_float64(call: Call, run: Callable[..., Any]) -> Any:
    """The reference's result on the same numbers."""
    call = doubled(call)
    if run is reference.forward:
        return run(call.spec, *call.arrays)
    return run(call)


def doubled(call: Call) -> Call:
    """The call with the same numbers in float64; its spec keeps the dtype, at which only kernels look."""
    return call.but(**{name: None if array is None else array.astype(np.float64) for name, array in named(call).items()})


def reference_backward(call: Call) -> Gradients:
    c = call
    return reference.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS)


def named(call: Call) -> dict[str, Array | None]:
    return {name: getattr(call, name) for name in (*ARGUMENTS, "grad_output")}


def plain_convolution(call: Call) -> Array:
    """The convolution without offsets and mask, from windows of the padded input, in float64."""
    spec, call = call.spec, doubled(call)
    padded = np.pad(call.input, [(0, 0), (0, 0), *spec.padding])
    extent = [d * (k - 1) + 1 for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
    axes = tuple(range(2, 2 + spec.rank))
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axes)
    strides, dilations = (
        [slice(None, None, s) for s in spec.stride],
        [slice(None, None, d) for d in spec.dilation],
    )
    windows = windows[(slice(None), slice(None), *strides, *dilations)]
    N, g, K, P = spec.batch, spec.groups, spec.taps, spec.positions
    windows = windows.reshape(N, g, spec.in_channels // g, P, K)
    weight = call.weight.reshape(g, spec.out_channels // g, spec.in_channels // g, K)
    output = np.einsum("gock,ngcpk->ngop", weight, windows).reshape(spec.output_shape)
    return output if call.bias is None else output + call.bias.reshape(-1, *[1] * spec.rank)


class ForwardRules(Rules):
    """The output, and all that must be true of it."""

    tables: ClassVar[dict[str, list[Any]]] = {"case": CASES, "problem": PROBLEMS}

    def output(self, call: Call) -> Array:
        arrays = [None if array is None else self.array(array) for array in call.arrays]
        return self.numpy(self.backend.forward(call.spec, *arrays))

    def make(self, case: Case, **how: Any) -> Call:
        return make(case, self.dtypes[0], **how)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_in_memory_does_not_matter(self, layout: str) -> None:
        call = self.make(SMALL)
        call = call.but(**{n: LAYOUTS[layout](a) for n, a in named(call).items()})
        plain = call.but(**{n: np.ascontiguousarray(a) for n, a in named(call).items()})
        self.assert_close(self.output(call), self.output(plain))

    def test_arguments_are_left_alone(self) -> None:
        call = self.make(SMALL)
        self.output(call)
        for name, array in named(self.make(SMALL)).items():
            np.testing.assert_array_equal(getattr(call, name), array)

    def test_zero_offsets_give_the_plain_convolution(self, case: Case) -> None:
        call = self.make(case.but(masked=False))
        call = call.but(offset=np.zeros_like(call.offset))
        self.assert_close(self.output(call), plain_convolution(call))

    @by_boundary
    @pytest.mark.parametrize("shift", [0, 1, -2, 100])
    def test_integer_offsets_shift_the_image(self, rank: int, shift: int, boundary: str) -> None:
        image = np.random.default_rng(0).normal(size=(1, 1, *SIZES[rank]))
        offset = np.zeros((1, rank, *SIZES[rank]))
        offset[:, -1] = shift
        width = SIZES[rank][-1]
        shifted = np.zeros_like(image)
        for column in range(width):
            if 0 <= column + shift < width:
                shifted[..., column] = image[..., column + shift]
        arrays = (array.astype(self.dtypes[0]) for array in (image, offset, np.ones((1, 1) + (1,) * rank)))
        self.assert_close(self.output(call_of(*arrays, boundary=boundary)), shifted)

    def test_output_is_linear_in_weight(self) -> None:
        first, second = self.make(SMALL.but(biased=False)), self.make(SMALL.but(biased=False), seed=1)
        total = first.but(weight=first.weight + 2 * second.weight)
        outputs = self.output(first) + 2 * self.output(first.but(weight=second.weight))
        self.assert_close(self.output(total), outputs)

    def test_output_is_linear_in_mask(self) -> None:
        first, second = self.make(SMALL.but(biased=False)), self.make(SMALL.but(biased=False), seed=1)
        total = first.but(mask=first.mask + 2 * second.mask)
        outputs = self.output(first) + 2 * self.output(first.but(mask=second.mask))
        self.assert_close(self.output(total), outputs)

    def test_mask_of_ones_is_v1(self, case: Case) -> None:
        call, v1 = self.make(case.but(masked=True)), self.make(case.but(masked=False))
        v1 = v1.but(bias=call.bias)
        self.assert_close(self.output(call.but(mask=np.ones_like(call.mask))), self.output(v1))

    @by_boundary
    def test_rank_embeds_in_the_next(self, lower: int, boundary: str) -> None:
        """An axis of length 1, before the others, changes nothing if its offsets are 0."""
        size, kernel = (6, 9)[-lower:], (2, 3)[-lower:]
        call = self.make(Case("", size, kernel, stride=2, padding=1, offset_groups=2, boundary=boundary))
        larger = embedded(call, boundary)
        assert larger.spec.rank == lower + 1
        self.assert_close(self.output(larger), self.output(call)[:, :, None])

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        call = self.make(SMALL.but(batch=3))
        garbage = {n: getattr(call, n).copy() for n in ("input", "offset", "mask")}
        for array in garbage.values():
            array[[0, 2]] = np.nan
        alone = call_of(call.input[1:2], call.offset[1:2], call.weight, call.bias, call.mask[1:2], padding=SMALL.padding)
        among_garbage = self.output(call.but(**garbage))[1:2]
        self.assert_repeats(among_garbage, self.output(call)[1:2])
        self.assert_close(self.output(alone), among_garbage)

    def test_a_call_repeats_its_output(self) -> None:
        call = self.make(SMALL)
        first = self.output(call)
        for _ in range(3):
            self.assert_repeats(self.output(call), first)

    @pytest.mark.parametrize("padding", [0, 2])
    @pytest.mark.parametrize(("boundary", "position", "value", "derivative"), POSITIONS)
    def test_position(
        self, boundary: str, position: float, value: float, derivative: float, rank: int, padding: int, dtype: str
    ) -> None:
        call = pinned([1.0, 10.0, 100.0], position, rank, padding, boundary, dtype)
        self.assert_exact(self.output(call).ravel()[0], value, dtype)
        self.check_position_derivative(call, derivative)

    def check_position_derivative(self, call: Call, derivative: float) -> None:
        """Nothing to check without gradients."""

    @pytest.mark.parametrize(("boundary", "position", "value"), INFINITE)
    def test_a_pixel_of_weight_0_is_read(self, boundary: str, position: float, value: float) -> None:
        call = pinned([1.0, np.inf, 3.0], position, self.ranks[0], 0, boundary, self.dtypes[0])
        self.assert_exact(self.output(call).ravel()[0], value, self.dtypes[0])

    def test_the_last_pixel_is_both_corners_inside(self) -> None:
        call = pinned([1.0, 10.0, np.inf], 2.5, self.ranks[0], 0, "inside", self.dtypes[0])
        np.testing.assert_array_equal(self.output(call).ravel()[0], np.nan)  # 1 * inf + 0 * inf

    # Offsets that are no numbers, or no positions.

    @by_boundary
    def test_nan_reaches_the_outputs_that_read_it(self, dtype: str, boundary: str) -> None:
        """Groups (2) of channels (6) 0-2, 3-5; offset groups (3) of channels 0-1, 2-3, 4-5."""
        case = Case("", (4, 5), (2, 3), in_channels=6, groups=2, offset_groups=3, padding=1, boundary=boundary)
        for group, outputs in ((0, [0, 1, 2]), (1, [0, 1, 2, 3, 4, 5]), (2, [3, 4, 5])):
            call = make(case, dtype)
            clean = self.output(call)
            offset = call.offset.copy()
            offset[1, group * 12 + 5, 2, 3] = np.nan
            expected = clean.copy()
            expected[1, outputs, 2, 3] = np.nan
            assert_close(self.output(call.but(offset=offset)), expected, dtype)

    @by_boundary
    @pytest.mark.parametrize("far", FAR)
    def test_far_positions_are_outside(self, far: float, dtype: str, boundary: str) -> None:
        call = make(SMALL.but(boundary=boundary), dtype)
        offset, mask = call.offset.copy(), call.mask.copy()
        offset[1, 5, 2, 3] = far
        offset[0, :, 1, 1] = far
        mask[1, 2, 2, 3] = 0
        mask[0, :, 1, 1] = 0
        assert_close(self.output(call.but(offset=offset)), self.output(call.but(mask=mask)), dtype)

    @by_boundary
    @pytest.mark.parametrize("value", ODD)
    def test_nothing_but_odd_offsets(self, value: float, rank: int, boundary: str) -> None:
        call = make(Case("", SIZES[rank], (2,) * rank, boundary=boundary), self.dtypes[-1])
        call = call.but(offset=np.full_like(call.offset, value))
        expected = np.full_like(call.grad_output, np.nan if np.isnan(value) else 0)
        expected += call.bias.reshape(-1, *[1] * rank)
        self.assert_exact(self.output(call), expected, self.dtypes[-1])


class GradientRules(ForwardRules):
    """The output and the five gradients, and all that must be true of them."""

    def gradients(self, call: Call, wanted: Collection[str] = GRADIENTS) -> Gradients:
        names = ("grad_output", "input", "offset", "weight", "mask")
        arrays = [None if a is None else self.array(a) for a in (getattr(call, name) for name in names)]
        gradients = self.backend.backward(call.spec, *arrays, wanted)
        return Gradients(*(None if gradient is None else self.numpy(gradient) for gradient in gradients))

    def assert_gradients(self, call: Call, expected: Gradients, dtype: str) -> None:
        gradients = self.gradients(call)
        for name in GRADIENTS:
            actual, wanted = getattr(gradients, name), getattr(expected, name)
            assert (actual is None) == (wanted is None), name
            if actual is not None:
                assert actual.dtype == dtype, name
                assert_close(actual, wanted, dtype, f"gradient of {name}")

    @pytest.mark.parametrize("wanted", [*((name,) for name in GRADIENTS), ("input", "mask"), ()])
    def test_only_what_is_wanted_is_computed(self, wanted: tuple[str, ...]) -> None:
        expected = expected_gradients(SMALL, self.dtypes[0])
        for name, gradient in self.gradients(self.make(SMALL), wanted)._asdict().items():
            if name in wanted:
                self.assert_close(gradient, getattr(expected, name), name)
            else:
                assert gradient is None, name

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_in_memory_does_not_matter_to_gradients(self, layout: str) -> None:
        call = self.make(SMALL)
        call = call.but(**{n: LAYOUTS[layout](a) for n, a in named(call).items()})
        plain = call.but(**{n: np.ascontiguousarray(a) for n, a in named(call).items()})
        self.assert_gradients(call, self.gradients(plain), self.dtypes[0])

    def test_a_call_repeats_its_gradients(self) -> None:
        call = self.make(SMALL)
        first = self.gradients(call)
        for _ in range(3):
            for gradient, expected in zip(self.gradients(call), first, strict=True):
                self.assert_repeats(gradient, expected)

    def check_position_derivative(self, call: Call, derivative: float) -> None:
        self.assert_exact(self.gradients(call).offset[0, -1].ravel()[0], derivative, call.spec.dtype)

    @by_boundary
    def test_nan_reaches_the_gradients_that_used_it(self, dtype: str, boundary: str) -> None:
        """Groups (2) of channels (6) 0-2, 3-5; offset groups (3) of channels 0-1, 2-3, 4-5."""
        case = Case("", (4, 5), (2, 3), in_channels=6, groups=2, offset_groups=3, padding=1, boundary=boundary)
        call = make(case, dtype)
        offset, without = call.offset.copy(), call.mask.copy()
        offset[1, 12 + 5, 2, 3] = np.nan  # offset group 1, tap 2
        without[1, 6 + 2, 2, 3] = 0
        gradients, expected = self.gradients(call.but(offset=offset)), self.gradients(call.but(mask=without))
        expected.offset[1, [12 + 4, 12 + 5], 2, 3] = np.nan
        expected.mask[1, 6 + 2, 2, 3] = np.nan
        expected.weight[:3, 2, 0, 2] = np.nan  # channel 2 is the last of group 0, 3 the first of group 1
        expected.weight[3:, 0, 0, 2] = np.nan
        for name in GRADIENTS:
            assert_close(getattr(gradients, name), getattr(expected, name), dtype, name)

    def test_nan_in_the_mask(self, dtype: str) -> None:
        """It meets the sum over corners: its own derivative stays a number, all others of the tap do not."""
        call = make(SMALL.but(padding=0), dtype)
        offset, mask = np.full_like(call.offset, 0.25), call.mask.copy()
        offset[..., -1, :] = offset[..., :, -1] = -0.25
        mask[1, 6 + 2, 1, 0] = np.nan  # offset group 1, tap 2, which is (0, 2) of 2x3: corners 1-2 and 2-3
        call = call.but(offset=offset)
        output, clean = self.output(call.but(mask=mask)), self.output(call)
        clean[1, 3:, 1, 0] = np.nan
        assert_close(output, clean, dtype)
        gradients, expected = self.gradients(call.but(mask=mask)), self.gradients(call)
        expected.offset[1, [12 + 4, 12 + 5], 1, 0] = np.nan
        expected.weight[3:, :, 0, 2] = np.nan
        expected.input[1, 2:, 1:3, 2:4] = np.nan
        for name in GRADIENTS:
            assert_close(getattr(gradients, name), getattr(expected, name), dtype, name)

    @by_boundary
    @pytest.mark.parametrize("far", FAR)
    def test_far_positions_have_no_gradient(self, far: float, dtype: str, boundary: str) -> None:
        call = make(SMALL.but(boundary=boundary), dtype)
        offset, without = call.offset.copy(), call.mask.copy()
        offset[1, 5, 2, 3] = far  # tap 2
        without[1, 2, 2, 3] = 0
        gradients, expected = self.gradients(call.but(offset=offset)), self.gradients(call.but(mask=without))
        expected.mask[1, 2, 2, 3] = 0
        for name in GRADIENTS:
            assert_close(getattr(gradients, name), getattr(expected, name), dtype, name)

    @by_boundary
    @pytest.mark.parametrize("value", ODD)
    def test_gradients_of_nothing_but_odd_offsets(self, value: float, rank: int, boundary: str) -> None:
        call = make(Case("", SIZES[rank], (2,) * rank, boundary=boundary), self.dtypes[-1])
        gradients = self.gradients(call.but(offset=np.full_like(call.offset, value)))
        assert not gradients.input.any()
        for gradient in (gradients.offset, gradients.weight, gradients.mask):
            self.assert_exact(gradient, np.full_like(gradient, np.nan if np.isnan(value) else 0), self.dtypes[-1])


class ForwardSuite(ForwardRules):
    """The rules, and agreement with the reference in float64."""

    def test_output_is_the_reference_s(self, case: Case, dtype: str) -> None:
        output = self.output(make(case, dtype))
        assert output.dtype == dtype
        assert_close(output, expected_output(case, dtype), dtype)

    def test_output_of_a_real_problem(self, problem: Case) -> None:
        dtype = self.dtypes[-1]
        assert_close(self.output(make(problem, dtype)), expected_output(problem, dtype), dtype)

    @settings(max_examples=60)
    @given(st.data())
    def test_output_of_any_configuration(self, data: st.DataObject) -> None:
        call = self.make(data.draw(configurations(self.ranks)))
        self.assert_close(self.output(call), in_float64(call, reference.forward))

    @by_boundary
    def test_odd_numbers_everywhere_match_the_reference(self, dtype: str, boundary: str) -> None:
        call = odd(make(SMALL.but(boundary=boundary, batch=5), dtype))
        assert_close(self.output(call), in_float64(call, reference.forward), dtype)


class ConvSuite(GradientRules, ForwardSuite):
    """The rules, and agreement with the reference, of the output and the gradients."""

    def test_gradients_are_the_reference_s(self, case: Case, dtype: str) -> None:
        self.assert_gradients(make(case, dtype), expected_gradients(case, dtype), dtype)

    def test_gradients_of_a_real_problem(self, problem: Case) -> None:
        dtype = self.dtypes[-1]
        self.assert_gradients(make(problem, dtype), expected_gradients(problem, dtype), dtype)

    @settings(max_examples=40)
    @given(st.data())
    def test_gradients_of_any_configuration(self, data: st.DataObject) -> None:
        call = self.make(data.draw(configurations(self.ranks)))
        self.assert_gradients(call, in_float64(call, reference_backward), self.dtypes[0])

    @by_boundary
    def test_gradients_of_odd_numbers_everywhere_match_the_reference(self, dtype: str, boundary: str) -> None:
        call = odd(make(SMALL.but(boundary=boundary, batch=5), dtype))
        self.assert_gradients(call, in_float64(call, reference_backward), dtype)


def embedded(call: Call, boundary: str) -> Call:
    """The call with one more axis, of length 1, before the others."""
    spec = call.spec
    D, K, G = spec.rank, spec.taps, spec.offset_groups
    offset = call.offset.reshape(spec.batch, G, K, D, *spec.output_size)
    offset = np.concatenate([np.zeros_like(offset[:, :, :, :1]), offset], axis=3)
    return call_of(
        call.input[:, :, None],
        offset.reshape(spec.batch, G * K * (D + 1), 1, *spec.output_size),
        call.weight[:, :, None],
        call.bias,
        call.mask[:, :, None],
        stride=(1, *spec.stride),
        padding=((0, 0), *spec.padding),
        dilation=(1, *spec.dilation),
        boundary=boundary,
    )


def pinned(pixels: list[float], position: float, rank: int, padding: int, boundary: str, dtype: str) -> Call:
    """A call whose one sample is its output, and stands at `position` of the last axis, 0 of the others."""
    size = (2,) * (rank - 1) + (len(pixels),)
    image = np.zeros((1, 1, *size))
    image[(0, 0) + (0,) * (rank - 1)] = pixels
    offset = np.full((1, rank) + (1,) * rank, float(padding))
    offset[0, -1] += position
    ones = np.ones((1, 1) + (1,) * rank)
    arrays = (array.astype(dtype) for array in (image, offset, ones))
    return call_of(*arrays, stride=100, padding=padding, boundary=boundary)


def odd(call: Call) -> Call:
    """The call with odd offsets strewn in."""
    return call.but(offset=strewn(call.offset))


@st.composite
def configurations(draw: st.DrawFn, ranks: Sequence[int]) -> Case:
    """Small calls with every parameter free."""
    D = draw(st.sampled_from(ranks))
    most = {1: 9, 2: 5, 3: 3}[D]

    def each(strategy: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(strategy) for _ in range(D))

    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    case = Case(
        name="any",
        batch=draw(st.integers(0, 3)),
        in_channels=int(np.lcm(groups, offset_groups)) * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 3)),
        size=each(st.integers(1, most)),
        kernel=each(st.integers(1, 3)),
        stride=each(st.integers(1, 3)),
        padding=tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(D)),
        dilation=each(st.integers(1, 2)),
        groups=groups,
        offset_groups=offset_groups,
        masked=draw(st.booleans()),
        biased=draw(st.booleans()),
        boundary=draw(st.sampled_from(["zeros", "inside"])),
    )
    if min(output_size(case)) < 1:
        case = case.but(padding=tuple((2, 2) for _ in range(D)), dilation=1)
    return case
