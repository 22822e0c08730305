"""What every backend of deformable aggregation must satisfy.

A backend's test file inherits `AggregateSuite` (`ForwardSuite`, if it has no gradients), names the backend and what it cannot
do, as `tests.ops.rules` says. `ForwardRules` and `GradientRules` are the parts without the reference, which would always agree
with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.aggregate.cases import ARGUMENTS, CASES, Array, Call, Case, as_convolution, call_of, make
from tests.ops.conv.cases import output_size
from tests.ops.conv.suite import plain_convolution
from tests.ops.rules import FAR, INFINITE, LAYOUTS, ODD, POSITIONS, SIZES, Rules, by_boundary, strewn
from tests.tolerances import assert_close

from deformconv.ops.aggregate import reference
from deformconv.ops.aggregate.spec import GRADIENTS, Gradients

SMALL = Case("small", (3, 4), (2, 3), padding=1, channels=6, offset_groups=3)
FIRST, LAST = [0, 1], [4, 5]  # the channels of its first and its last offset group


@cache
def expected_output(case: Case, dtype: str) -> Array:
    return in_float64(make(case, dtype), reference_forward)


@cache
def expected_gradients(case: Case, dtype: str) -> Gradients:
    return in_float64(make(case, dtype), reference_backward)


def in_float64(call: Call, run: Callable[[Call], Any]) -> Any:
    """The reference's result on the same numbers; the spec keeps the dtype, at which only kernels look."""
    return run(call.but(**{name: None if array is None else array.astype(np.float64) for name, array in named(call).items()}))


def reference_forward(call: Call) -> Array:
    return reference.forward(call.spec, call.input, call.offset, call.mask)


def reference_backward(call: Call) -> Gradients:
    c = call
    return reference.backward(c.spec, c.grad_output, c.input, c.offset, c.mask, GRADIENTS)


def named(call: Call) -> dict[str, Array | None]:
    return {name: getattr(call, name) for name in (*ARGUMENTS, "grad_output")}


