"""Products of pairs of bfloat16 by tiles in whole calls, emulated where there are none: what `test_cpu_pairs` asks of pairs."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.conv import test_cpu_pairs as pairs
from tests.ops.conv.cases import Case
from tests.ops.conv.test_cpu import gradients, output, threads_afterwards

from deformconv.ops.conv import cpu, cpu_plan

__all__ = ["threads_afterwards"]

WORDS = cpu_plan.words.__wrapped__  # without what it remembers, and before the fixture replaces it
pytestmark = [pytest.mark.usefixtures("products_of_tiles"), pytest.mark.slow]  # kernels of their own to be compiled

# More than a tile's 16 rows, 32 numbers of the depth and 16 columns, and no multiples of these.
SOME = [case for case in pairs.EVEN if case.name in ("primes, doubled", "deep groups", "several parts and blocks")]
by_some = pairs.by(SOME)


@pairs.by([*SOME, *pairs.ONE_WAY])
def test_the_bound(case: Case) -> None:
    pairs.test_the_bound(case)


@by_some
def test_the_same_bits_for_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.test_the_same_bits_for_any_number_of_threads(case, monkeypatch)


@by_some
def test_an_image_does_not_depend_on_its_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.test_an_image_does_not_depend_on_its_batch(case, monkeypatch)


@by_some
def test_channels_may_lie_last(case: Case) -> None:
    pairs.test_channels_may_lie_last(case)


def test_a_weight_that_is_packed_already_and_a_layer_s_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.test_a_weight_that_is_packed_already(SOME[0])
    pairs.test_a_layer_s_kernel(SOME[0], monkeypatch)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite(number: float) -> None:
    """Also where positions are odd, and a pair's second number would be another output's."""
    for case in SOME[:1], pairs.EVEN[-3:-2]:
        pairs.test_numbers_that_are_not_finite(case[0], number)


def test_tiles_add_up_in_another_order_than_vectors() -> None:
    """So the two would not be taken for one another."""
    call, _ = pairs.call_of(SOME[0])
    by_tiles = [output(call), *gradients(call)]
    cpu._plans().words = lambda: "uint32"  # the fixture puts it back
    cpu._forward_plan.cache_clear()
    cpu._backward_plans.cache_clear()
    assert any((one != other).any() for one, other in zip(by_tiles, [output(call), *gradients(call)], strict=True))


@pytest.mark.parametrize(
    ("tiles", "instruction", "processor", "expected"),
    [
        (True, True, "sapphirerapids", "int32"),
        (False, True, "sapphirerapids", None),
        (False, True, "znver5", "uint32"),
        (False, False, "znver3", None),
    ],
)
def test_what_multiplies(
    tiles: bool, instruction: bool, processor: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_plan, "are_permitted", lambda: tiles)
    monkeypatch.setattr(cpu_plan, "MULTIPLIES_PAIRS", instruction)
    monkeypatch.setattr(cpu_plan, "host_processor", lambda: processor)
    assert WORDS() == expected