class ForwardRules(Rules):
    """The output, and all that must be true of it."""

    tables: ClassVar[dict[str, list[Any]]] = {"case": CASES}

    def output(self, call: Call) -> Array:
        arrays = [None if array is None else self.array(array) for array in call.arrays]
        return self.numpy(self.backend.forward(call.spec, *arrays))

    def make(self, case: Case, **how: Any) -> Call:
        return make(case, self.dtypes[0], **how)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_in_memory_does_not_matter(self, layout: str) -> None:
        call, plain = in_layout(self.make(SMALL), layout)
        self.assert_close(self.output(call), self.output(plain))

    def test_arguments_are_left_alone(self) -> None:
        call = self.make(SMALL)
        self.output(call)
        for name, array in named(self.make(SMALL)).items():
            np.testing.assert_array_equal(getattr(call, name), array)

    def test_zero_offsets_give_the_sums_of_windows(self, case: Case) -> None:
        call = self.make(case.but(masked=False))
        call = call.but(offset=np.zeros_like(call.offset))
        self.assert_close(self.output(call), plain_convolution(as_convolution(call)))

    @by_boundary
    def test_integer_offsets_shift_the_image(self, rank: int, boundary: str) -> None:
        image = np.random.default_rng(0).normal(size=(1, 1, *SIZES[rank]))
        offset, width = np.zeros((1, rank, *SIZES[rank])), SIZES[rank][-1]
        for shift in (0, 1, -2, 100):
            offset[:, -1] = shift
            shifted = np.zeros_like(image)
            for column in range(width):
                if 0 <= column + shift < width:
                    shifted[..., column] = image[..., column + shift]
            arrays = (array.astype(self.dtypes[0]) for array in (image, offset))
            self.assert_close(self.output(call_of(*arrays, kernel_size=1, boundary=boundary)), shifted)

    @pytest.mark.parametrize("name", ["input", "mask"])
    def test_output_is_linear(self, name: str) -> None:
        first, second = self.make(SMALL), self.make(SMALL, seed=1)
        both = first.but(**{name: getattr(first, name) + 2 * getattr(second, name)})
        outputs = self.output(first) + 2 * self.output(first.but(**{name: getattr(second, name)}))
        self.assert_close(self.output(both), outputs)

    def test_mask_of_ones_is_none(self, rank: int) -> None:
        call = self.make(Case("", SIZES[rank], (2,) * rank, padding=1, offset_groups=2))
        ones = call.but(mask=np.ones_like(call.mask))
        without = call_of(call.input, call.offset, kernel_size=2, padding=1)
        self.assert_close(self.output(ones), self.output(without))

    @by_boundary
    def test_rank_embeds_in_the_next(self, lower: int, boundary: str) -> None:
        """An axis of length 1, before the others, changes nothing if its offsets are 0."""
        size, kernel = (6, 9)[-lower:], (2, 3)[-lower:]
        call = self.make(Case("", size, kernel, stride=2, padding=1, offset_groups=2, boundary=boundary))
        larger = embedded(call)
        assert larger.spec.rank == lower + 1
        self.assert_close(self.output(larger), self.output(call)[:, :, None])

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        call = self.make(SMALL.but(batch=3))
        garbage = {name: getattr(call, name).copy() for name in ARGUMENTS}
        for array in garbage.values():
            array[[0, 2]] = np.nan
        alone = call_of(call.input[1:2], call.offset[1:2], call.mask[1:2], kernel_size=SMALL.kernel, padding=SMALL.padding)
        among_garbage = self.output(call.but(**garbage))[1:2]
        self.assert_repeats(among_garbage, self.output(call)[1:2])
        self.assert_close(self.output(alone), among_garbage)

    def test_a_channel_does_not_depend_on_others(self) -> None:
        call = self.make(SMALL)
        input, others = call.input.copy(), [0, 2, 3, 4, 5]
        input[:, others] = np.nan
        found = self.output(call.but(input=input))
        self.assert_repeats(found[:, 1], self.output(call)[:, 1])

    def test_a_call_repeats_its_output(self) -> None:
        call = self.make(SMALL)
        first = self.output(call)
        for _ in range(3):
            self.assert_repeats(self.output(call), first)

    # What positions mean.

    @by_boundary
    @pytest.mark.parametrize("padding", [0, 2])
    def test_positions(self, boundary: str, rank: int, padding: int, dtype: str) -> None:
        rows = [row[1:] for row in POSITIONS if row[0] == boundary]
        positions, values, derivatives = map(list, zip(*rows, strict=True))
        call = pinned([1.0, 10.0, 100.0], positions, rank, padding, boundary, dtype)
        self.assert_exact(self.output(call).ravel(), values, dtype)
        self.check_position_derivatives(call, derivatives)

    def check_position_derivatives(self, call: Call, derivatives: list[float]) -> None:
        """Nothing to check without gradients."""

    @by_boundary
    def test_a_pixel_of_weight_0_is_read(self, boundary: str, rank: int) -> None:
        positions, values = map(list, zip(*[row[1:] for row in INFINITE if row[0] == boundary], strict=True))
        call = pinned([1.0, np.inf, 3.0], positions, rank, 0, boundary, self.dtypes[0])
        self.assert_exact(self.output(call).ravel(), values, self.dtypes[0])

    def test_the_last_pixel_is_both_corners_inside(self) -> None:
        call = pinned([1.0, 10.0, np.inf], [2.5], self.ranks[0], 0, "inside", self.dtypes[0])
        np.testing.assert_array_equal(self.output(call).ravel(), [np.nan])  # 1 * inf + 0 * inf

    # Offsets that are no numbers, or no positions, and masks that are no factors.

    @by_boundary
    def test_nan_reaches_the_outputs_that_read_it(self, dtype: str, boundary: str) -> None:
        call = make(SMALL.but(boundary=boundary), dtype)
        clean = self.output(call)
        for group in range(3):
            offset, expected = call.offset.copy(), clean.copy()
            offset[1, group * 12 + 5, 2, 3] = np.nan
            expected[1, 2 * group : 2 * group + 2, 2, 3] = np.nan
            assert_close(self.output(call.but(offset=offset)), expected, dtype)

    @by_boundary
    def test_far_positions_are_outside(self, dtype: str, boundary: str) -> None:
        call = make(SMALL.but(boundary=boundary), dtype)
        without = self.output(without_some(call))
        for far in FAR:
            assert_close(self.output(with_some_at(call, far)), without, dtype, str(far))

    @by_boundary
    def test_nothing_but_odd_offsets(self, rank: int, boundary: str) -> None:
        call = make(Case("", SIZES[rank], (2,) * rank, boundary=boundary), self.dtypes[-1])
        for value in ODD:
            expected = np.full_like(call.grad_output, np.nan if np.isnan(value) else 0)
            self.assert_exact(self.output(call.but(offset=np.full_like(call.offset, value))), expected, self.dtypes[-1])

    def test_factors_that_are_not_finite(self, dtype: str) -> None:
        """A factor multiplies its sample, a number, and not the weights of the corners, of which some are 0."""
        call = make(SMALL, dtype)
        mask, offset, expected = call.mask.copy(), call.offset.copy(), self.output(call)
        call = call.but(input=np.abs(call.input) + 1)
        offset[0, [4, 5], 2, 2] = 0  # tap 2 of group 0 on pixel (1, 3), between whose corners three have weight 0
        mask[0, 2, 2, 2], mask[1, 16, 0, 1] = np.inf, np.nan
        offset[1, [12, 13], 3, 3], mask[1, 6, 3, 3] = 99, np.inf  # outside, where the sample is 0
        without = call.but(mask=mask, offset=offset)
        expected = self.output(call.but(offset=offset))
        expected[0, FIRST, 2, 2], expected[1, LAST, 0, 1], expected[1, [2, 3], 3, 3] = np.inf, np.nan, np.nan
        assert_close(self.output(without), expected, dtype)


class GradientRules(ForwardRules):
    """The output and the three gradients, and all that must be true of them."""

    def gradients(self, call: Call, wanted: Collection[str] = GRADIENTS) -> Gradients:
        arrays = [None if a is None else self.array(a) for a in (call.grad_output, *call.arrays)]
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
        call, plain = in_layout(self.make(SMALL), layout)
        self.assert_gradients(call, self.gradients(plain), self.dtypes[0])

    def test_a_call_repeats_its_gradients(self) -> None:
        call = self.make(SMALL)
        first = self.gradients(call)
        for _ in range(3):
            for gradient, expected in zip(self.gradients(call), first, strict=True):
                self.assert_repeats(gradient, expected)

    def check_position_derivatives(self, call: Call, derivatives: list[float]) -> None:
        self.assert_exact(self.gradients(call).offset[:, -1].ravel(), derivatives, call.spec.dtype)

    @by_boundary
    def test_nan_reaches_the_gradients_that_used_it(self, dtype: str, boundary: str) -> None:
        call = make(SMALL.but(boundary=boundary), dtype)
        offset, without = call.offset.copy(), call.mask.copy()
        offset[1, 12 + 5, 2, 3] = np.nan  # offset group 1, tap 2
        without[1, 6 + 2, 2, 3] = 0
        expected = self.gradients(call.but(mask=without))
        expected.offset[1, [12 + 4, 12 + 5], 2, 3] = np.nan
        expected.mask[1, 6 + 2, 2, 3] = np.nan
        self.assert_gradients(call.but(offset=offset), expected, dtype)

    def test_nan_in_the_mask(self, dtype: str) -> None:
        """It meets the sum over corners: its own derivative stays a number, all others of the tap do not."""
        call = make(SMALL.but(padding=0), dtype)
        offset, mask = np.full_like(call.offset, 0.25), call.mask.copy()
        offset[..., -1, :] = offset[..., :, -1] = -0.25
        mask[1, 6 + 2, 0, 0] = np.nan  # offset group 1, tap 2, which is (0, 2) of 2x3: corners 0-1 and 2-3
        call = call.but(offset=offset)
        expected = self.gradients(call)
        expected.offset[1, [12 + 4, 12 + 5], 0, 0] = np.nan
        expected.input[1, 2:4, 0:2, 2:4] = np.nan
        self.assert_gradients(call.but(mask=mask), expected, dtype)

    @by_boundary
    def test_far_positions_have_no_gradient(self, dtype: str, boundary: str) -> None:
        call = make(SMALL.but(boundary=boundary), dtype)
        expected = self.gradients(without_some(call))
        expected.mask[1, 2, 2, 3], expected.mask[0, :, 1, 1] = 0, 0
        for far in FAR:
            self.assert_gradients(with_some_at(call, far), expected, dtype)

    @by_boundary
    def test_gradients_of_nothing_but_odd_offsets(self, rank: int, boundary: str) -> None:
        call = make(Case("", SIZES[rank], (2,) * rank, boundary=boundary), self.dtypes[-1])
        for value in ODD:
            gradients = self.gradients(call.but(offset=np.full_like(call.offset, value)))
            assert not gradients.input.any()
            for gradient in (gradients.offset, gradients.mask):
                self.assert_exact(gradient, np.full_like(gradient, np.nan if np.isnan(value) else 0), self.dtypes[-1])


class ForwardSuite(ForwardRules):
    """The rules, and agreement with the reference in float64."""

    def test_output_is_the_reference_s(self, case: Case, dtype: str) -> None:
        output = self.output(make(case, dtype))
        assert output.dtype == dtype
        assert_close(output, expected_output(case, dtype), dtype)

    @settings(max_examples=20)
    @given(st.data())
    def test_output_of_any_configuration(self, data: st.DataObject) -> None:
        call = self.make(data.draw(configurations(self.ranks)))
        self.assert_close(self.output(call), in_float64(call, reference_forward))

    @by_boundary
    def test_odd_numbers_everywhere_match_the_reference(self, dtype: str, boundary: str) -> None:
        call = odd(make(SMALL.but(boundary=boundary, batch=5), dtype))
        assert_close(self.output(call), in_float64(call, reference_forward), dtype)


class AggregateSuite(GradientRules, ForwardSuite):
    """The rules, and agreement with the reference, of the output and the gradients."""

    def test_gradients_are_the_reference_s(self, case: Case, dtype: str) -> None:
        self.assert_gradients(make(case, dtype), expected_gradients(case, dtype), dtype)

    @settings(max_examples=20)
    @given(st.data())
    def test_gradients_of_any_configuration(self, data: st.DataObject) -> None:
        call = self.make(data.draw(configurations(self.ranks)))
        self.assert_gradients(call, in_float64(call, reference_backward), self.dtypes[0])

    @by_boundary
    def test_gradients_of_odd_numbers_everywhere_match_the_reference(self, dtype: str, boundary: str) -> None:
        call = odd(make(SMALL.but(boundary=boundary, batch=5), dtype))
        self.assert_gradients(call, in_float64(call, reference_backward), dtype)


def in_layout(call: Call, layout: str) -> tuple[Call, Call]:
    """The call on arrays that lie in memory in this way, and on the same numbers one after the other."""
    call = call.but(**{name: LAYOUTS[layout](array) for name, array in named(call).items()})
    return call, call.but(**{name: np.ascontiguousarray(array) for name, array in named(call).items()})


def with_some_at(call: Call, far: float) -> Call:
    """The call with a coordinate of one tap, and all of one position, at `far`."""
    offset = call.offset.copy()
    offset[1, 5, 2, 3] = offset[0, :, 1, 1] = far  # tap 2 of group 0
    return call.but(offset=offset)


def without_some(call: Call) -> Call:
    """The call in which the factors of these samples are 0."""
    mask = call.mask.copy()
    mask[1, 2, 2, 3], mask[0, :, 1, 1] = 0, 0
    return call.but(mask=mask)


def embedded(call: Call) -> Call:
    """The call with one more axis, of length 1, before the others."""
    spec = call.spec
    D, K, G = spec.rank, spec.taps, spec.offset_groups
    offset = call.offset.reshape(spec.batch, G, K, D, *spec.output_size)
    offset = np.concatenate([np.zeros_like(offset[:, :, :, :1]), offset], axis=3)
    return call_of(
        call.input[:, :, None],
        offset.reshape(spec.batch, G * K * (D + 1), 1, *spec.output_size),
        call.mask[:, :, None],
        kernel_size=(1, *spec.kernel_size),
        stride=(1, *spec.stride),
        padding=((0, 0), *spec.padding),
        dilation=(1, *spec.dilation),
        boundary=spec.boundary,
    )


def pinned(pixels: list[float], positions: list[float], rank: int, padding: int, boundary: str, dtype: str) -> Call:
    """A call whose images have one sample, their output, each at one of `positions` on the last axis, at 0 on the others."""
    size = (2,) * (rank - 1) + (len(pixels),)
    images = np.zeros((len(positions), 1, *size))
    images[(slice(None), 0) + (0,) * (rank - 1)] = pixels
    offset = np.full((len(positions), rank) + (1,) * rank, float(padding))
    offset[:, -1] += np.reshape(positions, (-1, *(1,) * rank))
    return call_of(images.astype(dtype), offset.astype(dtype), kernel_size=1, stride=100, padding=padding, boundary=boundary)


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

    offset_groups = draw(st.integers(1, 3))
    case = Case(
        name="any",
        batch=draw(st.integers(0, 3)),
        channels=offset_groups * draw(st.integers(1, 3)),
        size=each(st.integers(1, most)),
        kernel=each(st.integers(1, 3)),
        stride=each(st.integers(1, 3)),
        padding=tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(D)),
        dilation=each(st.integers(1, 2)),
        offset_groups=offset_groups,
        masked=draw(st.booleans()),
        boundary=draw(st.sampled_from(["zeros", "inside"])),
    )
    if min(output_size(case)) < 1:
        case = case.but(padding=tuple((2, 2) for _ in range(D)), dilation=1)
    return case
